"""The default optimizer wrapper: every rank holds the whole model.

Gradients are averaged over the data dimension in buckets, overlapped with
backward, and every rank computes the same update.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from powertrain.access import keeping_writes
from powertrain.buckets import GradientBuckets
from powertrain.compat import has_step_hooks
from powertrain.context import Context
from powertrain.errors import PrecisionError
from powertrain.names import named_parameters
from powertrain.pieces import FlatViews
from powertrain.precision import Recipe
from powertrain.roles.checkpoint import CheckpointReader, TensorSlice
from powertrain.roles.optimizer import FlatOptimizer, OptimizerWrapper, Request, Update, clip_factor, device_of_state


class ReplicatedOptimizer(OptimizerWrapper):
    """Replicated data parallel, and the master weights that low precision needs.

    Args:
        model: the model; its parameters are converted to the recipe's format in place.
        optimizer: the optimizer over the model's parameters; where master weights
            differ from the model's, its groups are pointed at the masters.
        context: the run.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, context: Context) -> None:
        recipe = context.recipe
        _check(recipe, keeps_state=isinstance(optimizer, FlatOptimizer))
        if isinstance(optimizer, FlatOptimizer) and recipe.state != recipe.master:
            optimizer.state_dtype = recipe.state
        for name, param in named_parameters(model):
            context.birth.make(name, param, context.device)
        self.optimizer = optimizer
        self._named = [(name, param) for name, param in named_parameters(model) if param.requires_grad]
        self._frozen = [(name, param) for name, param in named_parameters(model) if not param.requires_grad]
        self._names = {param: name for name, param in named_parameters(model)}
        self._masters = {
            param: param
            if recipe.master == recipe.parameters
            else torch.nn.Parameter(param.detach().to(recipe.master, copy=True))
            for _, param in self._named
        }
        for param in model.parameters():
            if param.is_floating_point():
                param.data = param.data.to(recipe.parameters)
        for group in optimizer.param_groups:
            for param in group["params"]:  # what the optimizer knows already goes on from there
                if state := optimizer.state.pop(param, None):
                    master = self._masters.get(param, param)
                    optimizer.state[master] = {
                        key: _beside(master, key, value, optimizer, recipe.state, group) for key, value in state.items()
                    }
            group["params"] = [self._masters.get(param, param) for param in group["params"]]
        # Alone, and with nothing to convert, autograd's own accumulation is the best there is.
        self._buckets: GradientBuckets | None = None
        if context.communicator.size("data") > 1 or recipe.reduce != recipe.parameters:
            backward_order = list(reversed(self._named))
            self._buckets = GradientBuckets(backward_order, context.communicator, recipe.reduce)
        self._first = True
        self._scale: float | torch.Tensor = 1.0  # what the gradients are still to be multiplied by, to be as used
        self._communicator = context.communicator
        self._views = FlatViews()
        self._written: set[torch.nn.Parameter] = set()  # by a block that is not over

    def begin(self, *, last: bool, once: bool = False) -> None:
        """Prepare for a micro-batch; the first one after a step drops the old gradients."""
        if self._first:
            self._views.put_back()
            self._clear()
        if self._buckets is not None:
            self._buckets.begin(first=self._first, last=last, once=once)
        self._first = False

    def _clear(self) -> None:
        """Drop all gradients."""
        for param, master in self._masters.items():
            param.grad = None
            master.grad = None

    def flush(self) -> None:
        """Send the buckets that backward did not complete."""
        if self._buckets is not None:
            self._buckets.flush()

    def step(self, *, grad_scale: float, clip: float | None, check_overflow: bool) -> Update:
        """Average, clip and apply the gradients."""
        self._views.put_back()
        self._deliver()
        masters = [master for master in self._masters.values() if master.grad is not None]
        self._first = True
        flat = self.optimizer if isinstance(self.optimizer, FlatOptimizer) else None
        self._scale = 1.0 / grad_scale
        if flat is None:
            self._show()
        factor = self._scale  # that the norm is still to be multiplied by
        norm: torch.Tensor | None = None
        if clip is not None or check_overflow:
            norm = _norm(masters) * factor
        if check_overflow and norm is not None and not bool(norm.isfinite()):
            return Update(applied=False, grad_norm=lambda: norm)
        if clip is not None and norm is not None:
            if flat is None:
                torch.nn.utils.clip_grads_with_norm_(masters, clip, norm)
            else:
                self._scale = clip_factor(norm, clip) * factor
        if flat is None:
            self.optimizer.step()
            self._publish()
        else:
            self._run(flat)
        # Holding the gradients here would keep them alive beside those of the next step.
        return Update(applied=True, grad_norm=lambda: _norm(masters) * self._scale if norm is None else norm)

    def _run(self, optimizer: FlatOptimizer) -> None:
        """Let a flat optimizer scale, update and publish in one pass."""
        if has_step_hooks(optimizer):
            self._show()  # who listens sees what the update uses
        outs = {
            master: param
            for param, master in self._masters.items()
            if master is not param and param.is_contiguous() and param not in self._written
        }
        with optimizer.asked(Request(scale=self._scale, outs=outs)):
            optimizer.step()
        self._publish(besides=outs)

    @torch.no_grad()
    def _show(self) -> None:
        """Multiply the gradients by what the update does: from then on they are what it used."""
        if isinstance(self._scale, torch.Tensor) or self._scale != 1.0:
            for master in self._masters.values():
                if master.grad is not None:
                    master.grad.mul_(self._scale)
        self._scale = 1.0

    def _deliver(self) -> None:
        """Put the averaged gradients where the optimizer looks for them."""
        averaged = self._buckets.finish() if self._buckets is not None else None
        for param, master in self._masters.items():
            grad = param.grad if averaged is None else averaged.get(param)
            master.grad = grad if grad is None or grad.dtype == master.dtype else grad.to(master.dtype)

    @torch.no_grad()
    def _publish(self, besides: Container[torch.nn.Parameter] = ()) -> None:
        """Copy the masters into the model where they are not the same tensors, those of ``besides`` excepted."""
        for param, master in self._masters.items():
            if param is not master and master not in besides and param not in self._written:
                param.copy_(master)

    def discard(self) -> None:
        """Drop the gradients gathered so far."""
        if self._buckets is not None:
            self._buckets.drain()
        if not self._first:
            self._clear()  # half-gathered gradients must not pass for those of a step
        self._first = True

    def tensors(self) -> list[TensorSlice]:
        """Return all parameters (masters) and their optimizer state."""
        result = [_slice(f"model/{name}", param) for name, param in self._frozen]
        for name, param in self._named:
            master = self._masters[param]
            result.append(_slice(f"model/{name}", master))
            for key, value in self.optimizer.state.get(master, {}).items():
                if isinstance(value, torch.Tensor):
                    result.append(_slice(f"optimizer/{name}/{key}", value))
        return result

    def values(self) -> dict[str, Any]:
        """Return optimizer state that is no tensor, by parameter name and key."""
        result: dict[str, Any] = {}
        for name, param in self._named:
            state = self.optimizer.state.get(self._masters[param], {})
            plain = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
            if plain:
                result[name] = plain
        return result

    @torch.no_grad()
    def load(self, reader: CheckpointReader) -> list[str]:
        """Fill parameters and optimizer state in one read; the state is put in place once all of it is there."""
        self._views.put_back()
        live: list[tuple[str, torch.Tensor]] = [(f"model/{name}", param) for name, param in self._frozen]
        by_name = {name: self._masters[param] for name, param in self._named}
        live += [(f"model/{name}", master) for name, master in by_name.items()]
        group_of = {param: group for group in self.optimizer.param_groups for param in group["params"]}
        state: dict[str, dict[str, Any]] = {
            name: dict(plain) for name, plain in reader.values.get("optimizer", {}).items() if name in by_name
        }
        for full_name, info in reader.tensors.items():
            kind, _, rest = full_name.partition("/")
            name, _, key = rest.rpartition("/")
            if kind != "optimizer" or name not in by_name:
                continue
            master = by_name[name]
            group = group_of.get(master, {})
            device = device_of_state(key, group, master.device)
            dtype = info.dtype
            if isinstance(self.optimizer, FlatOptimizer) and _with_elements(master, key, info.shape, dtype):
                dtype = self.optimizer.format_of(key, master)  # another run may have kept it in another
            value = torch.empty(info.shape, dtype=dtype, device=device)
            state.setdefault(name, {})[key] = value
            live.append((full_name, value))
        fill(reader, live)
        for name, master in by_name.items():
            self.optimizer.state.pop(master, None)
            if name in state:
                self.optimizer.state[master].update(state[name])
        self._publish()
        return [name for name, _ in live]

    def parts(self, param: torch.nn.Parameter) -> dict[str, TensorSlice]:
        """Return all of a parameter, its gradient and its state: every rank holds the whole model."""
        name = self._names[param]
        master = self._masters.get(param, param)
        result = {"value": self._views.lend(name, master)}
        if self._first and master.grad is not None:
            self._show()
            result["grad"] = self._views.lend(name, master.grad)
        for key, value in self.optimizer.state.get(master, {}).items():
            if isinstance(value, torch.Tensor):
                result[f"optimizer/{key}"] = self._views.lend(name, value)
        return result

    def publish(self) -> None:
        """Copy the masters into the model."""
        self._views.put_back()
        self._publish()

    def gathered(self, params: Sequence[torch.nn.Parameter], *, write: bool = False) -> AbstractContextManager[None]:
        """Keep what the block writes, if it is to be kept: the parameters are whole anyway."""
        return self._keeping(params) if write else nullcontext()

    @contextmanager
    def _keeping(self, params: Sequence[torch.nn.Parameter]) -> Iterator[None]:
        self._written.update(params)
        try:
            with keeping_writes(self, params, self._communicator):
                yield
        finally:
            self._written.difference_update(params)

    def close(self) -> None:
        """Take the gradient hooks off the model."""
        if self._buckets is not None:
            self._buckets.close()


