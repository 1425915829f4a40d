"""What accelerators get: kernels by name, the reference's arguments, and None with a reason where triton cannot run."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from importlib.util import find_spec

import pytest

from powertrain import kernels
from powertrain_cuda.accelerator import CudaAccelerator
from powertrain_rocm.accelerator import RocmAccelerator
from powertrain_triton.offer import NAMES, Offer

has_triton = pytest.mark.skipif(find_spec("triton") is None, reason="there is no triton for this system")


@has_triton
@pytest.mark.parametrize("name", NAMES)
def test_kernels_take_the_references_arguments(name: str) -> None:
    """Every kernel is one of the core's, with the very parameters and defaults of its reference."""
    kernel = Offer().get(name)
    assert kernel is not None

    def shape(function: object) -> list[tuple[str, object, object]]:
        parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
        return [(one.name, one.kind, one.default) for one in parameters]

    assert shape(kernel) == shape(kernels.reference(name))


def test_the_library_has_every_kernel() -> None:
    """What the core names, and nothing else."""
    assert set(NAMES) == set(kernels.NAMES)
    assert Offer().get("no such kernel") is None


@has_triton
@pytest.mark.parametrize("kind", [CudaAccelerator, RocmAccelerator])
def test_gpus_offer_them(kind: type[CudaAccelerator | RocmAccelerator]) -> None:
    """Both accelerators hand the library's kernels out."""
    accelerator = kind()
    assert "kernels" in accelerator.capabilities
    found = kernels.kernel(accelerator, "adam")
    assert found.__func__ is Offer().get("adam").__func__  # type: ignore[union-attr,attr-defined]
    assert found == kernels.kernel(accelerator, "adam")  # with the same tables


def test_without_triton_one_line_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where triton cannot be imported each kernel is None, and the log says it once, with what to do."""
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    offer = Offer()
    with caplog.at_level(logging.WARNING, "powertrain.triton"):
        assert offer.get("adam") is None
        assert offer.get("quantize") is None
    (record,) = caplog.records
    assert "triton cannot be imported" in record.getMessage()
    assert "To fix: install" in record.getMessage()


def test_asking_for_nothing_imports_nothing() -> None:
    """An accelerator that nobody asks for a kernel imports no triton."""
    code = (
        "import sys; from powertrain_cuda.accelerator import CudaAccelerator; CudaAccelerator()\n"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@has_triton
def test_without_a_device_one_line_says_so() -> None:
    """Where triton is there and no device is, kernels are None and the host's memory is refused."""
    code = (
        "import logging, torch; from powertrain_triton.offer import Offer\n"
        "logging.basicConfig()\n"
        "assert torch.cuda.device_count() or Offer().get('adam') is None\n"
        "from powertrain_triton.offer import homes\n"
        "try: homes()['sums'].sums_of_squares([torch.zeros(3)])\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "not in the host's memory" in done.stdout
