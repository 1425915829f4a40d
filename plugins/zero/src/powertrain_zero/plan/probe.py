"""What an optimizer keeps for each parameter, found by running one step of it; and what a process needs by itself."""

from __future__ import annotations

import math
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from powertrain.errors import OptimizerError, PowertrainError
from powertrain_zero.plan.settings import Settings, make_recipe, optimizer_factory

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import torch

SIDES = ((), (1009,), (31, 37), (7, 11, 13), (5, 7, 11, 13))
"""The probed parameters by number of dimensions: no side has another's length, so state tells which sides it has."""


PATIENCE = 60.0
"""Seconds to wait for a process that probes; it takes about three."""


@attrs.frozen
class StateTensor:
    """A tensor that the optimizer keeps for a parameter.

    Attributes:
        sides: which of the parameter's sides it has, by place.
        rest: the product of its other sides.
        itemsize: bytes of an element.
        converts: whether it may rest in another format than the masters.
        block: it has one element for so many of the parameter's; 0: it has not.
    """

    sides: tuple[int, ...]
    rest: int
    itemsize: int
    converts: bool
    block: int = 0

    def numel(self, shape: Sequence[int]) -> int:
        """Return its elements for a parameter of some shape."""
        if self.block:
            return -(-math.prod(shape) // self.block)
        return self.rest * math.prod(shape[side] for side in self.sides)


@attrs.frozen
class OptimizerFacts:
    """What one optimizer needs.

    Attributes:
        name: its class.
        pieces: it updates any piece of a parameter; otherwise parameters come whole, those excepted that it says.
        flat: it keeps state in another format than the masters by itself; otherwise that is converted for an update.
        align: pieces start at multiples of so many elements.
        states: what it keeps for parameters of 1, 2, 3 and 4 dimensions.
        temporary: bytes that live only within a step, for each element of the parameter that is updated.
        process: bytes that a process needs before it has tensors; 0 when unknown.
    """

    name: str
    pieces: bool
    flat: bool
    align: int
    states: tuple[tuple[StateTensor, ...], ...]
    temporary: float
    process: int

    def state_bytes(self, shape: Sequence[int], itemsize: int | None = None) -> int:
        """Return what it keeps for a parameter of some shape.

        Args:
            shape: the parameter's.
            itemsize: bytes of an element where state rests in another format than the masters.
        """
        shape = tuple(shape) or (1,)
        if len(shape) > len(self.states):
            shape = (*shape[: len(self.states) - 1], math.prod(shape[len(self.states) - 1 :]))
        return sum(
            tensor.numel(shape) * (itemsize if itemsize is not None and tensor.converts else tensor.itemsize)
            for tensor in self.states[len(shape) - 1]
        )

    def converted_bytes(self, numel: int, itemsize: int) -> int:
        """Return the bytes of what is converted for an update of ``numel`` elements."""
        return sum(tensor.numel((numel,)) * itemsize for tensor in self.states[0] if tensor.converts)


def probe_beside(settings: Settings) -> Callable[[], OptimizerFacts]:
    """Start ``probe`` in a process beside this one; return what waits for its result.

    torch imports its compiler with the first optimizer, which takes as long as torch itself. The process is a
    fork that shares what torch has imported so far; where torch has worked already, its threads forbid that (and
    the system, where it is not Linux), and the result is found when it is asked for.
    """
    fresh = "torch" not in sys.modules
    import torch

    if not (fresh and torch.nn and sys.platform == "linux"):
        return lambda: probe(settings)
    fork = get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_tell, args=(sender, settings, _rss()), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which are numpy's, and idle
        process.start()
    sender.close()

    def result() -> OptimizerFacts:
        try:
            found: OptimizerFacts | None = receiver.recv() if receiver.poll(PATIENCE) else None
        except EOFError:
            found = None
        process.kill()  # it has told all that it will tell
        process.join()
        return probe(settings) if found is None else found  # here it raises what it has to say

    return result


def _tell(sender: Connection[OptimizerFacts | None, Any], settings: Settings, before: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for this one answers Ctrl-C
    start = _rss()  # less than before the fork: the pages of libraries have not been touched yet
    try:
        found = probe(settings)
        found = attrs.evolve(found, process=before + found.process - start)
    except Exception:
        sender.send(None)
    else:
        sender.send(found)


def probe(settings: Settings) -> OptimizerFacts:
    """Run one step of the configured optimizer on small real tensors.

    Raises:
        OptimizerError: there is no such optimizer, or it cannot update any of them.
    """
    from powertrain.roles.optimizer import FlatOptimizer, blocks_of, takes_pieces

    factory = optimizer_factory(settings.config)
    dtype = make_recipe(settings.config).master
    states, temporary, name = [], 0.0, ""
    pieces, flat, align = True, False, 1
    failure: Exception | None = None
    for ndim in range(1, len(SIDES)):
        try:
            made, kept, extra = _step(factory, SIDES[ndim], dtype)
        except PowertrainError:
            raise
        except Exception as error:  # some update matrices only
            failure, kept, extra = error, (), 0.0
        else:
            name, temporary = type(made).__name__, max(temporary, extra)
            pieces, flat = takes_pieces(made), isinstance(made, FlatOptimizer)
            align = math.lcm(1, *blocks_of(made).values())
        states.append(kept)
    if not name:
        raise OptimizerError(
            f"the optimizer {settings.config.optimizer.name!r} cannot update a small tensor",
            where="optimizer",
            found=str(failure),
        )
    return OptimizerFacts(name, pieces, flat, align, tuple(states), temporary, resident())


def _step(
    factory: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.optim.Optimizer, tuple[StateTensor, ...], float]:
    import torch

    from powertrain.roles.optimizer import blocks_of

    param = torch.nn.Parameter(torch.full(shape, 0.5, dtype=dtype))
    optimizer = factory([("probed", param)] if getattr(factory, "named", False) else [param])
    optimizer.granularity = factory.granularity
    param.grad = torch.full_like(param, 0.25)
    with _meter() as count:
        optimizer.step()
    state = {key: value for key, value in optimizer.state[param].items() if isinstance(value, torch.Tensor)}
    found = [_rule(value, shape, blocks_of(optimizer).get(key, 0)) for key, value in state.items()]
    kept = list(state.values())
    size = sum(value.untyped_storage().nbytes() for value in {id(v.untyped_storage()): v for v in kept}.values())
    return optimizer, tuple(found), max(0, count.peak - size) / param.numel()


def _rule(value: torch.Tensor, shape: tuple[int, ...], block: int) -> StateTensor:
    if block:
        return StateTensor((), 1, value.element_size(), converts=False, block=block)
    sides, rest = [], 1
    for length in value.shape:
        if length in shape and length > 1:
            sides.append(shape.index(length))
        else:
            rest *= length
    return StateTensor(tuple(sides), rest, value.element_size(), value.ndim > 0 and value.is_floating_point())


def _meter() -> Any:
    from powertrain_zero.plan.activations import StorageCount

    return StorageCount(())


def resident() -> int:
    """Return the memory of this process, in bytes; 0 where the system does not tell.

    After an optimizer's step, and before there is a model, a process has loaded what a rank
    loads: Python, torch and Powertrain.
    """
    import powertrain
    import powertrain_zero.sharded

    assert callable(powertrain.initialize) and powertrain_zero.sharded
    return _rss()


def _rss() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)
