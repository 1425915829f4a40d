"""What a plugin is told about the run that it is helping to build."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    import torch

    from powertrain.birth import Birth
    from powertrain.config import BatchSizes, Config
    from powertrain.environment import Rank
    from powertrain.mesh import Mesh
    from powertrain.precision import Recipe
    from powertrain.registry import Registry
    from powertrain.roles.accelerator import Accelerator
    from powertrain.roles.communicator import Communicator
    from powertrain.roles.tier import Category, Tier


def _birth() -> Birth:
    from powertrain.birth import Birth  # imported here: hooks are specified without torch

    return Birth()


@attrs.frozen(kw_only=True)
class Context:
    """The facts of one engine, the same object for every hook.

    Attributes:
        config: the effective configuration.
        rank: this process's place in the launch.
        mesh: the named dimensions that the ranks form.
        accelerator: what computes.
        host: what computes in the host's memory: the same, or the processor beside it; None where no plugin has it.
        device: this rank's device.
        communicator: what connects the ranks, wrappers included.
        batch: samples per micro-batch, micro-batches per step, samples per step.
        recipe: the number format of each part of a step.
        hooks: the plugins of this engine.
        birth: gives parameters their first values.
    """

    config: Config
    rank: Rank
    mesh: Mesh
    accelerator: Accelerator
    host: Accelerator | None = None
    device: torch.device
    communicator: Communicator
    batch: BatchSizes
    recipe: Recipe
    hooks: Registry
    birth: Birth = attrs.field(factory=_birth)
    _tiers: dict[Category, Tier] = attrs.field(factory=dict, init=False, repr=False)

    def tier(self, category: Category) -> Tier:
        """Return where state of a category rests: on the device, unless a plugin says otherwise."""
        if category not in self._tiers:
            from powertrain.roles.tier import DeviceTier

            found: Tier | None = self.hooks.one("make_tier", category=category, context=self)
            self._tiers[category] = found or DeviceTier(self.device)
        return self._tiers[category]

    def close_tiers(self) -> None:
        """Give up what the tiers hold; the engine calls it at its end, when nothing of them is used any more."""
        for tier in self._tiers.values():
            tier.close()
