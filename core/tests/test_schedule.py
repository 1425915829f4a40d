"""Learning-rate schedules against torch's own and their closed forms."""

from __future__ import annotations

import json
from math import cos, pi, sqrt
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from powertrain import schedule
from powertrain.errors import CheckpointMismatch, SchedulerError

LR = 0.5


def optimizer() -> torch.optim.Optimizer:
    """Return an optimizer of two groups with rates 0.5 and 0.05."""
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    return torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": LR / 10}], lr=LR)


def rates(name: str, options: dict[str, Any], steps: int) -> list[float]:
    """Return the first group's rate at each of ``steps`` updates, having checked the second's."""
    update = optimizer()
    plan = schedule.build(name, options, update)
    found = []
    for _ in range(steps):
        first, second = (group["lr"] for group in update.param_groups)
        assert second == pytest.approx(first / 10)
        found.append(first)
        update.step()
        plan.advance()
    return found


def torch_rates(make: Any, steps: int) -> list[float]:
    """Return the same of one of torch's schedulers."""
    update = optimizer()
    plan = make(update)
    found = []
    for _ in range(steps):
        found.append(update.param_groups[0]["lr"])
        update.step()
        plan.step()
    return found


def test_linear_is_torchs() -> None:
    """Without a warm-up, linear is LinearLR, and stays at its end."""
    theirs = torch_rates(lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, 10), 15)
    assert rates("linear", {"steps": 10, "final": 0.2, "warmup": 0}, 15) == pytest.approx(theirs)


def test_cosine_is_torchs() -> None:
    """Without a warm-up, cosine is CosineAnnealingLR over its steps, and stays at its end after them."""
    mine = rates("cosine", {"steps": 10, "final": 0.0, "warmup": 0}, 15)
    theirs = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, 10), 11)
    assert mine[:11] == pytest.approx(theirs, abs=1e-12)
    assert mine[11:] == pytest.approx([0.0] * 4)


def test_warm_up_is_torchs() -> None:
    """A warm-up of 4 rises as LinearLR from a quarter, takes no step at zero and ends at the peak."""
    mine = rates("constant", {"warmup": 4}, 8)
    theirs = torch_rates(lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, 3), 8)
    assert mine == pytest.approx(theirs)
    assert mine[0] == LR / 4


def test_warm_up_is_part_of_the_steps() -> None:
    """``steps`` is the whole run: the decay begins after the warm-up and ends at ``steps``."""
    mine = rates("linear", {"steps": 10, "warmup": 4, "final": 0.0}, 12)
    down = [LR * (1 - k / 6) for k in range(6)]
    assert mine == pytest.approx([LR * k / 4 for k in (1, 2, 3, 4)] + down + [0.0, 0.0])


@pytest.mark.parametrize(
    ("shape", "form"),
    [("linear", lambda t: t), ("cosine", lambda t: (1 - cos(pi * t)) / 2), ("sqrt", lambda t: sqrt(t))],
)
def test_wsd_is_its_closed_form(shape: str, form: Any) -> None:
    """Warm-up, the peak, and a decay of the given shape over the last steps."""
    options = {"steps": 12, "warmup": 2, "decay": 4, "final": 0.1, "shape": shape}
    up, flat = [LR / 2, LR], [LR] * 6
    down = [LR * (1 - 0.9 * form(k / 4)) for k in range(5)]
    assert rates("wsd", options, 14) == pytest.approx(up + flat + down + [LR * 0.1])


@pytest.mark.parametrize("warmup", [0, 4])
def test_one_cycle_is_its_closed_form(warmup: int) -> None:
    """A line up to ``start``, then within ``steps`` half a cosine up and half a cosine down to ``final``."""
    options = {"steps": 10 + warmup, "up": 0.3, "start": 0.04, "final": 0.01, "warmup": warmup}

    def blend(low: float, high: float, t: float) -> float:
        return LR * (low + (high - low) * (1 - cos(pi * t)) / 2)

    line = [LR * 0.04 * (k + 1) / warmup for k in range(warmup)]
    up = [blend(0.04, 1.0, k / 3) for k in range(3)]
    down = [blend(1.0, 0.01, k / 7) for k in range(8)]
    assert rates("one-cycle", options, 12 + warmup) == pytest.approx(line + up + down + [LR * 0.01])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {"steps": 1, "warmup": 1, "final": 0.0}),
        ("cosine", {"steps": 3, "warmup": 3, "final": 0.5}),
        ("one-cycle", {"steps": 1, "up": 1.0, "start": 0.1, "final": 0.0}),
        ("one-cycle", {"steps": 5, "up": 0.0, "start": 0.1, "final": 0.0}),
    ],
)
def test_degenerate_schedules_stay_between_zero_and_the_peak(name: str, options: dict[str, Any]) -> None:
    """A schedule that is all warm-up, or a single step, divides by no zero."""
    assert all(0 <= rate <= LR for rate in rates(name, options, 8))


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("torch.optim.lr_scheduler.StepLR", {"step_size": 3, "gamma": 0.5}, lr_scheduler.StepLR),
        ("torch.optim.lr_scheduler.MultiStepLR", {"milestones": [2, 5]}, lr_scheduler.MultiStepLR),
        ("torch.optim.lr_scheduler.OneCycleLR", {"max_lr": 1.0, "total_steps": 20}, lr_scheduler.OneCycleLR),
    ],
)
def test_a_dotted_name_is_torchs_scheduler(name: str, options: dict[str, Any], kind: Any) -> None:
    """A dotted path builds that class with the table's options."""
    update = optimizer()
    plan = schedule.build(name, options, update)
    theirs = torch_rates(lambda o: kind(o, **options), 10)
    mine = []
    for _ in range(10):
        mine.append(update.param_groups[0]["lr"])
        update.step()
        plan.advance()
    assert mine == pytest.approx(theirs)


