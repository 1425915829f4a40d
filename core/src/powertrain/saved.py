"""What a checkpoint holds of an engine, and how an engine continues from one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from powertrain import optimizers, random_state
from powertrain.context import Context
from powertrain.errors import CheckpointError, CheckpointMismatch
from powertrain.names import named_parameters, state_dict
from powertrain.replicated import fill
from powertrain.roles.checkpoint import CheckpointReader, CheckpointStore, Snapshot, TensorInfo, TensorSlice
from powertrain.text import did_you_mean

if TYPE_CHECKING:
    from powertrain.config import Config
    from powertrain.engine import Engine


_OWN = "communicator/"
"""How the names of a rank's part of the communicator's state begin; the rank's number follows."""


@attrs.frozen(kw_only=True)
class LoadReport:
    """What ``load_checkpoint`` did.

    Attributes:
        tag: the checkpoint's name.
        step: the optimizer steps done when it was saved.
        world_size: the number of ranks that saved it.
        loaded: the names of all tensors that were filled.
        fresh: trainable parameters for which it holds no optimizer state.
        client_state: the caller's own JSON.
    """

    tag: str
    step: int
    world_size: int
    loaded: list[str]
    fresh: list[str]
    client_state: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.tag}: step {self.step}, {len(self.loaded)} tensors, saved by {self.world_size} ranks"


def checkpoint_uri(config: Config, directory: Any) -> str:
    """Return where checkpoints live: the argument, the configured place, or the default."""
    chosen = directory if directory is not None else config.checkpoint.directory
    return str(chosen) if chosen is not None else str(Path(config.run.output) / "checkpoints")


def open_store(context: Context, uri: str) -> CheckpointStore:
    """Ask the plugins for the store of ``uri``.

    Raises:
        CheckpointError: no plugin keeps checkpoints there.
    """
    store: CheckpointStore | None = context.hooks.one("make_checkpoint_store", uri=uri, context=context)
    if store is None:
        raise CheckpointError(
            "no plugin keeps checkpoints in this place", where=uri, remedy="pip install powertrain-checkpoint"
        )
    return store


def open_weights(context: Context, path: str | os.PathLike[str]) -> CheckpointReader:
    """Open the plain weights at ``path``; the reader needs no closing.

    Raises:
        CheckpointError: no plugin reads them, they are not there, or damaged.
    """
    store = open_store(context, os.fspath(path))
    try:
        return store.open_weights()
    finally:
        store.close()


