"""When units are gathered and freed: hooks on the modules that run them (stage 3).

Forward: before a module of a unit runs, its unit is awaited and the next ones
start; after it, the unit is freed. Backward: the gradient of a module's output
announces it; the gradient of its input, or the end of the backward pass, ends it.
What activation checkpointing runs again happens inside backward and belongs to it.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from powertrain.compat import after_backward, in_backward
from powertrain.errors import ShardingError
from powertrain_zero.passes import Ballot, FirstPass, KnownPass
from powertrain_zero.timeline import Cursor, Step, backward_steps
from powertrain_zero.unit import Unit

IDLE = 0
"""What a rank says when it runs no forward pass of its own."""


class Flow:
    """Gathers and frees the units of a model as it runs.

    Args:
        model: whose modules run.
        units: all of its units, in the order of registration.
        prefetch: how many units are gathered ahead.
        reshard: whether units are freed between forward and backward.
        ballot: lets the ranks exchange a number.
        reducing: asked when backward begins: are gradients reduced in it?
        reduced: told when backward is over.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        units: Sequence[Unit],
        *,
        prefetch: int,
        reshard: bool,
        ballot: Ballot,
        reducing: Callable[[], bool],
        reduced: Callable[[], None],
    ) -> None:
        self._units = list(units)
        self._prefetch = prefetch
        self._reshard = reshard
        self._ballot = ballot
        self._reducing = reducing
        self._reduced = reduced
        self._orders: dict[tuple[int, bool], list[Unit]] = {}
        self._pass: FirstPass | KnownPass | None = None
        self._kind = (0, False)
        self._depth = 0
        self._uneven = 0
        self._outer_error: BaseException | None = None
        self._called: set[Unit] = set()
        self._history: list[list[Unit]] = []
        self._cursor: Cursor[Unit] | None = None
        self._skipped: list[Unit] = []
        self._entries: dict[torch.nn.Module, int] = {}
        self._hooks: list[Any] = []
        self._attach(model)

    # --- hooks -------------------------------------------------------------------

    def _attach(self, model: torch.nn.Module) -> None:
        """Put hooks on the modules of units, and on those that contain them."""
        needs: dict[str, list[Unit]] = {"": []}
        for unit in self._units:
            for path in unit.plan.paths:
                needs.setdefault(path, []).append(unit)
                while path:
                    path = path.rpartition(".")[0]
                    needs.setdefault(path, [])
        for path, units in needs.items():
            module = model.get_submodule(path)
            self._entries[module] = len(self._entries) + 1
            enter, leave = self._hooks_of(units)
            self._hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            self._hooks.append(module.register_forward_hook(leave, always_call=True))

    def _hooks_of(self, units: Sequence[Unit]) -> tuple[Any, Any]:
        # A compiler is not to look into these: it leaves the graph for them.
        @torch.compiler.disable
        def enter(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._enter(module, units, args, kwargs)

        @torch.compiler.disable
        def leave(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._leave(units, output)

        return enter, leave

    def _enter(self, module: torch.nn.Module, units: Sequence[Unit], args: Any, kwargs: Mapping[str, Any]) -> None:
        again = in_backward()
        if not again:
            if self._depth == 0:
                self._outer_error = sys.exc_info()[1]
                self._begin_pass(module)
            self._depth += 1
        for unit in units:
            if again:
                self._come_to(unit)
            else:
                assert self._pass is not None
                self._pass.demand(unit)
                if unit in self._called and not unit.plan.whole_pass:
                    unit.repeated = True
                self._called.add(unit)
            if torch.is_grad_enabled() and not unit.plan.whole_pass:
                self._watch_inputs(unit, args, kwargs, again=again)

    def _leave(self, units: Sequence[Unit], output: Any) -> None:
        if torch.is_grad_enabled():
            for unit in units:
                self._watch_outputs(unit, output)
        if in_backward():
            return
        self._depth -= 1
        if sys.exc_info()[1] is not self._outer_error:
            self._pass = None  # the pass has failed: no rank may be waited for
            return
        for unit in units:
            if not unit.plan.whole_pass and not self._stays(unit):
                if torch.is_grad_enabled():
                    unit.keep()
                unit.release()
        if self._depth == 0:
            self._end_pass()

    def _stays(self, unit: Unit) -> bool:
        """Return whether a unit that has run is still wanted."""
        if torch.is_grad_enabled() and not self._reshard:
            return True
        if unit.repeated:
            return True  # until the pass is over
        return torch.is_grad_enabled() and isinstance(self._pass, KnownPass) and unit is self._pass.last

    # --- forward passes ------------------------------------------------------------

    def _begin_pass(self, module: torch.nn.Module) -> None:
        kind = (self._entries[module], torch.is_grad_enabled())
        if self._uneven:
            self._agree(kind)
        self._open_pass(kind)

    def _open_pass(self, kind: tuple[int, bool]) -> None:
        self._called.clear()
        self._kind = kind
        order = self._orders.get(kind)
        if order is None:
            self._pass = FirstPass(self._units, self._ballot)
        else:
            self._pass = KnownPass(order, self._prefetch)

    def _end_pass(self) -> None:
        current, self._pass = self._pass, None
        assert current is not None
        if isinstance(current, FirstPass):
            order = self._orders[self._kind] = current.finish()
        else:
            order = current.finish(keep=current.last if self._kind[1] else None)
        if self._kind[1]:
            self._history.append(order)
            for unit in self._units:
                if unit.repeated and self._reshard:
                    unit.keep()
                    unit.release()
        else:
            for unit in self._units:
                if unit.here:
                    unit.release()

    # --- backward ------------------------------------------------------------------

    def _watch_outputs(self, unit: Unit, output: Any) -> None:
        """Ask for the unit when the gradient of one of its outputs is there."""
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda grad, unit=unit: self._come_to(unit))

    def _watch_inputs(self, unit: Unit, args: Any, kwargs: Any, *, again: bool) -> None:
        """Take note of when the gradient of one of its inputs is there: then all after it is done."""
        if again and unit.open_calls:
            return  # the call that is being repeated watches already
        # A leaf's gradient may be there before the rest is done, but what runs again has no others.
        tensors = [t for t in tensors_in((args, kwargs)) if t.requires_grad and (again or t.grad_fn is not None)]
        if not tensors:
            return
        unit.open_calls += 1
        call = [True]

        def arrived(grad: torch.Tensor, *, leaf: bool) -> None:
            if call:
                call.clear()
                self._close_call(unit, over=not leaf)

        for tensor in tensors:
            tensor.register_hook(partial(arrived, leaf=tensor.grad_fn is None))

    def _come_to(self, unit: Unit) -> None:
        """Backward comes to a unit: bring it here, and start what is due."""
        self._begin_backward()
        assert self._cursor is not None
        for step in self._cursor.through(unit):
            self._run(step)
        unit.gather()
        if unit in self._skipped:
            self._skipped.remove(unit)
        unit.wait()

    def _begin_backward(self) -> None:
        if self._cursor is not None:
            return
        whole = [unit for unit in self._units if unit.plan.whole_pass]
        reducing = {unit for unit in self._units if unit.gradients} if self._reducing() else set()
        steps, marks = backward_steps(self._history, whole, prefetch=self._prefetch, reducing=reducing)
        for unit in self._units:
            unit.done = False
        self._history = []
        self._cursor = Cursor(steps, marks)
        after_backward(self._end_backward)

    def _run(self, step: Step[Unit]) -> None:
        unit = step.unit
        if step.kind == "gather":
            if not unit.here:
                unit.gather()
                self._skipped.append(unit)
            return
        unit.send()
        if unit in self._skipped:  # this rank did not come to it
            self._skipped.remove(unit)
            unit.release()

    def _close_call(self, unit: Unit, *, over: bool) -> None:
        unit.open_calls -= 1
        if unit.open_calls <= 0 and over:
            unit.done = True
            self.completed()
        if unit.open_calls <= 0 or not unit.repeated:
            unit.release()

    def completed(self) -> None:
        """Reduce what is complete, as far as the order allows."""
        if self._cursor is None:
            return
        while (step := self._cursor.peek()) is not None and step.kind == "reduce" and step.unit.complete:
            self._run(self._cursor.advance())

    def _end_backward(self) -> None:
        if self._cursor is None:
            return
        for step in self._cursor.rest():
            if step.kind == "gather" and not step.unit.here:
                # Others may gather it.
                step.unit.gather()
            elif step.kind == "reduce":
                step.unit.send()
        self._cursor = None
        self._skipped.clear()
        for unit in self._units:
            unit.open_calls = 0
            if unit.here:
                unit.release()
        self._reduced()

    # --- ranks that run different numbers of passes ------------------------------------

    @contextmanager
    def uneven(self) -> Iterator[None]:
        """Let ranks run different numbers of forward passes without gradients, as generation does.

        Whoever is through serves the others' gathers until all are.
        """
        self._uneven += 1
        try:
            yield
        except BaseException:
            self._uneven -= 1
            raise
        if self._uneven == 1:
            while self._serve():
                pass
        self._uneven -= 1

    def _agree(self, kind: tuple[int, bool]) -> None:
        mine = 2 * kind[0] + kind[1]
        others = set(self._ballot(mine, "which forward pass comes next")) - {IDLE, mine}
        if others:
            raise ShardingError(
                "ranks call different modules of one model at the same time",
                where="inside generate, or another uneven block",
                remedy="call the same modules in the same order on all ranks",
            )

    def _serve(self) -> bool:
        """Take part in one pass of other ranks; return False when no rank runs one."""
        asked = set(self._ballot(IDLE, "which forward pass comes next")) - {IDLE}
        if not asked:
            return False
        code = asked.pop()
        self._open_pass((code // 2, bool(code % 2)))
        self._end_pass()
        return True

    # --- the end -------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget passes whose backward never came, and free what they left."""
        self._history = []
        self._cursor = None
        self._depth = 0
        for unit in self._units:
            unit.open_calls = 0
            unit.forget_kept()
            if unit.here:
                unit.release()

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a nest of tuples, lists, mappings and plain objects with attributes."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name, None))
