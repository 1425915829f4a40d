"""Weights from a model library's files: which name there is which tensor here, and loading them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import attrs
import torch

from powertrain.errors import CheckpointError, CheckpointMismatch
from powertrain.names import named_buffers, named_parameters, state_dict
from powertrain.roles.checkpoint import CheckpointReader, TensorSlice
from powertrain.text import did_you_mean

if TYPE_CHECKING:
    from powertrain.engine import Engine

_PREFIX = "model/"


@attrs.frozen(kw_only=True)
class WeightsReport:
    """What ``load_weights`` did.

    Attributes:
        source: the name of the directory or file.
        loaded: the model's tensors that were filled; tied ones under their first name.
        missing: the model's tensors that the files do not hold.
        unexpected: names in the files that the model does not have.
    """

    source: str
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]

    def __str__(self) -> str:
        rest = f", {len(self.missing)} missing, {len(self.unexpected)} unexpected"
        return f"{self.source}: {len(self.loaded)} tensors" + (rest if self.missing or self.unexpected else "")


class ModelWeights:
    """Plain weights, seen by the names of one model.

    A tied tensor is found under any of its names. One prefix that all names of the files
    have more, or less, than the model's is ignored. Names of buffers that the model
    does not save are passed over.

    Attributes:
        report: what will be loaded, and what is missing.

    Args:
        model: the model, which may be on the meta device.
        reader: the open files.
        strict: refuse names that one side lacks.

    Raises:
        CheckpointMismatch: shapes differ; names too, if ``strict``.
    """

    def __init__(self, model: torch.nn.Module, reader: CheckpointReader, *, strict: bool = True) -> None:
        self._reader = reader
        saved = {name.removeprefix(_PREFIX): info.shape for name, info in reader.tensors.items()}
        groups, passing = _names(model)
        rename = _Rename.best([name for names, _ in groups for name in names], saved)
        found = {rename(name): name for name in saved}
        self._source: dict[str, str] = {}
        loaded, missing, wrong, used = [], [], [], set()
        for names, shape in groups:
            here = [found[name] for name in names if name in found]
            used.update(here)
            if not here:
                missing.append(names[0])
            elif tuple(saved[here[0]]) != shape:
                wrong.append(f"{names[0]}: shape {list(saved[here[0]])} in the files, {list(shape)} in the model")
            else:
                loaded.append(names[0])
                self._source.update(dict.fromkeys(names, here[0]))
        unexpected = [name for name in saved if name not in used and rename(name) not in passing]
        self.report = WeightsReport(source=reader.tag, loaded=loaded, missing=missing, unexpected=unexpected)
        problems = wrong + (_problems(missing, unexpected, rename) if strict else [])
        if problems:
            raise CheckpointMismatch(
                f"the weights in {reader.tag!r} are of another model: {len(problems)} tensors differ",
                found="\n    ".join(problems[:10]) + (f"\n    … and {len(problems) - 10} more" * (len(problems) > 10)),
                remedy="build the model of these weights"
                + ("" if wrong else "; engine.load_weights(path, strict=False) loads what matches"),
            )

    def covers(self, name: str) -> bool:
        """Return whether the files hold this parameter or buffer, under whichever of its names."""
        return name in self._source

    def fill(self, name: str, target: torch.Tensor, start: int) -> None:
        """Read elements ``start ..`` of a tensor into ``target`` (flat), converting its type; local."""
        self.read([(name, TensorSlice(name, (), target, start))])

    def read(self, slices: Iterable[tuple[str, TensorSlice]]) -> None:
        """Fill slices of the model's tensors, each given with the tensor's name; local."""
        self._reader.read(
            [
                attrs.evolve(item, name=full, shape=self._reader.tensors[full].shape)
                for name, item in slices
                for full in [_PREFIX + self._source[name]]
            ]
        )


def load(engine: Engine, reader: CheckpointReader, *, strict: bool) -> WeightsReport:
    """Load weights into an engine's model and its masters; optimizer state stays. Every rank calls it.

    Raises:
        CheckpointMismatch: names or shapes differ; nothing was changed.
        CheckpointError: a file could not be read on some rank; raised on all, and what was read before it is loaded.
    """
    weights = ModelWeights(engine.module, reader, strict=strict)
    wrapper, module = engine.optimizer_wrapper, engine.module
    params = [(name, param) for name, param in named_parameters(module) if weights.covers(name)]
    buffers = [(name, buffer) for name, buffer in named_buffers(module) if weights.covers(name)]
    failure: Exception | None = None
    try:
        for name, param in params:
            weights.read([(name, wrapper.parts(param)["value"])])
        for name, buffer in buffers:
            value = torch.empty(buffer.numel(), dtype=buffer.dtype, device=buffer.device)
            weights.fill(name, value, 0)
            buffer.detach().copy_(value.view(buffer.shape))
    except (CheckpointError, OSError) as error:
        failure = error
    # What follows is a collective: a rank that failed must not leave the others in it.
    verdicts = engine.context.communicator.gather_json(failure and str(failure), label="weights read")
    if failure is not None:
        raise failure
    for rank, verdict in enumerate(verdicts):
        if verdict is not None:
            raise CheckpointError(f"rank {rank} could not read the weights", found=verdict)
    wrapper.publish()
    return weights.report


@attrs.frozen
class _Rename:
    """Turns a name of the files into one of the model: takes ``less`` off its front, or puts ``more`` there."""

    less: str = ""
    more: str = ""

    def __call__(self, name: str) -> str:
        """Return the name as the model has it."""
        return self.more + name.removeprefix(self.less)

    @classmethod
    def best(cls, model: Iterable[str], files: Mapping[str, object]) -> _Rename:
        """Return the one under which most names match; names as they are, if none is better."""
        wanted = set(model)
        votes = Counter({cls(): len(wanted & files.keys())})
        for name in wanted:
            votes.update(cls(more=head) for head, tail in _splits(name) if tail in files)
        for name in files:
            votes.update(cls(less=head) for head, tail in _splits(name) if tail in wanted)
        rename, count = votes.most_common(1)[0]
        return rename if count > votes[cls()] else cls()


def _splits(name: str) -> Iterable[tuple[str, str]]:
    """Yield each way to cut a name after a dot."""
    parts = name.split(".")
    for index in range(1, len(parts)):
        yield ".".join(parts[:index]) + ".", ".".join(parts[index:])


def _names(model: torch.nn.Module) -> tuple[list[tuple[list[str], tuple[int, ...]]], set[str]]:
    """Return the names of each tensor that is saved, with its shape; and the names of buffers that are not."""
    groups: dict[int, tuple[list[str], tuple[int, ...]]] = {}
    saved = state_dict(model)
    tensors = [*named_parameters(model, remove_duplicate=False), *named_buffers(model, remove_duplicate=False)]
    for name, tensor in tensors:
        if name in saved:
            groups.setdefault(id(tensor), ([], tuple(tensor.shape)))[0].append(name)
    return list(groups.values()), {name for name, _ in tensors if name not in saved}


def _problems(missing: list[str], unexpected: list[str], rename: _Rename) -> list[str]:
    """Return what one side lacks in words; near names are looked for while few enough are shown."""
    names = [rename(name) for name in unexpected]
    result = [
        f"{name}: not in the files{did_you_mean(name, names) if index < 10 else ''}"
        for index, name in enumerate(missing)
    ]
    return result + [f"{name}: in the files, not in the model" for name in unexpected]
