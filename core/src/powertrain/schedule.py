"""Learning-rate schedules, as a factor on each group's own learning rate.

Step ``s`` counts applied updates from 0, so the first update uses
``factor(0)``. Warm-up rises linearly to 1 and takes no step at zero.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch

from powertrain.errors import SchedulerError

Factor = Callable[[int], float]


class Schedule(ABC):
    """Sets the learning rate of an optimizer's groups before each update."""

    @abstractmethod
    def advance(self) -> None:
        """Go on by one applied update."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the position as JSON."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, with the learning rates of the present configuration."""


class FactorSchedule(Schedule):
    """A schedule in closed form: the position is all its state."""

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Factor) -> None:
        self.optimizer = optimizer
        self.factor = factor
        self.step = 0
        self.base = [group["lr"] for group in optimizer.param_groups]
        self._apply()

    def _apply(self) -> None:
        scale = self.factor(self.step)
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * scale

    def advance(self) -> None:
        """Go on by one applied update."""
        self.step += 1
        self._apply()

    def state(self) -> dict[str, Any]:
        """Return the position."""
        return {"step": self.step}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self.step = int(state["step"])
        self._apply()


class TorchSchedule(Schedule):
    """Any object with the interface of ``torch.optim.lr_scheduler``."""

    def __init__(self, scheduler: Any) -> None:
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise SchedulerError(
                "ReduceLROnPlateau needs a metric at each step, which the engine does not have",
                where="scheduler",
                remedy="make it yourself on engine.optimizer_wrapper.optimizer, and call its step(metric) yourself",
            )
        self.scheduler = scheduler

    def advance(self) -> None:
        """Go on by one applied update."""
        self.scheduler.step()

    def state(self) -> dict[str, Any]:
        """Return the scheduler's own state.

        Raises:
            SchedulerError: it is not JSON.
        """
        try:
            state: dict[str, Any] = json.loads(json.dumps(self.scheduler.state_dict()))
        except TypeError as error:
            raise SchedulerError(
                f"the state of {type(self.scheduler).__name__} cannot be saved",
                expected="JSON",
                found=str(error),
                remedy="use a scheduler whose state_dict holds numbers, strings, lists and dicts",
            ) from error
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self.scheduler.load_state_dict(_alike(state, self.scheduler.state_dict()))
        # torch writes learning rates in step() only.
        for group, rate in zip(self.scheduler.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate


def _alike(saved: Any, own: Any) -> Any:
    """Return ``saved`` with the types that JSON lost: a mapping's class and the keys that are numbers."""
    if isinstance(own, dict) and isinstance(saved, dict):
        keys = {str(name): name for name in own}
        items = {keys.get(name, name): value for name, value in saved.items()}
        return type(own)({name: _alike(value, own.get(name)) for name, value in items.items()})
    if isinstance(own, list) and isinstance(saved, list) and len(own) == len(saved):
        return [_alike(value, mine) for value, mine in zip(saved, own, strict=True)]
    return saved


def warm_up(after: Factor, warmup: int) -> Factor:
    """Rise to 1 over ``warmup`` steps, then follow ``after`` from its own step 0."""
    return lambda step: (step + 1) / warmup if step < warmup else after(step - warmup)


def constant() -> Factor:
    """Stay at 1."""
    return lambda step: 1.0


def linear(steps: int, final: float) -> Factor:
    """Fall in a straight line to ``final`` over ``steps``."""
    return lambda step: 1 + (final - 1) * min(1.0, step / steps)


def cosine(steps: int, final: float) -> Factor:
    """Fall along half a cosine to ``final`` over ``steps`` (Loshchilov & Hutter, SGDR, 2017)."""
    return lambda step: final + (1 - final) * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2


def wsd(steps: int, decay: int, final: float, shape: str) -> Factor:
    """Stay at 1, then fall to ``final`` over the last ``decay`` of ``steps`` (Hu et al., MiniCPM, 2024)."""

    def factor(step: int) -> float:
        done = min(1.0, max(0.0, (step - (steps - decay)) / decay))
        if shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        elif shape == "sqrt":
            done = math.sqrt(done)
        return 1 + (final - 1) * done

    return factor


def one_cycle(steps: int, up: float, start: float, final: float) -> Factor:
    """Rise along a cosine from ``start`` to 1 over ``up`` of ``steps``, then fall to ``final`` (Smith, 2018)."""
    rise = max(1, round(steps * up))

    def blend(low: float, high: float, t: float) -> float:
        return low + (high - low) * (1 - math.cos(math.pi * min(1.0, t))) / 2

    return lambda step: (
        blend(start, 1.0, step / rise) if step < rise else blend(1.0, final, (step - rise) / max(1, steps - rise))
    )


def build(name: str, options: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Schedule:
    """Make the schedule of a ``[scheduler]`` table.

    Raises:
        SchedulerError: a dotted name that leads nowhere, or options that do not fit it.
    """
    if "." in name:
        return TorchSchedule(_dotted(name, options, optimizer))
    rest = dict(options)
    warmup = rest.pop("warmup", 0)
    if "steps" in rest and name != "one-cycle":
        # ``steps`` is the whole run; the shapes below begin after the warm-up.
        rest["steps"] = max(1, rest["steps"] - warmup)
    shapes: dict[str, Callable[..., Factor]] = {
        "constant": constant,
        "linear": linear,
        "cosine": cosine,
        "wsd": wsd,
        "one-cycle": one_cycle,
    }
    return FactorSchedule(optimizer, warm_up(shapes[name](**rest), warmup))


def _dotted(name: str, options: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(import_module(module), attribute)
        return kind(optimizer, **options)
    except (ImportError, AttributeError) as error:
        raise SchedulerError(f"there is no scheduler {name}", where="scheduler.name", found=str(error)) from error
    except TypeError as error:
        raise SchedulerError(f"{name} does not take these options", where="scheduler", found=str(error)) from error