def sequential(update: torch.optim.Optimizer) -> Any:
    first = lr_scheduler.LinearLR(update, 0.1, 1.0, 3)
    return lr_scheduler.SequentialLR(update, [first, lr_scheduler.MultiStepLR(update, [3, 5])], [3])


SCHEDULES = {
    "cosine": lambda o: schedule.build("cosine", {"steps": 10, "warmup": 2, "final": 0.1}, o),
    "StepLR": lambda o: schedule.TorchSchedule(lr_scheduler.StepLR(o, 3)),
    "MultiStepLR": lambda o: schedule.TorchSchedule(lr_scheduler.MultiStepLR(o, [2, 6, 8])),
    "OneCycleLR": lambda o: schedule.TorchSchedule(lr_scheduler.OneCycleLR(o, 1.0, 20)),
    "CosineAnnealingLR": lambda o: schedule.TorchSchedule(lr_scheduler.CosineAnnealingLR(o, 9)),
    "LambdaLR": lambda o: schedule.TorchSchedule(lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step))),
    "SequentialLR": lambda o: schedule.TorchSchedule(sequential(o)),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_continue_from_their_state(name: str) -> None:
    """A new schedule given the state, through JSON, goes on as the old one does."""
    old_update, new_update = optimizer(), optimizer()
    old, new = SCHEDULES[name](old_update), SCHEDULES[name](new_update)
    for _ in range(4):
        old_update.step()
        old.advance()
    new.load_state(json.loads(json.dumps(old.state())), 4)
    for _ in range(6):
        assert [g["lr"] for g in new_update.param_groups] == [g["lr"] for g in old_update.param_groups]
        for update, plan in ((old_update, old), (new_update, new)):
            update.step()
            plan.advance()


def test_a_changed_rate_takes_effect_on_resume() -> None:
    """The closed forms keep the present configuration's learning rates and only take the position."""
    old, new_update = SCHEDULES["cosine"](optimizer()), optimizer()
    for group in new_update.param_groups:
        group["lr"] *= 10
    new = SCHEDULES["cosine"](new_update)
    for _ in range(4):
        old.advance()
    new.load_state(old.state(), 4)
    assert new_update.param_groups[0]["lr"] == pytest.approx(10 * old.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("before", [None, "cosine", "StepLR"])
def test_closed_forms_continue_any_schedule(before: str | None) -> None:
    """A closed form goes on at the number of applied updates, whatever set the rate before."""
    expected = rates("cosine", {"steps": 10, "warmup": 0, "final": 0.0}, 6)
    update = optimizer()
    plan = schedule.build("cosine", {"steps": 10, "warmup": 0, "final": 0.0}, update)
    saved = None if before is None else SCHEDULES[before](optimizer()).state()
    plan.check(saved)
    plan.load_state(saved, 5)
    assert update.param_groups[0]["lr"] == expected[5]


@pytest.mark.parametrize("before", [None, "cosine", "LambdaLR"])
def test_a_torch_scheduler_continues_its_own_class_only(before: str | None) -> None:
    """A torch scheduler refuses another's state, a closed form's or none, and says what was there."""
    saved = None if before is None else SCHEDULES[before](optimizer()).state()
    with pytest.raises(CheckpointMismatch, match="which a StepLR cannot continue") as caught:
        SCHEDULES["StepLR"](optimizer()).check(saved)
    names = {None: "no schedule", "cosine": "closed form", "LambdaLR": "torch.optim.lr_scheduler.LambdaLR"}
    assert caught.value.found == names[before]
    SCHEDULES["StepLR"](optimizer()).check(SCHEDULES["StepLR"](optimizer()).state())


@pytest.mark.parametrize(
    ("name", "options", "where", "says"),
    [
        ("torch.optim.lr_scheduler.NoSuchLR", {}, "scheduler.name", "there is no scheduler"),
        ("no_such_module.StepLR", {}, "scheduler.name", "there is no scheduler no_such_module.StepLR"),
        ("torch.optim.lr_scheduler.StepLR", {"step": 3}, "scheduler", "does not take these options"),
        ("torch.optim.lr_scheduler.StepLR", {}, "scheduler", "does not take these options"),
    ],
)
def test_dotted_names_that_lead_nowhere_are_refused(name: str, options: dict[str, Any], where: str, says: str) -> None:
    """A scheduler that is not there, or takes other options, is a SchedulerError that says why."""
    with pytest.raises(SchedulerError, match=says) as caught:
        schedule.build(name, options, optimizer())
    assert (caught.value.code, caught.value.where) == ("PT440", where)
    assert caught.value.found


def test_a_state_that_is_not_json_is_refused() -> None:
    """A scheduler whose state JSON cannot hold is a SchedulerError when it is saved."""

    class Odd(lr_scheduler.StepLR):
        def state_dict(self) -> dict[str, Any]:
            return {"thing": object()}

    with pytest.raises(SchedulerError, match="the state of Odd cannot be saved"):
        schedule.TorchSchedule(Odd(optimizer(), 2)).state()
