// One thread that keeps up to `depth` pieces at the kernel.
//
// Only this thread speaks to the ring: what a thread has submitted is cancelled when it ends, and who calls may end any
// time. Callers wake it by a descriptor that it reads from like from any file, so it sleeps in one place only.
#pragma once
#include "uring.h"
#if defined(POWERTRAIN_URING)
#include <future>
#include <sys/eventfd.h>
#include <thread>
#include <vector>
#include "engine.h"

namespace powertrain {

class Ring : public Engine {
  public:
    Ring(int depth, uint64_t block) : Engine(block), slots_(size_t(depth)) {
        bell_ = eventfd(0, EFD_CLOEXEC);
        if (bell_ < 0) throw std::runtime_error(std::string("eventfd: ") + std::strerror(errno));
        std::promise<void> made;
        std::future<void> answer = made.get_future();
        try {
            thread_ = std::thread([this, &made] { run(made); });
            answer.get();
        } catch (...) {
            if (thread_.joinable()) thread_.join();
            ::close(bell_);
            throw;
        }
    }

    ~Ring() override {
        stop();
        ::close(bell_);
    }

    void start(std::shared_ptr<Transfer> transfer) override {
        if (queue.push(std::move(transfer))) ring();
    }

    void stop() override {
        queue.close();
        if (!thread_.joinable()) return;
        ring();
        thread_.join();
    }

  private:
    static constexpr uint64_t kBell = ~uint64_t(0);

    struct Slot {
        Piece piece;
        Bounce bounce;
        bool patient = false;  // ask the kernel for a thread that can wait
    };

    void ring() const {
        const uint64_t one = 1;
        while (write(bell_, &one, sizeof one) < 0 && errno == EINTR) {
        }
    }

    void run(std::promise<void>& made) {
        std::unique_ptr<Uring> uring;
        try {
            uring.reset(new Uring(unsigned(slots_.size()) + 1));  // one is the bell's
            for (size_t i = 0; i < slots_.size(); ++i) free_.push_back(i);
        } catch (...) {
            made.set_exception(std::current_exception());
            return;
        }
        made.set_value();
        listen(*uring);
        for (;;) {
            while (!free_.empty() && queue.try_take(slots_[free_.back()].piece)) {
                Slot& slot = slots_[free_.back()];
                place(slot.piece, slot.bounce);
                slot.patient = false;
                submit(*uring, free_.back());
                free_.pop_back();
            }
            if (free_.size() == slots_.size() && queue.closed()) return;
            const int error = uring->submit_and_wait();
            uring->reap([&](uint64_t number, int result) {
                if (number == kBell) listen(*uring);
                else took(*uring, size_t(number), result);
            });
            if (error && error != EINTR && error != EAGAIN && error != EBUSY) return lost(error);
        }
    }

    void listen(Uring& uring) {
        io_uring_sqe& entry = uring.next();
        entry.opcode = IORING_OP_READ, entry.fd = bell_, entry.user_data = kBell;
        entry.addr = reinterpret_cast<uint64_t>(&rung_), entry.len = sizeof rung_;
    }

    void submit(Uring& uring, size_t number) {
        const Piece& piece = slots_[number].piece;
        io_uring_sqe& entry = uring.next();
        entry.opcode = piece.transfer->writes ? IORING_OP_WRITE : IORING_OP_READ;
        entry.fd = piece.descriptor(), entry.user_data = number;
        entry.addr = reinterpret_cast<uint64_t>(piece.address());
        entry.len = uint32_t(piece.length - piece.moved), entry.off = piece.offset + piece.moved;
        if (slots_[number].patient) entry.flags = IOSQE_ASYNC;
    }

    void took(Uring& uring, size_t number, int result) {
        Slot& slot = slots_[number];
        slot.patient = result == -EAGAIN;
        if (slot.piece.take(result)) {
            submit(uring, number);
        } else {
            slot.piece = Piece();
            free_.push_back(number);
        }
    }

    // The kernel no longer answers: no one must wait for it.
    void lost(int error) {
        queue.close();
        std::vector<bool> idle(slots_.size(), false);
        for (size_t number : free_) idle[number] = true;
        for (size_t number = 0; number < slots_.size(); ++number)
            if (!idle[number]) slots_[number].piece.take(-error);
    }

    std::vector<Slot> slots_;
    std::vector<size_t> free_;
    std::thread thread_;
    int bell_ = -1;
    uint64_t rung_ = 0;
};

}  // namespace powertrain
#endif
