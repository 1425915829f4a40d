"""Token files and their datasets."""

from __future__ import annotations

import errno
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from powertrain.errors import DataError
from powertrain_data import writer as writer_module
from powertrain_data.tokens import BLOCK, TokenDataset, info_path, read_info
from powertrain_data.writer import TokenWriter


def write(path: Path, tokens: Any, dtype: str = "uint8") -> Path:
    """Write a token file."""
    with TokenWriter(path, dtype, {"by": "a test"}) as writer:
        writer.append(tokens)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of the tokens 0 to 20."""
    return write(tmp_path / "tokens.bin", range(21))


@pytest.mark.parametrize(("dtype", "largest"), [("uint8", 255), ("uint16", 65535), ("uint32", 2**32 - 1)])
def test_windows_are_inputs_and_next_tokens(tmp_path: Path, dtype: str, largest: int) -> None:
    """Each window has its targets one token ahead, in int64, with the type's largest value intact."""
    dataset = TokenDataset(write(tmp_path / "t.bin", [1, 2, 3, 4, largest, 6, 7], dtype), sequence=2)
    assert len(dataset) == 3
    assert dataset[1]["tokens"].dtype == dataset[1]["targets"].dtype == torch.int64
    assert [(w["tokens"].tolist(), w["targets"].tolist()) for w in dataset] == [
        ([1, 2], [2, 3]),
        ([3, 4], [4, largest]),
        ([largest, 6], [6, 7]),
    ]


@given(st.integers(2, 200), st.integers(1, 30))
def test_every_token_is_a_target_once(tmp_path_factory: pytest.TempPathFactory, count: int, sequence: int) -> None:
    """Over all windows, targets are the tokens from the second on, up to the part that fills no window."""
    path = write(tmp_path_factory.mktemp("tokens") / "t.bin", range(count))
    if count <= sequence:
        with pytest.raises(DataError, match=f"no window of {sequence}"):
            TokenDataset(path, sequence)
        return
    targets = [token for window in TokenDataset(path, sequence) for token in window["targets"].tolist()]
    assert targets == list(range(1, len(targets) + 1))
    assert count - 1 - len(targets) < sequence


@pytest.mark.parametrize("index", [-1, 4, 99])
def test_a_window_that_is_not_there_is_an_index_error(path: Path, index: int) -> None:
    """Out-of-range windows are named with the file."""
    with pytest.raises(IndexError, match=rf"window {index} of 4 in .*tokens\.bin"):
        TokenDataset(path, 5)[index]


def test_a_sequence_of_nothing_is_refused(path: Path) -> None:
    """A window has at least one token."""
    with pytest.raises(DataError, match="no window of 0"):
        TokenDataset(path, 0)


def test_batches_collate_by_name(path: Path) -> None:
    """torch's default collation stacks the windows under the names that a model takes."""
    batch = next(iter(DataLoader(TokenDataset(path, 5), batch_size=4)))
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {"tokens": (4, 5), "targets": (4, 5)}


def test_pickling_carries_the_path_not_the_tokens(tmp_path: Path) -> None:
    """A worker that is sent the dataset maps the file itself."""
    dataset = TokenDataset(write(tmp_path / "t.bin", np.zeros(100_000, np.uint8)), 10)
    sent = pickle.dumps(dataset)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent)[3]["tokens"], dataset[3]["tokens"])


def test_windows_do_not_write_to_the_file(path: Path) -> None:
    """A window may be changed in place; the file and the next reader do not see it."""
    dataset = TokenDataset(path, 5)
    dataset[0]["tokens"].fill_(9)
    assert dataset[0]["tokens"].tolist() == [0, 1, 2, 3, 4]


def test_the_description_says_what_the_tokens_are(path: Path) -> None:
    """Type, count and source come back as written."""
    info = read_info(path)
    assert (info.dtype, info.count, info.size, info.source) == ("uint8", 21, 21, {"by": "a test"})


# --- damage ---------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "word"), [(20, "truncated"), (0, "truncated"), (22, "too long")])
def test_a_file_of_another_size_is_refused(path: Path, size: int, word: str) -> None:
    """The error names file and byte, and both sizes."""
    path.write_bytes((path.read_bytes() * 2)[:size])
    with pytest.raises(DataError, match=word) as caught:
        TokenDataset(path, 5)
    assert caught.value.where == f"{path}, byte {min(size, 21)}"
    assert caught.value.found == f"{size} bytes"


def test_a_missing_file_is_refused(path: Path) -> None:
    """Tokens without a description and a description without tokens are different errors."""
    path.unlink()
    with pytest.raises(DataError, match=r"the token file tokens\.bin is missing"):
        TokenDataset(path, 5)
    info_path(path).unlink()
    with pytest.raises(DataError, match="its description is missing"):
        TokenDataset(path, 5)


