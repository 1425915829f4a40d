"""The one private name of torch that the measurement needs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch


def plain_dispatch() -> AbstractContextManager[Any]:
    """Return a context in which tensor subclasses are asked as plain tensors: a freed parameter refuses otherwise."""
    context: AbstractContextManager[Any] = torch._C.DisableTorchFunctionSubclass()
    return context
