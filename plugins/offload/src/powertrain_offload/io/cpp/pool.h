// Threads that each move one piece at a time.
#pragma once
#include <thread>
#include <unistd.h>
#include <vector>
#include "engine.h"

namespace powertrain {

class Pool : public Engine {
  public:
    Pool(int threads, uint64_t block) : Engine(block) {
        try {
            for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { run(); });
        } catch (...) {
            stop();
            throw;
        }
    }

    ~Pool() override { stop(); }

    void start(std::shared_ptr<Transfer> transfer) override { queue.push(std::move(transfer)); }

    void stop() override {
        queue.close();
        for (auto& thread : threads_) thread.join();
        threads_.clear();
    }

  private:
    void run() {
        Bounce bounce;
        for (Piece piece; queue.take(piece); piece = Piece()) {
            place(piece, bounce);
            while (piece.take(move(piece))) {
            }
        }
    }

    static int64_t move(const Piece& piece) {
        const uint64_t length = piece.length - piece.moved;
        const off_t offset = off_t(piece.offset + piece.moved);
        const ssize_t result = piece.transfer->writes ? pwrite(piece.descriptor(), piece.address(), length, offset)
                                                      : pread(piece.descriptor(), piece.address(), length, offset);
        return result < 0 ? -int64_t(errno) : int64_t(result);
    }

    std::vector<std::thread> threads_;
};

}  // namespace powertrain