def _buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the persistent buffers, which are what a state dict has beyond parameters."""
    params = {name for name, _ in named_parameters(module, remove_duplicate=False)}
    result = []
    for name, value in state_dict(module).items():
        if name in params:
            continue
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                "the model keeps extra state that is no tensor",
                where=name,
                found=type(value).__name__,
                remedy="keep it in a buffer, or save it through client_state",
            )
        result.append((name, value))
    return result


def _aliases(module: torch.nn.Module) -> dict[str, str]:
    """Return the further names of tied parameters, each with the name it is saved under."""
    first = {param: name for name, param in named_parameters(module)}
    return {
        name: first[param] for name, param in named_parameters(module, remove_duplicate=False) if first[param] != name
    }


def snapshot(engine: Engine, client_state: dict[str, Any] | None) -> Snapshot:
    """Return this rank's part of the engine's state.

    Args:
        engine: what is saved.
        client_state: the caller's own JSON; None carries on what the last load found. Whether
            it is JSON is for the store to see, whose ranks refuse it together.
    """
    context = engine.context
    tensors = list(engine.optimizer_wrapper.tensors())
    # Buffers may differ between data ranks (the statistics of BatchNorm): those of the first belong together.
    for name, buffer in _buffers(engine.module) if context.mesh.index("data") == 0 else ():
        tensors.append(TensorSlice(f"model/{name}", tuple(buffer.shape), buffer.detach().reshape(-1)))
    for kind, value in random_state.state_tensors(context).items():
        tensors.append(TensorSlice(f"rng/{context.rank.index}/{kind}", tuple(value.shape), value.reshape(-1)))
    for name, value in context.communicator.state().items():
        tensors.append(TensorSlice(f"{_OWN}{context.rank.index}/{name}", tuple(value.shape), value.reshape(-1)))
    values = {
        "step": engine.global_step,
        "world_size": context.mesh.world_size,
        "aliases": _aliases(engine.module),
        "optimizer_name": optimizers.name_of(engine.optimizer_wrapper.optimizer),
        "optimizer": engine.optimizer_wrapper.values(),
        "groups": _groups(engine),
        "schedule": engine.schedule.state() if engine.schedule is not None else None,
        "loss_scale": engine.loss_scale.state(),
        "sampler": engine.loader.sampler.state() if engine.loader is not None else None,
        "client": engine.client_state if client_state is None else client_state,
    }
    return Snapshot(tensors=tensors, values=values, rank_values={"rng": random_state.state_values()})


def _groups(engine: Engine) -> list[dict[str, Any]]:
    """Return the numbers of each parameter group."""
    groups = engine.optimizer_wrapper.optimizer.param_groups
    plain = (bool, int, float, str, tuple, list, type(None))
    return [{k: v for k, v in group.items() if k != "params" and isinstance(v, plain)} for group in groups]


def restore(engine: Engine, reader: CheckpointReader) -> LoadReport:
    """Fill the engine from a checkpoint; nothing is changed when it does not fit or cannot be read.

    Raises:
        CheckpointMismatch: parameters or buffers differ in name or shape, or the optimizer or
            schedule is of another kind.
        DataError: the sampler cannot continue from the saved position.
    """
    module, context = engine.module, engine.context
    check_names(engine, reader)
    values = reader.values
    # What can still be refused comes before anything of the model changes.
    _check_optimizer(engine, values["optimizer_name"], len(values["groups"]))
    if engine.schedule is not None:
        engine.schedule.check(values["schedule"])
    sampler = engine.loader.sampler if engine.loader is not None and values["sampler"] is not None else None
    position = sampler.state() if sampler is not None else {}
    if sampler is not None:
        sampler.load_state(values["sampler"])
    try:
        # Copies first: the wrapper's own read is the last thing that may fail.
        buffers = [(f"model/{name}", buffer, torch.empty_like(buffer)) for name, buffer in _buffers(module)]
        generators = _generators(context, reader)
        fill(reader, [(name, copy) for name, _, copy in buffers] + list(generators.items()))
        connected = _connections(context, reader)
        loaded = engine.optimizer_wrapper.load(reader)
    except BaseException:
        if sampler is not None:
            sampler.load_state(position)
        raise
    for _, buffer, copy in buffers:
        buffer.detach().copy_(copy)
    engine.global_step = int(values["step"])
    engine.loss_scale.load_state(values["loss_scale"])
    if engine.schedule is not None:
        engine.schedule.load_state(values["schedule"], engine.global_step - engine.skipped_steps)
    else:
        for group, saved in zip(engine.optimizer_wrapper.optimizer.param_groups, values["groups"], strict=True):
            # Without a schedule the learning rate belongs to whoever set it last.
            if "lr" in saved and not context.config.is_stated("optimizer.lr"):
                group["lr"] = saved["lr"]
    _restore_random(context, reader, generators, engine.global_step)
    context.communicator.load_state(connected)
    engine.client_state = dict(values["client"])
    trainable = [name for name, param in named_parameters(module) if param.requires_grad]
    with_state = {name.split("/", 1)[1].rpartition("/")[0] for name in loaded if name.startswith("optimizer/")}
    return LoadReport(
        tag=reader.tag,
        step=engine.global_step,
        world_size=int(values["world_size"]),
        loaded=[*loaded, *(name for name, _, _ in buffers)],
        fresh=[name for name in trainable if name not in with_state] if with_state else trainable,
        client_state=engine.client_state,
    )


def check_names(engine: Engine, reader: CheckpointReader) -> None:
    """Compare names and shapes of the model's tensors with the checkpoint's.

    Raises:
        CheckpointMismatch: with up to ten of the differences.
    """
    module = engine.module
    wanted = {f"model/{name}": tuple(param.shape) for name, param in named_parameters(module)}
    wanted |= {f"model/{name}": tuple(buffer.shape) for name, buffer in _buffers(module)}
    saved = {name: info.shape for name, info in reader.tensors.items() if name.startswith("model/")}
    problems = []
    for name, shape in wanted.items():
        if name not in saved:
            hint = did_you_mean(name[6:], [other[6:] for other in saved if other not in wanted])
            problems.append(f"{name[6:]}: not in the checkpoint{hint}")
        elif tuple(saved[name]) != tuple(shape):
            problems.append(f"{name[6:]}: shape {tuple(saved[name])} in the checkpoint, {tuple(shape)} in the model")
    problems += [f"{name[6:]}: in the checkpoint, not in the model" for name in saved if name not in wanted]
    if problems:
        shown = problems[:10] + ([f"… and {len(problems) - 10} more"] if len(problems) > 10 else [])
        raise CheckpointMismatch(
            f"checkpoint {reader.tag!r} was made from another model: {len(problems)} tensors differ",
            found="\n    ".join(shown),
        )


def _check_optimizer(engine: Engine, saved: str, groups: int) -> None:
    """Compare the optimizer's class and its groups: the state of another one would be dropped, or taken for other."""
    optimizer = engine.optimizer_wrapper.optimizer
    own = optimizers.name_of(optimizer)
    if own != saved:
        raise CheckpointMismatch(
            "the checkpoint was made with another optimizer",
            where="optimizer.name",
            expected=saved,
            found=own,
            remedy=f'set `[optimizer] name = "{saved}"`; to start anew from the weights with the other one, '
            "`powertrain export` the checkpoint and use engine.load_weights",
        )
    if len(optimizer.param_groups) != groups:
        raise CheckpointMismatch(
            "the optimizer of the checkpoint has another number of parameter groups: learning rates go by group",
            where="optimizer=",
            expected=f"{groups} groups",
            found=f"{len(optimizer.param_groups)} groups",
            remedy="make the optimizer with the groups that the checkpoint was made with, in their order; empty ones "
            "count; to start anew from the weights, use engine.load_weights",
        )


