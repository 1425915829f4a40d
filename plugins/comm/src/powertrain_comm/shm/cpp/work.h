// What moves and combines memory, on one vector path; filled by work.cpp once for each.
#pragma once
#include <cstdint>

namespace powertrain {

struct Work {
    // Combine elements begin..end of `terms` into `to`, which may be one of them; see <powertrain/combine.inl>.
    void (*combine)(void* to, const void* const* terms, int count, int format, int64_t begin, int64_t end, int how);
    // Copy into the cache: for what is read again soon.
    void (*copy)(void* to, const void* from, uint64_t bytes);
    // Copy past the cache: for what is longer than it.
    void (*stream)(void* to, const void* from, uint64_t bytes);
};

namespace plain { const Work& work(); }
namespace avx2 { const Work& work(); }
namespace avx512 { const Work& work(); }

}  // namespace powertrain
