"""The optimizer roles: what updates, and what brings gradients to it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import attrs
import torch

if TYPE_CHECKING:
    from powertrain.roles.accelerator import Accelerator
    from powertrain.roles.checkpoint import CheckpointReader, TensorSlice

Granularity = Literal["element", "tensor", "matrix"]
"""What an update rule must see at once: any element alone, a whole tensor's norm, a whole matrix."""


_ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop")


def granularity_of(optimizer: torch.optim.Optimizer) -> Granularity:
    """Return what an optimizer's update must see at once.

    Its own attribute ``granularity`` says it; of torch's own optimizers it is known; any
    other is taken to need whole matrices.
    """
    declared: Granularity | None = getattr(optimizer, "granularity", None)
    if declared is not None:
        return declared
    return "element" if type(optimizer) in {getattr(torch.optim, name) for name in _ELEMENTWISE} else "matrix"


def device_of_state(key: str, group: Mapping[str, Any], device: torch.device) -> torch.device:
    """Return where torch keeps an entry of optimizer state: step counts on the host, unless the update reads them.

    Args:
        key: of the entry.
        group: the parameter's group.
        device: the parameter's.
    """
    on_host = key == "step" and not (group.get("capturable") or group.get("fused"))
    return torch.device("cpu") if on_host else device


class OptimizerFactory(Protocol):
    """Makes an optimizer over parameters, in the manner of ``torch.optim``.

    Attributes:
        granularity: what its update must see at once; sharders honour it.

    One that goes by the parameters' names says so by an attribute ``named = True``, and is called with
    ``(name, parameter)`` pairs.
    """

    granularity: Granularity

    def __call__(self, params: Iterable[Any]) -> torch.optim.Optimizer:
        """Return the optimizer of ``params`` (tensors or group dictionaries)."""


class Total(Protocol):
    """Combines figures of tensors over the ranks that hold pieces of them."""

    def __call__(
        self,
        figures: torch.Tensor,
        params: Sequence[torch.nn.Parameter],
        how: Literal["sum", "max"] = "sum",
    ) -> torch.Tensor:
        """Return ``figures`` (parameters, …) combined, one row for each of ``params`` again.

        Every rank must call it as often, with whatever parameters it holds pieces of, none included.
        """


def _as_it_is(
    figures: torch.Tensor, params: Sequence[torch.nn.Parameter], how: Literal["sum", "max"] = "sum"
) -> torch.Tensor:
    return figures


@attrs.frozen(eq=False)
class Request:
    """What a ``FlatOptimizer`` does beside its update, in the same pass over memory.

    Attributes:
        scale: multiplies every gradient before anything else: a number, or a 0-d tensor on the device.
        outs: tensors that receive a parameter's new values as well, in a format of their own.
        grads: gradients that are not the parameter's ``.grad``: those of another format than its.
        total: adds up figures of tensors over the ranks that hold pieces of them, or finds the largest.
    """

    scale: float | torch.Tensor = 1.0
    outs: Mapping[torch.nn.Parameter, torch.Tensor] = attrs.field(factory=dict)
    grads: Mapping[torch.nn.Parameter, torch.Tensor] = attrs.field(factory=dict)
    total: Total = _as_it_is


class FlatOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that scales, updates and casts in one pass: what ``make_optimizer`` should return.

    It works under any training loop, as every optimizer of torch. A wrapper that shards its parameters or
    keeps them in two formats says so by ``asked``, around ``step``.

    Attributes:
        granularity: what its update must see at once. "element": any piece of a parameter will do, each of
            ``params`` may be one. "tensor": pieces as well; sums over a whole tensor go through
            ``request.total``. "matrix": parameters come whole.
        kind: what ``[optimizer] name`` calls it; checkpoints of optimizers of one kind load into one another.
        blocks: keys of state that has one element for so many of the parameter's, in their flat order (a scale
            for each 256 of them): pieces are cut where such a block ends, so they are the same on any number of ranks.
        state_dtype: the format of state that goes with the elements; None for the parameter's own.
        accelerator: whose kernels it may call (``powertrain.kernels``); an engine says it. None: the PyTorch reference.
        host: whose kernels it may call for what rests in the host's memory.
        request: what else is asked for in the step under way.
    """

    granularity: Granularity = "element"
    kind: str = ""
    blocks: Mapping[str, int] = {}
    state_dtype: torch.dtype | None = None
    accelerator: Accelerator | None = None
    host: Accelerator | None = None
    request: Request = Request()

    @property
    def reducer(self) -> str | None:
        """Which compression its gradients would take in the next step ("onebit"); None for exact ones.

        A wish: what travels is up to the configuration.
        """
        return None

    def needs_whole(self, group: Mapping[str, Any], param: torch.Tensor) -> bool:
        """Return whether a parameter of a group must come whole; "matrix" rules may let others be cut."""
        return self.granularity == "matrix"

    def format_of(self, key: str, param: torch.Tensor) -> torch.dtype:
        """Return the format in which an entry of state rests that goes with the elements of ``param``."""
        return self.state_dtype or param.dtype

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` returned; formats are those of ``format_of``, not the parameters'."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, torch.Tensor) and key != "step":
                    goes_along = value.shape == param.shape and value.is_floating_point() and key not in self.blocks
                    dtype = self.format_of(key, param) if goes_along else value.dtype
                    self.state[param][key] = value.to(param.device, dtype)
                elif not isinstance(value, torch.Tensor):  # torch makes something else of a text
                    self.state[param][key] = copy.deepcopy(value)

    @contextmanager
    def asked(self, request: Request) -> Iterator[None]:
        """Let the steps of a ``with`` block do what ``request`` says."""
        self.request = request
        try:
            yield
        finally:
            self.request = Request()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what ``closure`` returned, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = self.request.grads
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None or param in grads]
            # Sums over ranks need every rank, whether it holds a piece or not.
            if params or self.granularity == "tensor":
                self.update(group, params)
        return loss

    def accelerator_for(self, tensor: torch.Tensor) -> Accelerator | None:
        """Return whose kernels update a tensor: the device's, the host's, or None for the PyTorch reference."""
        if self.accelerator is None:
            return None
        near = (self.accelerator, self.host)
        return next((one for one in near if one is not None and one.device_type == tensor.device.type), None)

    def grad_of(self, param: torch.nn.Parameter) -> torch.Tensor:
        """Return the gradient that ``update`` uses, flat or of the parameter's shape, before it is scaled."""
        grad = self.request.grads.get(param, param.grad)
        assert grad is not None
        return grad

    @abstractmethod
    def update(self, group: dict[str, Any], params: Sequence[torch.nn.Parameter]) -> None:
        """Update some parameters of one group, in place, and do what ``request`` asks for.

        Args:
            group: the numbers of the update (lr, …).
            params: those that have a gradient: see ``grad_of``.
        """


