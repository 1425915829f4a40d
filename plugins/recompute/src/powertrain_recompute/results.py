"""Results of operators, kept in the first run of a block and given to the second in place of computing them.

torch's own ``create_selective_checkpoint_contexts`` wants the same operators in both runs, the cheap ones too. Casts
that autocast has cached, and what hooks do that gather parameters, are not the same; here they need not be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from powertrain.compat import TorchDispatchMode, alias, version
from powertrain.nest import map_tensors, tensors

Key = tuple[Any, int]
"""An operator, and which of its calls in the block."""

Kept = tuple[Any, list[int]]
"""What it returned, and the versions of the tensors in that."""


def keep(operators: frozenset[Any]) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return what surrounds the first run of a block, and the second."""
    results: dict[Key, Kept] = {}
    return Keeping(operators, results), Giving(operators, results)


class Keeping(TorchDispatchMode):
    """Keeps results."""

    def __init__(self, operators: frozenset[Any], results: dict[Key, Kept]) -> None:
        super().__init__()
        self._operators, self._results = operators, results
        self._calls: Counter[Any] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator."""
        result = func(*args, **(kwargs or {}))
        if func in self._operators:
            key = func, self._calls[func]
            self._calls[func] += 1
            # The tensors themselves will have a history, which holds this.
            kept = map_tensors(alias, result)
            self._results[key] = kept, [version(tensor) for tensor in tensors(kept)]
        return result


class Giving(TorchDispatchMode):
    """Gives results, each once; a graph that is gone through again computes them."""

    def __init__(self, operators: frozenset[Any], results: dict[Key, Kept]) -> None:
        super().__init__()
        self._operators, self._results = operators, results
        self._calls: Counter[Any] = Counter()

    def __enter__(self) -> Giving:
        """Begin a run."""
        self._calls.clear()
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Return what the operator returned before, or run it."""
        if func in self._operators:
            key = func, self._calls[func]
            self._calls[func] += 1
            if key in self._results:
                result, versions = self._results.pop(key)
                if [version(tensor) for tensor in tensors(result)] != versions:
                    raise RuntimeError(
                        f"the result of {func}, which [recompute] save keeps, has been modified by an inplace "
                        "operation: write out of place there, or leave the operator out of save"
                    )
                return result
        return func(*args, **(kwargs or {}))
