// Blockwise symmetric quantization to 8 or 4 bits; the reference is powertrain.kernels.blockwise, bit by bit.
//
// int4: the first half of a block's elements lies in the low halves of its bytes, the second half in the high ones,
// each plus 8.
#pragma once
#include <powertrain/vector.inl>
#include "table.h"
#include <cmath>

namespace powertrain {
namespace POWERTRAIN_PATH {

static const float kLargest = 3.40282346638528859812e+38f;

static inline float scale_of(const float* x, int64_t count, float top) {
    // As bits, magnitudes are ordered like integers, and NaN above infinity: one maximum finds either.
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = float_to_bits(x[i]) & 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    const float magnitude = bits_to_float(largest);
    const float scale = magnitude / top;
    if (largest >= 0x7f800000u) return scale;
    const float limit = kLargest / top * (1.0f - 2.384185791015625e-7f);  // rounded up, it would make the largest infinite
    return scale < limit ? scale : limit;
}

static inline void integers(const float* __restrict x, float* __restrict to, int64_t count, float scale, float top) {
    const float step = scale == 0.0f ? 1.0f : scale;
    for (int64_t i = 0; i < count; ++i) {
        const float q = std::nearbyint(x[i] / step);
        const float bounded = q < -top ? -top : (q > top ? top : q);
        to[i] = bounded != bounded ? 1.0f : bounded;
    }
}

static void quantize(
    const void* from, int format, uint8_t* to, float* scales, int bits, int block, int64_t begin, int64_t end) {
    alignas(64) float room[kBlock], whole[kBlock];
    const float top = bits == 8 ? 127.0f : 7.0f;
    for (int64_t index = begin; index < end; ++index) {
        const float* x = loaded(from, format, index * block, block, room);
        const float scale = scale_of(x, block, top);
        scales[index] = scale;
        integers(x, whole, block, scale, top);
        if (bits == 8) {
            int8_t* place = reinterpret_cast<int8_t*>(to) + index * block;
            for (int i = 0; i < block; ++i) place[i] = int8_t(int(whole[i]));
        } else {
            const int half = block / 2;
            uint8_t* place = to + index * half;
            for (int i = 0; i < half; ++i)
                place[i] = uint8_t((int(whole[i]) + 8) | ((int(whole[half + i]) + 8) << 4));
        }
    }
}

static void dequantize(const uint8_t* from, const float* scales, void* to, int format, int bits, int block,
                       int64_t begin, int64_t end, int add) {
    alignas(64) float room[kBlock], before[kBlock];
    for (int64_t index = begin; index < end; ++index) {
        const float scale = scales[index];
        if (bits == 8) {
            const int8_t* place = reinterpret_cast<const int8_t*>(from) + index * block;
            for (int i = 0; i < block; ++i) room[i] = float(place[i]) * scale;
        } else {
            const int half = block / 2;
            const uint8_t* place = from + index * half;
            for (int i = 0; i < half; ++i) {
                room[i] = float(int(place[i] & 15) - 8) * scale;
                room[half + i] = float(int(place[i] >> 4) - 8) * scale;
            }
        }
        if (add) {
            const float* old = loaded(to, format, index * block, block, before);
            for (int i = 0; i < block; ++i) room[i] = old[i] + room[i];
        }
        stored(to, format, index * block, block, room);
    }
}

}  // namespace POWERTRAIN_PATH
}  // namespace powertrain
