// Aligned memory of the engine's own, mapped when it is first needed.
#pragma once
#include <cstdint>
#include <new>
#include <sys/mman.h>

namespace powertrain {

class Bounce {
  public:
    Bounce() = default;
    Bounce(const Bounce&) = delete;
    ~Bounce() {
        if (place_) munmap(place_, size_);
    }

    uint8_t* get(uint64_t size) {
        if (!place_) {
            void* place = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (place == MAP_FAILED) return nullptr;
            place_ = static_cast<uint8_t*>(place), size_ = size;
        }
        return place_;
    }

  private:
    uint8_t* place_ = nullptr;
    uint64_t size_ = 0;
};

}  // namespace powertrain
