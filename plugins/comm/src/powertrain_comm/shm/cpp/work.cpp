// One vector path's way to move memory; compiled once for each.
#include "work.h"
#include <powertrain/combine.inl>

namespace powertrain {
namespace POWERTRAIN_PATH {

#if defined(__AVX512F__) || defined(__AVX2__)
// Bytes by which reading is announced, and writing: lines that another core has changed, or has only read before they are
// written again, take several times as long as memory's own. (prefetchw has no intrinsic without a flag of its own; a
// processor that lacks it passes over it.)
static const uint64_t kReadAhead = 1024, kWriteAhead = 256;

static inline void announce_write(const uint8_t* place) { asm volatile("prefetchw %0" ::"m"(*place)); }

static inline void line(uint8_t* to, const uint8_t* from, bool past_cache) {
#if defined(__AVX512F__)
    const __m512i all = _mm512_loadu_si512(from);
    if (past_cache) _mm512_stream_si512((__m512i*)to, all);
    else _mm512_storeu_si512((__m512i*)to, all);
#else
    const __m256i low = _mm256_loadu_si256((const __m256i*)from), high = _mm256_loadu_si256((const __m256i*)(from + 32));
    if (past_cache) {
        _mm256_stream_si256((__m256i*)to, low);
        _mm256_stream_si256((__m256i*)(to + 32), high);
    } else {
        _mm256_storeu_si256((__m256i*)to, low);
        _mm256_storeu_si256((__m256i*)(to + 32), high);
    }
#endif
}

static inline void lines(void* to, const void* from, uint64_t bytes, bool past_cache) {
    if (bytes < 4096) {
        std::memcpy(to, from, bytes);
        return;
    }
    auto* target = static_cast<uint8_t*>(to);
    const auto* source = static_cast<const uint8_t*>(from);
    const uint64_t first = (64 - (reinterpret_cast<uintptr_t>(target) & 63)) & 63;  // whole lines from here on
    std::memcpy(target, source, first);
    uint64_t i = first;
    for (; i + 64 <= bytes; i += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(source + i + kReadAhead), _MM_HINT_T0);
        if (!past_cache) announce_write(target + i + kWriteAhead);
        line(target + i, source + i, past_cache);
    }
    std::memcpy(target + i, source + i, bytes - i);
}

static void copy(void* to, const void* from, uint64_t bytes) { lines(to, from, bytes, false); }

// A store that goes past the cache need not read the line that it overwrites: a third less traffic.
static void stream(void* to, const void* from, uint64_t bytes) {
    lines(to, from, bytes, true);
    _mm_sfence();
}
#else
static void copy(void* to, const void* from, uint64_t bytes) { std::memcpy(to, from, bytes); }
static void stream(void* to, const void* from, uint64_t bytes) { std::memcpy(to, from, bytes); }
#endif

const Work& work() {
    static const Work functions = {combine, copy, stream};
    return functions;
}

}  // namespace POWERTRAIN_PATH
}  // namespace powertrain
