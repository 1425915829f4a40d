"""Blocks that torch.compile builds under a memory budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from powertrain.compat import compiler_trouble, within_memory_budget
from powertrain.errors import CompilerMissing, ShardingError


class Compiled:
    """Runs a module's forward as compiled code that keeps no more than a share of its activations.

    Without gradients nothing is kept anyway, and it runs as it is.

    Args:
        backend: of torch.compile; blocks that share one share their code.
    """

    def __init__(self, backend: Callable[..., Any]) -> None:
        self.backend = backend
        self._code: Callable[..., Any] | None = None

    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return what ``forward`` returns."""
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if self._code is None:
            self._code = torch.compile(forward, backend=self.backend)
        return self._code(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        return Compiled(self.backend)  # the code is of this module, not of a copy

    def __reduce__(self) -> tuple[Any, ...]:
        return Compiled, (self.backend,)


def budgeted(budget: float, device: torch.device, backend: str = "inductor") -> Callable[..., Any]:
    """Return a backend of torch.compile under a memory budget.

    Raises:
        CompilerMissing: it would need a C++ compiler, and there is none.
    """
    if backend == "inductor" and device.type == "cpu":
        trouble = compiler_trouble()
        if trouble is not None:
            raise CompilerMissing(
                'recompute.policy = "budget" compiles blocks for this processor, and there is no C++ compiler',
                where="recompute.policy",
                found=trouble,
                remedy="install a C++ compiler (Debian and Ubuntu: g++; Fedora: gcc-c++), or set CXX; or choose "
                'policy = "selective", which needs none',
            )
    return within_memory_budget(budget, backend)


def check_not_compiled(path: str, module: torch.nn.Module) -> None:
    """Refuse a block that is compiled already.

    Raises:
        ShardingError: it is.
    """
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        raise ShardingError(
            "a block is compiled already, so no memory budget can enter into how",
            where=path,
            expected='blocks that recompute.policy = "budget" compiles itself',
            found="a block that torch.compile was called for",
            remedy='leave torch.compile to this policy, or choose policy = "full"',
        )
