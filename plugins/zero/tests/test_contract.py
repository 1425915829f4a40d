"""The sharded optimizer fulfils the optimizer wrapper's contract at every stage."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from powertrain.context import Context
from powertrain.roles.optimizer import OptimizerWrapper
from powertrain.testing.optimizer import OptimizerWrapperContract
from powertrain_zero.config import ZeroConfig
from powertrain_zero.sharded import ShardedOptimizer


class Sharded(OptimizerWrapperContract):
    options: ClassVar[dict[str, Any]] = {}
    low_precision: ClassVar[bool] = True

    def make(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, context: Context) -> OptimizerWrapper:
        return ShardedOptimizer(model, optimizer, ZeroConfig(**self.options), context)


class TestStage1(Sharded):
    options: ClassVar[dict[str, Any]] = {"stage": 1, "bucket": 40}


class TestStage2(Sharded):
    options: ClassVar[dict[str, Any]] = {"stage": 2, "bucket": 40}


class TestStage3(Sharded):
    keeps_model_whole: ClassVar[bool] = False
    options: ClassVar[dict[str, Any]] = {"stage": 3}


class TestStage3Units(Sharded):
    keeps_model_whole: ClassVar[bool] = False
    options: ClassVar[dict[str, Any]] = {"stage": 3, "unit": ["body", "frozen", "branch", "head"], "prefetch": 2}
