"""From a built file to a Python module."""

from __future__ import annotations

import logging
import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

from powertrain.environment import native_wanted
from powertrain.errors import BuildFailed, NativeError
from powertrain.native.builder import Built, build
from powertrain.native.source import Source

_log = logging.getLogger("powertrain.native")


def load(source: Source) -> ModuleType:
    """Return the module of ``source``, built now if it is not in the cache.

    Raises:
        CompilerMissing: no compiler, no ninja or no Python headers.
        BuildFailed: it could not be built, or what was built does not load.
    """
    built = build(source)
    try:
        return _import(source, built)
    except ImportError as error:  # made on another system, perhaps: once more, from the source
        _log.info("%s does not load (%s); building it again", built.path, error)
    built = build(source, broken=built)
    try:
        return _import(source, built)
    except ImportError as error:
        raise BuildFailed(
            f"{source.name} was built but does not load", where=str(built.path), found=str(error)
        ) from error


def _import(source: Source, built: Built) -> ModuleType:
    name = f"powertrain.native.built.{source.name}_{built.key}"
    if (known := sys.modules.get(name)) is not None:
        return known
    spec = spec_from_file_location(source.name, built.path, loader=ExtensionFileLoader(source.name, str(built.path)))
    if spec is None or spec.loader is None:
        raise ImportError(f"{built.path} is no extension module")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    # A module that is initialized twice in one process would lose the types of the first.
    return sys.modules.setdefault(name, module)


def try_load(source: Source, purpose: str) -> ModuleType | None:
    """Return the module of ``source``, or None, with one line that says why, where it cannot be had.

    Args:
        source: what to load.
        purpose: what runs instead: "the PyTorch reference", "gloo".
    """
    if not native_wanted():
        _log.info("%s is left out (POWERTRAIN_NATIVE=0): %s runs instead", source.name, purpose)
        return None
    try:
        return load(source)
    except NativeError as error:
        failed = isinstance(error, BuildFailed)
        place = f" ({error.where})" if failed and error.where else ""
        more = "`powertrain kernels build` prints what the compiler says; " if failed and error.found else ""
        _log.warning("%s%s; %s runs instead. To fix: %s%s", error.message, place, purpose, more, error.remedy)
        return None
