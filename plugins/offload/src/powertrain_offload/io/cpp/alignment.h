// What a file asks of direct transfers.
#pragma once
#include <cstdint>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <utility>

namespace powertrain {

// Alignment of memory, and of offsets and lengths; zeros where there is no direct way; `otherwise` where nobody says.
inline std::pair<uint64_t, uint64_t> direct_alignment(int file, uint64_t otherwise) {
    struct statfs system;
    // Memory takes the flag, and its pages are a cache all the same.
    if (fstatfs(file, &system) == 0 && (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC)) return {0, 0};
#if defined(STATX_DIOALIGN)
    struct statx said;
    if (statx(file, "", AT_EMPTY_PATH, STATX_DIOALIGN, &said) == 0 && (said.stx_mask & STATX_DIOALIGN))
        return {said.stx_dio_mem_align, said.stx_dio_offset_align};
#endif
    return {otherwise, otherwise};
}

}  // namespace powertrain
