"""Learning-rate schedules, as a factor on each group's own learning rate.

Step ``s`` counts applied updates from 0, so the first update uses
``factor(0)``. Warm-up rises linearly to where the schedule begins, which is the
peak except for one-cycle, and takes no step at zero.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch

from powertrain.errors import CheckpointMismatch, SchedulerError

Factor = Callable[[int], float]


class Schedule(ABC):
    """Sets the learning rate of an optimizer's groups before each update."""

    @abstractmethod
    def advance(self) -> None:
        """Go on by one applied update."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return as JSON the kind of schedule, and what it needs beside the number of applied updates."""

    @abstractmethod
    def check(self, state: dict[str, Any] | None) -> None:
        """Change nothing; ``state`` is None where the run that saved had no schedule.

        Raises:
            CheckpointMismatch: it cannot continue from ``state``.
        """

    @abstractmethod
    def load_state(self, state: dict[str, Any] | None, updates: int) -> None:
        """Continue after ``updates`` applied updates, with the learning rates of the present configuration.

        Args:
            state: what ``check`` has passed.
            updates: how many updates the run that saved had applied.
        """


class FactorSchedule(Schedule):
    """A schedule in closed form: it continues from any other, for the number of updates is all its state."""

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
        """Return the kind; the number of updates is the checkpoint's own."""
        return {"kind": "closed form"}

    def check(self, state: dict[str, Any] | None) -> None:
        """Do nothing: every state will do."""

    def load_state(self, state: dict[str, Any] | None, updates: int) -> None:
        """Continue after ``updates`` applied updates."""
        self.step = updates
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
        self._written: set[str] = set()  # keys of the groups, beside the rate, that its steps have changed

    def advance(self) -> None:
        """Go on by one applied update."""
        groups = self.scheduler.optimizer.param_groups
        before = [_numbers(group) for group in groups]
        self.scheduler.step()
        for group, old in zip(groups, before, strict=True):
            self._written |= {key for key, value in _numbers(group).items() if value != old.get(key)}

    def state(self) -> dict[str, Any]:
        """Return the scheduler's own state, and what it has set in the groups beside the rate.

        Some cycle the momentum as well (OneCycleLR, CyclicLR), and write it in ``step`` only.

        Raises:
            SchedulerError: it is not JSON.
        """
        try:
            inner: dict[str, Any] = json.loads(json.dumps(self.scheduler.state_dict()))
        except TypeError as error:
            raise SchedulerError(
                f"the state of {type(self.scheduler).__name__} cannot be saved",
                expected="JSON",
                found=str(error),
                remedy="use a scheduler whose state_dict holds numbers, strings, lists and dicts",
            ) from error
        groups = [
            {key: value for key, value in _numbers(group).items() if key in self._written}
            for group in self.scheduler.optimizer.param_groups
        ]
        return {"kind": self.kind, "scheduler": inner, "groups": groups}

    @property
    def kind(self) -> str:
        """The dotted path of the scheduler's class."""
        return f"{type(self.scheduler).__module__}.{type(self.scheduler).__qualname__}"

    def check(self, state: dict[str, Any] | None) -> None:
        """Compare the class.

        Raises:
            CheckpointMismatch: ``state`` is of another class, or there is none.
        """
        found = state["kind"] if state is not None else "no schedule"
        if found != self.kind:
            name = type(self.scheduler).__name__
            raise CheckpointMismatch(
                f"the checkpoint was made with another schedule, which a {name} cannot continue",
                where="scheduler",
                expected=f"the state of a {self.kind}",
                found=found,
                remedy="train with the schedule of the checkpoint, or with one of the core's own, which continue any",
            )
        assert state is not None
        own, saved = len(self.scheduler.optimizer.param_groups), len(state["groups"])
        if own != saved:
            raise CheckpointMismatch(
                "the checkpoint was made with another number of parameter groups",
                where="optimizer",
                expected=f"{saved} groups",
                found=f"{own} groups",
            )

    def load_state(self, state: dict[str, Any] | None, updates: int) -> None:
        """Continue from ``state``."""
        assert state is not None  # check has refused it
        self.scheduler.load_state_dict(_alike(state["scheduler"], self.scheduler.state_dict()))
        # torch writes learning rates in step() only.
        groups = self.scheduler.optimizer.param_groups
        for group, rate, written in zip(groups, self.scheduler.get_last_lr(), state["groups"], strict=True):
            group["lr"] = rate
            group.update({key: tuple(value) if isinstance(value, list) else value for key, value in written.items()})
            self._written |= set(written)


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """Return what a scheduler may write in a group beside the rate: numbers, and tuples of them such as betas."""
    return {key: value for key, value in group.items() if key != "lr" and isinstance(value, (int, float, tuple))}


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
    """Rise over ``warmup`` steps to where ``after`` begins, then follow it from its own step 0."""
    return lambda step: after(0) * (step + 1) / warmup if step < warmup else after(step - warmup)


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
    if "steps" in rest:
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
