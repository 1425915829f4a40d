// Blocks of numbers between memory and fp32, for one vector path.
//
// Include it inside a unit of `vector_units` only. All is static and in a
// namespace named after the path: were anything here shared between units, the
// linker could keep the copy of the widest path and run it on any processor.
// For the same reason nothing of the C++ library that has a body is used.
//
// The loops are plain; the compiler turns them into the path's vectors. Only
// fp16 needs the processor's own instruction by name.
#pragma once
#include <cstdint>
#include <cstring>
#include "formats.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef POWERTRAIN_PATH
#error "compile this as one of vector_units"
#endif

namespace powertrain {
namespace POWERTRAIN_PATH {

// Elements that are in hand at a time: a handful of fp32 streams of this length stay in the first-level cache.
static constexpr int64_t kBlock = 1024;

static inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

static inline void load_bf16(float* __restrict to, const uint16_t* __restrict from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = bits_to_float(uint32_t(from[i]) << 16);
}

// To the nearest, ties to even; NaN stays NaN.
static inline uint16_t round_bf16(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline void store_bf16(uint16_t* __restrict to, const float* __restrict from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = round_bf16(from[i]);
}

static inline float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 0x3ffu;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (fraction << 13));
    if (exponent) return bits_to_float(sign | ((exponent + 112u) << 23) | (fraction << 13));
    const float small = float(fraction) * 5.9604644775390625e-8f;  // 2^-24: what has no exponent
    return sign ? -small : small;
}

static inline uint16_t float_to_half(float value) {
    const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (size >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
    if (size < 0x38800000u) {  // below the smallest normal: let an addition round, at the place where it must
        const float shifted = bits_to_float(size) + 0.5f;
        return uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u));
    }
    return uint16_t(sign | ((size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13));
}

static inline void load_f16(float* __restrict to, const uint16_t* __restrict from, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + i))));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
    for (; i < count; ++i) to[i] = half_to_float(from[i]);
}

static inline void store_f16(uint16_t* __restrict to, const float* __restrict from, int64_t count) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm256_storeu_si256((__m256i*)(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < count; ++i) to[i] = float_to_half(from[i]);
}

// Return `count` elements from `start` on as fp32: where they lie if they are, else in `room`.
static inline const float* loaded(const void* from, int format, int64_t start, int64_t count, float* room) {
    if (format == kF32) return static_cast<const float*>(from) + start;
    if (format == kBF16) load_bf16(room, static_cast<const uint16_t*>(from) + start, count);
    else load_f16(room, static_cast<const uint16_t*>(from) + start, count);
    return room;
}

static inline void stored(void* to, int format, int64_t start, int64_t count, const float* from) {
    if (format == kF32) {
        float* place = static_cast<float*>(to) + start;
        if (place != from) std::memcpy(place, from, size_t(count) * 4);
    } else if (format == kBF16) {
        store_bf16(static_cast<uint16_t*>(to) + start, from, count);
    } else {
        store_f16(static_cast<uint16_t*>(to) + start, from, count);
    }
}

}  // namespace POWERTRAIN_PATH
}  // namespace powertrain
