"""Builds an engine: reads the configuration, asks the plugins, puts the parts together."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from powertrain import access, optimizers, random_state, saved, schedule
from powertrain import config as configuration
from powertrain.accumulation import Accumulation
from powertrain.call import ModelCall
from powertrain.config import Config
from powertrain.context import Context
from powertrain.discovery import allowed, hooks_of, installed, load, schemas_for
from powertrain.engine import Engine
from powertrain.environment import Rank
from powertrain.errors import (
    AcceleratorError,
    CommunicatorMissing,
    ConfigError,
    DataError,
    EngineError,
    OptimizerError,
    PluginConflict,
    PowertrainError,
    PrecisionError,
)
from powertrain.mesh import Mesh
from powertrain.names import named_buffers, named_parameters
from powertrain.plugin import Plugin
from powertrain.precision import LossScale, Recipe
from powertrain.registry import Registry
from powertrain.replicated import ReplicatedOptimizer
from powertrain.roles.accelerator import Accelerator
from powertrain.roles.communicator import Communicator, SingleProcess
from powertrain.roles.optimizer import FlatOptimizer, OptimizerWrapper
from powertrain.sampling import EpochSampler, Loader
from powertrain.selection import select
from powertrain.text import some
from powertrain.weights import ModelWeights

_log = logging.getLogger("powertrain")

OptimizerLike = torch.optim.Optimizer | Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


def initialize(
    model: torch.nn.Module,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    dataset: Any = None,
    loss_fn: Callable[..., Any] | None = None,
    optimizer: OptimizerLike | None = None,
    collate_fn: Callable[..., Any] | None = None,
    *,
    scheduler: Any = None,
    weights: str | os.PathLike[str] | None = None,
    plugins: Sequence[Plugin[Any]] = (),
    overrides: Sequence[str] = (),
) -> Engine:
    """Make an engine that trains ``model``.

    Args:
        model: any module; it is moved to the device and converted in place. One that was
            built in ``powertrain.deferred()`` gets its first values here, each rank those that it keeps.
        config: a TOML file's path, a mapping of the same shape, or None for the defaults.
        dataset: a map-style dataset; ``engine.loader`` then yields its batches.
        loss_fn: makes the loss where the model does not return it (see ``ModelCall``).
        optimizer: an optimizer over the model's parameters, or a function that makes
            one of an iterable of parameters, in place of ``[optimizer]``.
        collate_fn: makes a batch of a list of samples, as in torch's DataLoader.
        scheduler: a torch scheduler on ``optimizer``, or a function that makes one
            of an optimizer, in place of ``[scheduler]``.
        weights: the model's first values: a directory of safetensors files as model
            libraries write it, or one such file. Each rank reads what it keeps.
        plugins: ready plugin objects that act before those of the configuration.
        overrides: ``"batch.micro=4"`` strings that win over the configuration.

    Raises:
        ConfigError: with every problem of the configuration.
        BirthError: a parameter is on the meta device, and nothing tells its first value.
        CheckpointMismatch: ``weights`` are of another model.
        PowertrainError: a plugin, device or peer that the configuration needs is not there.
    """
    _check_free(model)
    _check_dataset(dataset)
    rank = Rank.from_environment()
    document = configuration.read(config, overrides=overrides)
    schemas = schemas_for(document, plugins)
    settings = configuration.structure(
        document,
        schemas.tables,
        installed=schemas.installed,
        options=schemas.options,
        data_ranks=rank.world_size,
    )
    hooks = Registry(plugins, settings.plugins.pin)
    for plugin in select(settings, schemas, world_size=rank.world_size, given=hooks.plugins):
        hooks.add(plugin)

    accelerator = choose_accelerator(hooks, settings.accelerator.use)
    device = accelerator.device(rank.local_index)
    accelerator.activate(device)
    mesh = Mesh.build(rank.world_size, rank.index)
    batch = configuration.resolve_batch(settings.batch, mesh.size("data"), settings.origins)
    for plugin in hooks.plugins.values():
        plugin.check_ranks(plugin.config, mesh.size("data"))
    settings = configuration.derive(settings, mesh.size("data"))
    communicator = connect(hooks, settings, accelerator, device, mesh, rank)
    context: Context | None = None
    try:
        agree_on_config(settings, communicator)
        context = Context(
            config=settings,
            rank=rank,
            mesh=mesh,
            accelerator=accelerator,
            host=host_beside(accelerator),
            device=device,
            communicator=communicator,
            batch=batch,
            recipe=Recipe.build(settings.precision, accelerator),
            hooks=hooks,
        )
        for listener in hooks.listeners("on_prepare"):
            listener(model=model, context=context)
        if settings.checkpoint.every is not None:
            saved.open_store(context, saved.checkpoint_uri(settings, None)).close()  # refused now, not hours later
        model = _prepare(model, context, weights)
        wrapper = _wrap(model, optimizer, context)
        try:
            return _start(model, wrapper, context, dataset, loss_fn, collate_fn, scheduler)
        except BaseException:
            access.release(model, wrapper)
            wrapper.close()  # its hooks must not meet those of the next try
            raise
    except BaseException as error:
        communicator.report(error)
        if context is not None:
            context.close_tiers()
        communicator.close()
        raise


def _prepare(model: torch.nn.Module, context: Context, weights: str | os.PathLike[str] | None) -> torch.nn.Module:
    """Give the model its first values, the same on all ranks, and return what the plugins make of it."""
    random_state.seed_all(context, context.config.run.seed)
    if weights is not None:
        found = ModelWeights(model, saved.open_weights(context, weights))
        context.birth.weights = found
        _log.info("weights from %s", found.report)
    context.birth.check(model, context.device)
    context.birth.agree(model, context.communicator)
    context.birth.place(model, context.device)
    broadcast_from_first(model, context.communicator)
    for name in context.hooks.transforms():
        transformed = context.hooks.call(name, "transform_model", model=model, context=context)
        model = model if transformed is None else transformed
    prepare_formats(model, context.recipe)
    return model


def _wrap(model: torch.nn.Module, optimizer: OptimizerLike | None, context: Context) -> OptimizerWrapper:
    """Make the optimizer, and what brings gradients to it."""
    inner = make_optimizer(model, optimizer, context)
    optimizers.check_step(inner)
    if isinstance(inner, FlatOptimizer) and inner.accelerator is None:
        inner.accelerator, inner.host = context.accelerator, context.host
    wrapper: OptimizerWrapper | None = context.hooks.one(
        "wrap_optimizer", model=model, optimizer=inner, context=context
    )
    return wrapper or ReplicatedOptimizer(model, inner, context)


def _start(
    model: torch.nn.Module,
    wrapper: OptimizerWrapper,
    context: Context,
    dataset: Any,
    loss_fn: Callable[..., Any] | None,
    collate_fn: Callable[..., Any] | None,
    scheduler: Any,
) -> Engine:
    """Put the engine together, and tell the plugins that it is there."""
    settings, batch, mesh = context.config, context.batch, context.mesh
    context.birth.finish(model, wrapper.optimizer, context.device)
    access.adopt(model, wrapper, context.communicator)
    engine = Engine(
        module=model,
        context=context,
        call=ModelCall(model, loss_fn),
        optimizer=wrapper,
        schedule=make_schedule(wrapper.optimizer, scheduler, settings),
        loss_scale=LossScale.build(settings.precision),
        loader=make_loader(dataset, collate_fn, context),
    )
    strict = settings.is_stated("batch.micro") or settings.is_stated("batch.total")
    engine.attach(context.hooks.one("make_runner", engine=engine) or Accumulation(engine, strict_micro=strict))
    _log.info(
        "%d rank(s) on %s; batch %d = micro %d x accumulation %d x %d; precision: %s",
        mesh.world_size, context.device, batch.total, batch.micro, batch.accumulation, mesh.size("data"),
        context.recipe,
    )  # fmt: skip
    for listener in context.hooks.listeners("on_engine_ready"):
        listener(engine=engine)
    return engine


def choose_accelerator(hooks: Registry, name: str | None) -> Accelerator:
    """Return the accelerator called ``name``, or the available one; the other candidates are forgotten.

    Raises:
        AcceleratorError: there is none.
        PluginConflict: several are available and none is named.
    """
    candidates = {n: p for n, p in hooks.plugins.items() if "make_accelerator" in hooks_of(p)}
    if name is None:
        name = _available(candidates)
    accelerator: Accelerator | None = hooks.one("make_accelerator", name=name)
    if accelerator is None:
        raise AcceleratorError(
            f"no installed plugin makes an accelerator called {name!r}",
            where="accelerator.use",
            expected=f"one of {', '.join(candidates) or 'none that is installed'}",
            remedy=f"pip install powertrain-{name}",
        )
    for other in candidates:
        if hooks.call(other, "make_accelerator", name=name) is None:
            hooks.remove(other)
    return accelerator


def host_beside(accelerator: Accelerator) -> Accelerator | None:
    """Return what computes in the host's memory beside ``accelerator``: itself, or an installed one; None: nobody."""
    if accelerator.device_type == "cpu":
        return accelerator
    only = allowed()
    for name, entry in installed().items():
        if "accelerator" not in entry.roles or (only is not None and name not in only):
            continue
        try:
            kind = load(name)
            made: Accelerator | None = Registry([kind(kind.Config())]).one("make_accelerator", name=name)
        except PowertrainError:  # one that is broken, or is for devices that are not here
            continue
        if made is not None and made.device_type == "cpu":
            return made
    return None


