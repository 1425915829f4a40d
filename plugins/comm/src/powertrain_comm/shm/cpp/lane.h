// What ranks tell one another, in each rank's own shared memory: only its owner writes, everybody reads.
//
// A lane is a row of collectives among some ranks of a host, in one order. Each rank posts what it takes part in,
// and counts how far it has come; a bell wakes whoever waits for a count to change.
#pragma once
#include <atomic>
#include <climits>
#include <cstdint>
#include <ctime>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace powertrain {

static const int kMaxRanks = 64;       // of one host
static const int kRing = 8;            // collectives that a rank may be ahead of the slowest one's reading
static const uint64_t kEager = 4096;   // bytes up to which an input travels within the post itself

enum Operation : int {
    kAllReduce = 0, kAllGather = 1, kReduceScatter = 2, kAllToAll = 3, kBroadcast = 4, kBarrier = 5,
};

enum Where : uint32_t { kInputShared = 1, kOutputShared = 2, kInputHere = 4 };

// One collective, as one rank posted it.
struct Post {
    int32_t operation, format, reduction, source;
    int64_t numel;           // all_gather: of the input; reduce_scatter: of the output; otherwise of the whole
    uint64_t input, output;  // offsets into the heap, where `where` says that they are there
    uint32_t where;
    int64_t starts[kMaxRanks + 1];  // all_to_all: where each rank's piece of the input begins
    alignas(64) uint8_t data[kEager];
};

// How far a rank has come. `posted` and `left` count collectives; the others count pieces, see `piece_count`.
struct Lane {
    alignas(64) std::atomic<uint64_t> posted;     // collectives posted
    alignas(64) std::atomic<uint64_t> left;       // of which it needs nothing from others any more
    alignas(64) std::atomic<uint64_t> staged;     // pieces of its input that lie in its staging area
    alignas(64) std::atomic<uint64_t> consumed;   // pieces of the others' inputs that it has read, and reduced
    alignas(64) std::atomic<uint64_t> collected;  // pieces of the others' results that it has read
    alignas(64) std::atomic<uint64_t> staging;    // offset of its staging area in the heap; 0 before it is used
    Post ring[kRing];
};

// Counts of pieces go on from one collective to the next, so that they need not be reset.
inline uint64_t piece_count(uint64_t sequence, int64_t pieces) { return (sequence << 32) + uint64_t(pieces); }

struct Header {
    alignas(64) std::atomic<uint32_t> bell;
    alignas(64) std::atomic<uint32_t> asleep;
    alignas(64) std::atomic<uint32_t> closed;  // left in order: whoever waits for it waits in vain
};

static const uint64_t kLanesAt = 4096;

inline uint64_t lanes_end(uint64_t lanes) { return (kLanesAt + lanes * sizeof(Lane) + 4095) / 4096 * 4096; }
inline Header& header_of(uint8_t* base) { return *reinterpret_cast<Header*>(base); }
inline Lane& lane_of(uint8_t* base, uint64_t index) { return reinterpret_cast<Lane*>(base + kLanesAt)[index]; }

inline void ring_bell(Header& header) {
    header.bell.fetch_add(1);
    if (header.asleep.load()) syscall(SYS_futex, &header.bell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Sleep until the bell, which was read as `heard`, rings again; return after `seconds` at the latest.
inline void sleep_until_bell(Header& header, uint32_t heard, double seconds) {
    timespec limit;
    limit.tv_sec = time_t(seconds);
    limit.tv_nsec = long((seconds - double(limit.tv_sec)) * 1e9);
    header.asleep.store(1);
    syscall(SYS_futex, &header.bell, FUTEX_WAIT, heard, &limit, nullptr, 0);
    header.asleep.store(0);
}

}  // namespace powertrain
