"""Which parameters are gathered and reduced together.

A unit is one module, or several, with all their parameters. By default each
instance of the model's repeated block is a unit; what lies outside of them
(embeddings, the last norm, the head) is one more, the root.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

import attrs
import torch

from powertrain.blocks import LISTS, choose_blocks
from powertrain.names import named_parameters

ROOT = "(root)"
"""The name of the unit of what no other unit holds."""

Named = tuple[str, torch.nn.Parameter]


@attrs.frozen(eq=False)
class UnitPlan:
    """A unit before it has memory.

    Attributes:
        name: of its module, for people.
        paths: the modules whose forward needs it.
        params: its parameters with their global names, each owned by one unit only.
        whole_pass: kept from its first use in a forward pass until the pass, or backward, is over.
    """

    name: str
    paths: tuple[str, ...]
    params: tuple[Named, ...]
    whole_pass: bool = False

    @property
    def numel(self) -> int:
        """Its number of parameters."""
        return sum(param.numel() for _, param in self.params)


def plan_units(model: torch.nn.Module, unit: str | int | Sequence[str] | None) -> list[UnitPlan]:
    """Cut a model into units.

    Args:
        model: any module.
        unit: a class name, module paths or patterns of them, a largest number of
            parameters, or None for the repeated block.

    Returns:
        The root first (if it has parameters), then the units in the order of registration.

    Raises:
        ShardingError: a name matches nothing, with what there is instead.
    """
    groups = _groups(model, unit)
    users = _users(model, {model.get_submodule(path): number for number, paths in enumerate(groups) for path in paths})
    holders: dict[torch.nn.Parameter, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for param in module.parameters(recurse=False):
            holders[param].append(path)
    members: dict[int, list[Named]] = defaultdict(list)
    for name, param in named_parameters(model):
        # A parameter that several units share is the root's: it stays gathered while any of them runs.
        (place,) = users[param] if len(users[param]) == 1 else (-1,)
        members[place].append((name, param))
    plans = []
    if members[-1]:
        users_of_root = dict.fromkeys(path for _, param in members[-1] for path in holders[param])
        root_paths = ("", *(path for path in users_of_root if path))
        plans.append(UnitPlan(ROOT, root_paths, tuple(members[-1]), whole_pass=True))
    for number, paths in enumerate(groups):
        if members[number]:
            name = paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]}"
            plans.append(UnitPlan(name, tuple(paths), tuple(members[number])))
    return plans


def _users(model: torch.nn.Module, units: Mapping[torch.nn.Module, int]) -> dict[torch.nn.Parameter, set[int]]:
    """Return the units whose forward passes use each parameter, -1 for what lies in none.

    A module is of the innermost unit around it, and of several where several places of the model hold it.
    """
    users: dict[torch.nn.Parameter, set[int]] = defaultdict(set)
    seen: set[tuple[torch.nn.Module, int]] = set()
    below = [(model, -1)]
    while below:
        module, around = below.pop()
        place = units.get(module, around)
        if (module, place) in seen:
            continue
        seen.add((module, place))
        for param in module.parameters(recurse=False):
            users[param].add(place)
        below.extend((child, place) for child in module.children())
    return users


def _groups(model: torch.nn.Module, unit: str | int | Sequence[str] | None) -> list[list[str]]:
    """Return the paths of each unit's modules, outer ones before those nested in them."""
    if isinstance(unit, int):
        return list(_by_size(model, unit))
    remedy = "name one of these classes, list module paths, give a number of parameters, or leave the key out"
    return [[path] for path in choose_blocks(model, unit, where="zero.unit", remedy=remedy)]


def _by_size(model: torch.nn.Module, limit: int) -> Iterator[list[str]]:
    """Yield runs of neighbouring modules of at most ``limit`` parameters; a larger module without children alone."""
    run: list[str] = []
    size = 0
    for path, numel in _pieces(model, "", limit):
        if run and size + numel > limit:
            yield run
            run, size = [], 0
        run.append(path)
        size += numel
    if run:
        yield run


def _pieces(module: torch.nn.Module, path: str, limit: int) -> Iterator[tuple[str, int]]:
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        numel = sum(param.numel() for param in child.parameters())
        if numel == 0:
            continue
        if not isinstance(child, LISTS) and (numel <= limit or not any(True for _ in child.children())):
            yield below, numel
        else:
            yield from _pieces(child, below, limit)


def plan_buckets(
    model: torch.nn.Module, limit: int, whole: Container[torch.nn.Parameter] = (), shards: int = 1
) -> list[UnitPlan]:
    """Cut a model's parameters, in the order of registration, into runs of at most ``limit``; a larger one alone.

    Where parameters must lie in slices as wholes, a run goes on until they fill the slices about evenly: else most of a
    buffer would be padding.

    Args:
        model: whose parameters.
        limit: elements of a run.
        whole: those that must lie in one slice each.
        shards: slices of a run.
    """
    runs: list[list[Named]] = []
    size = 0
    for name, param in named_parameters(model):
        if not runs or (size + param.numel() > limit and _even(runs[-1], whole, shards)):
            runs.append([])
            size = 0
        runs[-1].append((name, param))
        size += param.numel()
    while len(runs) > 1 and not _even(runs[-1], whole, shards):
        last = runs.pop()
        runs[-1] += last
    return [UnitPlan(_span(run), (), tuple(run)) for run in runs]


def _even(run: Sequence[Named], whole: Container[torch.nn.Parameter], shards: int) -> bool:
    """Return whether whole parameters fill the slices of a run to four fifths at least."""
    sizes = [param.numel() for _, param in run if param in whole]
    return shards == 1 or not sizes or 5 * sum(sizes) >= 4 * shards * max(loads(sizes, shards))


def loads(sizes: Iterable[int], shards: int) -> list[int]:
    """Return how full slices get when whole tensors, the largest first, go to the one with most room."""
    result = [0] * shards
    for size in sorted(sizes, reverse=True):
        result[result.index(min(result))] += size
    return result


@attrs.frozen
class Kind:
    """What lies apart in a unit.

    Attributes:
        trainable: or frozen.
        dtype: in the model.
        whole: each parameter lies in one slice as a whole.
    """

    trainable: bool
    dtype: torch.dtype
    whole: bool


def kinds(plan: UnitPlan, dtype: torch.dtype, whole: Container[torch.nn.Parameter]) -> dict[Kind, list[Named]]:
    """Return a unit's parameters by what must lie apart.

    Args:
        plan: the unit.
        dtype: of floating-point parameters in the model.
        whole: those that must come whole.
    """
    result: dict[Kind, list[Named]] = {}
    for name, param in plan.params:
        kind = Kind(
            param.requires_grad,
            dtype if param.is_floating_point() else param.dtype,
            param.requires_grad and param in whole,
        )
        result.setdefault(kind, []).append((name, param))
    return result


def _span(run: Sequence[Named]) -> str:
    return run[0][0] if len(run) == 1 else f"{run[0][0]} … {run[-1][0]}"
