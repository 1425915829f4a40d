"""What went wrong with a transfer, in words."""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from powertrain.errors import TransferFailed

_REMEDIES = {
    0: "the file is shorter than what is read: see whether something cut it, or read less",
    errno.ENOSPC: "free space on its disk, then resume from the last checkpoint, which is untouched",
    errno.EDQUOT: "free space, or ask for a larger quota, then resume from the last checkpoint, which is untouched",
    errno.EFBIG: "raise this user's limit on file sizes (`ulimit -f unlimited`), or use another file system",
    errno.ECANCELED: "wait for transfers before the engine is closed or the process ends",
    errno.EBADF: "open the file in a mode that allows it, and close it after the last transfer",
}


class Failure(NamedTuple):
    """The first thing that went wrong in one transfer.

    Attributes:
        code: of the system (errno); 0: the file ended.
        position: bytes of the transfer before it; all of them were moved.
        part: which of the files.
        offset: in that file.
    """

    code: int
    position: int
    part: int
    offset: int


def transfer_failed(failure: Failure, path: str, writes: bool, offset: int, length: int) -> TransferFailed:
    """Return the error of a transfer.

    Args:
        failure: what went wrong.
        path: of the file that it happened in.
        writes: whether it was a write.
        offset: of the transfer, in the logical file.
        length: of the transfer, in bytes.
    """
    doing = "writing to" if writes else "reading"
    what = "the file ended"
    if failure.code:
        what = f"{os.strerror(failure.code)} ({errno.errorcode.get(failure.code, failure.code)})"
    return TransferFailed(
        f"{doing} {path} failed: {what}",
        where=f"{path}, byte {failure.offset}",
        expected=f"{length} bytes {'to' if writes else 'from'} byte {offset} of the whole",
        found=f"{failure.position} bytes before it failed",
        remedy=_REMEDIES.get(failure.code),
    )
