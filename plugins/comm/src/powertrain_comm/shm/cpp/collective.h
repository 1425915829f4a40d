// One collective of this rank, and how it gets on without ever waiting.
//
// Memory from the heap is read where it lies, by whoever needs it. What lies elsewhere goes through the owner's staging
// area, in pieces that stay in some cache: the owner copies piece k there (`stage`), the others read it (`take`) while
// the owner copies piece k + 1. An all_reduce has a third part, in which each rank brings what the others have reduced
// (`collect`); where all results lie in the heap, they are written there at once instead.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>
#include <powertrain/formats.h>
#include "heap.h"
#include "lane.h"
#include "peer.h"
#include "work.h"

namespace powertrain {

enum Status : int { kUnderWay = 0, kDone = 1, kPeerGone = 2, kDiverged = 3, kBroken = 4 };
enum Stage : int { kWaiting = 0, kPosted = 1, kWorking = 2, kLeft = 3, kOver = 4 };

// The ranks of a lane, in order, and which of them this is.
struct Group {
    uint64_t lane;
    std::vector<int> ranks;  // places among the host's ranks
    int me;

    int size() const { return int(ranks.size()); }
};

struct Collective {
    const Group* group;
    int operation, format, reduction, source;
    int64_t numel;
    const uint8_t* input;
    uint8_t* output;
    std::vector<int64_t> starts, takes;  // all_to_all: where pieces begin in the input, and in the output
    uint32_t where = 0;
    uint64_t sequence = 0;
    int stage = kWaiting;
    int64_t staged = 0, taken = 0, collected = 0;  // pieces that are done
    int64_t to_stage = 0, to_take = 0, to_collect = 0;
    std::atomic<int> status{kUnderWay};
    std::chrono::steady_clock::time_point issued = std::chrono::steady_clock::now(), ended;
    std::string message;
    int culprit = -1;

    int width() const { return bytes_of(format); }
    bool reduces() const { return operation == kAllReduce || operation == kReduceScatter; }
    bool same_for_all() const { return operation == kAllGather || operation == kBroadcast; }

    // Bytes that this rank gives.
    uint64_t given() const {
        if (operation == kBarrier || (operation == kBroadcast && group->me != source)) return 0;
        return uint64_t(numel) * uint64_t(width()) * uint64_t(operation == kReduceScatter ? group->size() : 1);
    }

    // Whether this rank needs what the rank at `index` gives.
    bool needs(int index) const { return operation != kBroadcast || index == source; }
};

// Carries collectives on. All is done by one thread at a time.
class Machine {
  public:
    Machine(std::vector<std::unique_ptr<Peer>>& peers, Heap& heap, int self, const Work& work)
        : peers_(peers), heap_(heap), self_(self), work_(work) {}

    // Tell the others what this rank takes part in; false while the slowest of them is too far behind.
    bool post(Collective& c) {
        if (c.sequence >= kRing && !everyone(c, &Lane::left, c.sequence - kRing + 1)) return false;
        Lane& mine = lane(c, c.group->me);
        Post& post = mine.ring[c.sequence % kRing];
        post.operation = c.operation, post.format = c.format, post.reduction = c.reduction, post.source = c.source;
        post.numel = c.numel, post.where = c.where;
        if (c.where & kInputShared) post.input = uint64_t(c.input - heap_.base());
        if (c.where & kOutputShared) post.output = uint64_t(c.output - heap_.base());
        if (c.where & kInputHere && c.given()) std::memcpy(post.data, c.input, c.given());
        for (size_t index = 0; index < c.starts.size(); ++index) post.starts[index] = c.starts[index];
        mine.posted.store(c.sequence + 1, std::memory_order_release);
        ring(c);
        c.stage = kPosted;
        return true;
    }

    // Go on with a collective that was posted, the first of its lane that has work to do; true if anything was done.
    bool advance(Collective& c) {
        if (c.stage == kPosted) {
            for (int index = 0; index < c.group->size(); ++index)
                if (c.needs(index) && lane(c, index).posted.load(std::memory_order_acquire) <= c.sequence) return false;
            if (!agreed(c)) return true;
            plan(c);
            c.stage = kWorking;
        }
        if (c.stage == kWorking) {
            bool moved = false;
            if (c.staged < c.to_stage) moved |= stage(c);
            if (c.taken < c.to_take) moved |= c.reduces() ? reduce(c) : gather(c);
            if (c.collected < c.to_collect) moved |= collect(c);
            if (c.status.load() != kUnderWay) return true;
            if (c.staged < c.to_stage || c.taken < c.to_take || c.collected < c.to_collect) return moved;
            lane(c, c.group->me).left.store(c.sequence + 1, std::memory_order_release);
            ring(c);
            c.stage = kLeft;
        }
        if (c.stage == kLeft && free_of_others(c)) {
            c.stage = kOver;
            c.ended = std::chrono::steady_clock::now();
            c.status.store(kDone);
            return true;
        }
        return false;
    }

