"""Access to parameters that may rest in pieces: who holds each, and all of it for a block.

Each parameter of an engine's model carries, in the attribute ``powertrain_home``,
who holds it: the engine's optimizer wrapper, which is asked for the rest. There
is no table of engines, and two of them in one process know nothing of each other.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from powertrain.errors import CommunicationError
from powertrain.names import named_parameters
from powertrain.pieces import index
from powertrain.roles.communicator import Communicator
from powertrain.roles.optimizer import OptimizerWrapper

if TYPE_CHECKING:
    from powertrain.engine import Engine

_MARK = "powertrain_home"


class Home:
    """Who holds a parameter; copies of the parameter have none.

    Attributes:
        name: the parameter's global name.
        communicator: connects the ranks that hold pieces.
        gathering: the open ``gathered`` block that makes the parameter whole.
    """

    def __init__(
        self, param: torch.nn.Parameter, name: str, wrapper: OptimizerWrapper, communicator: Communicator
    ) -> None:
        self.name = name
        self.communicator = communicator
        self.gathering: _Gathering | None = None
        # Weak: a model that outlives its engine must not keep the engine's optimizer state alive.
        self._param = weakref.ref(param)
        self._wrapper = weakref.ref(wrapper)

    @property
    def param(self) -> torch.nn.Parameter:
        """The parameter."""
        param = self._param()
        assert param is not None
        return param

    @property
    def wrapper(self) -> OptimizerWrapper:
        """The optimizer wrapper."""
        wrapper = self._wrapper()
        assert wrapper is not None
        return wrapper

    def is_current(self) -> bool:
        """Return whether the parameter is still held, and by the same engine."""
        param = self._param()
        return param is not None and home_of(param) is self

    def is_of(self, param: torch.Tensor) -> bool:
        """Return whether ``param`` is the parameter itself, and its engine is still there."""
        return self._param() is param and self._wrapper() is not None

    def __reduce__(self) -> tuple[Any, ...]:
        # Copying or pickling a model copies its parameters' attributes; an engine does not go with them.
        return OrderedDict, ()


def adopt(model: torch.nn.Module, wrapper: OptimizerWrapper, communicator: Communicator) -> None:
    """Mark the parameters of ``model`` as held by ``wrapper``; called once by what builds the engine.

    Args:
        model: the model as the engine runs it, with its global names.
        wrapper: what holds its parameters from now on.
        communicator: connects the ranks that hold pieces.
    """
    for name, param in named_parameters(model):
        setattr(param, _MARK, Home(param, name, wrapper, communicator))


def release(model: torch.nn.Module, wrapper: OptimizerWrapper) -> None:
    """Take the marks of ``wrapper`` off: its parameters are plain ones again."""
    for param in model.parameters():
        home = home_of(param)
        if home is not None and home.wrapper is wrapper:
            delattr(param, _MARK)


def home_of(param: torch.Tensor) -> Home | None:
    """Return who holds a parameter; None for a plain one."""
    home = getattr(param, _MARK, None)
    return home if isinstance(home, Home) and home.is_of(param) else None


def module_of(target: torch.nn.Module | Engine) -> torch.nn.Module:
    """Return a module as it is, and of an engine the module that it trains."""
    return target if isinstance(target, torch.nn.Module) else target.module


class _Gathering:
    """Parameters that one ``gathered`` block of their wrapper makes whole, for as long as somebody uses them."""

    def __init__(self, homes: Sequence[Home], *, write: bool) -> None:
        self.write = write
        self.users = 0
        self._homes = homes
        self._context = homes[0].wrapper.gathered([home.param for home in homes], write=write)
        self._context.__enter__()
        for home in homes:
            home.gathering = self

    def leave(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        """End one use; the last one ends the wrapper's block."""
        self.users -= 1
        if self.users:
            return None
        for home in self._homes:
            home.gathering = None
        return self._context.__exit__(kind, error, traceback)


