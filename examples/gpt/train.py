"""Trains a byte-level GPT: `powertrain launch --nproc 2 examples/gpt/train.py`."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import torch
from corpus import standard_library
from model import GPT
from report import Report

import powertrain
from powertrain.errors import CheckpointMissing
from powertrain_data.tokens import TokenDataset

SEQUENCE = 128
VALIDATION_BATCHES = 8
VALIDATE_EVERY = 50


class StopRequest:
    """Notes Ctrl-C or a polite kill, and lets all ranks agree on the step to stop after."""

    def __init__(self, engine: powertrain.Engine, report: Report) -> None:
        self._communicator = engine.context.communicator
        self._report = report
        self._wanted = torch.zeros(1, device=engine.context.device)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        if not self._wanted:
            self._report.say("stopping after this step, and saving …")
        self._wanted.fill_(1)

    def agreed(self) -> bool:
        """Return whether any rank was asked to stop; every rank must call it."""
        answer = self._wanted.clone()
        self._communicator.all_reduce(answer, reduction="max", label="stop?").wait()
        return bool(answer.item())


def validate(engine: powertrain.Engine, dataset: TokenDataset, batch: int) -> float:
    """Return the mean loss over the same spread-out windows each time."""
    losses = []
    stride = len(dataset) // (VALIDATION_BATCHES * batch * engine.data_size)
    for k in range(VALIDATION_BATCHES):
        first = (k * engine.data_size + engine.data_rank) * batch
        windows = [dataset[(first + i) * stride] for i in range(batch)]
        losses.append(engine.eval_step({key: torch.stack([w[key] for w in windows]) for key in windows[0]}))
    return float(torch.stack(losses).mean())


def train(engine: powertrain.Engine, validation: TokenDataset, report: Report, steps: int) -> bool:
    """Train up to step ``steps``; return False when somebody asked to stop before."""
    sizes, context = engine.context.batch, engine.context
    stop = StopRequest(engine, report)
    with report:
        if engine.global_step == 0:
            report.validation(0, validate(engine, validation, sizes.micro))
        while engine.global_step < steps:
            for batch in engine.loader or ():
                loss = engine.train_step(batch)
                step = engine.global_step
                memory = context.accelerator.memory(context.device)
                report.step(
                    step,
                    sizes.total * SEQUENCE,
                    memory.used,
                    loss=float(loss),
                    learning_rate=engine.learning_rate,
                    grad_norm=engine.grad_norm or 0.0,
                )
                if step % VALIDATE_EVERY == 0 or step == steps:
                    report.validation(step, validate(engine, validation, sizes.micro))
                if step == steps:
                    break
                if stop.agreed():
                    return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=str(Path(__file__).with_name("train.toml")), help="TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of it")
    arguments = parser.parse_args()

    corpus = standard_library(Path("runs/corpus"))
    torch.manual_seed(0)
    with powertrain.initialize(
        GPT(SEQUENCE), arguments.config, TokenDataset(corpus.train, SEQUENCE), overrides=arguments.set
    ) as engine:
        settings = engine.context.config
        output, steps = Path(settings.run.output), settings.scheduler.options["steps"]
        try:
            resumed = str(engine.load_checkpoint())
        except CheckpointMissing:
            resumed = ""
        report = Report(output, engine.global_step, steps, show=engine.context.rank.index == 0)
        parameters = sum(p.numel() for p in engine.module.parameters())
        report.say(f"{parameters / 1e6:.1f}M parameters on {engine.data_size} process(es), {steps} steps")
        if resumed:
            report.say(f"resumed from {resumed}")
        finished = train(engine, TokenDataset(corpus.validation, SEQUENCE), report, steps)
        every = engine.context.config.checkpoint.every
        if engine.global_step > report.start and (every is None or engine.global_step % every):
            engine.save_checkpoint()
        finish(engine, report, output, finished=finished)


def finish(engine: powertrain.Engine, report: Report, output: Path, *, finished: bool) -> None:
    """Leave the curve and a sample, and say where everything lies."""
    engine.module.eval()
    # On every rank, with the same seed: where parameters are sharded, each needs the others to run the model.
    sample = engine.module.continue_text("def ", 400, temperature=0.7, seed=1)
    if engine.context.rank.index:
        return
    report.draw()
    (output / "sample.txt").write_text(sample)
    losses = [row["validation_loss"] for row in report.rows if "validation_loss" in row]
    print(f"\n{sample}\n")
    if losses:
        print(f"validation loss {losses[-1]:.3f} nats per byte (it began at {losses[0]:.3f})")
    for name, what in (
        ("checkpoints", "checkpoints"),
        ("metrics.jsonl", "metrics"),
        ("loss.png", "loss curve"),
        ("sample.txt", "sample"),
    ):
        print(f"  {what:12} {output / name}")
    if not finished:
        print(f"stopped at step {engine.global_step}, saved; the same command goes on from there")
    elif report.start == report.steps:
        print('nothing was left to train; for more: make train ARGS="--set scheduler.steps=1000"')


if __name__ == "__main__":
    main()
