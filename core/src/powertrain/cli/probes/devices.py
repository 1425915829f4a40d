"""Probes that import torch: accelerators and collectives."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from typing import Any

from powertrain import discovery, registry
from powertrain.cli.plugin_states import usable
from powertrain.cli.probes import Check
from powertrain.plugin import Plugin

RANKS = 2


def accelerator(name: str) -> Iterator[Check]:
    """Whether one plugin's device is there, and what it is."""
    plugin = _plugin(name)
    probe = plugin.is_available()
    if not probe.available:
        yield Check("accelerators", name, "ok", f"not available: {probe.reason}")
        return
    device = registry.Registry([plugin]).one("make_accelerator", name=name)
    facts = ", ".join(f"{key} {value}" for key, value in device.describe().items())
    yield Check("accelerators", name, "ok", f"{probe.reason}; {facts}" if facts else probe.reason)


def _plugin(name: str) -> Plugin[Any]:
    known = discovery.installed()
    for _entry, plugin, error in usable({name: known[name]}):
        if error is not None:
            raise error
        if plugin is not None:
            return plugin
    raise LookupError(f"plugin {name} cannot be made without a configuration")


def collectives() -> Iterator[Check]:
    """An all-reduce between two processes of this host, through the installed communicator."""
    providers = [name for name, entry in discovery.installed().items() if "communicator" in entry.roles]
    if not providers:
        yield Check("collectives", "all_reduce", "warn", "no communicator is installed", "pip install powertrain-comm")
        return
    for name in providers:
        yield _all_reduce(name)


def _all_reduce(name: str) -> Check:
    import torch  # noqa: F401  imported once, before the ranks are forked

    from powertrain.testing.ports import free_port

    port = free_port()
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(name, index, port, answers), daemon=True) for index in range(RANKS)]
    started = time.perf_counter()
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    results = [answers.get() for _ in ranks if not answers.empty()]
    took = time.perf_counter() - started
    if results == ["ok"] * RANKS:
        return Check("collectives", "all_reduce", "ok", f"{RANKS} ranks through {name} on 127.0.0.1 in {took:.2f} s")
    codes = [rank.exitcode for rank in ranks]
    found = next((text for text in results if text != "ok"), f"ranks exited with {codes}")
    remedy = "see that nothing blocks 127.0.0.1; in a container, allow the network of the host"
    return Check("collectives", "all_reduce", "fail", f"{name}: {found}", remedy)


def _rank(name: str, index: int, port: int, answers: Any) -> None:
    try:
        answers.put(_reduce(name, index, port))
    except Exception as error:
        answers.put(" ".join(f"{type(error).__name__}: {error}".split()))


def _reduce(name: str, index: int, port: int) -> str:
    import torch

    from powertrain.environment import Rank
    from powertrain.mesh import Mesh

    device = registry.Registry([_host_plugin()]).one("make_accelerator", name=_host_plugin().name)
    rank = Rank(index=index, world_size=RANKS, local_index=index, local_size=RANKS, port=port, launcher="doctor")
    communicator = registry.Registry([_plugin(name)]).one(
        "make_communicator", name=None, accelerator=device, mesh=Mesh.build(RANKS, index), rank=rank, timeout=5.0
    )
    if communicator is None:
        return "it made no communicator for two ranks on a host's processors"
    values = torch.full((4,), float(index + 1))
    communicator.all_reduce(values).wait()
    communicator.close()
    expected = float(sum(range(1, RANKS + 1)))
    return "ok" if bool((values == expected).all()) else f"wrong sum: {values.tolist()} instead of {expected}"


def _host_plugin() -> Plugin[Any]:
    """Return the accelerator that is there on every machine: the fallback."""
    providers = {name: entry for name, entry in discovery.installed().items() if "accelerator" in entry.roles}
    for _entry, plugin, _error in usable(providers):
        if plugin is not None and plugin.fallback:
            return plugin
    raise LookupError("no accelerator for the host's processors: pip install powertrain-cpu")
