// Who carries the collectives of this rank on: a thread of its own while Python computes, or the thread that waits.
#pragma once
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <sched.h>
#include <thread>
#include "collective.h"

namespace powertrain {

class Engine {
  public:
    using Handle = std::shared_ptr<Collective>;

    Engine(std::shared_ptr<Heap> heap, int self, const Work& work, int spins)
        : heap_(std::move(heap)), self_(self), spins_(spins), owner_(getpid()), machine_(peers_, *heap_, self, work) {}

    ~Engine() {
        close();
        if (getpid() == owner_) delete sync_;  // in a forked child the thread it knows of is not there, and its locks stay
    }

    Engine(const Engine&) = delete;

    void add_peer(int file, uint64_t size, int socket, pid_t process) {
        const bool own = int(peers_.size()) == self_;
        peers_.emplace_back(new Peer(file, size, socket, process, own ? heap_->base() : nullptr));
    }

    // Start a collective in a lane. Tensors must stay until it is over.
    Handle issue(Handle c, uint64_t lane, const std::vector<int>& ranks, int me) {
        std::unique_lock<std::mutex> guard(mutex_);
        Queue& queue = queues_[lane];
        if (queue.group.ranks.empty()) {
            queue.group = {lane, ranks, me};
            fresh_.push_back(&queue);
        }
        c->group = &queue.group;
        place(*c);
        c->sequence = queue.next++;
        if (failed_) {
            settle(*c, failure_->status.load(), failure_->culprit, failure_->message);
            return c;
        }
        if (closed_) {
            settle(*c, kBroken, self_, kClosed);
            return c;
        }
        ++pending_;
        incoming_.push_back({&queue, c});
        if (!driving_) {
            absorb();
            post(queue);
            if (!thread_.joinable()) thread_ = std::thread(&Engine::serve, this);
            work_.notify_one();
        } else {
            ring_bell(own());
        }
        return c;
    }

    // Return when it is over, or after `seconds`; false then.
    bool wait(const Handle& c, double seconds) {
        const auto deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(Seconds(seconds));
        std::unique_lock<std::mutex> guard(mutex_);
        while (c->status.load() == kUnderWay) {
            if (Clock::now() >= deadline) return false;
            if (closed_ && !driving_) end_all(kBroken, self_, kClosed);
            else if (!driving_) drive(guard, c.get(), deadline);
            else over_.wait_for(guard, std::chrono::milliseconds(200));
        }
        return true;
    }

    // Leave in order: peers that still wait for this rank learn that they need not.
    void close() {
        if (getpid() != owner_) return;
        {
            std::unique_lock<std::mutex> guard(mutex_);
            if (closed_) return;
            closed_ = true;
        }
        ring_bell(own());
        work_.notify_all();
        if (thread_.joinable()) thread_.join();
        {
            std::unique_lock<std::mutex> guard(mutex_);
            over_.wait(guard, [this] { return !driving_; });
            end_all(kBroken, self_, kClosed);
        }
        own().closed.store(1);
        for (auto& peer : peers_) ring_bell(peer->header());
    }

  private:
    using Clock = std::chrono::steady_clock;
    using Seconds = std::chrono::duration<double>;

    struct Queue {
        Group group;
        uint64_t next = 0;
        std::deque<Handle> unposted, working, leaving;
    };

    Header& own() { return header_of(heap_->base()); }

    // Find out where the tensors lie.
    void place(Collective& c) {
        const uint64_t given = c.given(), taken = c.operation == kAllReduce ? given : 0;
        if (given <= kEager) c.where |= kInputHere;
        else if (heap_->contains(c.input, given)) c.where |= kInputShared;
        if (taken > kEager && heap_->contains(c.output, taken)) c.where |= kOutputShared;
    }

    // With the lock held: take what was issued into the queues, which are the driving thread's.
    void absorb() {
        active_.insert(active_.end(), fresh_.begin(), fresh_.end());
        fresh_.clear();
        while (!incoming_.empty()) {
            incoming_.front().first->unposted.push_back(std::move(incoming_.front().second));
            incoming_.pop_front();
        }
    }

    bool post(Queue& queue) {
        bool moved = false;
        while (!queue.unposted.empty() && machine_.post(*queue.unposted.front())) {
            queue.working.push_back(std::move(queue.unposted.front()));
            queue.unposted.pop_front();
            moved = true;
        }
        return moved;
    }

    bool advance(Queue& queue) {
        bool moved = post(queue);
        if (!queue.working.empty()) {
            Collective& first = *queue.working.front();
            moved |= machine_.advance(first);
            if (first.stage >= kLeft || first.status.load() != kUnderWay) {
                queue.leaving.push_back(std::move(queue.working.front()));
                queue.working.pop_front();
            }
        }
        for (auto each = queue.leaving.begin(); each != queue.leaving.end();) {
            Collective& c = **each;
            if (c.status.load() == kUnderWay) moved |= machine_.advance(c);
            if (c.status.load() == kUnderWay) {
                ++each;
                continue;
            }
            if (c.status.load() != kDone) broken_ = *each;
            ended_.push_back(std::move(*each));
            each = queue.leaving.erase(each);
            moved = true;
        }
        return moved;
    }

