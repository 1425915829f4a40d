"""The only place that touches names of torch that begin with an underscore, each with the reason."""

from __future__ import annotations

from collections.abc import Callable

import torch


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
