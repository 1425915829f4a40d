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

template <class T, int kReduction>
static inline T joined(T a, T b) {
    return kReduction == kMax ? larger(a, b) : kReduction == kMin ? smaller(a, b) : T(a + b);
}

// Elements of `first` and of `more`, in order, into `to`; the mean's sum is divided by `count`.
template <class T, int kReduction, int kMore>
static void join(T* to, const T* first, const T* const* more, int64_t start, int64_t length, T count) {
    const T* b = more[0] + start;
    const T* c = kMore > 1 ? more[1] + start : b;
    const T* last = more[kMore - 1] + start;
#pragma GCC ivdep
    for (int64_t i = 0; i < length; ++i) {
        T all = first[i];
        if (kMore > 1) all = joined<T, kReduction>(all, b[i]);
        if (kMore > 2) all = joined<T, kReduction>(all, c[i]);
        to[i] = kReduction == kMean ? T((all + last[i]) / count) : joined<T, kReduction>(all, last[i]);
    }
}

template <class T, int kReduction>
static void join_some(T* to, const T* first, const T* const* more, int some, int64_t start, int64_t length, T count) {
    switch (some) {
        case 1: return join<T, kReduction, 1>(to, first, more, start, length, count);
        case 2: return join<T, kReduction, 2>(to, first, more, start, length, count);
        default: return join<T, kReduction, 3>(to, first, more, start, length, count);
    }
}

// Types that are added as they are, up to four arrays in a pass. `to` may be one of the terms: where it is written at once,
// each element is read before.
template <class T>
static void combine_plain(T* to, const T* const* terms, int count, int64_t begin, int64_t end, int reduction) {
    constexpr int64_t kLine = 64 / int64_t(sizeof(T));
    for (int64_t start = begin; start < end; start += kBlock) {
        const int64_t length = end - start < kBlock ? end - start : kBlock;
        T room[kBlock];
        for (int term = 1; term < count; term += 3) {
            const int some = count - term < 3 ? count - term : 3;
            const bool ends = term + some == count;
            const T* first = term == 1 ? terms[0] + start : room;
            const T* const* more = terms + term;
            T* out = ends ? to + start : room;
            for (int64_t i = 0; i < length; i += kLine) {
                if (term == 1) announce(first + i);
                for (int each = 0; each < some; ++each) announce(more[each] + start + i);
            }
            if (reduction == kMax) join_some<T, kMax>(out, first, more, some, start, length, T(count));
            else if (reduction == kMin) join_some<T, kMin>(out, first, more, some, start, length, T(count));
            else if (reduction == kMean && ends) join_some<T, kMean>(out, first, more, some, start, length, T(count));
            else join_some<T, kSum>(out, first, more, some, start, length, T(count));
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