  private:
    // Bytes of a rank's staging area in one lane at the most: more than its own cache holds, so that what others read has
    // mostly gone on to the cache that all share; another core's changed lines cost more than memory's own.
    static constexpr int64_t kStaging = 4 << 20;
    static constexpr int64_t kPiece = 512 << 10;  // bytes of a piece at the most; measured
    static const int64_t kNear = 8 << 10;       // bytes that stay in the nearest cache
    static const int64_t kPastCache = 1 << 20;  // bytes from which a result is written past the cache

    Peer& peer(const Collective& c, int index) const { return *peers_[size_t(c.group->ranks[size_t(index)])]; }
    Lane& lane(const Collective& c, int index) const { return peer(c, index).lane(c.group->lane); }
    const Post& post_of(const Collective& c, int index) const { return lane(c, index).ring[c.sequence % kRing]; }

    void ring(const Collective& c) const {
        for (int index = 0; index < c.group->size(); ++index)
            if (index != c.group->me) ring_bell(peer(c, index).header());
    }

    bool everyone(const Collective& c, std::atomic<uint64_t> Lane::* count, uint64_t least) const {
        for (int index = 0; index < c.group->size(); ++index)
            if ((lane(c, index).*count).load(std::memory_order_acquire) < least) return false;
        return true;
    }

    void count(Collective& c, std::atomic<uint64_t> Lane::* which, int64_t pieces) const {
        (lane(c, c.group->me).*which).store(piece_count(c.sequence, pieces), std::memory_order_release);
        ring(c);
    }

    bool has(const Collective& c, int index, std::atomic<uint64_t> Lane::* which, int64_t pieces) const {
        return (lane(c, index).*which).load(std::memory_order_acquire) >= piece_count(c.sequence, pieces);
    }

    // Whether nobody reads or writes this rank's tensors any more.
    bool free_of_others(const Collective& c) const {
        if (!(c.where & (kInputShared | kOutputShared))) return true;
        return everyone(c, &Lane::left, c.sequence + 1);
    }

    bool agreed(Collective& c) {
        for (int index = 0; index < c.group->size(); ++index) {
            if (!c.needs(index)) continue;
            const Post& other = post_of(c, index);
            if (other.operation == c.operation && other.format == c.format && other.reduction == c.reduction &&
                other.source == c.source && (other.numel == c.numel || c.operation == kAllToAll))
                continue;
            return differs(c, index, told(other) + "|" + told(post_of(c, c.group->me)));  // Python has the names
        }
        if (c.operation != kAllToAll) return true;
        for (int index = 0; index < c.group->size(); ++index) {
            const Post& other = post_of(c, index);
            const int64_t sent = other.starts[c.group->me + 1] - other.starts[c.group->me];
            const int64_t expected = c.takes[size_t(index) + 1] - c.takes[size_t(index)];
            if (sent != expected)
                return differs(c, index, "it sends " + std::to_string(sent) + " bytes where " +
                                             std::to_string(expected) + " are expected");
        }
        return true;
    }

    static std::string told(const Post& post) {
        std::string text;
        for (const int64_t each : {int64_t(post.operation), int64_t(post.format), int64_t(post.reduction),
                                   int64_t(post.source), post.numel})
            text += std::to_string(each) + " ";
        return text;
    }

    bool differs(Collective& c, int index, std::string how) {
        c.culprit = c.group->ranks[size_t(index)];
        c.message = std::move(how);
        c.status.store(kDiverged);
        return false;
    }

    // --- where things are -----------------------------------------------------------------

    bool small(const Collective& c) const { return c.where & kInputHere; }

    // The elements that a rank reduces for all: whole cache lines, so that no two ranks write to one.
    static int64_t cut(const Collective& c, int index) {
        const int64_t lines = (c.numel + 63) / 64, at = lines * index / c.group->size() * 64;
        return std::min(at, c.numel);
    }

    // Bytes of what `from` gives that `to` needs: where they begin in the input, and how many there are.
    struct Part {
        int64_t begin, length;
    };

    Part part(const Collective& c, int from, int to) const {
        const int64_t width = c.width(), whole = c.numel * width;
        switch (c.operation) {
            case kAllReduce:
                if (small(c)) return {0, whole};
                return {cut(c, to) * width, (cut(c, to + 1) - cut(c, to)) * width};
            case kReduceScatter: return {whole * to, whole};
            case kAllToAll: {
                const int64_t* starts = from == c.group->me ? c.starts.data() : post_of(c, from).starts;
                return {starts[to], starts[to + 1] - starts[to]};
            }
            case kBarrier: return {0, 0};
            case kBroadcast: return {0, from == c.source && to != from ? whole : 0};
            default: return {0, whole};
        }
    }

