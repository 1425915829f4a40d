// Threads that wait for work, asleep. Not for units of `vector_units`: it uses the C++ library.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <unistd.h>
#include <vector>

namespace powertrain {

// One pool of a process. Threads are made when they are first needed, and end with the process.
class Threads {
  public:
    // Call work(index) for every index below `count`, the caller taking 0; return when all are done.
    void run(int count, const std::function<void(int)>& work) {
        if (count <= 1) return work(0);
        std::unique_lock<std::mutex> turn(turn_);  // one call at a time
        {
            std::unique_lock<std::mutex> guard(mutex_);
            for (int index = made_ + 1; index < count; ++index) {
                std::thread(&Threads::serve, this, index, round_).detach();
                made_ = index;
            }
            work_ = &work;
            count_ = count;
            left_ = count - 1;
            ++round_;
        }
        begin_.notify_all();
        work(0);
        std::unique_lock<std::mutex> guard(mutex_);
        end_.wait(guard, [this] { return left_ == 0; });
        work_ = nullptr;
    }

    // The pool of this process: a child after fork() has none of its parent's threads, and gets its own. No lock is
    // taken: another thread of the parent could hold it when the process forks, and it would stay held in the child.
    static Threads& here() {
        static std::atomic<Threads*> current{nullptr};
        Threads* pool = current.load(std::memory_order_acquire);
        while (pool == nullptr || pool->owner_ != getpid()) {
            Threads* fresh = new Threads;  // never freed: its threads may outlast any static object
            if (current.compare_exchange_strong(pool, fresh)) return *fresh;
            delete fresh;  // another thread was faster
        }
        return *pool;
    }

  private:
    void serve(int index, uint64_t seen) {
        std::unique_lock<std::mutex> guard(mutex_);
        for (;;) {
            begin_.wait(guard, [&] { return round_ != seen; });
            seen = round_;
            if (index >= count_) continue;
            const std::function<void(int)>& work = *work_;
            guard.unlock();
            work(index);
            guard.lock();
            if (--left_ == 0) end_.notify_one();
        }
    }

    const pid_t owner_ = getpid();
    std::mutex turn_, mutex_;
    std::condition_variable begin_, end_;
    const std::function<void(int)>* work_ = nullptr;
    int made_ = 0, count_ = 0, left_ = 0;
    uint64_t round_ = 0;
};

// Cut 0..total into `threads` runs of whole `grain`s and call work(begin, end) for each, in parallel.
template <class Work>
void parallel(int64_t total, int64_t grain, int threads, const Work& work) {
    const int64_t grains = (total + grain - 1) / grain;
    const int count = int(grains < threads ? grains : threads);
    if (count <= 1) return work(int64_t(0), total);
    Threads::here().run(count, [&](int index) {
        const int64_t begin = grains * index / count * grain, end = grains * (index + 1) / count * grain;
        work(begin, end < total ? end : total);
    });
}

}  // namespace powertrain
