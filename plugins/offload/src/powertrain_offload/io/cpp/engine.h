// What moves the pieces: a pool of threads, or a ring of the kernel's.
#pragma once
#include <unistd.h>
#include "bounce.h"
#include "queue.h"

namespace powertrain {

class Engine {
  public:
    explicit Engine(uint64_t block) : queue(block) {}
    virtual ~Engine() = default;

    // Whether this is a process that was forked off: its threads are not there.
    bool foreign() const { return getpid() != owner_; }

    virtual void start(std::shared_ptr<Transfer> transfer) = 0;
    // Give up what has not begun, and return when what has is over. A second call does nothing.
    virtual void stop() = 0;

  protected:
    // Where memory for the detour is short, the page cache will do.
    void place(Piece& piece, Bounce& bounce) const {
        if (!piece.misplaced()) return;
        uint8_t* aligned = bounce.get(queue.block());
        if (aligned) piece.detour(aligned);
        else piece.direct = false;
    }

    Queue queue;

  private:
    const pid_t owner_ = getpid();
};

}  // namespace powertrain
