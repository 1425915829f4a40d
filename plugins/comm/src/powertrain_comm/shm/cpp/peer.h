// Another rank of this host, as this one sees it.
#pragma once
#include <cstdint>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "heap.h"
#include "lane.h"

namespace powertrain {

class Peer {
  public:
    // `file` and `socket` are its shared memory and a connection to it; this object closes both. `process` is 0 where
    // it cannot be seen, `self` says that it is this rank.
    Peer(int file, uint64_t size, int socket, pid_t process, uint8_t* self)
        : size_(size), socket_(socket), own_(self != nullptr) {
        base_ = own_ ? self : map_file(file, size);
        if (file >= 0) ::close(file);
#ifdef SYS_pidfd_open
        if (!own_ && process > 0) watch_ = int(syscall(SYS_pidfd_open, process, 0));
#endif
    }

    ~Peer() {
        if (!own_) munmap(base_, size_);
        if (socket_ >= 0) ::close(socket_);
        if (watch_ >= 0) ::close(watch_);
    }

    Peer(const Peer&) = delete;

    uint8_t* base() const { return base_; }
    Header& header() const { return header_of(base_); }
    Lane& lane(uint64_t index) const { return lane_of(base_, index); }

    // Whether its process has ended. A forked child of it may still hold the connection, so the process is asked first.
    bool gone() const {
        if (own_) return false;
        pollfd files[2] = {{watch_, POLLIN, 0}, {socket_, POLLIN, 0}};
        if (poll(files, 2, 0) <= 0) return false;
        return (watch_ >= 0 && files[0].revents) || (files[1].revents & (POLLHUP | POLLERR)) ||
               (files[1].revents & POLLIN);  // nothing is ever sent: what can be read is the end
    }

  private:
    uint64_t size_;
    int socket_ = -1, watch_ = -1;
    bool own_;
    uint8_t* base_ = nullptr;
};

}  // namespace powertrain