def _available(candidates: Mapping[str, Plugin[Any]]) -> str:
    probes = {name: plugin.is_available() for name, plugin in candidates.items()}
    ready = [name for name, probe in probes.items() if probe.available]
    first = [name for name in ready if not candidates[name].fallback] or ready
    if len(first) > 1:
        raise PluginConflict(
            f"several accelerators are available: {', '.join(first)}",
            remedy=f'choose one: [accelerator] use = "{first[0]}"',
        )
    if not first:
        found = "; ".join(f"{name}: {probe.reason}" for name, probe in probes.items())
        known = [name for name, entry in installed().items() if "accelerator" in entry.roles]
        only = allowed()
        left_out = [name for name in known if only is not None and name not in only]
        if left_out:
            found = "; ".join([*([found] if found else []), f"{', '.join(left_out)}: not in POWERTRAIN_PLUGINS"])
        raise AcceleratorError(
            "no accelerator is available",
            found=found or "no accelerator plugin is installed",
            remedy=f"add {' or '.join(left_out)} to the variable POWERTRAIN_PLUGINS, or unset it" if left_out else None,
        )
    return first[0]


def connect(
    hooks: Registry, settings: Config, accelerator: Accelerator, device: torch.device, mesh: Mesh, rank: Rank
) -> Communicator:
    """Connect the ranks, and wrap the connection in what the plugins put around it.

    Raises:
        CommunicatorMissing: there are several ranks and no plugin connects them.
    """
    if mesh.world_size == 1:
        return SingleProcess(mesh, device)
    name, timeout = settings.communicator.use, settings.communicator.timeout
    found = hooks.one("make_communicator", name=name, accelerator=accelerator, mesh=mesh, rank=rank, timeout=timeout)
    if found is None:
        raise CommunicatorMissing(
            f"{mesh.world_size} ranks were started, but no plugin connects them" + (f" by {name!r}" if name else ""),
            where="communicator.use" if name else f"variables set by {rank.launcher}",
            remedy=f"leave the key out, for what suits the accelerator {accelerator.name!r}; correct it; or install "
            "the plugin that has it (each one's README names its own)"
            if name
            else None,
        )
    communicator = cast("Communicator", found)
    for plugin in hooks.wrappers():
        wrapped = hooks.call(
            plugin, "wrap_communicator", communicator=communicator, accelerator=accelerator, timeout=timeout
        )
        communicator = communicator if wrapped is None else wrapped
    return communicator


