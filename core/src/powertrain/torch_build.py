"""What the installed torch was built for, read without importing it.

An accelerator plugin that needs a certain build of torch must say in
milliseconds that it cannot be used here; importing torch takes seconds.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def torch_build(feature: str) -> str | None:
    """Return the version of ``feature`` that torch was built with, or None if it was built without.

    Args:
        feature: an attribute of ``torch.version``, the name of a device library there.
    """
    torch = sys.modules.get("torch")
    version = vars(torch.version) if torch is not None else _read_version_file()
    value = version.get(feature)
    return str(value) if value else None


def _read_version_file() -> dict[str, object]:
    """Run torch's generated ``version.py``, which holds constants only, outside its package."""
    package = importlib.util.find_spec("torch")
    if package is None or package.origin is None:
        return {}
    file = Path(package.origin).with_name("version.py")
    spec = importlib.util.spec_from_file_location("torch_version_constants", file)
    if spec is None or spec.loader is None or not file.is_file():
        return {}
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)
