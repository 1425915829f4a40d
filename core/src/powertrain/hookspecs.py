"""The whole contract between the core and its plugins.

Hooks build an engine. What they return is a plain object that is called
directly from then on: no training step goes through pluggy.

A *first-result* hook (``make_*`` and ``wrap_optimizer``) takes one answer:
return None to decline, and two answers are an error that names both plugins
unless ``[plugins] pin`` chooses. A *chain* hook (``wrap_communicator``,
``transform_model``) hands each plugin, in order, what the one before it
returned; None leaves it as it is. The *events* (``on_*``) are collected once
when the engine is built.

A plugin may leave out arguments that it does not use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pluggy import HookimplMarker, HookspecMarker

if TYPE_CHECKING:
    import click
    import torch

    from powertrain.context import Context
    from powertrain.engine import Engine
    from powertrain.environment import Rank
    from powertrain.mesh import Mesh
    from powertrain.roles.accelerator import Accelerator
    from powertrain.roles.checkpoint import CheckpointStore
    from powertrain.roles.communicator import Communicator
    from powertrain.roles.files import FileEngine
    from powertrain.roles.optimizer import OptimizerFactory, OptimizerWrapper
    from powertrain.roles.runner import StepRunner
    from powertrain.roles.sampler import Sampler
    from powertrain.roles.tier import Category, Tier

hookspec = HookspecMarker("powertrain")
hookimpl = HookimplMarker("powertrain")


# --- roles: one answer each ---------------------------------------------------


@hookspec
def make_accelerator(name: str) -> Accelerator | None:
    """Return the accelerator called ``name``, or None if this plugin has no such one."""


@hookspec
def make_communicator(
    name: str | None, accelerator: Accelerator, mesh: Mesh, rank: Rank, timeout: float
) -> Communicator | None:
    """Return a connected communicator for the ranks of ``mesh``.

    ``name`` is ``[communicator] use``; None asks for what suits ``accelerator``.
    Called only when there is more than one rank. ``timeout`` is in seconds.
    """


@hookspec
def make_optimizer(name: str, options: dict[str, Any], accelerator: Accelerator) -> OptimizerFactory | None:
    """Return a factory of the optimizer called ``name``; the core knows torch's own.

    ``powertrain.kernels.kernel`` finds the kernels of ``accelerator``.
    """


@hookspec
def wrap_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, context: Context
) -> OptimizerWrapper | None:
    """Return what reduces gradients and updates parameters.

    The core's default replicates the model and averages gradients over the
    data dimension.
    """


@hookspec
def make_runner(engine: Engine) -> StepRunner | None:
    """Return what turns one local batch into accumulated gradients.

    The core's default runs the micro-batches one after the other.
    """


@hookspec
def make_checkpoint_store(uri: str, context: Context) -> CheckpointStore | None:
    """Return the store that keeps checkpoints under ``uri`` (a directory unless it has a scheme)."""


@hookspec
def make_tier(category: Category, context: Context) -> Tier | None:
    """Return where state of a category rests between uses; the core's default leaves it on the device.

    Asked through ``context.tier``, once for each category that somebody keeps.
    """


@hookspec
def make_file_engine(context: Context | None) -> FileEngine | None:
    """Return what moves bytes between memory and files; without one, who needs files opens them as Python does.

    ``context`` is None for commands, which run without an engine.
    """


@hookspec
def make_sampler(dataset: Any, context: Context) -> Sampler | None:
    """Return what chooses this rank's samples of ``dataset``; the core's default shuffles."""


# --- chains: in the order of phase, then of the configuration ------------------


@hookspec
def wrap_communicator(communicator: Communicator, accelerator: Accelerator, timeout: float) -> Communicator | None:
    """Return a communicator around ``communicator`` (tracing, checking, compression)."""


@hookspec
def transform_model(model: torch.nn.Module, context: Context) -> torch.nn.Module | None:
    """Return the model to train in place of ``model``; runs in the plugin's ``phase``."""


# --- events: all are told ------------------------------------------------------


@hookspec
def on_prepare(model: torch.nn.Module, context: Context) -> None:
    """Called before anything is allocated or sent: refuse here what this machine cannot carry.

    ``model`` is as the user gave it; one that was deferred has no memory yet.
    """


@hookspec
def on_engine_ready(engine: Engine) -> None:
    """Called once when the engine is complete."""


@hookspec
def on_step_start(engine: Engine) -> None:
    """Called before the first micro-batch of each optimizer step."""


@hookspec
def on_step_end(engine: Engine, loss: torch.Tensor | None) -> None:
    """Called after each optimizer step.

    ``loss`` is the mean over the global batch; None where the step was made of
    the finer calls, which show the engine no loss.
    """


@hookspec
def on_checkpoint_saved(engine: Engine, directory: str, tag: str) -> None:
    """Called on every rank once a checkpoint is complete and visible."""


@hookspec
def on_error(engine: Engine, error: BaseException) -> None:
    """Called when a step raises, before the exception leaves the engine."""


@hookspec
def on_close(engine: Engine) -> None:
    """Called once when the engine is closed."""


# --- the command line -----------------------------------------------------------


@hookspec
def add_commands(cli: click.Group) -> None:
    """Add subcommands to the ``powertrain`` command, named after the plugin or after what they do.

    Static where the plugin's table has required keys: there is no object then.
    """
