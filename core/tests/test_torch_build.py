"""What the installed torch was built for is read without importing it."""

from __future__ import annotations

import subprocess
import sys

import torch

from powertrain.torch_build import torch_build

FEATURES = ("__version__", "git_version", "debug", *(name for name in torch.version.__all__ if name != "__version__"))


def test_agrees_with_the_imported_torch() -> None:
    """The answer is what ``torch.version`` says, and None for what it lacks."""
    for name in FEATURES:
        value = getattr(torch.version, name)
        assert torch_build(name) == (str(value) if value else None)
    assert torch_build("no_such_library") is None


def test_reads_the_version_without_importing_torch() -> None:
    """A fresh interpreter gets the same answers and has no torch loaded."""
    code = (
        "import sys; from powertrain.torch_build import torch_build\n"
        f"print([torch_build(name) for name in {FEATURES!r}]); assert 'torch' not in sys.modules"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == repr([torch_build(name) for name in FEATURES])


def test_no_torch_is_no_build() -> None:
    """Where torch is not installed, every feature is absent."""
    code = (
        "import importlib.util; found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else found(name, *rest)\n"
        "from powertrain.torch_build import torch_build; print(torch_build('git_version'))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "None"
