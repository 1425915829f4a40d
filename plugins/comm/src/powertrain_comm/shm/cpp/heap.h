// This rank's shared memory: one file without a name, which the other ranks of the host map as well.
//
// The file (memfd) lies in no directory: when the last process that has it ends, however it ends, it is gone. It is
// as long as the host's memory and takes as much of it as was touched; what is freed is given back at once.
#pragma once
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <unistd.h>

namespace powertrain {

static const uint64_t kPage = 4096;

inline std::runtime_error system_error(const std::string& what) {
    return std::runtime_error(what + ": " + std::strerror(errno));
}

inline uint8_t* map_file(int file, uint64_t size) {
    void* place = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    if (place == MAP_FAILED) throw system_error("cannot map shared memory");
    return static_cast<uint8_t*>(place);
}

class Heap {
  public:
    // The first `reserved` bytes are not handed out.
    Heap(uint64_t size, uint64_t reserved) : size_(size), owner_(getpid()) {
        if (size <= reserved) throw std::runtime_error("too little memory for what so many ranks tell one another");
        file_ = memfd_create("powertrain", MFD_CLOEXEC);
        if (file_ < 0) throw system_error("cannot make shared memory");
        if (ftruncate(file_, off_t(size)) != 0) {
            const auto error = system_error("cannot size shared memory");
            ::close(file_);
            throw error;
        }
        base_ = map_file(file_, size);
        free_[reserved] = size - reserved;
    }

    ~Heap() {
        munmap(base_, size_);
        ::close(file_);
    }

    Heap(const Heap&) = delete;

    uint8_t* base() const { return base_; }
    uint64_t size() const { return size_; }
    int file() const { return file_; }

    bool contains(const void* place, uint64_t bytes) const {
        const auto* start = static_cast<const uint8_t*>(place);
        return start >= base_ && start + bytes <= base_ + size_;
    }

    // Whole pages, first fit; null when there is no room.
    uint8_t* allocate(uint64_t bytes) {
        const uint64_t wanted = rounded(bytes);
        std::lock_guard<std::mutex> guard(mutex_);
        for (auto gap = free_.begin(); gap != free_.end(); ++gap) {
            if (gap->second < wanted) continue;
            const uint64_t offset = gap->first, rest = gap->second - wanted;
            free_.erase(gap);
            if (rest) free_[offset + wanted] = rest;
            return base_ + offset;
        }
        return nullptr;
    }

    void release(uint8_t* place, uint64_t bytes) {
        if (getpid() != owner_) return;  // a forked child drops its copy of what is the parent's
        uint64_t offset = uint64_t(place - base_), length = rounded(bytes);
        fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off_t(offset), off_t(length));
        std::lock_guard<std::mutex> guard(mutex_);
        auto next = free_.lower_bound(offset);
        if (next != free_.end() && offset + length == next->first) {
            length += next->second;
            next = free_.erase(next);
        }
        if (next != free_.begin()) {
            auto before = std::prev(next);
            if (before->first + before->second == offset) {
                before->second += length;
                return;
            }
        }
        free_[offset] = length;
    }

  private:
    static uint64_t rounded(uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

    uint64_t size_;
    pid_t owner_;
    int file_ = -1;
    uint8_t* base_ = nullptr;
    std::mutex mutex_;
    std::map<uint64_t, uint64_t> free_;  // offset → length
};

}  // namespace powertrain
