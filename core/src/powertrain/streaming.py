"""All tensors of a model, whole, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from powertrain.access import home_of, module_of
from powertrain.names import named_parameters, state_dict
from powertrain.pieces import Place, assemble, bits, exchange
from powertrain.roles.communicator import Communicator

if TYPE_CHECKING:
    from powertrain.engine import Engine


def stream(
    module_or_engine: torch.nn.Module | Engine, *, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over ``(name, whole tensor)``: all parameters, tied ones once, then the persistent buffers.

    Collective: each item is. Every rank must take the same number of items, and those that have no use for a tensor
    drop it; to stop early, all stop after the same item. The tensors are copies, on the run's device, the
    same on every rank: parameters in the precision that the optimizer updates, buffers as the first
    data rank has them. One whole tensor exists at a time, if the consumer keeps none.

    Args:
        module_or_engine: what to iterate over; names and order are those of ``named_parameters``.
        dtype: what floating-point tensors are converted to, before they travel; None leaves them as they are.
    """
    module = module_of(module_or_engine)
    named = list(named_parameters(module))
    homes = {name: home for name, param in named if (home := home_of(param)) is not None}
    places: dict[str, list[Place | None]] = {}
    for wrapper in {id(home.wrapper): home.wrapper for home in homes.values()}.values():
        own = {name: home for name, home in homes.items() if home.wrapper is wrapper}
        mine = {name: Place.of(wrapper.parts(home.param)["value"]) for name, home in own.items()}
        places |= exchange(mine, next(iter(own.values())).communicator, "places of all parameters")
    for name, param in named:
        # Nothing here may keep a tensor while the next one is made.
        if (home := homes.get(name)) is None:
            yield name, _converted(param.detach(), dtype)
        else:
            piece = home.wrapper.parts(home.param)["value"]
            kind = dtype if piece.tensor.is_floating_point() else None
            yield name, assemble(piece, places[name], home.communicator, name, kind)
    communicator = next((home.communicator for home in homes.values()), None)
    for name, buffer in _persistent_buffers(module):
        yield name, _of_the_first(_converted(buffer.detach(), dtype), communicator, name)


def _of_the_first(tensor: torch.Tensor, communicator: Communicator | None, name: str) -> torch.Tensor:
    """Return the first data rank's values."""
    if communicator is None or communicator.size("data") == 1:
        return tensor
    flat = tensor.to(communicator.device).reshape(-1)
    communicator.broadcast(bits(flat), 0, label=f"all of {name}").wait()
    return flat.view(tensor.shape)


def _converted(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return a contiguous copy, floating-point numbers in another format."""
    kind = dtype if tensor.is_floating_point() else None
    return tensor.to(kind or tensor.dtype, copy=True, memory_format=torch.contiguous_format)


def _persistent_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the buffers that a state dict has, each once."""
    params = {name for name, _ in named_parameters(module, remove_duplicate=False)}
    found: dict[torch.Tensor, str] = {}
    for name, value in state_dict(module).items():
        if name not in params and isinstance(value, torch.Tensor):
            found.setdefault(value, name)
    return [(name, value) for value, name in found.items()]
