"""Element types as the safetensors format names them; importing this needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from powertrain.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element."""

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "C64": "complex64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def to_torch(code: str) -> torch.dtype:
    """Return torch's type for a safetensors code such as ``"BF16"``."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[code])
    return dtype


def from_torch(dtype: torch.dtype) -> str:
    """Return the safetensors code of a torch type.

    Raises:
        CheckpointError: the format has no such type.
    """
    name = str(dtype).removeprefix("torch.")
    for code, torch_name in _TORCH_NAMES.items():
        if torch_name == name:
            return code
    raise CheckpointError(
        f"tensors of type {name} cannot be saved",
        expected=", ".join(sorted(_TORCH_NAMES.values())),
        remedy="convert the tensor before it is saved",
    )
