"""The same tests on a GPU, where there is one, and else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch

GPU = torch.cuda.device_count() > 0

# Triton has no wheels for some systems; what the library does there has its own test.
collect_ignore = (
    [] if find_spec("triton") else ["test_updates.py", "test_sums.py", "test_blockwise.py", "test_layers.py"]
)

if find_spec("triton") and not GPU:
    # Triton asks for it when a function is decorated. Its own functions stay compiled ones, whoever imports it first,
    # and no other test sees the variable.
    import_module("triton.language")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in ("updates", "lamb", "sums", "blockwise", "norms", "rotary", "swiglu", "losses"):
            import_module(f"powertrain_triton.device.{name}")


@pytest.fixture
def device() -> torch.device:
    """Return where the kernels run."""
    return torch.device("cuda", 0) if GPU else torch.device("cpu")


@pytest.fixture
def rounds() -> int:
    """Return how often a test of random cases repeats: the interpreter takes milliseconds a program."""
    return 20 if GPU else 1


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Let the interpreter's numpy overflow in silence, as a device does."""
    with np.errstate(all="ignore"):
        yield