def replace(**fields: Any) -> Callable[[str], str]:
    """Return a change of some fields of a description."""
    return lambda text: json.dumps(json.loads(text) | fields)


@pytest.mark.parametrize(
    ("change", "where", "found"),
    [
        (lambda text: text[:-2], ":1:", "Expecting"),
        (lambda text: "", ":1:1", "Expecting value"),
        (lambda text: "[]", ".json", '"format"'),
        (replace(format="powertrain-tokens-9"), ".json", '"format"'),
        (replace(dtype="float32"), ".json", "'float32'"),
        (replace(dtype=["uint8"]), ".json", "['uint8']"),
        (replace(count="21"), ".json", "'21'"),
        (replace(count=-1), ".json", "-1"),
        (replace(count=True), ".json", "True"),
        (replace(checksums=[]), ".json", "1 numbers"),
        (replace(checksums=["a"]), ".json", "1 numbers"),
        (replace(checksums=None), ".json", "1 numbers"),
    ],
)
def test_a_garbled_description_is_refused(path: Path, change: Callable[[str], str], where: str, found: str) -> None:
    """Whatever is wrong with the description, the error names the file and what was found."""
    place = info_path(path)
    place.write_text(change(place.read_text()))
    with pytest.raises(DataError, match="garbled") as caught:
        TokenDataset(path, 5)
    assert str(place) in str(caught.value.where)
    assert where in str(caught.value.where)
    assert found in str(caught.value.found)


def test_a_description_that_is_no_text_is_refused(path: Path) -> None:
    """Bytes that are no UTF-8 are located."""
    info_path(path).write_bytes(b'{"form\xff')
    with pytest.raises(DataError, match="garbled") as caught:
        TokenDataset(path, 5)
    assert str(caught.value.where).endswith("byte 6")


@pytest.mark.parametrize(("position", "block"), [(0, 0), (BLOCK - 1, 0), (BLOCK, 1), (2 * BLOCK + 5, 2)])
def test_a_flipped_byte_is_found_by_verify(tmp_path: Path, position: int, block: int) -> None:
    """Verification passes on what was written, and names the block of a changed byte."""
    path = tmp_path / "t.bin"
    with TokenWriter(path, "uint8", {}) as writer:
        for start in range(0, 2 * BLOCK + 6, 999_983):  # pieces that do not end with blocks
            writer.append(np.arange(start, min(start + 999_983, 2 * BLOCK + 6)) % 251)
    TokenDataset(path, 64).verify()
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DataError, match="damaged") as caught:
        TokenDataset(path, 64).verify()
    end = min((block + 1) * BLOCK, 2 * BLOCK + 6) - 1
    assert caught.value.where == f"{path}, bytes {block * BLOCK} to {end}"


# --- writing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "position", "found"),
    [([1, 256], 3, "256"), ([-1], 2, "-1"), ([0, 1, 70_000, -5], 4, "70000"), ([0.5], 2, "0.5")],
)
def test_a_token_that_does_not_fit_is_refused(tmp_path: Path, tokens: list[Any], position: int, found: str) -> None:
    """A value outside the type is located; nothing of the file is left."""
    path = tmp_path / "t.bin"
    with pytest.raises(DataError, match="does not fit uint8") as caught, TokenWriter(path, "uint8", {}) as writer:
        writer.append([7, 7])
        writer.append(tokens)
    assert str(caught.value.where).endswith(f"token {position}")
    assert found in str(caught.value.found)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_what_was_there(path: Path) -> None:
    """An exception while writing keeps the former file, readable, and leaves no temporary one."""
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), TokenWriter(path, "uint16", {}) as writer:
        writer.append(range(1000))
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert len(TokenDataset(path, 5)) == 4
    assert set(path.parent.iterdir()) == {path, info_path(path)}


def test_a_crash_between_the_two_files_is_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the tokens are replaced and their description is not, no old description vouches for them."""

    def full(*args: Any, **kwargs: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match="No space left on device"):
        write(path, range(100, 121))
    monkeypatch.undo()
    with pytest.raises(DataError, match="its description is missing"):
        TokenDataset(path, 5)
    assert set(path.parent.iterdir()) == {path}


def test_a_full_disk_is_a_data_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that refuses the tokens leaves the former file in place."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module.os, "fsync", full)
    with pytest.raises(DataError, match="could not be written: No space left on device"):
        write(path, [1, 2])
    assert len(TokenDataset(path, 5)) == 4
    assert set(path.parent.iterdir()) == {path, info_path(path)}


def test_a_directory_that_cannot_be_made_is_a_data_error(tmp_path: Path) -> None:
    """A file where the directory should be is reported with the path."""
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="could not be written"):
        write(tmp_path / "taken" / "t.bin", [1])


def test_files_are_as_readable_as_any_other(path: Path) -> None:
    """Others may read a token file if they may read files of this user: a data set is shared."""
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == info_path(path).stat().st_mode == other.stat().st_mode
