// Transfers that wait for their turn, first come first served, and are given out piece by piece.
#pragma once
#include <deque>
#include "piece.h"

namespace powertrain {

class Queue {
  public:
    explicit Queue(uint64_t block) : block_(block) {}

    uint64_t block() const { return block_; }

    // Return whether someone found the queue empty since the last call, and must be woken.
    bool push(std::shared_ptr<Transfer> transfer) {
        std::lock_guard<std::mutex> guard(mutex_);
        if (closed_) {
            abandon(*transfer);
            return false;
        }
        waiting_.push_back(std::move(transfer));
        const bool wake = hungry_;
        hungry_ = false;
        some_.notify_all();
        return wake;
    }

    // Take a piece; false when there is none now.
    bool try_take(Piece& piece) {
        std::lock_guard<std::mutex> guard(mutex_);
        if (next(piece)) return true;
        hungry_ = true;
        return false;
    }

    // Wait for a piece; false when the queue is closed.
    bool take(Piece& piece) {
        std::unique_lock<std::mutex> guard(mutex_);
        for (;;) {
            if (next(piece)) return true;
            if (closed_) return false;
            some_.wait(guard);
        }
    }

    // Give up what has not been given out.
    void close() {
        std::lock_guard<std::mutex> guard(mutex_);
        closed_ = true;
        for (auto& transfer : waiting_) abandon(*transfer);
        waiting_.clear();
        some_.notify_all();
    }

    bool closed() {
        std::lock_guard<std::mutex> guard(mutex_);
        return closed_;
    }

  private:
    static void abandon(Transfer& transfer) {
        const uint64_t rest = transfer.length - transfer.given;
        const Span span = transfer.file->at(transfer.offset + transfer.given, rest);
        const Failure failure = {ECANCELED, transfer.given, span.part, span.offset};
        transfer.given = transfer.length;
        transfer.fail(failure, rest);
    }

    bool next(Piece& piece) {
        while (!waiting_.empty()) {
            const std::shared_ptr<Transfer> transfer = waiting_.front();
            if (transfer->failed()) {
                const uint64_t rest = transfer->length - transfer->given;
                waiting_.pop_front();
                transfer->finish(rest);
                continue;
            }
            piece = cut(transfer, block_);
            if (transfer->given == transfer->length) waiting_.pop_front();
            return true;
        }
        return false;
    }

    const uint64_t block_;
    std::mutex mutex_;
    std::condition_variable some_;
    std::deque<std::shared_ptr<Transfer>> waiting_;
    bool closed_ = false, hungry_ = false;
};

}  // namespace powertrain
