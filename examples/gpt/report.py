"""What a run shows while it goes on and leaves behind: progress, metrics, the loss curve."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Facts(ProgressColumn):
    """The newest figures of the run."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("facts", "")), style="cyan")


class Report:
    """Keeps the metrics file and the progress line of one process.

    Args:
        directory: where ``metrics.jsonl`` and ``loss.png`` go.
        start: the step the run resumes from; later lines of an earlier run are dropped.
        steps: the last step.
        show: whether this process speaks (one of all ranks does).
    """

    def __init__(self, directory: Path, start: int, steps: int, *, show: bool) -> None:
        self.path = directory / "metrics.jsonl"
        self.figure = directory / "loss.png"
        self.start, self.steps, self.show = start, steps, show
        self.rows: list[dict[str, float]] = []
        if show:
            directory.mkdir(parents=True, exist_ok=True)
            self.rows = [row for row in _read(self.path) if row["step"] <= start]
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self.console = Console(file=sys.stderr)
        self.live = show and self.console.is_terminal
        self._progress = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=8),
            _Facts(),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.live,
        )
        self._task = self._progress.add_task("train", total=steps, completed=start)
        self._began = self._mark = time.perf_counter()
        self._validation: float | None = None
        self._facts = "{}"

    def __enter__(self) -> Report:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print one line above the progress line."""
        if self.show:
            self.console.print(text, highlight=False, soft_wrap=True)

    def step(self, step: int, tokens: int, memory: int, **figures: float) -> None:
        """Record one training step of ``tokens`` tokens over all ranks; ``memory`` in bytes."""
        if not self.show:
            return
        now = time.perf_counter()
        rate, self._mark = tokens / (now - self._mark), now
        self._write({"step": step, **figures, "tokens_per_second": round(rate), "memory_mb": memory >> 20})
        self._facts = f"loss {figures['loss']:.3f}{{}} · {rate / 1e3:.1f}k tok/s · {memory >> 20} MB"
        self._progress.update(self._task, completed=step, facts=self._line())
        if not self.live and step % 25 == 0 and step != self.steps:
            left = timedelta(seconds=round((now - self._began) / max(1, step - self.start) * (self.steps - step)))
            self.say(f"step {step}/{self.steps} · {self._line()} · ETA {left}")

    def _line(self) -> str:
        return self._facts.format("" if self._validation is None else f" · val {self._validation:.3f}")

    def validation(self, step: int, loss: float) -> None:
        """Record a validation loss."""
        self._validation = loss
        if self.show:
            self._write({"step": step, "validation_loss": loss})
            self._progress.update(self._task, facts=self._line())
            if not self.live:
                self.say(f"step {step}/{self.steps} · validation loss {loss:.3f}")
        self._mark = time.perf_counter()

    def _write(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def draw(self) -> None:
        """Draw the loss curve."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        train = [(row["step"], row["loss"]) for row in self.rows if "loss" in row]
        validation = [(row["step"], row["validation_loss"]) for row in self.rows if "validation_loss" in row]
        figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
        if train:
            axes.plot(*zip(*train, strict=True), color="#9ab", linewidth=0.8, label="training, each step")
        if validation:
            axes.plot(*zip(*validation, strict=True), color="#c33", marker="o", markersize=3, label="validation")
            axes.annotate(f"{validation[-1][1]:.2f}", validation[-1], textcoords="offset points", xytext=(4, 6))
        axes.axhline(5.545, color="#bbb", linestyle=":", linewidth=1)
        axes.text(0, 5.56, "a uniform guess, ln 256", fontsize=8, color="#888", va="bottom")
        axes.set(xlabel="optimizer step", ylabel="loss (nats per byte)", title="Byte-level GPT on the standard library")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(self.figure)
        pyplot.close(figure)


def _read(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the line that a killed run was writing
    return rows