    // Carry everything on until `target` is over, or, without one, until nothing is left to do.
    void drive(std::unique_lock<std::mutex>& guard, Collective* target, Clock::time_point deadline) {
        driving_ = true;
        int idle = 0;
        auto looked = Clock::now();
        for (;;) {
            absorb();
            pending_ -= ended_.size();
            if (!ended_.empty()) over_.notify_all();
            ended_.clear();
            if (broken_) fail(broken_->status.load(), broken_->culprit, broken_->message);
            if (target ? target->status.load() != kUnderWay : pending_ == 0) break;
            if (closed_ || Clock::now() >= deadline) break;
            const uint32_t heard = own().bell.load();  // while nothing can be issued unheard
            guard.unlock();
            bool moved = false;
            for (Queue* queue : active_) moved |= advance(*queue);
            if (moved) {
                idle = 0;
            } else if (target && ++idle <= spins_) {  // who only carries on would take the time of who computes
                pause();
            } else if (target && !spins_ && idle <= kYields) {
                sched_yield();
            } else {
                const auto now = Clock::now();
                if (now - looked > std::chrono::milliseconds(200)) {
                    look();
                    looked = now;
                }
                sleep_until_bell(own(), heard, 0.1);
            }
            guard.lock();
        }
        driving_ = false;
        if (pending_ && !closed_) work_.notify_one();
        over_.notify_all();
    }

    static const int kYields = 50;  // looks that a rank takes before it sleeps, where ranks share cores

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    // Find peers that collectives wait for and that are no more.
    void look() {
        for (Queue* queue : active_) {
            uint64_t end = 0;
            for (const auto* list : {&queue->unposted, &queue->working, &queue->leaving})
                for (const Handle& each : *list) end = std::max(end, each->sequence + 1);
            if (!end) continue;
            for (int rank : queue->group.ranks) {
                const Peer& peer = *peers_[size_t(rank)];
                // In this order: one that finishes and ends in between has not been waited for.
                const bool parted = peer.header().closed.load(), ended = rank != self_ && (parted || peer.gone());
                if (!ended || peer.lane(queue->group.lane).left.load() >= end) continue;
                return fail_all(kPeerGone, rank, parted ? "it has left" : "its process has ended");
            }
        }
    }

    // Only while driving: the queues are this thread's.
    void fail_all(int status, int culprit, const std::string& message) {
        broken_ = std::make_shared<Collective>();
        broken_->status.store(status);
        broken_->culprit = culprit;
        broken_->message = message;
    }

    // With the lock held, while driving: end everything that is under way.
    void fail(int status, int culprit, const std::string& message) {
        failure_ = broken_;
        failed_ = true;
        broken_.reset();
        end_all(status, culprit, message);
    }

    // With the lock held, while nobody else drives.
    void end_all(int status, int culprit, const std::string& message) {
        absorb();
        for (Queue* queue : active_)
            for (auto* list : {&queue->unposted, &queue->working, &queue->leaving}) {
                for (Handle& each : *list) {
                    settle(*each, status, culprit, message);
                    --pending_;
                }
                list->clear();
            }
        over_.notify_all();
    }

    static void settle(Collective& c, int status, int culprit, const std::string& message) {
        if (c.status.load() != kUnderWay) return;
        c.culprit = culprit;
        c.message = message;
        c.status.store(status);
    }

    void serve() {
        std::unique_lock<std::mutex> guard(mutex_);
        for (;;) {
            work_.wait(guard, [this] { return closed_ || (pending_ && !driving_); });
            if (closed_) return;
            drive(guard, nullptr, Clock::time_point::max());
        }
    }

    // What threads meet at.
    struct Sync {
        std::mutex mutex;
        std::condition_variable work, over;
        std::thread thread;
    };

    static constexpr const char* kClosed = "it has left the run";

    std::shared_ptr<Heap> heap_;
    int self_, spins_;
    pid_t owner_;
    Sync* const sync_ = new Sync;
    std::mutex& mutex_ = sync_->mutex;
    std::condition_variable &work_ = sync_->work, &over_ = sync_->over;
    std::thread& thread_ = sync_->thread;
    std::vector<std::unique_ptr<Peer>> peers_;
    Machine machine_;
    std::map<uint64_t, Queue> queues_;
    std::vector<Queue*> fresh_, active_;
    std::deque<std::pair<Queue*, Handle>> incoming_;
    std::vector<Handle> ended_;
    Handle broken_, failure_;
    size_t pending_ = 0;
    bool driving_ = false, closed_ = false, failed_ = false;
};

}  // namespace powertrain