def _generators(context: Context, reader: CheckpointReader) -> dict[str, torch.Tensor]:
    """Return an empty tensor for each of this rank's generators in the checkpoint, by name."""
    return {
        name: torch.empty(info.shape, dtype=info.dtype)
        for name, info in reader.tensors.items()
        if name.startswith(f"rng/{context.rank.index}/")
    }


def _connections(context: Context, reader: CheckpointReader) -> dict[str, torch.Tensor]:
    """Return what the communicator wants of the state that it left in the checkpoint, by name.

    That of this rank; where the ranks were of another number, the mean of every rank's, if they are of one shape,
    so that the mean over the ranks is what it was. The state of one other rank is here at a time. Every rank reads as
    often, whatever it finds of its own: reading is a matter of all.
    """
    found: dict[str, dict[int, TensorInfo]] = {}
    for full, info in reader.tensors.items():
        rank, _, name = full.removeprefix(_OWN).partition("/")
        if full.startswith(_OWN) and context.communicator.wants(name):
            found.setdefault(name, {})[int(rank)] = info
    if not found:
        return {}
    saved = int(reader.values["world_size"])
    own = range(saved) if saved != context.mesh.world_size else [context.rank.index]
    whole = {name: infos for name, infos in found.items() if set(own) <= set(infos)}
    alike = {name: infos for name, infos in whole.items() if len({infos[index].shape for index in own}) == 1}
    result: dict[str, torch.Tensor] = {}
    for index in own:
        copies = {name: torch.empty(infos[index].shape, dtype=infos[index].dtype) for name, infos in alike.items()}
        fill(reader, [(f"{_OWN}{index}/{name}", copy) for name, copy in copies.items()])
        result = {name: result[name].add_(copy) if name in result else copy for name, copy in copies.items()}
    return {name: total.div_(len(own)) for name, total in result.items()}


def _restore_random(context: Context, reader: CheckpointReader, generators: dict[str, torch.Tensor], step: int) -> None:
    """Continue this rank's generators; a rank that did not exist then starts its own."""
    rank = context.rank.index
    if rank >= len(reader.rank_values):
        random_state.seed_all(context, context.config.run.seed + 7919 * step)
        return
    random_state.load_values(dict(reader.rank_values[rank]["rng"]))
    random_state.load_tensors(context, {name.rpartition("/")[2]: value for name, value in generators.items()})
