"""How much memory a forward and a backward pass need beside parameters and gradients, found without any.

The model runs on the meta device: its tensors have shapes and types, but no
memory. Every storage that an operator makes is counted from then until nobody,
autograd included, holds it any more; the most that lived at once is the answer.
What autograd saved for backward is told apart. Parameters are not counted, and
a gradient is given up when it is complete, as those who reduce gradients do.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch.overrides import TorchFunctionMode

from powertrain.compat import TorchDispatchMode
from powertrain.nest import leaves

_COUNTED = "powertrain_counted"
"""The attribute of a storage that is known already."""

TARGETS = ("targets", "target", "labels", "label", "y")
"""What a forward calls the argument that it makes a loss of."""

SEQUENCE = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_len",
    "sequence",
    "sequence_length",
    "block_size",
    "context_length",
)
"""What a model, or its ``config``, calls the longest sequence that it takes."""


@attrs.frozen
class Activations:
    """What passes through a model need.

    Attributes:
        saved: bytes that autograd keeps at the end of the forward pass.
        peak: the most bytes that live at once in forward and backward; None when unknown.
        reason: why it is unknown.
        inputs: what the model was called with, for people.
        loss: whether the model returned a loss; without, that of ``loss_fn`` is not counted.
    """

    saved: int = 0
    peak: int | None = None
    reason: str = ""
    inputs: str = ""
    loss: bool = True


def measure(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], *, dtype: torch.dtype) -> Activations:
    """Run a model on the meta device, forward and backward.

    Args:
        model: on the meta device; its floating-point tensors are converted to ``dtype`` in place.
        inputs: meta tensors by the names of forward's arguments; floating ones are converted too.
        dtype: the format of parameters and activations.

    Returns:
        The answer, or why there is none: a model that looks at values cannot run without any.
    """
    model.to(dtype)
    model.train()
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    shown = ", ".join(f"{name} {tuple(value.shape)}" for name, value in given.items())
    hooks = [
        param.register_post_accumulate_grad_hook(_drop_gradient) for param in model.parameters() if param.requires_grad
    ]
    try:
        try:
            found = _run(model, given, contextlib.nullcontext())
        except Exception:
            # It may make tensors in its forward without saying on which device; asking each call for it takes long.
            found = _run(model, given, torch.device("meta"))
        return attrs.evolve(found, inputs=shown)
    except Exception as error:  # whatever a model may do that needs values
        lines = str(error).strip().splitlines() or [""]
        return Activations(reason=f"{type(error).__name__}: {lines[0][:200]}", inputs=shown)
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)


def _run(
    model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], place: contextlib.AbstractContextManager[Any]
) -> Activations:
    known = [*model.parameters(), *model.buffers(), *inputs.values()]
    count = StorageCount(known)
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if hasattr(storage, _COUNTED) and not count.is_known(storage):
            saved[id(storage)] = storage
        return tensor

    with place, _FusedAttention(), count:
        with torch.autograd.graph.saved_tensors_hooks(keep, _as_it_is):
            output = model(**inputs)
        size = sum(storage.nbytes() for storage in saved.values())
        saved.clear()  # or they would live through all of backward
        loss, gradient, is_loss = _loss(output)
        del output
        if loss is not None:
            torch.autograd.backward(loss, gradient)
    return Activations(saved=size, peak=count.peak, loss=is_loss)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _drop_gradient(param: torch.Tensor) -> None:
    param.grad = None


def _loss(output: Any) -> tuple[torch.Tensor | None, torch.Tensor | None, bool]:
    """Return what backward starts from, with its gradient, and whether that is a loss of the model's own."""
    if isinstance(output, torch.Tensor):
        first: Any = output
    elif isinstance(output, Mapping):
        first = output.get("loss")
    else:
        first = getattr(output, "loss", None)
    if first is None:
        tensors = (leaf for leaf in leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad)
        first = next(tensors, None)
    if first is None or not first.requires_grad:
        return None, None, False
    if first.ndim == 0:
        return first, None, True
    return first, torch.empty_like(first), False


