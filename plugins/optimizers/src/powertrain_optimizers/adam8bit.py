"""Adam and AdamW with moments of 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from powertrain.kernels.updates import Operands
from powertrain_optimizers.adam import Adam
from powertrain_optimizers.base import only_real, width
from powertrain_optimizers.dynamic import BLOCK, DynamicMap, count_blocks

SLICE = 4096 * BLOCK
"""Elements that are decoded at a time: what lives only within a step stays small."""


class Adam8bit(Adam):
    """Adam with blockwise 8-bit moments (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021).

    A step decodes the moments, makes Adam's update in fp32, and encodes them again. Of the second moment the root is
    encoded, which spans half as many decades: none that is above zero becomes zero, by which an update would be
    divided. Blocks of 256 are counted from a parameter's start. A sharder cuts parameters where blocks end
    (``blocks``), so they are the same, and the result is, on any number of ranks.

    Args: those of ``Adam``.

    State: ``step``; ``exp_avg_8bit`` and ``exp_avg_sq_8bit`` (the parameter's shape, uint8); ``exp_avg_scale`` and
    ``exp_avg_sq_scale`` (one for each 256 elements, fp32).
    """

    kind = "adam8bit"
    blocks = {"exp_avg_scale": BLOCK, "exp_avg_sq_scale": BLOCK}

    def update(self, group: dict[str, Any], params: Sequence[torch.nn.Parameter]) -> None:
        """Update ``params`` one after the other, a slice at a time."""
        only_real(params, type(self).__name__)
        maps = self._maps()
        for step, alike in self.counted(params).items():
            for param in alike:
                if param.device not in maps:
                    maps[param.device] = _Maps(param.device)
                self._update_one(group, param, step, maps[param.device])
        self.publish(params)

    def _maps(self) -> dict[torch.device, _Maps]:
        """Return the codes by device; a copy of the optimizer, which takes its state only, makes its own."""
        maps: dict[torch.device, _Maps] = self.__dict__.setdefault("_codes", {})
        return maps

    def _update_one(self, group: dict[str, Any], param: torch.nn.Parameter, step: int, maps: _Maps) -> None:
        beta1, beta2 = group["betas"]
        state = self._state(param)
        place = param.detach()
        whole = place.contiguous().view(-1)
        grad = self.gradient(param).reshape(-1)
        for start in range(0, param.numel(), SLICE):
            part = slice(start, start + SLICE)
            blocks = slice(start // BLOCK, count_blocks(min(start + SLICE, param.numel())))
            first, second = maps.decoded(state, part, blocks)
            operands = Operands(
                params=[whole[part]],
                grads=[grad[part].contiguous()],
                firsts=[first.to(width(param))],
                seconds=[second.to(width(param))],
            )
            self.kernel_for("adam", operands)(
                operands,
                step=step,
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled=self.decoupled,
                scale=self.scale(group),
            )
            maps.encode(state, part, blocks, operands.firsts[0], operands.seconds[0])
        if not place.is_contiguous():
            place.copy_(whole.view(place.shape))

    def _state(self, param: torch.nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        for name in ("exp_avg", "exp_avg_sq"):
            if f"{name}_8bit" not in state:
                shape, device = param.shape, param.device
                state[f"{name}_8bit"] = torch.zeros(shape, dtype=torch.uint8, device=device)
                state[f"{name}_scale"] = torch.zeros(count_blocks(param.numel()), device=device)
        return state


class AdamW8bit(Adam8bit):
    """``Adam8bit`` with decoupled weight decay.

    Args: those of ``AdamW``.
    """

    kind = "adamw8bit"
    decoupled = True

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize)


class _Maps:
    """The codes of both moments on one device."""

    def __init__(self, device: torch.device) -> None:
        self._first = DynamicMap(signed=True, device=device)
        self._root = DynamicMap(signed=False, device=device)

    def decoded(self, state: dict[str, Any], part: slice, blocks: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a slice of the first and the second moment, in fp32."""
        first = self._first.decode(state["exp_avg_8bit"].view(-1)[part], state["exp_avg_scale"][blocks])
        root = self._root.decode(state["exp_avg_sq_8bit"].view(-1)[part], state["exp_avg_sq_scale"][blocks])
        return first, root.square_()

    def encode(
        self, state: dict[str, Any], part: slice, blocks: slice, first: torch.Tensor, second: torch.Tensor
    ) -> None:
        """Keep a slice of both."""
        for name, codes, numbers in (("exp_avg", self._first, first), ("exp_avg_sq", self._root, second.sqrt())):
            found, scales = codes.encode(numbers.float())
            state[f"{name}_8bit"].view(-1)[part].copy_(found)
            state[f"{name}_scale"][blocks].copy_(scales)
