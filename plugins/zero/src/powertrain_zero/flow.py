"""When units are gathered and freed: hooks on the modules that run them (stage 3).

Forward: before a module of a unit runs, its unit is awaited and the next ones
start; after it, the unit is freed. Backward: the gradient of a module's output
announces it; the gradient of its input, or the end of the backward pass, ends it.
What activation checkpointing runs again happens inside backward and belongs to it.

Ranks may take different branches. So what is here when a pass is over is the
same on every rank, whatever each has run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch

from powertrain import nest
from powertrain.compat import after_backward, in_backward
from powertrain.errors import ShardingError
from powertrain_zero.backward import Backward
from powertrain_zero.passes import Ballot, FirstPass, KnownPass, Rounds
from powertrain_zero.unit import Unit

IDLE = 0
"""What a rank says when it runs no forward pass of its own."""


@attrs.frozen
class _Call:
    """A module that is running.

    Attributes:
        units: those that it needs.
        error: what the program was handling when it was called.
    """

    units: Sequence[Unit]
    error: BaseException | None


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
        self._model = model
        self._units = list(units)
        self._prefetch = prefetch
        self._reshard = reshard
        self._ballot = ballot
        self._rounds = Rounds(units, ballot, self._put_away)
        self._backward = Backward(
            units, prefetch=prefetch, rounds=self._rounds, reducing=reducing, reduced=reduced, in_use=self._in_use
        )
        self._orders: dict[tuple[int, bool], list[Unit]] = {}
        self._pass: FirstPass | KnownPass | None = None
        self._failed: FirstPass | KnownPass | None = None
        self._kind = (0, False)
        self._calls: list[_Call] = []
        self._called: set[Unit] = set()
        self._uneven = 0
        self._rerun: set[Unit] = set()
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
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def enter(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module in self._entries:  # a copy of the model has copies of its hooks
                self._enter(module, units, args, kwargs)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def leave(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if module in self._entries:
                self._leave(units, output)

        return enter, leave

    def _enter(self, module: torch.nn.Module, units: Sequence[Unit], args: Any, kwargs: Mapping[str, Any]) -> None:
        if in_backward():
            for unit in units:
                self._backward.arrive(unit)
                if torch.is_grad_enabled() and not unit.plan.whole_pass:
                    self._watch_rerun_inputs(unit, args, kwargs)
            return
        if self._calls and module is self._model:
            self._fail()  # nothing calls the model itself: an interrupt has left what was running
        if not self._calls:
            self._begin_pass(module)
        self._calls.append(_Call(units, sys.exc_info()[1]))
        assert self._pass is not None
        for unit in units:
            self._pass.demand(unit)
            if unit in self._called and not unit.plan.whole_pass:
                unit.repeated = True
            self._called.add(unit)
            if self._kind[1]:
                self._backward.ran.add(unit)
            if torch.is_grad_enabled() and not unit.plan.whole_pass:
                self._watch_inputs(unit, args, kwargs)

    def _leave(self, units: Sequence[Unit], output: Any) -> None:
        if in_backward():
            if torch.is_grad_enabled():
                for unit in units:
                    self._watch_rerun_outputs(unit, output)
            return
        if not self._calls:
            return  # it has not got as far as to be called
        call = self._calls.pop()
        if sys.exc_info()[1] is not call.error:
            if not self._calls:
                self._fail()
            return
        assert self._pass is not None
        for unit in units:
            if torch.is_grad_enabled():
                for tensor in _differentiable(output):
                    tensor.register_hook(self._announcing(unit))
            if not (unit.plan.whole_pass or unit.repeated or self._pass.stays(unit)) and not self._is_running(unit):
                self._put_away(unit)
        if not self._calls:
            self._end_pass()

    def _is_running(self, unit: Unit) -> bool:
        return any(unit in call.units for call in self._calls)

    def _in_use(self, unit: Unit) -> bool:
        """Return whether a forward pass that is still open wants a unit: models may differentiate within forward."""
        if self._pass is None:
            return False
        expected = isinstance(self._pass, KnownPass) and self._pass.expects(unit)
        return expected or self._is_running(unit) or (unit.plan.whole_pass and unit in self._called)

    def _put_away(self, unit: Unit) -> None:
        """Free a unit in a forward pass; all ranks keep their secondary slices, whatever they have run."""
        unit.wait()
        if self._kind[1]:
            unit.keep()
        unit.release()

    # --- forward passes ------------------------------------------------------------

    def _begin_pass(self, module: torch.nn.Module) -> None:
        kind = (self._entries[module], torch.is_grad_enabled())
        self._catch_up()
        if self._uneven:
            self._agree(kind)
        self._open_pass(kind)

    def _open_pass(self, kind: tuple[int, bool]) -> None:
        self._called.clear()
        self._kind = kind
        order = self._orders.get(kind)
        if order is None:
            self._pass = FirstPass(self._units, self._rounds)
            return
        self._pass = known = KnownPass(
            order,
            self._prefetch,
            rounds=self._rounds,
            put_away=self._put_away,
            stays=lambda unit: kind[1] and (not self._reshard or unit is known.last),
        )

    def _end_pass(self) -> None:
        current = self._pass
        assert current is not None
        order = self._orders[self._kind] = current.finish()
        self._pass = None
        with_gradients = self._kind[1]
        if with_gradients:
            self._backward.history.append(order)
        for unit in self._units:
            if not unit.here or (with_gradients and (unit.plan.whole_pass or current.stays(unit))):
                continue
            if not self._backward.lasting:
                self._put_away(unit)

    def _fail(self) -> None:
        """Note that the pass has failed. Other ranks may be gone, so nobody is waited for now."""
        self._failed, self._pass = self._pass, None
        self._calls.clear()

    def _catch_up(self) -> None:
        """After a failure that somebody caught: take part in what the other ranks have gathered since."""
        if self._failed is not None:
            failed, self._failed = self._failed, None
            failed.finish()
            for unit in self._units:
                if unit.here:
                    unit.release()
        self._backward.abandon()

    # --- backward ------------------------------------------------------------------

    def _announcing(self, unit: Unit) -> Callable[[torch.Tensor], None]:
        """Return a hook for outputs of a unit: their gradients announce it."""

        def arrived(grad: torch.Tensor) -> None:
            if torch.is_grad_enabled():
                self._backward.lasting = True  # create_graph: the weights are needed once more
            self._backward.arrive(unit)

        return arrived

    def _watch_inputs(self, unit: Unit, args: Any, kwargs: Any) -> None:
        """Take note of when the gradient of one of its inputs is there: then all after it is done."""
        # A leaf's gradient may be there before the rest is done.
        tensors = [tensor for tensor in _differentiable((args, kwargs)) if tensor.grad_fn is not None]
        if not tensors:
            return
        unit.open_calls += 1
        arrived = _once(lambda: self._backward.close(unit))
        for tensor in tensors:
            tensor.register_hook(lambda grad: arrived())

    def _watch_rerun_inputs(self, unit: Unit, args: Any, kwargs: Any) -> None:
        """Watch the inputs of what activation checkpointing runs again, unless its first run is watched."""
        if unit.open_calls > 0 or unit.repeated:  # how many calls of it are to come is not known: it stays
            return
        self._watch_inputs(unit, args, kwargs)
        if unit.open_calls <= 0 and any(True for _ in _differentiable((args, kwargs))):
            self._rerun.add(unit)

    def _watch_rerun_outputs(self, unit: Unit, output: Any) -> None:
        """Announce the unit in the backward pass of what was run again.

        Reentrant checkpointing cuts the inputs off as leaves. Their gradients may be there
        before the rest is done, so the end of its own, inner backward pass ends the call.
        """
        tensors = list(_differentiable(output))
        announce = self._announcing(unit)
        for tensor in tensors:
            tensor.register_hook(announce)
        if unit not in self._rerun:
            return
        self._rerun.discard(unit)
        unit.open_calls += 1
        arrived = _once(lambda: after_backward(lambda: self._backward.close(unit)))
        for tensor in tensors:
            tensor.register_hook(lambda grad: arrived())

    def completed(self) -> None:
        """Reduce what is complete, as far as the order allows."""
        self._backward.completed()

    def delay(self, unit: Unit) -> None:
        """From the next step on, reduce a unit later in backward: it was sent before its gradients came."""
        self._backward.delayed.add(unit)

    # --- ranks that run different numbers of passes ------------------------------------

    @contextmanager
    def uneven(self) -> Iterator[None]:
        """Let ranks run different numbers of forward passes without gradients, as generation does.

        Whoever is through serves the others' gathers until all are.
        """
        self._catch_up()
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
        if self._pass is not None:
            self._fail()
        self._catch_up()
        self._backward.forget()
        for unit in self._units:
            unit.open_calls = 0
            unit.forget_kept()
            if unit.here:
                unit.release()

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def _once(action: Callable[[], None]) -> Callable[[], None]:
    """Return a function that acts when it is called first."""
    waiting = [action]

    def act() -> None:
        if waiting:
            waiting.pop()()

    return act


def _differentiable(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors with gradients of a nest."""
    return (tensor for tensor in nest.tensors(value) if tensor.requires_grad)
