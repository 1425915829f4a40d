// The n-way reduction, for one vector path: several arrays into one, in their order.
#pragma once
#include "vector.inl"

namespace powertrain {

enum Reduction : int { kSum = 0, kMean = 1, kMax = 2, kMin = 3 };

namespace POWERTRAIN_PATH {

template <class T>
static inline T larger(T a, T b) {
    return a != a ? a : (b != b ? b : (a > b ? a : b));  // NaN passes on
}

template <class T>
static inline T smaller(T a, T b) {
    return a != a ? a : (b != b ? b : (a < b ? a : b));
}

// Bytes by which reading is announced: the processor's own foresight ends with each page, and with many arrays.
static constexpr int64_t kAnnounced = 2048;

static inline void announce(const void* place) {
#if defined(__AVX2__) || defined(__AVX512F__)
    _mm_prefetch(static_cast<const char*>(place) + kAnnounced, _MM_HINT_T0);
#endif
}

// Types that are added as they are. `to` may be one of the terms: each element is read before it is written.
template <class T>
static void combine_plain(T* to, const T* const* terms, int count, int64_t begin, int64_t end, int reduction) {
    for (int64_t start = begin; start < end; start += kBlock) {
        const int64_t length = end - start < kBlock ? end - start : kBlock;
        T room[kBlock];
        constexpr int64_t kLine = 64 / int64_t(sizeof(T));
        for (int term = 1; term < count; ++term) {
            const T* a = term == 1 ? terms[0] + start : room;
            const T* b = terms[term] + start;
            T* out = term == count - 1 ? to + start : room;
            for (int64_t i = 0; i < length; i += kLine) {
                if (term == 1) announce(a + i);
                announce(b + i);
            }
            if (reduction == kMax) {
#pragma GCC ivdep
                for (int64_t i = 0; i < length; ++i) out[i] = larger(a[i], b[i]);
            } else if (reduction == kMin) {
#pragma GCC ivdep
                for (int64_t i = 0; i < length; ++i) out[i] = smaller(a[i], b[i]);
            } else if (reduction == kMean && term == count - 1) {
                const T divisor = T(count);
#pragma GCC ivdep
                for (int64_t i = 0; i < length; ++i) out[i] = T((a[i] + b[i]) / divisor);
            } else {
#pragma GCC ivdep
                for (int64_t i = 0; i < length; ++i) out[i] = T(a[i] + b[i]);
            }
        }
    }
}

// Types of 16 bits: combined in fp32, rounded once.
static void combine_narrow(
    void* to, const void* const* terms, int count, int format, int64_t begin, int64_t end, int reduction) {
    float total[kBlock], part[kBlock];
    for (int64_t start = begin; start < end; start += kBlock) {
        const int64_t length = end - start < kBlock ? end - start : kBlock;
        loaded(terms[0], format, start, length, total);
        for (int term = 1; term < count; ++term) {
            loaded(terms[term], format, start, length, part);
            if (reduction == kMax) {
                for (int64_t i = 0; i < length; ++i) total[i] = larger(total[i], part[i]);
            } else if (reduction == kMin) {
                for (int64_t i = 0; i < length; ++i) total[i] = smaller(total[i], part[i]);
            } else {
                for (int64_t i = 0; i < length; ++i) total[i] += part[i];
            }
        }
        if (reduction == kMean) {
            const float divisor = float(count);
            for (int64_t i = 0; i < length; ++i) total[i] /= divisor;
        }
        stored(to, format, start, length, total);
    }
}

// Combine elements begin..end of two or more `terms` into `to`, which may be one of them.
static void combine(
    void* to, const void* const* terms, int count, int format, int64_t begin, int64_t end, int reduction) {
    switch (format) {
        case kF32: combine_plain((float*)to, (const float* const*)terms, count, begin, end, reduction); break;
        case kF64: combine_plain((double*)to, (const double* const*)terms, count, begin, end, reduction); break;
        case kI8: combine_plain((int8_t*)to, (const int8_t* const*)terms, count, begin, end, reduction); break;
        case kU8: combine_plain((uint8_t*)to, (const uint8_t* const*)terms, count, begin, end, reduction); break;
        case kI32: combine_plain((int32_t*)to, (const int32_t* const*)terms, count, begin, end, reduction); break;
        case kI64: combine_plain((int64_t*)to, (const int64_t* const*)terms, count, begin, end, reduction); break;
        default: combine_narrow(to, terms, count, format, begin, end, reduction);
    }
}

}  // namespace POWERTRAIN_PATH
}  // namespace powertrain
