"""Where parameters and buffers get their first values from, a slice at a time.

Whoever holds parameters (an optimizer wrapper) asks for the slices that it keeps,
one parameter after the other, so a model may be larger than any rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch

from powertrain import compat
from powertrain.errors import BirthError
from powertrain.names import global_name, named_buffers, named_parameters
from powertrain.nest import leaves, map_tensors
from powertrain.tape import Entry, Tape, entry_of

if TYPE_CHECKING:
    from powertrain.roles.communicator import Communicator


class Weights(Protocol):
    """Values from outside, by the global name of a parameter or buffer."""

    def covers(self, name: str) -> bool:
        """Return whether there is a value of this name."""

    def fill(self, name: str, target: torch.Tensor, start: int) -> None:
        """Write elements ``start ..`` of a value into ``target`` (flat), converting its type; local."""


class Birth:
    """Gives parameters and buffers their first values.

    A value comes from the weights if they have one of the name, else from the
    construction that ``powertrain.deferred`` recorded, else from the tensor itself.

    Attributes:
        weights: values from outside; None without ``weights=``.
    """

    def __init__(self) -> None:
        self.weights: Weights | None = None
        # Transforms may rename what they wrap: weights know a parameter by the name that it had before.
        self._names: dict[int, tuple[torch.Tensor, str]] = {}

    @torch.no_grad()
    def fill(self, name: str, param: torch.Tensor, target: torch.Tensor, start: int = 0) -> None:
        """Write elements ``start ..`` of a parameter's first value into ``target``, converting its type.

        Local: each rank asks for what it keeps. A recorded value is computed whole on the
        CPU, and given up before this returns; of weights only the slice is read.

        Args:
            name: the parameter's global name.
            param: the parameter, which may be on the meta device.
            target: flat; as many elements as are wanted.
            start: the first element wanted, in row-major order.

        Raises:
            BirthError: it is on the meta device, and neither recorded nor in the weights.
        """
        if target.is_meta:  # a device without memory, for planning
            return
        known, first_name = self._names.get(id(param), (None, name))
        weights_name = first_name if known is param else name
        if self.weights is not None and self.weights.covers(weights_name):
            self.weights.fill(weights_name, target, start)
            return
        value = param.detach()
        if value.is_meta:
            entry = entry_of(value)
            if entry is None:
                raise _lost([name])
            value = entry.value(value)
        target.copy_(value.reshape(-1)[start : start + target.numel()])

    @torch.no_grad()
    def whole(self, name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a new tensor on ``device`` with all of a parameter's or buffer's first value, laid out as it is."""
        result = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if result.is_contiguous():
            self.fill(name, tensor, result.view(-1))
        else:
            flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device=device)
            self.fill(name, tensor, flat)
            result.copy_(flat.view(tensor.shape))
        return result

    def make(self, name: str, param: torch.nn.Parameter, device: torch.device) -> None:
        """Give a parameter on the meta device all of its first value, in place; leave a real one alone."""
        if _lacks(param, device):
            settle(param, self.whole(name, param, device))

    # --- a whole model, before anyone owns its parameters ---------------------------------

    def check(self, model: torch.nn.Module, device: torch.device) -> None:
        """Refuse tensors whose first value cannot be known; remember the names of the others.

        Raises:
            BirthError: with the names of the first ten.
        """
        self._names = {id(param): (param, name) for name, param in named_parameters(model)}
        lost = [
            name
            for name, tensor in _named(model)
            if _lacks(tensor, device) and entry_of(tensor) is None and not (self.weights and self.weights.covers(name))
        ]
        if lost:
            raise _lost(lost)

    def agree(self, model: torch.nn.Module, communicator: Communicator) -> None:
        """Let every data rank's deferred tensors take the values that they have on the first.

        What is sent are the states of generators and small constants: no parameter.
        Every rank calls it, with the same model.
        """
        tapes = _tapes(model)
        if communicator.size("data") == 1 or not tapes:
            return
        facts = [fact for tape in tapes for fact in tape.facts()]
        sizes = [fact.numel() * fact.element_size() for fact in facts]
        # A reshaped copy: small constants may be of any type and layout.
        flat = torch.cat([fact.contiguous().view(-1).view(torch.uint8) for fact in facts]).to(communicator.device)
        communicator.broadcast(flat, 0, label="random state of the deferred construction").wait()
        with torch.no_grad():
            for fact, part in zip(facts, flat.cpu().split(sizes), strict=True):
                fact.copy_(part.clone().view(fact.dtype).view(fact.shape))
        for tape in tapes:
            tape.forget()

    def place(self, model: torch.nn.Module, device: torch.device) -> None:
        """Make the model's buffers, and move to the device what is real; parameters may stay on the meta device."""
        if device.type == "meta" or (not any(tensor.is_meta for _, tensor in _named(model)) and not _tapes(model)):
            model.to(device)
        else:
            self._make_buffers(model, device)
            _make_attributes(model)
            compat.apply(model, lambda tensor: tensor if tensor.is_meta else tensor.to(device))
        if self.weights is not None:
            for name, tensor in _named(model):
                if not tensor.is_meta and self.weights.covers(name):
                    tensor.detach().copy_(self.whole(name, tensor, device))

    def _make_buffers(self, model: torch.nn.Module, device: torch.device) -> None:
        made: dict[int, torch.Tensor] = {}
        for prefix, module in model.named_modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_meta:
                    if id(buffer) not in made:
                        full = global_name(f"{prefix}.{name}" if prefix else name)
                        made[id(buffer)] = self.whole(full, buffer, device)
                    setattr(module, name, made[id(buffer)])

    def finish(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        """See that nothing is left on the meta device when the engine is ready, and let go of the weights.

        Raises:
            BirthError: with the names of the first ten.
        """
        for state in optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and _lacks(value, device):
                    raise BirthError(
                        f"the optimizer {type(optimizer).__name__} made its state of parameters that had no memory yet",
                        where=str(key),
                        remedy="choose one that makes its state in the first step, or build the model as usual",
                    )
        left = [name for name, tensor in _named(model) if _lacks(tensor, device)]
        if left:
            raise BirthError(
                f"{len(left)} of the model's tensors are still on the meta device",
                where=_some(left),
                remedy="what wraps the optimizer or transforms the model must make parameters through context.birth",
            )
        self.weights = None
        self._names = {}


def settle(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Make ``value`` the memory of a parameter, in place: all who hold the parameter keep it, with its attributes.

    Raises:
        BirthError: something of torch holds the parameter in a way that forbids it.
    """
    if not param.is_meta or value.is_meta:
        param.data = value
        return
    new = torch.nn.Parameter(torch.empty(0, dtype=value.dtype, device=value.device), requires_grad=param.requires_grad)
    # Given as data, a view of a buffer does not count writes into the rest of the buffer as its own.
    new.data = value
    new.__class__ = type(param)
    new.__dict__.update(param.__dict__)
    try:
        torch.utils.swap_tensors(param, new)
    except RuntimeError as error:
        raise BirthError(
            "a deferred parameter is held by autograd or by a weak reference, and cannot get its memory",
            found=str(error).splitlines()[0],
            remedy="take no weak reference to parameters, and run no backward pass, before powertrain.initialize",
        ) from error


def _lacks(tensor: torch.Tensor, device: torch.device) -> bool:
    """Return whether a tensor still has to get memory; on the meta device itself, which plans runs, none has."""
    return tensor.is_meta and device.type != "meta"


def _named(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from named_parameters(model)
    yield from named_buffers(model)


def _attributes(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, Entry]]:
    """Yield plain attributes of modules that are or hold deferred tensors, with one tensor's entry."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, (torch.Tensor, list, tuple, dict)) and name not in ("_parameters", "_buffers"):
                for leaf in leaves(value):
                    if _is_plain(leaf) and (entry := entry_of(leaf)) is not None:
                        yield module, name, entry


def _make_attributes(model: torch.nn.Module) -> None:
    """Make tensors that modules keep as plain attributes where they would have been without deferral."""
    for module, name, _ in list(_attributes(model)):
        setattr(module, name, map_tensors(_made, getattr(module, name)))


def _made(tensor: torch.Tensor) -> torch.Tensor:
    entry = entry_of(tensor) if _is_plain(tensor) else None
    return tensor if entry is None else entry.value(tensor.detach()).to(entry.device)


def _is_plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter) and value.is_meta


def _tapes(model: torch.nn.Module) -> list[Tape]:
    """Return the recorded constructions that the model came from, in the order of its tensors."""
    entries = [entry_of(tensor) for _, tensor in _named(model) if tensor.is_meta]
    entries += [entry for _, _, entry in _attributes(model)]
    return list({id(entry.tape): entry.tape for entry in entries if entry is not None}.values())


def _lost(names: list[str]) -> BirthError:
    return BirthError(
        f"{len(names)} of the model's tensors are on the meta device, and nothing tells their first values",
        where=_some(names),
        remedy="build the model inside `with powertrain.deferred():` instead of torch.device('meta') and change it "
        "only there, or give `weights=` to powertrain.initialize",
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
