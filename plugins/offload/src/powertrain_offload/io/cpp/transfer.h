// One read or write, however long: what of it has been given out, what is left, and what went wrong first.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include "file.h"

namespace powertrain {

struct Failure {
    int code = 0;           // errno; 0: the file ended
    uint64_t position = 0;  // bytes of the transfer before it, all of which were moved
    uint32_t part = 0;
    uint64_t offset = 0;  // in the part
};

class Transfer {
  public:
    Transfer(std::shared_ptr<const File> file, bool writes, uint64_t offset, uint8_t* memory, uint64_t length)
        : file(std::move(file)), writes(writes), offset(offset), memory(memory), length(length), left_(length) {}

    const std::shared_ptr<const File> file;
    const bool writes;
    const uint64_t offset;
    uint8_t* const memory;
    const uint64_t length;
    uint64_t given = 0;  // to be moved; the queue's

    // Some bytes need no more work: moved, or failed, or never to be tried.
    void finish(uint64_t bytes) {
        std::lock_guard<std::mutex> guard(mutex_);
        left_ -= bytes;
        if (left_ == 0) over_.notify_all();
    }

    void fail(const Failure& failure, uint64_t bytes) {
        {
            std::lock_guard<std::mutex> guard(mutex_);
            if (!failed_ || failure.position < failure_.position) failure_ = failure;
            failed_ = true;
        }
        finish(bytes);
    }

    bool failed() {
        std::lock_guard<std::mutex> guard(mutex_);
        return failed_;
    }

    // Once it is over.
    Failure failure() {
        std::lock_guard<std::mutex> guard(mutex_);
        return failure_;
    }

    bool done() const { return left_ == 0; }

    bool wait_for(std::chrono::milliseconds time) {
        std::unique_lock<std::mutex> guard(mutex_);
        return over_.wait_for(guard, time, [this] { return left_ == 0; });
    }

  private:
    std::mutex mutex_;
    std::condition_variable over_;
    std::atomic<uint64_t> left_;
    bool failed_ = false;
    Failure failure_;
};

}  // namespace powertrain
