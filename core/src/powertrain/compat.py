"""The only place that touches names of torch that begin with an underscore, each with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # sees every operator; no public name


def in_backward() -> bool:
    """Return whether autograd is running a backward pass in this thread.

    Modules that are run again by activation checkpointing run inside one, and
    torch has no public way to ask.
    """
    return int(torch._C._current_graph_task_id()) != -1


def after_backward(callback: Callable[[], None]) -> None:
    """Call ``callback`` when the backward pass that is running is over; only within one.

    torch's own data parallel wrappers end their backward work this way; there is no public name for it.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def operator_name(operator: Any) -> str:
    """Return an operator's name without namespace and overload: ``normal_``."""
    return str(operator._schema.name).rpartition("::")[2]


def has_argument(operator: Any, name: str) -> bool:
    """Return whether an operator takes an argument of this name; its schema has no public name."""
    return any(argument.name == name for argument in operator._schema.arguments)


def written(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors that a call of an operator writes into; its schema has no public name."""
    for index, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, torch.Tensor):
                yield item


def version(tensor: torch.Tensor) -> int:
    """Return a number that every write into a tensor raises; torch shows it by no public name."""
    return int(tensor._version)


def owns_its_memory(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is the only one over its memory, and covers it; no public call counts the others."""
    storage = tensor.untyped_storage()
    # One reference is the tensor's, one that of the object by which we ask.
    alone = int(torch._C._storage_Use_Count(storage._cdata)) == 2
    return alone and storage.nbytes() == tensor.numel() * tensor.element_size()


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether somebody is to be called before or after each ``step`` of an optimizer; no public call tells."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    everybodys = _global_optimizer_pre_hooks or _global_optimizer_post_hooks
    return bool(own or everybodys)


def apply(module: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace a module's parameters and buffers as ``module.to`` would, with what modules add to that.

    ``module.to`` itself refuses meta tensors.
    """
    module._apply(function)


def plain_dispatch() -> AbstractContextManager[Any]:
    """Return a context in which subclasses' ``__torch_function__`` is not asked; only a private name offers it."""
    context: AbstractContextManager[Any] = torch._C.DisableTorchFunctionSubclass()
    return context


def within_memory_budget(budget: float, backend: str) -> Callable[[Any, Any], Any]:
    """Return a backend of ``torch.compile`` that keeps a share of the activations; torch's setting has no public name.

    Args:
        budget: 0: only the inputs of what is compiled; 1: all that is not cheap to compute again.
        backend: what compiles, by its name.
    """

    def compile_graph(graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.registry import lookup_backend
        from torch._functorch import config

        with config.patch(activation_memory_budget=budget):
            return lookup_backend(backend)(graph, inputs)

    return compile_graph


def compiler_trouble() -> str | None:
    """Return what is wrong with the C++ compiler that ``torch.compile`` would use on a processor; None: nothing.

    Only private names tell before it is used.
    """
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except (InvalidCxxCompiler, OSError) as error:
        return str(error)
    return None


def operator_names() -> list[str]:
    """Return the full names of all operators there are, such as "aten.mm.default"; only a private name lists them."""
    names = (name.replace("::", ".") for name in torch._C._dispatch_get_all_op_names())
    return [name if name.count(".") > 1 else f"{name}.default" for name in names]


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without history over the same memory, in which writes into either show by ``version``.

    Below autograd, where dispatch modes run, ``detach`` alone would give it a version of its own.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()
