"""Tokens in a memory-mapped file, with a small JSON file beside it that says what they are.

The token file is the tokens alone, little-endian. The JSON file has the same
name with ``.json`` appended and is written last: where it is, the tokens are
whole.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import torch

from powertrain.errors import DataError

DTYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}
"""Element types of token files, by the name in the JSON file."""

BLOCK = 4 * 2**20
"""Bytes that one checksum covers."""

FORMAT = "powertrain-tokens-1"


@attrs.frozen(kw_only=True)
class TokenInfo:
    """What the JSON file says.

    Attributes:
        dtype: element type, a key of ``DTYPES``.
        count: number of tokens.
        checksums: CRC-32 of each ``BLOCK`` bytes of the token file.
        source: where the tokens come from; any JSON.
    """

    dtype: str
    count: int
    checksums: tuple[int, ...]
    source: Mapping[str, Any]

    @property
    def size(self) -> int:
        """The size of the token file in bytes."""
        return self.count * np.dtype(DTYPES[self.dtype]).itemsize


def info_path(path: Path) -> Path:
    """Return the place of the JSON file of the token file ``path``."""
    return path.with_name(path.name + ".json")


def read_info(path: Path) -> TokenInfo:
    """Read and check the JSON file of the token file ``path``.

    Raises:
        DataError: either file is missing, garbled, or of another size than the other says.
    """
    place = info_path(path)
    try:
        fields = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"there is no token file {path.name}: its description is missing",
            where=str(place),
            remedy="build it, for example with powertrain_data.corpus.build_bytes",
        ) from None
    except json.JSONDecodeError as error:
        raise _garbled(f"{place}:{error.lineno}:{error.colno}", error.msg) from None
    except UnicodeDecodeError as error:
        raise _garbled(f"{place}, byte {error.start}", "not UTF-8") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise _garbled(str(place), f'no "format": "{FORMAT}"')
    if fields.get("dtype") not in tuple(DTYPES):
        raise _garbled(str(place), f'"dtype" is {fields.get("dtype")!r}, not one of {", ".join(DTYPES)}')
    count, checksums = fields.get("count"), fields.get("checksums")
    if type(count) is not int or count < 0:
        raise _garbled(str(place), f'"count" is {count!r}, not a number of tokens')
    info = TokenInfo(dtype=fields["dtype"], count=count, checksums=(), source=fields.get("source", {}))
    blocks = -(-info.size // BLOCK)
    if not (isinstance(checksums, list) and len(checksums) == blocks and all(type(one) is int for one in checksums)):
        raise _garbled(str(place), f'"checksums" is not a list of {blocks} numbers')
    _check_size(path, info)
    return attrs.evolve(info, checksums=tuple(checksums))


def _check_size(path: Path, info: TokenInfo) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"the token file {path.name} is missing", where=str(path), remedy="build it again") from None
    if size != info.size:
        raise DataError(
            f"the token file {path.name} is {'truncated' if size < info.size else 'too long'}",
            where=f"{path}, byte {min(size, info.size)}",
            expected=f"{info.size} bytes: {info.count} tokens of {info.dtype}",
            found=f"{size} bytes",
            remedy="copy or build it again",
        )


def _garbled(where: str, what: str) -> DataError:
    return DataError(
        "the description of a token file is garbled", where=where, found=what, remedy="copy or build it again"
    )


class TokenDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Windows of a token file, as inputs and next-token targets.

    Window i starts at token ``i * sequence``: each token is an input once and
    a target once. Tokens at the end that fill no window are left out. The file
    is mapped, not read, and workers of a DataLoader map it for themselves.

    Args:
        path: the token file.
        sequence: tokens in a window.

    Raises:
        DataError: the file is missing, truncated or garbled, or too short for one window.
    """

    def __init__(self, path: str | Path, sequence: int) -> None:
        self.path, self.sequence = Path(path), sequence
        self.info = read_info(self.path)
        if sequence < 1 or self.info.count <= sequence:
            raise DataError(
                f"a token file of {self.info.count} tokens has no window of {sequence}",
                where=str(self.path),
                expected=f"a window from 1 to {self.info.count - 1} tokens, and one more to predict",
                remedy="choose a shorter window, or use more text",
            )
        self.tokens: npt.NDArray[np.integer] = np.memmap(self.path, DTYPES[self.info.dtype], "r")

    def __len__(self) -> int:
        return (self.info.count - 1) // self.sequence

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``tokens`` and ``targets`` of a window: int64, shape (sequence,), targets one token ahead.

        Raises:
            IndexError: there is no such window.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)} in {self.path}")
        start = index * self.sequence
        window = torch.from_numpy(self.tokens[start : start + self.sequence + 1].astype(np.int64))
        return {"tokens": window[:-1], "targets": window[1:]}

    def verify(self) -> None:
        """Read the whole file and compare its checksums.

        Raises:
            DataError: some bytes are not those that were written; names the first bad block.
        """
        with self.path.open("rb") as file:
            for number, expected in enumerate(self.info.checksums):
                found = zlib.crc32(file.read(BLOCK))
                if found != expected:
                    start = number * BLOCK
                    raise DataError(
                        f"the token file {self.path.name} is damaged",
                        where=f"{self.path}, bytes {start} to {min(start + BLOCK, self.info.size) - 1}",
                        expected=f"CRC-32 {expected:08x}",
                        found=f"{found:08x}",
                        remedy="copy or build it again; check the disk",
                    )

    def __reduce__(self) -> tuple[type[TokenDataset], tuple[Path, int]]:
        # A pickled memory map would carry the tokens themselves.
        return type(self), (self.path, self.sequence)
