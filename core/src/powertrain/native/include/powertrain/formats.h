// Number formats, as Python names them to C++.
#pragma once
#include <cstdint>

namespace powertrain {

enum Format : int { kNone = -1, kF32 = 0, kBF16 = 1, kF16 = 2, kF64 = 3, kI8 = 4, kU8 = 5, kI32 = 6, kI64 = 7 };

inline int bytes_of(int format) {
    switch (format) {
        case kF32: case kI32: return 4;
        case kBF16: case kF16: return 2;
        case kF64: case kI64: return 8;
        default: return 1;
    }
}

}  // namespace powertrain