def broadcast_from_first(model: torch.nn.Module, communicator: Communicator) -> None:
    """Give every data rank the parameters and buffers of the first; those still to be made are agreed on already."""
    if communicator.size("data") == 1:
        return
    tensors = [*named_parameters(model), *named_buffers(model)]
    tensors = [(name, tensor) for name, tensor in tensors if not tensor.is_meta]
    handles = []
    for name, tensor in tensors:
        target = tensor.detach().contiguous()
        handles.append((communicator.broadcast(target, 0, label=f"initial {name}"), tensor, target))
    for handle, tensor, target in handles:
        handle.wait()
        if target.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(target)


def prepare_formats(model: torch.nn.Module, recipe: Recipe) -> None:
    """Convert floating-point buffers to the format of the parameters, as ``model.to(dtype)`` would.

    The parameters themselves are left to the optimizer wrapper, which first
    makes master copies of them.

    Raises:
        PrecisionError: a parameter is complex, which no recipe covers.
    """
    found = set()
    for name, param in named_parameters(model):
        if param.is_complex():
            raise PrecisionError(
                "the model has a complex parameter", where=name, remedy="keep real and imaginary part as two parameters"
            )
        found.add(param.dtype)
    if unusual := {dtype for dtype in found if dtype.is_floating_point} - {torch.float32, recipe.parameters}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in unusual))
        _log.warning("the model's %s parameters are converted: %s", names, recipe)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.dtype != recipe.parameters:
                setattr(module, name, buffer.to(recipe.parameters))


