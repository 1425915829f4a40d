"""What the tensors of a model are called, whatever wraps its modules.

``torch.compile(module)`` puts a module around the compiled one, and with it a
component into the name of everything below. A global name has none of these: a
checkpoint of a compiled model is one of the model, and loads weights by its names.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_WRAPPER = "_orig_mod"
"""The attribute under which torch's ``OptimizedModule`` keeps what it compiles."""


def global_name(name: str) -> str:
    """Return the name of a tensor or module as it would be in the model without ``torch.compile``."""
    return ".".join(part for part in name.split(".") if part != _WRAPPER) if _WRAPPER in name else name


def named_parameters(
    model: torch.nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield parameters with their global names, in the model's order; a tied one once, or under each of its names."""
    for name, param in model.named_parameters(remove_duplicate=remove_duplicate):
        yield global_name(name), param


def named_buffers(model: torch.nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield buffers with their global names, in the model's order."""
    for name, buffer in model.named_buffers(remove_duplicate=remove_duplicate):
        yield global_name(name), buffer


def state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what the model saves, the tensors themselves, by global name; extra state may be no tensor."""
    return {global_name(name): value for name, value in model.state_dict(keep_vars=True).items()}
