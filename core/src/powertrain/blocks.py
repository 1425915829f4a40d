"""The blocks of a model: the module that it repeats, or those that a configuration names."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from powertrain.errors import ShardingError
from powertrain.text import did_you_mean, some

LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict)
"""Modules that are never called themselves."""


def choose_blocks(
    model: torch.nn.Module, choice: str | Sequence[str] | None, *, where: str, remedy: str | None = None
) -> list[str]:
    """Return the paths of a model's blocks, outer ones before those nested in them.

    Args:
        model: any module; it is no block of itself.
        choice: a class name, module paths or patterns of them (a star stands for one component), or None for
            the repeated block.
        where: the key of the configuration that chooses, for messages.
        remedy: what to do about a class that no module has.

    Raises:
        ShardingError: a name matches nothing, with what there is instead.
    """
    if choice is None:
        kind = repeated_block(model)
        return [] if kind is None else outermost(model, kind)
    if isinstance(choice, str) and ("." in choice or "*" in choice):
        choice = [choice]
    if isinstance(choice, str):
        return _by_class(model, choice, where, remedy)
    return _by_path(model, choice, where)


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


def outermost(model: torch.nn.Module, kind: type[torch.nn.Module]) -> list[str]:
    """Return the paths of the modules of a class that are in no other of that class."""
    paths: list[str] = []
    for path, module in model.named_modules():
        if type(module) is kind and path and not (paths and path.startswith(paths[-1] + ".")):
            paths.append(path)
    return paths


def _lists(module: torch.nn.Module, path: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield lists of modules that are in no other list."""
    repeats = any(count > 1 for count in _kinds(module).values())
    if isinstance(module, (*LISTS, torch.nn.Sequential)) and repeats:
        yield path, module
        return
    for name, child in module.named_children():
        yield from _lists(child, f"{path}.{name}" if path else name)


def _kinds(module: torch.nn.Module) -> Counter[type[torch.nn.Module]]:
    """Count the classes of a module's children, lists excepted."""
    return Counter(type(child) for child in module.children() if not isinstance(child, LISTS))


def _by_class(model: torch.nn.Module, name: str, where: str, remedy: str | None) -> list[str]:
    paths = [path for path, module in model.named_modules() if type(module).__name__ == name and path]
    if not paths:
        classes = Counter(type(module).__name__ for path, module in model.named_modules() if path)
        shown = some([f"{kind} ({count})" for kind, count in classes.most_common()]) or "it has no module within"
        raise ShardingError(
            f"no module of the model is a {name!r}{did_you_mean(name, list(classes))}",
            where=where,
            expected=f"the class of some module: {shown}",
            found=repr(name),
            remedy=remedy or "name one of these classes, list module paths, or leave the key out",
        )
    return paths


def _by_path(model: torch.nn.Module, patterns: Sequence[str], where: str) -> list[str]:
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
                where=where,
                expected=f"the path of a module: {shown}",
                found=repr(pattern),
                remedy="name one of these paths; a star stands for one component",
            )
        if lists := [path for path in found if isinstance(model.get_submodule(path), LISTS)]:
            raise ShardingError(
                f"{lists[0]} is a list of modules, which is never called itself",
                where=where,
                expected="modules with a forward of their own",
                found=repr(pattern),
                remedy=f'write "{lists[0]}.*" for each of its members',
            )
        chosen.update(found)
    return [path for path in paths if path in chosen]