def agree_on_config(settings: Config, communicator: Communicator) -> None:
    """Compare the configuration between the ranks.

    Raises:
        ConfigError: a value differs, on every rank and with every such value.
    """
    if communicator.world_size == 1:
        return
    values = {
        f"{section}.{key}": value for section, table in settings.effective().items() for key, value in table.items()
    }
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    if len(set(communicator.gather_json(digest, label="configuration"))) == 1:
        return
    every = communicator.gather_json(values, label="configuration")
    problems = []
    for path in sorted({path for one in every for path in one}):
        found = [one.get(path) for one in every]
        if any(value != found[0] for value in found):
            other = next(rank for rank, value in enumerate(found) if value != found[0])
            problems.append(f"{path}: {found[0]!r} on rank 0, {found[other]!r} on rank {other}")
    raise ConfigError(
        "the ranks have different configurations",
        problems=tuple(problems),
        remedy="give every rank the same file, --set and POWERTRAIN__ variables",
    )


def make_optimizer(model: torch.nn.Module, given: OptimizerLike | None, context: Context) -> torch.optim.Optimizer:
    """Return the caller's optimizer, or the one that ``[optimizer]`` names.

    Raises:
        OptimizerError: no plugin makes it, or it is no optimizer.
    """
    trainable = [param for param in model.parameters() if param.requires_grad]
    if given is not None:
        made = given if isinstance(given, torch.optim.Optimizer) else given(trainable)
        if not isinstance(made, torch.optim.Optimizer):
            raise OptimizerError(
                "optimizer= made no optimizer", expected="a torch.optim.Optimizer", found=type(made).__name__
            )
        _check_members(model, made)
        return made
    table = context.config.optimizer
    factory = context.hooks.one(
        "make_optimizer", name=table.name, options=dict(table.options), accelerator=context.accelerator
    )
    factory = factory or optimizers.torch_factory(table.name, table.options)
    if factory is None:
        raise OptimizerError(f"no plugin makes the optimizer {table.name!r}", where="optimizer.name")
    if not trainable:
        raise OptimizerError("the model has no parameter that requires a gradient", remedy="unfreeze some of it")
    named = [(name, param) for name, param in named_parameters(model) if param.requires_grad]
    made = cast("torch.optim.Optimizer", factory(named if getattr(factory, "named", False) else trainable))
    made.granularity = factory.granularity  # type: ignore[attr-defined]
    return made


def _check_members(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse parameters that nobody would average over the ranks, shard or save.

    Raises:
        OptimizerError: one is not the model's.
    """
    known = set(model.parameters())
    for number, group in enumerate(optimizer.param_groups):
        strange = [tuple(param.shape) for param in group["params"] if param not in known]
        if strange:
            raise OptimizerError(
                f"{len(strange)} of the optimizer's parameters are not the model's",
                where=f"optimizer.param_groups[{number}]",
                expected="parameters of the model that powertrain.initialize is given",
                found=f"others of the shapes {some([str(shape) for shape in strange])}",
                remedy="make what they belong to (a loss, a temperature) a submodule of the model; or, where the model "
                "was rebuilt, make the optimizer of its parameters as they are now",
            )


def make_schedule(optimizer: torch.optim.Optimizer, given: Any, settings: Config) -> schedule.Schedule | None:
    """Return the caller's schedule or the configured one; None when the rate never changes."""
    if given is not None:
        return schedule.TorchSchedule(given(optimizer) if callable(given) else given)
    table = settings.scheduler
    if table.name == "constant" and not table.options.get("warmup"):
        return None
    return schedule.build(table.name, table.options, optimizer)


def _check_dataset(dataset: Any) -> None:
    """Refuse what no sampler can serve, before anything is built.

    Raises:
        DataError: the dataset has no length.
    """
    if dataset is not None and not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(
            "the dataset has no length and no items by index",
            found=type(dataset).__name__,
            remedy="leave dataset= out, loop over your own loader, and pass its batches to engine.train_step",
        )


def _check_free(model: torch.nn.Module) -> None:
    """Refuse a model that another engine trains: both would take its gradients.

    Raises:
        EngineError: the other engine was not closed.
    """
    held = next((home for home in map(access.home_of, model.parameters()) if home is not None), None)
    if held is not None:
        raise EngineError(
            "an engine holds this model already",
            where=held.name,
            expected="a model whose last engine was closed",
            remedy="call engine.close(), or leave its `with` block, before powertrain.initialize is called again; or "
            "build the model anew, which it takes anyway where parameters were sharded",
        )


def make_loader(dataset: Any, collate_fn: Callable[..., Any] | None, context: Context) -> Loader | None:
    """Return the loader of ``dataset``, or None without one.

    Raises:
        DataError: a sampler cannot serve it.
    """
    if dataset is None:
        return None
    sampler = context.hooks.one("make_sampler", dataset=dataset, context=context)
    if sampler is None:
        mesh = context.mesh
        sampler = EpochSampler(
            len(dataset), context.batch, mesh.index("data"), mesh.size("data"), context.config.run.seed
        )
    return Loader(dataset, sampler, collate_fn)