    int64_t piece(const Collective& c) const { return std::min(kPiece, kStaging / 2 / c.group->size() / 64 * 64); }

    int64_t pieces(const Collective& c, int64_t bytes) const { return (bytes + piece(c) - 1) / piece(c); }

    bool staged_by(const Collective& c, int index) const {
        return !(post_of(c, index).where & (kInputShared | kInputHere));
    }

    bool results_shared(const Collective& c) const {
        for (int index = 0; index < c.group->size(); ++index)
            if (!(post_of(c, index).where & kOutputShared)) return false;
        return true;
    }

    void plan(Collective& c) {
        const int me = c.group->me, count = c.group->size();
        for (int index = 0; index < count; ++index) {
            c.to_take = std::max(c.to_take, pieces(c, part(c, index, me).length));
            if (index != me && staged_by(c, me))
                c.to_stage = std::max(c.to_stage, pieces(c, part(c, me, index).length));
        }
        if (c.operation != kAllReduce || small(c) || results_shared(c)) return;
        for (int index = 0; index < count; ++index)
            if (index != me) c.to_collect = std::max(c.to_collect, pieces(c, part(c, index, index).length));
    }

    // The place of a piece in a rank's staging area: two of each, used in turn.
    uint8_t* staging(const Collective& c, int owner, int slot, int64_t number) const {
        const uint64_t offset = lane(c, owner).staging.load(std::memory_order_acquire);
        const int64_t turn = number & 1;
        return peer(c, owner).base() + offset + (turn * c.group->size() + slot) * piece(c);
    }

    // Whether there is a staging area; without room for one the collective has failed.
    bool own_staging(Collective& c) {
        Lane& mine = lane(c, c.group->me);
        if (mine.staging.load()) return true;
        const uint8_t* place = heap_.allocate(uint64_t(2 * c.group->size() * piece(c)));
        if (place) {
            mine.staging.store(uint64_t(place - heap_.base()), std::memory_order_release);
            return true;
        }
        c.message = "its shared memory is used up";
        c.culprit = self_;
        c.status.store(kBroken);
        return false;
    }

    // Piece `number` of what `from` gives to this rank: where it can be read.
    const uint8_t* source(const Collective& c, int from, int64_t number) const {
        const int me = c.group->me;
        const Post& post = post_of(c, from);
        const int64_t begin = part(c, from, me).begin + number * piece(c);
        if (from == me) return c.input + begin;
        if (post.where & kInputHere) return post.data + begin;
        if (post.where & kInputShared) return peer(c, from).base() + post.input + begin;
        return staging(c, from, c.same_for_all() ? from : me, number);
    }

    int64_t length(const Collective& c, int64_t whole, int64_t number) const {
        return std::max(int64_t(0), std::min(piece(c), whole - number * piece(c)));
    }

    // --- the three parts of the work ----------------------------------------------------------

    // Copy the next piece for every other rank into the staging area.
    bool stage(Collective& c) {
        const int me = c.group->me;
        const int64_t number = c.staged;
        if (number < 2 && !everyone(c, &Lane::left, c.sequence)) return false;  // the one before may still be read
        for (int index = 0; number >= 2 && index < c.group->size(); ++index)
            if (index != me && length(c, part(c, me, index).length, number - 2) && !has(c, index, &Lane::consumed, number - 1))
                return false;
        if (!own_staging(c)) return true;
        for (int index = 0; index < c.group->size(); ++index) {
            if (index == me) continue;
            const Part all = part(c, me, index);
            if (const int64_t bytes = length(c, all.length, number))
                work_.copy(staging(c, me, c.same_for_all() ? me : index, number),
                           c.input + all.begin + number * piece(c), uint64_t(bytes));
            if (c.same_for_all()) break;  // one copy is for all
        }
        count(c, &Lane::staged, ++c.staged);
        return true;
    }

    // Whether the next piece of every other rank's input is there.
    bool arrived(const Collective& c) const {
        for (int index = 0; index < c.group->size(); ++index)
            if (index != c.group->me && staged_by(c, index) && length(c, part(c, index, c.group->me).length, c.taken) &&
                !has(c, index, &Lane::staged, c.taken + 1))
                return false;
        return true;
    }

