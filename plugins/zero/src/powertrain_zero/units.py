"""Which parameters are gathered and reduced together.

A unit is one module, or several, with all their parameters. By default each
instance of the model's repeated block is a unit; what lies outside of them
(embeddings, the last norm, the head) is one more, the root.
"""

from __future__ import annotations

import fnmatch
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

import attrs
import torch

from powertrain.errors import ShardingError
from powertrain.names import named_parameters
from powertrain.text import did_you_mean, some

ROOT = "(root)"
"""The name of the unit of what no other unit holds."""

Named = tuple[str, torch.nn.Parameter]

_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict)
"""Modules that are never called themselves."""


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
    if unit is None:
        kind = repeated_block(model)
        return [] if kind is None else [[path] for path in _outermost(model, kind)]
    if isinstance(unit, int):
        return list(_by_size(model, unit))
    if isinstance(unit, str) and ("." in unit or "*" in unit):
        unit = [unit]
    if not isinstance(unit, str):
        return [[path] for path in _by_path(model, list(unit))]
    paths = [path for path, module in model.named_modules() if type(module).__name__ == unit and path]
    if not paths:
        classes = Counter(type(module).__name__ for path, module in model.named_modules() if path)
        shown = some([f"{name} ({count})" for name, count in classes.most_common()]) or "it has no module within"
        raise ShardingError(
            f"no module of the model is a {unit!r}{did_you_mean(unit, list(classes))}",
            where="zero.unit",
            expected=f"the class of some module: {shown}",
            found=repr(unit),
            remedy="name one of these classes, list module paths, give a number of parameters, or leave the key out",
        )
    return [[path] for path in paths]


def repeated_block(model: torch.nn.Module) -> type[torch.nn.Module] | None:
    """Return the class of the model's repeated block: of the outermost lists of modules, that with most parameters."""
    weights: Counter[type[torch.nn.Module]] = Counter()
    for _, container in _lists(model, ""):
        for kind, count in _kinds(container).items():
            if count > 1:
                weights[kind] += sum(
                    param.numel()
                    for child in container.children()
                    if type(child) is kind
                    for param in child.parameters()
                )
    heaviest = [kind for kind, numel in weights.most_common(1) if numel > 0]
    return heaviest[0] if heaviest else None


def _lists(module: torch.nn.Module, path: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield lists of modules that are in no other list."""
    repeats = any(count > 1 for count in _kinds(module).values())
    if isinstance(module, (*_LISTS, torch.nn.Sequential)) and repeats:
        yield path, module
        return
    for name, child in module.named_children():
        yield from _lists(child, f"{path}.{name}" if path else name)


def _kinds(module: torch.nn.Module) -> Counter[type[torch.nn.Module]]:
    """Count the classes of a module's children, lists excepted."""
    return Counter(type(child) for child in module.children() if not isinstance(child, _LISTS))


def _outermost(model: torch.nn.Module, kind: type[torch.nn.Module]) -> Iterator[str]:
    """Yield the paths of the modules of a class that are in no other of that class."""
    last = None
    for path, module in model.named_modules():
        if type(module) is kind and path and not (last is not None and path.startswith(last + ".")):
            last = path
            yield path


def _by_path(model: torch.nn.Module, patterns: Sequence[str]) -> list[str]:
    paths = [path for path, _ in model.named_modules() if path]
    chosen: set[str] = set()
    for pattern in patterns:
        # A star stands for one component, so that "blocks.*" is each block and not all that is in them.
        depth = pattern.count(".")
        found = [path for path in paths if path.count(".") == depth and fnmatch.fnmatchcase(path, pattern)]
        if not found:
            near = [path for path in paths if path.count(".") == depth] or paths
            shown = some(near) or "it has no module within"
            raise ShardingError(
                f"no module of the model has the path {pattern!r}{did_you_mean(pattern, paths)}",
                where="zero.unit",
                expected=f"the path of a module: {shown}",
                found=repr(pattern),
                remedy="name one of these paths; a star stands for one component",
            )
        if lists := [path for path in found if isinstance(model.get_submodule(path), _LISTS)]:
            raise ShardingError(
                f"{lists[0]} is a list of modules, which is never called itself",
                where="zero.unit",
                expected="modules with a forward of their own",
                found=repr(pattern),
                remedy=f'write "{lists[0]}.*" for each of its members',
            )
        chosen.update(found)
    return [path for path in paths if path in chosen]


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
        if not isinstance(child, _LISTS) and (numel <= limit or not any(True for _ in child.children())):
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
