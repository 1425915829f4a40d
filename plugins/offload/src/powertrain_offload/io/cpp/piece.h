// What one system call moves: part of a transfer, in one part of the file, by one descriptor.
//
// Whole blocks go past the page cache. What is before the first block's boundary and after the last one's goes by the
// buffered descriptor. The kernel keeps both views alike: a direct read writes dirty pages of its range first, a direct
// write drops them. That holds as long as no page is touched both ways at once, so the boundary is a page at the least.
// (To read, change and write back the whole block instead would lose what another transfer, or another process, writes
// to the rest of it.)
#pragma once
#include <cerrno>
#include <cstring>
#include <sys/types.h>
#include "transfer.h"

namespace powertrain {

struct Piece {
    std::shared_ptr<Transfer> transfer;
    const Part* part = nullptr;
    uint32_t number = 0;  // of the part
    uint64_t offset = 0;  // in the part
    uint64_t length = 0;
    uint64_t position = 0;  // in the transfer
    uint64_t moved = 0;
    bool direct = false;
    uint8_t* bounce = nullptr;

    int descriptor() const { return direct ? part->direct : part->buffered; }
    uint8_t* address() const { return (bounce ? bounce : transfer->memory + position) + moved; }
    bool misplaced() const { return direct && reinterpret_cast<uintptr_t>(transfer->memory + position) % part->memory; }

    // Go through aligned memory of the engine.
    void detour(uint8_t* aligned) {
        bounce = aligned;
        if (transfer->writes) std::memcpy(bounce, transfer->memory + position, length);
    }

    // Take what a call returned: bytes, or an errno below zero. Return whether there is more to do.
    bool take(int64_t result) {
        if (result == -EINTR || result == -EAGAIN) return true;
        if (result == -EINVAL && direct) {  // wants another alignment than it says
            direct = false;
            return true;
        }
        if (result <= 0) {
            const int nothing = transfer->writes ? EIO : 0;
            const Failure failure = {result ? int(-result) : nothing, position + moved, number, offset + moved};
            transfer->fail(failure, length);
            return false;
        }
        moved += uint64_t(result);
        if (moved < length) {
            if (direct && moved % part->edge) direct = false;
            return true;
        }
        if (bounce && !transfer->writes) std::memcpy(transfer->memory + position, bounce, length);
        transfer->finish(length);
        return false;
    }
};

// The next piece of a transfer that has some bytes left to give.
inline Piece cut(const std::shared_ptr<Transfer>& transfer, uint64_t block) {
    const File& file = *transfer->file;
    const uint64_t most = std::min(block, transfer->length - transfer->given);
    const Span span = file.at(transfer->offset + transfer->given, most);
    Piece piece;
    piece.transfer = transfer, piece.part = &file.parts[span.part], piece.number = span.part;
    piece.offset = span.offset, piece.length = span.length, piece.position = transfer->given;
    if (piece.part->direct >= 0) {
        const uint64_t edge = piece.part->edge, before = span.offset % edge;
        if (before) piece.length = std::min(span.length, edge - before);
        else if (span.length >= edge) piece.length = span.length - span.length % edge, piece.direct = true;
    }
    transfer->given += piece.length;
    return piece;
}

}  // namespace powertrain
