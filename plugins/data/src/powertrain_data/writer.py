"""Writes a token file so that it is seen whole or not at all."""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from powertrain.errors import DataError
from powertrain_data.tokens import BLOCK, DTYPES, FORMAT, info_path


class TokenWriter:
    """Appends tokens to a new file that appears under its name when the ``with`` block ends well.

    Args:
        path: the token file; one that is there is replaced at the end.
        dtype: element type, a key of ``powertrain_data.tokens.DTYPES``.
        source: where the tokens come from; any JSON, kept beside them.

    Attributes:
        count: tokens written so far.
    """

    def __init__(self, path: str | Path, dtype: str, source: Mapping[str, Any]) -> None:
        self.path, self.dtype, self.source = Path(path), dtype, source
        self.count = 0
        # Not from tempfile, whose files nobody else may read: a data set is shared.
        self._temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        self._type = np.dtype(DTYPES[dtype])
        self._checksums: list[int] = []
        self._checksum = self._covered = 0

    def __enter__(self) -> TokenWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("xb")
        except OSError as error:
            raise _refused(self.path, error) from error
        return self

    def append(self, tokens: npt.ArrayLike) -> None:
        """Write tokens at the end.

        Raises:
            DataError: a token does not fit the element type, or the disk refuses.
        """
        given = np.asarray(tokens).reshape(-1)
        if given.size and given.dtype != self._type:
            self._check(given)
        data = given.astype(self._type).tobytes()
        try:
            self._file.write(data)
        except OSError as error:
            raise _refused(self.path, error) from error
        self.count += given.size
        self._cover(memoryview(data))

    def _check(self, given: npt.NDArray[Any]) -> None:
        """Refuse what is no whole number of the element type."""
        largest = np.iinfo(self._type).max
        if not np.issubdtype(given.dtype, np.integer):
            first, wrong = 0, True
        else:
            outside = (given < 0) | (given > largest)
            first, wrong = int(outside.argmax()), bool(outside.any())
        if wrong:
            raise DataError(
                f"a token does not fit {self.dtype}",
                where=f"{self.path}, token {self.count + first}",
                expected=f"whole numbers from 0 to {largest}",
                found=f"{given[first]} ({given.dtype})",
                remedy="write whole numbers, in a wider type if need be",
            )

    def _cover(self, data: memoryview) -> None:
        """Extend the checksums by ``data``."""
        while data:
            piece = data[: BLOCK - self._covered]
            data = data[len(piece) :]
            self._checksum = zlib.crc32(piece, self._checksum)
            self._covered += len(piece)
            if self._covered == BLOCK:
                self._checksums.append(self._checksum)
                self._checksum = self._covered = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        except OSError as failure:
            raise _refused(self.path, failure) from failure
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _commit(self) -> None:
        """Put the tokens in place, then their description, so that a description never lies."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._covered:
            self._checksums.append(self._checksum)
        fields = {
            "format": FORMAT,
            "dtype": self.dtype,
            "count": self.count,
            "checksums": self._checksums,
            "source": self.source,
        }
        place = info_path(self.path)
        place.unlink(missing_ok=True)
        self._temporary.replace(self.path)
        # The same temporary name serves again: it is unique, and removed in any case.
        self._temporary.write_text(json.dumps(fields), encoding="utf-8")
        self._temporary.replace(place)


def _refused(path: Path, error: OSError) -> DataError:
    return DataError(
        f"the token file {path.name} could not be written: {error.strerror}",
        where=str(path),
        remedy="free space or choose another directory; nothing was left behind",
    )
