"""Token files built from text."""

from __future__ import annotations

from pathlib import Path

import pytest

from powertrain.errors import DataError
from powertrain_data.corpus import build_bytes
from powertrain_data.tokens import TokenDataset, read_info


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Two hundred small documents, some of them beyond ASCII, in two directories."""
    files = []
    for number in range(200):
        file = tmp_path / "texts" / f"part{number % 2}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"document {number}: äöü\n", encoding="utf-8")
        files.append(file)
    return files


def documents(path: Path) -> list[str]:
    """Return the documents of a token file."""
    return path.read_bytes().decode().split("\0")[:-1]


def test_each_document_lies_in_one_part_and_ends_with_the_separator(texts: list[Path], tmp_path: Path) -> None:
    """The two parts together are the texts, each followed by the separator, in the order of their paths."""
    corpus = build_bytes(texts, tmp_path / "out", validation=0.2)
    train, validation = documents(corpus.train), documents(corpus.validation)
    assert sorted(train + validation) == sorted(file.read_text(encoding="utf-8") for file in texts)
    assert train == [text for file in sorted(texts) if (text := file.read_text(encoding="utf-8")) in set(train)]
    assert 20 <= len(validation) <= 60
    assert read_info(corpus.train).count == corpus.train.stat().st_size
    TokenDataset(corpus.train, 16).verify()


def test_the_split_depends_on_relative_paths_alone(texts: list[Path], tmp_path: Path) -> None:
    """Another place, another order and fewer documents put each document where it was."""
    whole = build_bytes(texts, tmp_path / "a", validation=0.2)
    moved = tmp_path / "elsewhere"
    (tmp_path / "texts").rename(moved)
    some = [moved / file.relative_to(tmp_path / "texts") for file in reversed(texts[:150])]
    part = build_bytes(some, tmp_path / "b", root=moved, validation=0.2)
    assert set(documents(part.validation)) == {file.read_text() for file in some} & set(documents(whole.validation))


def test_progress_counts_documents(texts: list[Path], tmp_path: Path) -> None:
    """The callback sees each document once, and the number of all."""
    told: list[tuple[int, int]] = []
    build_bytes(texts, tmp_path / "out", validation=0.2, progress=lambda *step: told.append(step))
    assert told == [(done, 200) for done in range(1, 201)]


def test_the_separator_can_be_chosen(texts: list[Path], tmp_path: Path) -> None:
    """The byte after each document is the one asked for, and the description keeps it."""
    corpus = build_bytes(texts, tmp_path / "out", separator=3)
    assert corpus.train.read_bytes().count(b"\3") + corpus.validation.read_bytes().count(b"\3") == 200
    assert read_info(corpus.train).source["separator"] == 3


@pytest.mark.parametrize(("validation", "empty"), [(0.0, "validation.bin"), (1.0, "train.bin")])
def test_an_empty_part_is_refused(texts: list[Path], tmp_path: Path, validation: float, empty: str) -> None:
    """A part without documents is an error that names it, and neither file is left."""
    with pytest.raises(DataError, match=f"no document falls into {empty}"):
        build_bytes(texts, tmp_path / "out", validation=validation)
    assert list((tmp_path / "out").iterdir()) == []


def test_no_texts_are_refused(tmp_path: Path) -> None:
    """Nothing to read is an error of its own."""
    with pytest.raises(DataError, match="no text files"):
        build_bytes([], tmp_path / "out")


def test_an_unreadable_text_is_named_and_nothing_is_left(texts: list[Path], tmp_path: Path) -> None:
    """A text that is not there stops the build with its path; no part appears."""
    gone = tmp_path / "texts" / "gone.txt"
    with pytest.raises(DataError, match="cannot be read") as caught:
        build_bytes([*texts, gone], tmp_path / "out")
    assert caught.value.where == str(gone)
    assert list((tmp_path / "out").iterdir()) == []
