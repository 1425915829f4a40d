"""Makes token files from text files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import attrs
import numpy as np

from powertrain.errors import DataError
from powertrain_data.writer import TokenWriter


@attrs.frozen
class Corpus:
    """The two token files of a text.

    Attributes:
        train: the part to learn from.
        validation: the part to measure on.
    """

    train: Path
    validation: Path


def build_bytes(
    paths: Iterable[str | Path],
    output: str | Path,
    *,
    root: str | Path | None = None,
    separator: int = 0,
    validation: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Write text files as byte tokens (uint8) to ``train.bin`` and ``validation.bin``.

    A hash of its path decides into which file a document goes, so the split
    does not depend on the other documents or on their order. The documents
    are written in the order of their paths.

    Args:
        paths: the text files, one document each.
        output: the directory of the two token files.
        root: paths are hashed relative to it, so that another machine splits alike; absent: their common parent.
        separator: the byte after each document.
        validation: share of the documents that go into validation, between 0 and 1.
        progress: called with (documents done, documents) after each.

    Raises:
        DataError: a file cannot be read or written, or a part would be empty.
    """
    files = sorted(Path(path).absolute() for path in paths)
    if not files:
        raise DataError("there are no text files to build from", where=str(output), remedy="give at least two files")
    base = Path(root).absolute() if root is not None else Path(os.path.commonpath([file.parent for file in files]))
    corpus = Corpus(Path(output) / "train.bin", Path(output) / "validation.bin")
    source = {"root": str(base), "documents": len(files), "separator": separator, "validation": validation}
    with ExitStack() as parts:
        writers = [
            parts.enter_context(TokenWriter(path, "uint8", source)) for path in (corpus.train, corpus.validation)
        ]
        for done, file in enumerate(files, start=1):
            writer = writers[_share(os.path.relpath(file, base)) < validation]
            try:
                text = file.read_bytes()
            except OSError as error:
                raise DataError(
                    f"a text file cannot be read: {error.strerror}", where=str(file), remedy="leave it out, or mend it"
                ) from error
            writer.append(np.frombuffer(text + bytes([separator]), np.uint8))
            if progress is not None:
                progress(done, len(files))
        for writer in writers:
            if writer.count == 0:
                raise DataError(
                    f"no document falls into {writer.path.name}",
                    where=str(output),
                    found=f"{len(files)} documents and validation = {validation}",
                    remedy="give more documents, or another share for validation",
                )
    return corpus


def _share(name: str) -> float:
    """Return a number in [0, 1) that depends on ``name`` alone, spelt with forward slashes."""
    digest = hashlib.sha256(name.replace(os.sep, "/").encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
