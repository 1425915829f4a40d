// io_uring by system calls: two queues in memory shared with the kernel. For one thread, which has made it.
#pragma once
#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif
// Headers of Linux before 5.7 do not know the calls that read and write without vectors.
#if defined(IORING_FEAT_FAST_POLL)
#define POWERTRAIN_URING 1
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace powertrain {

class Uring {
  public:
    explicit Uring(unsigned entries) {
        io_uring_params told{};
        file_ = setup(entries, told);
        if (file_ < 0) fail("io_uring_setup", errno);
        try {
            map(told);
            know();
        } catch (...) {
            unmap();
            throw;
        }
    }

    Uring(const Uring&) = delete;
    ~Uring() { unmap(); }

    // A free entry; there is always one for who has no more under way than asked for.
    io_uring_sqe& next() {
        const unsigned at = tail_ & sq_mask_;
        io_uring_sqe& entry = entries_[at];
        std::memset(&entry, 0, sizeof entry);
        sq_array_[at] = at;
        ++tail_;
        return entry;
    }

    // Hand over what `next` gave and wait for one completion at the least. Return 0 or an errno.
    int submit_and_wait() {
        __atomic_store_n(sq_tail_, tail_, __ATOMIC_RELEASE);
        const unsigned count = tail_ - __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE);
        const long result = syscall(__NR_io_uring_enter, file_, count, 1, IORING_ENTER_GETEVENTS, nullptr, 0);
        return result < 0 ? errno : 0;
    }

    // Give each completion to `take`, with its entry's user_data and result.
    template <typename Take>
    void reap(Take take) {
        unsigned head = *cq_head_;
        while (head != __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) {
            const io_uring_cqe done = completions_[head & cq_mask_];
            __atomic_store_n(cq_head_, ++head, __ATOMIC_RELEASE);
            take(done.user_data, done.res);
        }
    }

  private:
    [[noreturn]] static void fail(const char* call, int code) {
        throw std::runtime_error(std::string(call) + ": " + std::strerror(code));
    }

    static int setup(unsigned entries, io_uring_params& told) {
        // Completions are worked off where this thread asks for them, without an interrupt of its own; Linux 6.1.
#if defined(IORING_SETUP_SINGLE_ISSUER) && defined(IORING_SETUP_DEFER_TASKRUN)
        told.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
        const int file = int(syscall(__NR_io_uring_setup, entries, &told));
        if (file >= 0 || errno != EINVAL) return file;
#endif
        told = {};
        return int(syscall(__NR_io_uring_setup, entries, &told));
    }

    void map(const io_uring_params& told) {
        sq_size_ = told.sq_off.array + told.sq_entries * sizeof(unsigned);
        cq_size_ = told.cq_off.cqes + told.cq_entries * sizeof(io_uring_cqe);
        entries_size_ = told.sq_entries * sizeof(io_uring_sqe);
        sq_ = view(sq_size_, IORING_OFF_SQ_RING);
        cq_ = view(cq_size_, IORING_OFF_CQ_RING);
        entries_ = static_cast<io_uring_sqe*>(view(entries_size_, IORING_OFF_SQES));
        sq_head_ = field(sq_, told.sq_off.head), sq_tail_ = field(sq_, told.sq_off.tail);
        sq_mask_ = *field(sq_, told.sq_off.ring_mask), sq_array_ = field(sq_, told.sq_off.array);
        cq_head_ = field(cq_, told.cq_off.head), cq_tail_ = field(cq_, told.cq_off.tail);
        cq_mask_ = *field(cq_, told.cq_off.ring_mask);
        completions_ = reinterpret_cast<io_uring_cqe*>(static_cast<uint8_t*>(cq_) + told.cq_off.cqes);
        tail_ = *sq_tail_;
    }

    void* view(size_t size, uint64_t offset) const {
        void* place = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file_, off_t(offset));
        if (place == MAP_FAILED) fail("mapping io_uring", errno);
        return place;
    }

    static unsigned* field(void* base, uint32_t offset) {
        return reinterpret_cast<unsigned*>(static_cast<uint8_t*>(base) + offset);
    }

    // Whether this kernel has what is needed of it.
    void know() const {
        constexpr unsigned count = 256;
        alignas(io_uring_probe) uint8_t room[sizeof(io_uring_probe) + count * sizeof(io_uring_probe_op)] = {};
        auto* probe = reinterpret_cast<io_uring_probe*>(room);
        if (syscall(__NR_io_uring_register, file_, IORING_REGISTER_PROBE, probe, count) < 0)
            fail("this kernel's io_uring is too old (before Linux 5.6)", errno);
        for (unsigned call : {unsigned(IORING_OP_READ), unsigned(IORING_OP_WRITE)})
            if (call > probe->last_op || !(probe->ops[call].flags & IO_URING_OP_SUPPORTED))
                fail("this kernel's io_uring does not read or write", ENOSYS);
    }

    void unmap() {
        if (entries_) munmap(entries_, entries_size_);
        if (cq_) munmap(cq_, cq_size_);
        if (sq_) munmap(sq_, sq_size_);
        ::close(file_);
    }

    int file_ = -1;
    void *sq_ = nullptr, *cq_ = nullptr;
    io_uring_sqe* entries_ = nullptr;
    io_uring_cqe* completions_ = nullptr;
    size_t sq_size_ = 0, cq_size_ = 0, entries_size_ = 0;
    unsigned *sq_head_ = nullptr, *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
    unsigned sq_mask_ = 0, cq_mask_ = 0, tail_ = 0;
};

}  // namespace powertrain
#endif
