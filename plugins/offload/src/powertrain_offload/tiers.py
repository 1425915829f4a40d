"""All tiers of one run: they share the engine, the swap file and the memory for transfers."""

from __future__ import annotations

import logging
from pathlib import Path

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

    def of(self, category: Category) -> Tier:
        """Return where a category rests."""
        place = getattr(self._table, category)
        # Masters and optimizer state are updated by the processor; all else is used on the device.
        used = _HOST if category == "optimizer" else self._context.device
        tier = self._disk(used) if place == "nvme" else self._host(used)
        if category == "optimizer" and self._table.ratio < 1.0:
            return RatioTier(tier, DeviceTier(self._context.device), self._table.ratio)
        return tier

    def _host(self, used: torch.device) -> Tier:
        device = self._context.device
        if device.type == _HOST.type:
            _log.info("the device's memory is the host's here: what rests on the host stays where it is")
            return DeviceTier(device)
        return HostTier(self._context.accelerator, device, used, self._table.grain)

    def _disk(self, used: torch.device) -> Tier:
        self._open += 1
        if self._swap is None or self._pool is None:
            paths = [Path(path).expanduser() for path in self._table.paths]
            preflight.check_paths(paths)
            engine = self._context.hooks.one("make_file_engine", context=self._context)
            table = self._table
            self._engine = engine or io.open_engine("threads", block=table.block, threads=table.threads)
            self._swap = SwapFile(self._engine, paths)
            self._pool = Pool(self._engine, table.buffers)
            _log.info("state rests in %s, moved by %s", ", ".join(map(str, paths)), self._engine.name)
        return _SharedDiskTier(self, self._swap, self._pool, used, self._table.grain)

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

    def __init__(self, tiers: Tiers, swap: SwapFile, pool: Pool, device: torch.device, grain: int) -> None:
        super().__init__(swap, pool, device, grain)
        self._tiers: Tiers | None = tiers

    def close(self) -> None:
        """Give the swap file up, if this is the last."""
        tiers, self._tiers = self._tiers, None
        if tiers is not None:
            tiers.done()