    // Reduce the next piece of this rank's part.
    bool reduce(Collective& c) {
        const int ranks = c.group->size(), me = c.group->me;
        const int64_t number = c.taken;
        if (!arrived(c)) return false;
        // Its result takes a place in the staging area, from which the one before the last must have been read.
        const bool stages = c.to_collect && !(c.where & kOutputShared);
        if (stages) {
            if (number < 2 ? !everyone(c, &Lane::left, c.sequence) : !others_have(c, &Lane::collected, number - 1)) return false;
            if (!own_staging(c)) return true;
        }
        const Part mine = part(c, me, me);
        const int64_t bytes = length(c, mine.length, number), elements = bytes / c.width();
        const int64_t begin = (c.operation == kAllReduce ? mine.begin : 0) + number * piece(c);
        const void* terms[kMaxRanks];
        for (int index = 0; index < ranks; ++index) terms[index] = source(c, index, number);
        uint8_t* to = c.output + begin;
        if (c.operation == kReduceScatter && mine.length >= kPastCache && !overlaps(c, to)) {
            room_.resize(size_t(bytes));
            work_.combine(room_.data(), terms, ranks, c.format, 0, elements, c.reduction);
            work_.stream(to, room_.data(), uint64_t(bytes));
        } else {
            const bool spread = c.operation == kAllReduce && !small(c) && !c.to_collect;
            // In parts that stay in the nearest cache until they are copied on.
            const int64_t near = stages || spread ? kNear / c.width() : elements;
            for (int64_t from = 0; from < elements; from += near) {
                const int64_t end = std::min(from + near, elements), at = from * c.width();
                const uint64_t length = uint64_t(end - from) * uint64_t(c.width());
                work_.combine(to, terms, ranks, c.format, from, end, c.reduction);
                if (stages) work_.copy(staging(c, me, me, number) + at, to + at, length);
                for (int step = 1; spread && step < ranks; ++step) {
                    const int index = (me + step) % ranks;
                    work_.copy(peer(c, index).base() + post_of(c, index).output + begin + at, to + at, length);
                }
            }
        }
        count(c, &Lane::consumed, ++c.taken);
        return true;
    }

    // Bring the next piece of what each other rank has reduced.
    bool collect(Collective& c) {
        const int ranks = c.group->size(), me = c.group->me;
        const int64_t number = c.collected;
        for (int index = 0; index < ranks; ++index)
            if (index != me && length(c, part(c, index, index).length, number) && !has(c, index, &Lane::consumed, number + 1))
                return false;
        for (int step = 1; step < ranks; ++step) {
            const int index = (me + step) % ranks;
            const Part theirs = part(c, index, index);
            const int64_t bytes = length(c, theirs.length, number), begin = theirs.begin + number * piece(c);
            if (!bytes) continue;
            const Post& post = post_of(c, index);
            const uint8_t* from = post.where & kOutputShared ? peer(c, index).base() + post.output + begin
                                                             : staging(c, index, index, number);
            copy(c.output + begin, from, bytes, c.numel * c.width());
        }
        count(c, &Lane::collected, ++c.collected);
        return true;
    }

    // Copy the next piece of each rank's input to its place.
    bool gather(Collective& c) {
        const int ranks = c.group->size(), me = c.group->me;
        const int64_t number = c.taken;
        if (!arrived(c)) return false;
        for (int step = 0; step < ranks; ++step) {
            const int index = (me + step) % ranks;
            const int64_t all = part(c, index, me).length, bytes = length(c, all, number);
            if (!bytes) continue;
            const int64_t place = c.operation == kAllToAll    ? c.takes[size_t(index)]
                                  : c.operation == kAllGather ? c.numel * c.width() * index
                                                              : 0;
            copy(c.output + place + number * piece(c), source(c, index, number), bytes, all);
        }
        count(c, &Lane::consumed, ++c.taken);
        return true;
    }

    void copy(uint8_t* to, const uint8_t* from, int64_t bytes, int64_t all) const {
        if (to == from) return;
        if (all >= kPastCache) work_.stream(to, from, uint64_t(bytes));
        else work_.copy(to, from, uint64_t(bytes));
    }

    bool others_have(const Collective& c, std::atomic<uint64_t> Lane::* which, int64_t pieces) const {
        for (int index = 0; index < c.group->size(); ++index)
            if (index != c.group->me && !has(c, index, which, pieces)) return false;
        return true;
    }

    // Whether a place is in this rank's input, where others may still read.
    static bool overlaps(const Collective& c, const uint8_t* place) {
        return place >= c.input && place < c.input + c.given();
    }

    std::vector<std::unique_ptr<Peer>>& peers_;
    Heap& heap_;
    int self_;
    const Work& work_;
    std::vector<uint8_t> room_;
};

}  // namespace powertrain