def _beside(
    master: torch.Tensor,
    key: str,
    value: Any,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype,
    group: dict[str, Any],
) -> Any:
    """Return an entry of a parameter's optimizer state where its master is, and in the format that goes with it."""
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return value
    if isinstance(optimizer, FlatOptimizer):
        dtype = optimizer.format_of(key, master)
    goes_along = _with_elements(master, key, value.shape, value.dtype)
    return value.to(device_of_state(key, group, master.device), dtype if goes_along else value.dtype)


def _with_elements(master: torch.Tensor, key: str, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Return whether an entry of state has a number for each element of the master, and so its format."""
    return key != "step" and tuple(shape) == tuple(master.shape) and dtype.is_floating_point


def _check(recipe: Recipe, *, keeps_state: bool) -> None:
    """Refuse formats that only wrappers keep apart which do not hold everything whole.

    Args:
        recipe: of the run.
        keeps_state: the optimizer keeps its state in another format than the masters' by itself.

    Raises:
        PrecisionError: gradients would add up in another format than they travel in, or state rest in another
            than the masters.
    """
    for key, found, expected in (
        ("accumulate", recipe.accumulate, recipe.reduce),
        ("optimizer", recipe.state, recipe.state if keeps_state else recipe.master),
    ):
        if found != expected:
            raise PrecisionError(
                f"replicated training keeps one format where `[precision] {key}` asks for another",
                where=f"precision.{key}",
                expected=str(expected).removeprefix("torch."),
                found=str(found).removeprefix("torch."),
                remedy="leave the key out, or add a section that shards the optimizer"
                + (", or `[optimizers]`, whose own keep their state in 16 bits" if key == "optimizer" else ""),
            )


def _norm(params: list[torch.nn.Parameter]) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])


def _slice(name: str, tensor: torch.Tensor) -> TensorSlice:
    return TensorSlice(name, tuple(tensor.shape), tensor.detach().reshape(-1))


def fill(reader: CheckpointReader, live: list[tuple[str, torch.Tensor]]) -> None:
    """Read whole tensors in place, through a copy where one is not contiguous."""
    slices, copies = [], []
    for name, tensor in live:
        target = tensor.detach()
        if not target.is_contiguous():
            flat = torch.empty(target.numel(), dtype=target.dtype, device=target.device)
            copies.append((target, flat))
        else:
            flat = target.view(-1)
        slices.append(TensorSlice(name, tuple(target.shape), flat))
    reader.read(slices)
    for target, flat in copies:
        target.copy_(flat.view(target.shape))
