"""The engine: a model, an optimizer and the plugins between them, one step at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from powertrain import access, nest, saved, weights
from powertrain.call import ModelCall, checked_loss
from powertrain.context import Context
from powertrain.errors import EngineError
from powertrain.precision import LossScale, scale_gradient
from powertrain.roles.checkpoint import CheckpointStore
from powertrain.roles.communicator import Done, Handle
from powertrain.roles.optimizer import OptimizerWrapper, Update
from powertrain.roles.runner import StepRunner
from powertrain.sampling import Loader
from powertrain.schedule import Schedule

_log = logging.getLogger("powertrain.engine")

_AUTOMATIC_TAG = "step-{:08d}"
_AUTOMATIC_TAGS = r"step-\d{8,}"  # only these are deleted: a name that the user chose is the user's


class Engine:
    """Trains one model; made by ``powertrain.initialize``.

    One call a step::

        for batch in engine.loader:
            loss = engine.train_step(batch)

    or the finer calls, once for each micro-batch::

        loss = engine(micro_batch)
        engine.backward(loss)  # or loss.backward()
        engine.step()  # updates after `[batch] accumulation` micro-batches

    Every rank must make the same calls. The engine is a context manager that
    closes itself.

    Attributes:
        module: the model that runs, transformed by plugins.
        context: the facts of the run that plugins see as well.
        loader: yields local batches of the dataset; None without a dataset.
        global_step: optimizer steps done, those skipped for an overflow included.
        client_state: what the last ``load_checkpoint`` found, or an empty dict.
    """

    def __init__(
        self,
        *,
        module: torch.nn.Module,
        context: Context,
        call: ModelCall,
        optimizer: OptimizerWrapper,
        schedule: Schedule | None,
        loss_scale: LossScale,
        loader: Loader | None,
    ) -> None:
        self.module = module
        self.context = context
        self.loader = loader
        self.global_step = 0
        self.client_state: dict[str, Any] = {}
        self.optimizer_wrapper = optimizer
        self.schedule = schedule
        self.loss_scale = loss_scale
        self._call = call
        self._runner: StepRunner | None = None
        self._update: Update | None = None
        self._grad_norm: float | None = None
        self._micro_batches = 0  # forward passes since the last update
        self._syncing = True
        self._closed = False
        self._guarded = False
        self._stores: dict[str, CheckpointStore] = {}
        self._events = {
            name: context.hooks.listeners(name)
            for name in ("on_step_start", "on_step_end", "on_checkpoint_saved", "on_error", "on_close")
        }

    # --- one call a step -----------------------------------------------------------

    def train_step(self, batch: Any) -> torch.Tensor:
        """Run one whole optimizer step.

        Args:
            batch: this rank's local batch, micro x accumulation samples along
                dimension 0 of each tensor; or an iterator of micro-batches.

        Returns:
            The mean loss over the global batch, before the update: a 0-d
            tensor, the same on every rank.

        Raises:
            BatchError: the batch does not have the configured size.
        """
        with self._guard():
            if not self.module.training:  # parts that were put into eval mode by hand stay there
                self.module.train()
            if self._micro_batches:  # what an interrupted step left behind
                self.optimizer_wrapper.discard()
                self._micro_batches = 0
            self._start_step()
            loss = self.runner.train(batch)
            # Before the loss goes out: which buckets backward has sent may differ between ranks.
            self.optimizer_wrapper.flush()
            loss, handle = self._mean_over_ranks(loss)
            self._apply()
            handle.wait()
            self._finish_step(loss)
            return loss

    def eval_step(self, batch: Any) -> torch.Tensor:
        """Return the mean loss of ``batch`` over all ranks, without gradients or dropout.

        Every rank must call it, with as many samples.
        """
        with self._guard():
            modes = [(module, module.training) for module in self.module.modules()]
            self.module.eval()
            try:
                loss, handle = self._mean_over_ranks(self.runner.evaluate(batch))
                handle.wait()
            finally:
                for module, mode in modes:
                    module.training = mode
            return loss

    def _mean_over_ranks(self, loss: torch.Tensor) -> tuple[torch.Tensor, Handle]:
        communicator = self.context.communicator
        if communicator.size("data") == 1:
            return loss, Done()
        loss = loss.detach().float().clone()
        return loss, communicator.all_reduce(loss, reduction="mean", label="loss")

    # --- the finer calls -------------------------------------------------------------

    def __call__(self, batch: Any) -> Any:
        """Run the model on one micro-batch; return the loss, or the model's output if it makes none.

        Gradients that flow back through what is returned carry the loss scale
        and the division by the number of micro-batches.
        """
        finer = not self._guarded
        with self._guard():
            return self._forward(batch, finer=finer)

    def _forward(self, batch: Any, *, finer: bool) -> Any:
        """Run the model; ``finer`` when the caller steps by hand and may go backward as often as it likes."""
        recipe, device = self.context.recipe, self.context.device
        training = self.module.training and torch.is_grad_enabled()
        if training:
            if self._micro_batches == 0 and finer:
                self._start_step()
            self._micro_batches += 1
            last = self._syncing and self._micro_batches >= self.context.batch.accumulation
            self.optimizer_wrapper.begin(last=last, once=not finer)
        try:
            with recipe.forward(device):
                output = self._call(batch, device, recipe.cast_inputs)
        except BaseException:
            self._micro_batches -= training  # it does not count
            raise
        factor = self.loss_scale.value / self.context.batch.accumulation
        if not training or factor == 1.0:
            return output
        return nest.map_tensors(lambda tensor: scale_gradient(tensor, factor), output)

    def loss(self, batch: Any) -> torch.Tensor:
        """Run the model on one micro-batch and return its loss.

        Raises:
            EngineError: what the model or the loss function returned is no scalar.
        """
        return checked_loss(self(batch), self._call.loss_fn is not None)

    def backward(self, loss: torch.Tensor, gradient: torch.Tensor | None = None) -> None:
        """Backpropagate from what a call of the engine returned; the same as ``loss.backward()``."""
        loss.backward(gradient)

    def step(self) -> bool:
        """End a micro-batch: update if it was the last of its step, and say whether it was.

        Raises:
            EngineError: the engine was not called since the last update.
        """
        if self._micro_batches == 0:
            raise EngineError(
                "step() without a forward pass since the last update",
                remedy="call engine(batch), then engine.backward(loss), then engine.step()",
            )
        if self._micro_batches < self.context.batch.accumulation:
            return False
        with self._guard():
            self._apply()
            self._finish_step(None)
        return True

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Put off the averaging of gradients until a backward pass outside of the block.

        Legal everywhere: the update itself averages what was put off.
        """
        was, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = was

    def _start_step(self) -> None:
        for listener in self._events["on_step_start"]:
            listener(engine=self)

    def _apply(self) -> None:
        """Update the parameters from the gradients gathered."""
        scale = self.loss_scale
        self._grad_norm = None
        self._update = self.optimizer_wrapper.step(
            grad_scale=scale.value, clip=self.context.config.optimizer.clip, check_overflow=scale.checked
        )
        self._micro_batches = 0
        self.global_step += 1
        if self._update.applied and self.schedule is not None:
            self.schedule.advance()
        elif not self._update.applied:
            _log.info("step %d skipped: gradients overflowed at loss scale %g", self.global_step, scale.value)
        scale.update(applied=self._update.applied)

    def _finish_step(self, loss: torch.Tensor | None) -> None:
        for store in self._stores.values():
            self._announce(store, store.poll())
        table = self.context.config.checkpoint
        if table.every is not None and self.global_step % table.every == 0:
            self.save_checkpoint()
        for listener in self._events["on_step_end"]:
            listener(engine=self, loss=loss)

    def attach(self, runner: StepRunner) -> None:
        """Set what runs the micro-batches of a step; ``initialize`` calls it once."""
        self._runner = runner

    # --- facts -------------------------------------------------------------------------

    @property
    def runner(self) -> StepRunner:
        """What runs the micro-batches of a step."""
        assert self._runner is not None
        return self._runner

    @property
    def learning_rate(self) -> float:
        """The first group's learning rate for the next update."""
        return float(self.optimizer_wrapper.optimizer.param_groups[0]["lr"])

    @property
    def grad_norm(self) -> float | None:
        """The global gradient norm of the last step, before clipping; None until there was one.

        Computed when asked for, from gradients that live until the next forward pass.
        """
        if self._grad_norm is None and self._update is not None and self._micro_batches == 0:
            self._grad_norm = float(self._update.grad_norm())
        return self._grad_norm

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because gradients overflowed."""
        return self.loss_scale.skipped

    @property
    def data_rank(self) -> int:
        """Which slice of the global batch this process feeds."""
        return self.context.mesh.index("data")

    @property
    def data_size(self) -> int:
        """Into how many slices the global batch is cut."""
        return self.context.mesh.size("data")

    # --- checkpoints ---------------------------------------------------------------------

    def save_checkpoint(
        self, directory: str | None = None, tag: str | None = None, client_state: dict[str, Any] | None = None
    ) -> str:
        """Save everything that is needed to go on, on every rank; return the tag.

        Args:
            directory: where checkpoints live; default ``[checkpoint] directory``.
            tag: the checkpoint's name; default ``step-<global_step>``.
            client_state: JSON of your own, the same on every rank; default what the last load found.

        Raises:
            CheckpointWriteFailed: the disk refused; asynchronous saves raise at a later step.
        """
        with self._guard():
            tag = tag or _AUTOMATIC_TAG.format(self.global_step)
            store = self._store(directory)
            table = self.context.config.checkpoint
            store.save(tag, saved.snapshot(self, client_state), asynchronous=table.asynchronous)
            self._announce(store, store.poll())
            return tag

    def load_checkpoint(self, directory: str | None = None, tag: str | None = None) -> saved.LoadReport:
        """Continue from a checkpoint, made on whatever number of ranks.

        Args:
            directory: where checkpoints live; default ``[checkpoint] directory``.
            tag: which one; default the newest complete one.

        Raises:
            CheckpointMissing, ManifestMissing, ShardMissing, ShardTruncated, ShardCorrupt,
            CheckpointMismatch, DataError: nothing was loaded; a half-done accumulation is dropped.
        """
        with self._guard():
            self.optimizer_wrapper.discard()
            self._micro_batches = 0
            store = self._store(directory)
            self._announce(store, store.wait())
            return saved.restore(self, store.open(tag))

    def load_weights(self, path: str | os.PathLike[str], strict: bool = True) -> weights.WeightsReport:
        """Give the model the values of a directory of safetensors files, or of one file, on every rank.

        Optimizer state, steps and random generators stay as they are; a half-done
        accumulation is dropped. Each rank reads what it keeps.

        Args:
            path: as model libraries write it, with or without an index.
            strict: refuse names that the model or the files lack; otherwise what matches is loaded.

        Raises:
            CheckpointMismatch: names or shapes differ; nothing was loaded.
            CheckpointMissing, ShardMissing, ShardTruncated, ShardCorrupt: nothing was loaded.
        """
        with self._guard():
            self.optimizer_wrapper.discard()
            self._micro_batches = 0
            report = weights.load(self, saved.open_weights(self.context, path), strict=strict)
            _log.info("weights from %s", report)
            return report

    def _store(self, directory: str | None) -> CheckpointStore:
        uri = saved.checkpoint_uri(self.context.config, directory)
        if uri not in self._stores:
            self._stores[uri] = saved.open_store(self.context, uri)
        return self._stores[uri]

    def _announce(self, store: CheckpointStore, tags: list[str]) -> None:
        """Tell of checkpoints that have become complete; delete those that they make superfluous."""
        keep = self.context.config.checkpoint.keep_last
        if tags and keep is not None:
            store.prune(keep, _AUTOMATIC_TAGS)
        uri = next(uri for uri, other in self._stores.items() if other is store)
        for tag in tags:
            for listener in self._events["on_checkpoint_saved"]:
                listener(engine=self, directory=uri, tag=tag)

    # --- the end ---------------------------------------------------------------------------

    def close(self) -> None:
        """Finish background saves, tell the plugins, and leave the group; a second call does nothing."""
        self._end(failed=False)

    def _end(self, *, failed: bool) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            for store in self._stores.values():
                if failed:  # other ranks may be gone: nothing may wait for them
                    store.abandon()
                else:
                    self._announce(store, store.wait())
                store.close()
        finally:
            try:
                for listener in self._events["on_close"]:
                    listener(engine=self)
            finally:
                access.release(self.module, self.optimizer_wrapper)
                self.optimizer_wrapper.close()
                self.context.close_tiers()
                self.context.communicator.close()
                self.context.accelerator.release_unused(self.context.device)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.close()
            return
        self.context.communicator.report(error)
        # Background saves may still fail; the error that ends the block is the one to show.
        try:
            self._end(failed=True)
        except Exception as other:
            _log.error("closing after an error failed as well: %s", other)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Tell plugins of an error, once, before it leaves the engine."""
        self._check_open()
        if self._guarded:
            yield
            return
        self._guarded = True
        try:
            yield
        except BaseException as error:
            for listener in self._events["on_error"]:
                listener(engine=self, error=error)
            raise
        finally:
            self._guarded = False

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed", remedy="make a new one with powertrain.initialize")