def takes_pieces(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer updates any piece of a parameter: otherwise parameters must come whole."""
    granularity = granularity_of(optimizer)
    return granularity == "element" or (granularity == "tensor" and isinstance(optimizer, FlatOptimizer))


def whole_parameters(optimizer: torch.optim.Optimizer) -> frozenset[torch.nn.Parameter]:
    """Return those of an optimizer's parameters that must come whole."""
    if takes_pieces(optimizer):
        return frozenset()
    return frozenset(
        param
        for group in optimizer.param_groups
        for param in group["params"]
        if not isinstance(optimizer, FlatOptimizer) or optimizer.needs_whole(group, param)
    )


def blocks_of(optimizer: torch.optim.Optimizer) -> Mapping[str, int]:
    """Return the keys of state that has one element for a block of the parameter's, with the lengths of the blocks."""
    return optimizer.blocks if isinstance(optimizer, FlatOptimizer) else {}


def clip_factor(norm: torch.Tensor, clip: float) -> torch.Tensor:
    """Return by what gradients of a norm are multiplied so that it is ``clip`` at most, as torch computes it."""
    return (clip / (norm + 1e-6)).clamp(max=1.0)


@attrs.frozen
class Update:
    """What one optimizer step did.

    Attributes:
        applied: False when the gradients overflowed and the step was skipped.
        grad_norm: returns the global norm before clipping, a 0-d tensor. Called on some
            ranks only, so it must not communicate, and before the next ``begin``.
    """

    applied: bool
    grad_norm: Callable[[], torch.Tensor]


class OptimizerWrapper(ABC):
    """Takes gradients from backward to updated parameters.

    It owns where parameters, gradients and optimizer state rest, so it is also
    the one that lists them for checkpoints.

    Attributes:
        optimizer: the torch optimizer that schedulers act on.
    """

    optimizer: torch.optim.Optimizer

    @abstractmethod
    def begin(self, *, last: bool, once: bool = False) -> None:
        """Prepare for the next micro-batch's backward passes.

        Args:
            last: it ends the accumulation, so reductions may start.
            once: it will have one backward pass; otherwise gradients may come after reductions have started.
        """

    def flush(self) -> None:
        """Start the reductions that backward has not started, in an order that all ranks share.

        Called after the last micro-batch, before any other collective.
        """

    @abstractmethod
    def step(self, *, grad_scale: float, clip: float | None, check_overflow: bool) -> Update:
        """Finish reductions, divide gradients by ``grad_scale``, clip, update, publish, clear.

        Args:
            grad_scale: what gradients were multiplied by on the way (loss scale).
            clip: the largest global norm, or None.
            check_overflow: skip the update when a gradient is not finite.
        """

    @abstractmethod
    def discard(self) -> None:
        """Drop the gradients gathered so far."""

    @abstractmethod
    def tensors(self) -> list[TensorSlice]:
        """Return this rank's slices of parameters and optimizer state, by global name."""

    def values(self) -> dict[str, Any]:
        """Return optimizer state that is no tensor, as JSON that is the same on every rank."""
        return {}

    @abstractmethod
    def load(self, reader: CheckpointReader) -> list[str]:
        """Fill parameters and optimizer state from ``reader``, in one read; return the names loaded.

        Nothing is changed when the read fails.

        Raises:
            CheckpointMismatch: names or shapes differ from this model's.
        """

    # --- access to single parameters, which may rest in pieces ---
    #
    # What users call is powertrain.full, powertrain.state and powertrain.stream. The core marks the model's
    # parameters as this wrapper's once it is made (powertrain.access.adopt), and these three methods serve
    # them. For one parameter and key, what a rank holds stays at the same place while the wrapper lives.

    @abstractmethod
    def parts(self, param: torch.nn.Parameter) -> dict[str, TensorSlice]:
        """Return what this rank holds of a parameter of the model, frozen or not, as slices of the global tensor.

        Local: nothing is communicated. Writing into a slice changes the state; ``publish`` is called afterwards.

        Returns:
            Slices called by the parameter's global name, under these keys:

            - ``value``: what the optimizer updates.
            - ``grad``: the mean gradient as the last update saw it, unscaled and clipped, from the end of ``step``
              until the next ``begin``; absent at other times, and for a parameter that no rank used.
            - ``optimizer/<key>``: the optimizer's tensors, with their own shapes (a step counter's is ``()``).

            ``value`` and ``grad`` are there on all ranks or on none, empty where a rank holds no element.
            Of ``optimizer/<key>`` such a rank may know nothing, and leave it out.
        """

    @abstractmethod
    def publish(self) -> None:
        """Make the model's parameters follow values that were written through ``parts``; every rank calls it.

        Within ``gathered`` too: parameters that are whole follow as well, except those that the block may write,
        which are left alone.
        """

    @abstractmethod
    def gathered(self, params: Sequence[torch.nn.Parameter], *, write: bool = False) -> AbstractContextManager[None]:
        """Return a context in which this rank holds ``params`` whole; every rank must enter and leave it.

        Inside, the model may run. Blocks of other parameters may be open meanwhile; ``powertrain.full`` opens no
        two for one parameter, and closes each once nobody needs it. ``powertrain.access.keeping_writes`` does
        what ``write`` asks for.

        Args:
            params: some of the model's parameters.
            write: keep what the block writes into them, when it ends, by an exception as well: the first data
                rank's values win, and where an element changed, ``value`` becomes what was written.
        """

    def visit(self, action: Callable[[torch.optim.Optimizer], None]) -> None:
        """Let ``action`` change what the optimizer updates, and its state, between steps; ``publish`` is called then.

        Called with the optimizer once; or several times, each with some of its parameters in its groups and all of
        them together once, where they are not all in memory at a time.
        """
        action(self.optimizer)

    def close(self) -> None:
        """Take hooks off the model."""
