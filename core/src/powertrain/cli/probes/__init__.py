"""What ``powertrain doctor`` looks at: each probe runs in a process of its own.

A probe may crash, hang or drown its process in output without spoiling the
others. It is a function that yields checks.
"""

from __future__ import annotations

from typing import Literal

import attrs

PROBES = {
    "collectives": ("devices", "collectives"),
    "versions": ("installation", "versions"),
    "system": ("machine", "system"),
    "disk": ("machine", "disk"),
    "compiler": ("machine", "compiler"),
    "network": ("machine", "network"),
    "environment_variables": ("installation", "environment"),
    "plugins": ("installation", "plugins"),
    "kernels": ("kernels", "kernels"),
    "accelerator": ("devices", "accelerators"),
}
"""Every probe: the module that holds it, and the area of its checks."""

Status = Literal["ok", "warn", "fail"]


@attrs.frozen
class Check:
    """One fact about this machine or installation.

    Attributes:
        area: what it belongs to.
        name: what was looked at.
        status: ok; warn where something will be slow or missing; fail where something will not work.
        found: the fact.
        remedy: what to do about it; empty when ok.
    """

    area: str
    name: str
    status: Status
    found: str
    remedy: str = ""
