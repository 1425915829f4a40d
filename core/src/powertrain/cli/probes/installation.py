"""Probes of what is installed and how it is set up; none imports torch."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distributions, version

from powertrain import environment
from powertrain.cli.probes import Check, Status
from powertrain.errors import PowertrainError

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 6)


def versions() -> Iterator[Check]:
    """Python, torch and every distribution of the family."""
    python = f"{platform.python_version()} at {sys.executable}"
    old = sys.version_info < OLDEST_PYTHON
    yield Check("versions", "python", "fail" if old else "ok", python, "install Python 3.10 or newer" if old else "")
    yield _torch()
    family = {
        distribution.name: distribution.version
        for distribution in distributions()
        if (distribution.name or "").lower().startswith("powertrain")
    }
    uneven = len(set(family.values())) > 1
    yield Check(
        "versions",
        "powertrain",
        "warn" if uneven else "ok",
        ", ".join(f"{name} {number}" for name, number in sorted(family.items())),
        "the family moves in lock step: install one version of all" if uneven else "",
    )


def _torch() -> Check:
    try:
        found = version("torch")
    except PackageNotFoundError:
        return Check("versions", "torch", "fail", "not installed", "pip install torch")
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < OLDEST_TORCH:
        return Check("versions", "torch", "fail", found, "pip install -U 'torch>=2.6'")
    return Check("versions", "torch", "ok", found)


def plugins() -> Iterator[Check]:
    """The state of every plugin, and whether the roles a run needs are filled."""
    from powertrain.cli.plugin_states import survey

    remedies = {
        "broken": "reinstall {0}, or leave it out with --no-plugin {1}",
        "conflict": '[plugins] pin = {{ {1} = "{0}" }}, or uninstall one of them',
        "incompatible": "install matching versions of powertrain-core and {0}",
    }
    states = survey()
    for plugin in states:
        bad = plugin.state in remedies
        remedy = remedies[plugin.state].format(plugin.distribution, plugin.name) if bad else ""
        found = f"{plugin.distribution} {plugin.version}: {plugin.state} ({plugin.why})"
        yield Check("plugins", plugin.name, "fail" if bad else "ok", found, remedy)
    for role, package in (("accelerator", "cpu"), ("communicator", "comm"), ("checkpoint", "checkpoint")):
        if not any(role in plugin.roles and plugin.state == "available" for plugin in states):
            needed: Status = "fail" if role == "accelerator" else "warn"
            yield Check("plugins", role, needed, f"no {role} is available", f"pip install powertrain-{package}")


PREFIXES = (
    "POWERTRAIN_",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "NCCL_",
    "GLOO_",
    "MASTER_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
)


def environment_variables() -> Iterator[Check]:
    """The variables that change what a run does."""
    found = environment.variables(*PREFIXES)
    yield Check("environment", "variables", "ok", ", ".join(f"{k}={v}" for k, v in found.items()) or "none set")
    readers: dict[str, Callable[[], object]] = {
        "launcher": environment.Rank.from_environment,
        "log level": environment.log_level,
    }
    for name, read in readers.items():
        if (error := _error_of(read)) is not None:
            yield Check("environment", name, "fail", f"{error.message}: {error.found or error.where}", error.remedy)


def _error_of(read: Callable[[], object]) -> PowertrainError | None:
    try:
        read()
    except PowertrainError as error:
        return error
    return None
