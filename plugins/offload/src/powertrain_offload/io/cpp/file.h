// One logical file: its parts on one or more disks, and where in them a byte lies.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace powertrain {

// The descriptors belong to Python, which keeps them open until every transfer is over.
struct Part {
    int direct;       // opened with O_DIRECT; negative where the file system refuses it
    int buffered;     // for what is not aligned
    uint64_t edge;    // offsets and lengths by `direct` are multiples of this
    uint64_t memory;  // and addresses of this
};

struct Span {
    uint32_t part;
    uint64_t offset, length;  // in the part
};

struct File {
    std::vector<Part> parts;
    uint64_t stripe;

    // What of the `length` bytes from `offset` lies in one part in one go.
    Span at(uint64_t offset, uint64_t length) const {
        if (parts.size() == 1) return {0, offset, length};
        const uint64_t number = offset / stripe, within = offset % stripe;
        const uint64_t row = number / parts.size();
        return {uint32_t(number % parts.size()), row * stripe + within, std::min(length, stripe - within)};
    }
};

}  // namespace powertrain