@contextmanager
def full(
    module_or_params: torch.nn.Module | Engine | torch.Tensor | Iterable[torch.Tensor], *, write: bool = False
) -> Iterator[None]:
    """Hold parameters whole on this rank, within a block.

    Collective: every rank must enter and leave, with the same parameters. Inside,
    the model may run. Blocks may be nested and overlap; what is whole already costs nothing.

    Args:
        module_or_params: a module or an engine, all of whose parameters are meant; or
            parameters. Those that no engine holds are whole anyway.
        write: keep what the block writes: the first data rank's values win, on all ranks, in the model and
            in what the optimizer updates. An element that was not changed keeps the precision of its
            master copy. What an exception cuts short is kept as well, as in plain PyTorch, except when
            the ranks can no longer talk. Without it, a block must not write.
    """
    if isinstance(module_or_params, torch.Tensor):
        params: Iterable[torch.Tensor] = [module_or_params]
    elif hasattr(module_or_params, "__iter__") and not isinstance(module_or_params, torch.nn.Module):
        params = module_or_params
    else:
        params = module_of(module_or_params).parameters()
    held: dict[int, dict[int, Home]] = {}  # by wrapper and by parameter
    for home in map(home_of, params):
        if home is not None:
            held.setdefault(id(home.wrapper), {})[id(home)] = home
    with ExitStack() as stack:
        for homes in held.values():
            stack.enter_context(_block(list(homes.values()), write=write))
        yield


@contextmanager
def _block(homes: Sequence[Home], *, write: bool) -> Iterator[None]:
    """Hold parameters of one wrapper whole."""
    wrapper, communicator = homes[0].wrapper, homes[0].communicator
    late = [home for home in homes if write and home.gathering is not None and not home.gathering.write]
    new = [home for home in homes if home.gathering is None]
    if new:
        _Gathering(new, write=write)
    used = dict.fromkeys(home.gathering for home in homes if home.gathering is not None)
    with ExitStack() as stack:
        for gathering in used:
            gathering.users += 1
            stack.push(gathering.leave)
        if late:  # whole already, by a block that does not write
            stack.enter_context(keeping_writes(wrapper, [home.param for home in late], communicator))
        yield


@contextmanager
def keeping_writes(
    wrapper: OptimizerWrapper, params: Sequence[torch.nn.Parameter], communicator: Communicator
) -> Iterator[None]:
    """Keep what a block writes into parameters that are whole on every rank; wrappers may use it in ``gathered``.

    At its end, by an exception as well, the first data rank's values go to all, then into ``parts`` where they
    changed an element, and are published.

    Args:
        wrapper: holds the parameters.
        params: what may be written.
        communicator: connects the ranks.
    """
    try:
        yield
    except CommunicationError:  # nobody is there to agree with
        raise
    except Exception:
        _keep_writes(wrapper, params, communicator)
        raise
    _keep_writes(wrapper, params, communicator)


@torch.no_grad()
def _keep_writes(wrapper: OptimizerWrapper, params: Sequence[torch.nn.Parameter], communicator: Communicator) -> None:
    under_way = []
    for param in params:
        home = home_of(param)
        target = param.detach().contiguous()
        label = f"written {home.name}" if home is not None else "written parameter"
        under_way.append((param, target, communicator.broadcast(target, 0, label=label)))
    for param, target, handle in under_way:
        handle.wait()
        if target.data_ptr() != param.data_ptr():
            param.copy_(target)
    for param in params:
        for box, chunk in wrapper.parts(param)["value"].chunks():
            written = param.detach()[index(box)].to(chunk.device)
            if written.dtype != chunk.dtype:
                # What the block left alone is the rounded master: the master itself is more exact.
                rounded = chunk.to(written.dtype)
                same = (rounded == written) & (rounded.signbit() == written.signbit())
                written = torch.where(same, chunk, written.to(chunk.dtype))
            chunk.copy_(written)
    wrapper.publish()