class StorageCount(TorchDispatchMode):
    """Counts the bytes of the storages that operators make.

    Args:
        known: tensors whose storages are not counted.

    Attributes:
        live: the bytes of those that somebody holds.
        peak: the most so far.
    """

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        # The layers of a model repeat: what an operator made before, of the same shapes, it makes again.
        self._made: dict[Any, _Made] = {}
        self._known = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in known)}
        for storage in self._known.values():
            setattr(storage, _COUNTED, True)

    def is_known(self, storage: torch.UntypedStorage) -> bool:
        """Return whether a storage was there before."""
        return id(storage) in self._known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator, and count what it makes."""
        kwargs = kwargs or {}
        call = _call(func, args, kwargs)
        made = self._made.get(call) if call is not None else None
        if made is not None:
            result = made.again()
            for leaf in made.outputs(result):
                self._see(leaf.untyped_storage())
            return result
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in (result if isinstance(result, (tuple, list)) else (result,)) if leaf is not None]
        tensors = [leaf for leaf in outputs if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided]
        fresh = [self._see(leaf.untyped_storage()) for leaf in tensors]
        if call is not None and tensors and len(tensors) == len(outputs) and all(fresh) and _meta_alone(tensors):
            self._made[call] = _Made.of(result)
        return result

    def _see(self, storage: torch.UntypedStorage) -> bool:
        """Count a storage, and return True, unless it is known."""
        if hasattr(storage, _COUNTED):
            return False
        setattr(storage, _COUNTED, True)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, size).atexit = False
        return True

    def _gone(self, size: int) -> None:
        self.live -= size


@attrs.frozen
class _Made:
    """The shapes of what an operator made: one tensor, or several; some may be None."""

    parts: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device] | None, ...]
    single: bool

    @classmethod
    def of(cls, result: Any) -> _Made:
        single = isinstance(result, torch.Tensor)
        parts = [
            None if leaf is None else (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
            for leaf in ((result,) if single else result)
        ]
        return cls(tuple(parts), single)

    def again(self) -> Any:
        """Return new tensors of the same shapes."""
        made = [
            None if part is None else torch.empty_strided(part[0], part[1], dtype=part[2], device=part[3])
            for part in self.parts
        ]
        return made[0] if self.single else tuple(made)

    def outputs(self, result: Any) -> Iterator[torch.Tensor]:
        """Yield the tensors of what ``again`` returned."""
        yield from ((result,) if self.single else (leaf for leaf in result if leaf is not None))


def _meta_alone(tensors: Sequence[torch.Tensor]) -> bool:
    return all(tensor.is_meta and type(tensor) is torch.Tensor for tensor in tensors)


def _call(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return what the shapes of an operator's outputs depend on; None where that cannot be told."""
    try:
        key = (func, _shapes(args), tuple((name, _shapes(value)) for name, value in kwargs.items()))
        hash(key)
    except TypeError:
        return None
    return key


def _shapes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(map(_shapes, value))
    return type(value), value


class _FusedAttention(TorchFunctionMode):
    """Lets attention need what a fused kernel needs.

    On the meta device torch would take the formula, which keeps every score; real
    devices have kernels that do not.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace scaled_dot_product_attention, where the kernels take it."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and not _needs_formula(args, kwargs):
            query, key, value = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(_QKV))
            return _Attention.apply(query, key, value)
        return func(*args, **kwargs)


_QKV = ("query", "key", "value")


def _needs_formula(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    query = args[0] if args else kwargs.get("query")
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    return query is None or query.ndim != 4 or (mask is not None and mask.requires_grad)


class _Attention(torch.autograd.Function):
    """Attention's shapes: batch x heads x length x width."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        # The kernels lay the result out by position, so that joining the heads is a view.
        result = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, sums)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


# --- the batch ------------------------------------------------------------------------


def sample_batch(
    model: torch.nn.Module, batch: int, sequence: int | None, given: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor] | str:
    """Make a batch that a model's ``forward`` may take, of meta tensors.

    Args:
        model: whose forward is asked for its arguments.
        batch: samples.
        sequence: positions in a sample; None when the model is to tell.
        given: arguments that the user described; the others are guessed.

    Returns:
        The arguments by name, or a sentence that says what is missing.
    """
    arguments = inspect.signature(model.forward).parameters
    unknown = [name for name in given if name not in arguments and not _takes_any(arguments.values())]
    if unknown:
        return f"forward has no argument {unknown[0]!r}; it takes {', '.join(arguments)}"
    wanted = list(_wanted(arguments))
    missing = [name for name in wanted if name not in given]
    if not missing:
        return dict(given)
    if any(isinstance(module, torch.nn.Embedding) for module in model.modules()):
        length = sequence or sequence_of(model)
        if length is None:
            return "the length of a sequence is not known: give --sequence"
        tokens = {name: torch.empty(batch, length, dtype=torch.int64, device="meta") for name in missing}
        return {**tokens, **given}
    first = next((module for module in model.modules() if isinstance(module, torch.nn.Linear)), None)
    if first is None or len(missing) > 1 or missing[0] in TARGETS:
        return f"what to call forward with is not known: describe it, for example --input {missing[0]}=8x128:fp32"
    shape = (batch, first.in_features) if sequence is None else (batch, sequence, first.in_features)
    return {missing[0]: torch.empty(shape, device="meta"), **given}


def _wanted(arguments: Mapping[str, inspect.Parameter]) -> Iterator[str]:
    """Yield the arguments that a forward pass of training gives."""
    tokens = "input_ids" in arguments
    for name, argument in arguments.items():
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            continue
        if argument.default is argument.empty or name in TARGETS or (tokens and name == "input_ids"):
            yield name


def _takes_any(arguments: Any) -> bool:
    return any(argument.kind is argument.VAR_KEYWORD for argument in arguments)


def sequence_of(model: torch.nn.Module) -> int | None:
    """Return the longest sequence that a model says it takes."""
    holders = [getattr(model, "config", None), model]
    with contextlib.suppress(AttributeError):
        holders.insert(1, model.config.get_text_config())  # type: ignore[union-attr,operator]
    for holder in holders:
        for name in SEQUENCE:
            value = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
