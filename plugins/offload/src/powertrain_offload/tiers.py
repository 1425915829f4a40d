"""All tiers of one run: they share the engine, the swap file and the memory for transfers."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from powertrain.context import Context
from powertrain.roles.files import FileEngine
from powertrain.roles.tier import Category, DeviceTier, Tier
from powertrain_offload import io, preflight
from powertrain_offload.config import OffloadConfig
from powertrain_offload.disk import DiskTier
from powertrain_offload.host import HostTier
from powertrain_offload.pool import Pool
from powertrain_offload.ratio import RatioTier
from powertrain_offload.swap import SwapFile

_log = logging.getLogger("powertrain.offload")

_HOST = torch.device("cpu")

WORDS = {
    "optimizer": "masters and optimizer state",
    "gradients": "gradients",
    "parameters": "parameters",
    "activations": "saved activations",
}

LATE = 0.5
"""With ``delayed``: the share of the parameters whose update may go on during the next forward pass. A forward pass
takes about as long as half of what the processor's update of all takes, where offloading pays at all."""


class Tiers:
    """Makes the tiers that ``[offload]`` asks for.

    Args:
        table: the table.
        context: the run.
    """

    def __init__(self, table: OffloadConfig, context: Context) -> None:
        self._table = table
        self._context = context
        self._engine: FileEngine | None = None
        self._swap: SwapFile | None = None
        self._pool: Pool | None = None
        self._open = 0
        self._expected = {"host": 0, "nvme": 0}

    @property
    def paths(self) -> list[Path]:
        """The directories."""
        return [Path(path).expanduser() for path in self._table.paths]

    def check(self, model: torch.nn.Module) -> None:
        """Refuse, before anything is allocated, what this machine cannot carry.

        How much there will be is not known yet: what is certain of it is counted.

        Raises:
            StorageUnwritable, StorageUnfit, StorageFull: of the directories.
            EngineUnavailable: the engine that the table names does not work here.
            HostMemoryShort: the host has less memory than what rests there, or than transfers need.
        """
        table = self._table
        if "nvme" in table.places:
            preflight.check_paths(self.paths)
            self._make_engine().close()
            self._expect("nvme", self._least(model, "nvme"), "what is to rest there, at the least")
            self._expect("host", min(table.buffers, self._least(model, "nvme")), "transfers need")
        if "host" in table.places and self._context.device.type != _HOST.type:
            self._expect("host", self._least(model, "host"), "what is to rest there needs, at the least")
        self._expected = {"host": 0, "nvme": 0}

    def _least(self, model: torch.nn.Module, place: str) -> int:
        """Return the bytes that will rest in a place on this rank, whatever the optimizer keeps."""
        recipe, ranks = self._context.recipe, self._context.mesh.size("data")
        numel = sum(param.numel() for param in model.parameters() if param.requires_grad) // ranks
        sizes = {"parameters": recipe.parameters.itemsize, "gradients": recipe.accumulate.itemsize}
        total = sum(numel * size for name, size in sizes.items() if getattr(self._table, name) == place)
        if self._table.optimizer == place and recipe.master != recipe.parameters:
            total += int(numel * recipe.master.itemsize * self._table.ratio)
        return total

    def of(self, category: Category) -> Tier:
        """Return where a category rests."""
        place = getattr(self._table, category)
        # Masters and optimizer state are updated by the processor; all else is used on the device.
        used = _HOST if category == "optimizer" else self._context.device
        tier = self._disk(category, used) if place == "nvme" else self._host(category, used)
        if category == "optimizer" and self._table.delayed and not tier.stays:
            tier.late = LATE
        if category == "optimizer" and self._table.ratio < 1.0:
            return RatioTier(tier, DeviceTier(self._context.device), self._table.ratio)
        return tier

    def _host(self, category: Category, used: torch.device) -> Tier:
        device = self._context.device
        if device.type == _HOST.type:
            _log.info("%s: the device's memory is the host's here, so it stays where it is", category)
            return DeviceTier(device)
        check = partial(self._expect, "host", what=f"{WORDS[category]} need")
        return HostTier(self._context.accelerator, device, used, self._table.grain, check)

    def _disk(self, category: Category, used: torch.device) -> Tier:
        self._open += 1
        if self._swap is None or self._pool is None:
            preflight.check_paths(self.paths)
            self._engine = self._make_engine()
            self._swap = SwapFile(self._engine, self.paths)
            self._pool = Pool(self._engine, self._table.buffers)
            _log.info("state rests in %s, moved by %s", ", ".join(map(str, self.paths)), self._engine.name)
        check = partial(self._expect, "nvme", what=WORDS[category])
        return _SharedDiskTier(self, self._swap, self._pool, used, self._table.grain, check)

    def _make_engine(self) -> FileEngine:
        engine: FileEngine | None = self._context.hooks.one("make_file_engine", context=self._context)
        return engine or io.open_engine("threads", block=self._table.block, threads=self._table.threads)

    def _expect(self, place: str, nbytes: int, what: str) -> None:
        """Check that there is room for so many bytes more, on all ranks of this host."""
        self._expected[place] += nbytes
        need, ranks = self._expected[place], self._context.rank.local_size
        if place == "nvme":
            preflight.check_space(self.paths, need, ranks, what)
        else:
            pinned = "pinned" in self._context.accelerator.capabilities
            preflight.check_memory(need, ranks, what, pinned=pinned)

    def done(self) -> None:
        """One of the disk tiers has closed; with the last, the file goes."""
        self._open -= 1
        if not self._open and self._swap is not None and self._pool is not None and self._engine is not None:
            self._swap.close()
            self._pool.drop()
            self._engine.close()
            self._swap = self._pool = self._engine = None


class _SharedDiskTier(DiskTier):
    """One of several that share a swap file."""

    def __init__(self, tiers: Tiers, *parts: Any) -> None:
        super().__init__(*parts)
        self._tiers: Tiers | None = tiers

    def close(self) -> None:
        """Give the swap file up, if this is the last."""
        tiers, self._tiers = self._tiers, None
        if tiers is not None:
            tiers.done()
