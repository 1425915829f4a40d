"""What a parameter is while this rank holds only its slice of it.

Its shape and type stay true, but its storage is empty: reading it would read
nothing. So its class changes for as long, and whatever needs its elements
raises, with its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from powertrain.compat import plain_dispatch
from powertrain.errors import ParameterFreed

_NAME = "_powertrain_freed_name"
_CLOSED = "_powertrain_closed"

_HARMLESS = frozenset(
    {
        "__get__", "__set__", "__delete__", "__hash__", "size", "stride", "dim", "numel", "nelement", "ndimension",
        "element_size", "is_floating_point", "is_complex", "is_contiguous", "requires_grad_", "register_hook",
        "register_post_accumulate_grad_hook", "get_device", "is_signed", "is_sparse", "storage_offset", "_is_view",
        "__len__", "is_meta",
    }
)  # fmt: skip
"""What can be asked of a parameter without its elements. ``__get__`` and ``__set__`` are those of attributes."""

_ELEMENTS = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
"""Attributes that lead to the elements."""


_OPEN = (
    "wrap the access in `with powertrain.full(module_or_parameters):`; for a whole state dict use powertrain.stream, "
    "engine.save_checkpoint and `powertrain export`; to load weights use engine.load_weights"
)
_OVER = (
    "its engine is closed, so nothing gathers it any more: use what was saved, or take the values before the engine "
    "closes, in `with powertrain.full(module):`; for another engine build the model anew"
)


class FreedParameter(torch.nn.Parameter):
    """A parameter that is not gathered."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what needs no elements.

        Raises:
            ParameterFreed: the call would read or write elements.
        """
        name = getattr(func, "__name__", str(func))
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        asks_for_type = name == "type" and len(args) == 1 and not kwargs  # with a type, it converts
        if asks_for_type or (name in _HARMLESS and not (name in ("__get__", "__set__") and attribute in _ELEMENTS)):
            with plain_dispatch():
                return func(*args, **(kwargs or {}))
        touched = next((arg for arg in _flat(args, kwargs) if isinstance(arg, FreedParameter)), None)
        what = f"{attribute}.{name}".strip(".") if name in ("__get__", "__set__") else name
        raise ParameterFreed(
            f"{what} needs the elements of a parameter that is sharded and not gathered here",
            where=getattr(touched, _NAME, "an unnamed parameter"),
            expected="an access inside the forward or backward pass of its module, or inside powertrain.full",
            remedy=_OVER if getattr(touched, _CLOSED, False) else _OPEN,
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Parameter(freed, name={getattr(self, _NAME, '?')!r}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _flat(args: Any, kwargs: Mapping[str, Any] | None) -> Any:
    for arg in (*args, *(kwargs or {}).values()):
        if isinstance(arg, (tuple, list)):
            yield from _flat(arg, None)
        else:
            yield arg


def mark_freed(param: torch.nn.Parameter, name: str) -> None:
    """Make touching the parameter's elements an error that says ``name``."""
    if type(param) is torch.nn.Parameter:
        param.__class__ = FreedParameter
        setattr(param, _NAME, name)
        setattr(param, _CLOSED, False)  # of an engine before this one


def mark_closed(param: torch.nn.Parameter) -> None:
    """Let the error say that the engine is closed."""
    setattr(param, _CLOSED, True)


def mark_whole(param: torch.nn.Parameter) -> None:
    """Make the parameter an ordinary one again."""
    if type(param) is FreedParameter:
        param.__class__ = torch.nn.Parameter  # type: ignore[assignment]
