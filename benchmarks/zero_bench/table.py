"""Turns runs into a table: medians, ratios against the right peers, and whether the bars are met."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zero_bench.contenders import CONTENDERS
from zero_bench.launch import RANKS, Run, Setting, tokens_a_step
from zero_bench.model import SIZES, block_parameters, parameters

FASTER = {"deepspeed": 1.2, "fsdp2": 1.15, "ddp": 1.0, "zero1": 1.0}  # tokens/s, at least, of the peer's
LEANER = 1.0  # memory, at most, of the peer's
FORMULA = {1: (8.0, 8.0), 2: (4.0, 12.0), 3: (0.0, 16.0)}  # fp32 bytes a parameter: on every rank, and over all ranks
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}  # relative, of the loss of each step
HEAD = "{:14} {:>9} {:>15} {:>8} {:>10} {:>9} {:>15} {:>10} {:>9}"
COLUMNS = (
    "contender",
    "tokens/s",
    "rounds",
    "of bound",
    "processor",
    "peak RSS",
    "bytes/param",
    "last loss",
    "deviation",
)
PEERS_OF = {
    "powertrain-0": ("deepspeed-0", "ddp"),
    "powertrain-1": ("deepspeed-1", "ddp", "zero1-torch"),
    "powertrain-2": ("deepspeed-2", "ddp", "zero1-torch"),
    "powertrain-3": ("deepspeed-3", "fsdp2", "fsdp2-once"),
}


@dataclass(frozen=True)
class Row:
    """The rounds of one contender in one setting.

    Attributes:
        good: runs that measured something.
        error: of the last run that did not.
        deviation: the largest relative difference of a step's loss from the median of
            all contenders; None for the bound, whose ranks train apart.
    """

    contender: str
    good: Sequence[Run]
    error: str
    deviation: float | None

    def median(self, value: Callable[[Run], float]) -> float:
        """Return the median over the rounds."""
        return statistics.median(map(value, self.good))

    def speeds(self) -> list[float]:
        """Return tokens/s of each round."""
        return [tokens_a_step(run.setting) / run.step_seconds for run in self.good]


def rows_of(setting: Setting, runs: Sequence[Run]) -> list[Row]:
    """Gather the runs of a setting, in the order of their first appearance."""
    here = [run for run in runs if run.setting == setting]
    names = list(dict.fromkeys(run.contender for run in here))
    trained = [run for run in here if run.losses and CONTENDERS[run.contender].synchronous]
    # One a contender, so that more rounds of one do not weigh more.
    one_each = {run.contender: run.losses for run in trained}
    usual = [statistics.median(values) for values in zip(*one_each.values(), strict=True)]
    rows = []
    for name in names:
        mine = [run for run in here if run.contender == name]
        deviations = [
            abs(loss - expected) / expected if loss == loss else float("inf")
            for run in trained
            if run.contender == name
            for loss, expected in zip(run.losses, usual, strict=True)
        ]
        errors = [run.error for run in mine if run.error]
        good = [run for run in mine if not run.error]
        rows.append(Row(name, good, errors[-1] if errors else "", max(deviations, default=None)))
    return rows


def paired(ours: Row, theirs: Row, value: Callable[[Run], float]) -> float | None:
    """Return the median over the rounds of ours / theirs: neighbours in time share the machine's moods."""
    other = {run.round: value(run) for run in theirs.good}
    ratios = [value(run) / other[run.round] for run in ours.good if run.round in other]
    return statistics.median(ratios) if ratios else None


def bound_share(row: Row, bound: Row) -> float | None:
    """Return tokens/s over those of the bound, which updates as large a share of the parameters as the contender."""
    other = 1 - 1 / RANKS if CONTENDERS[row.contender].sharded_update else 0.0
    least = {run.round: run.step_seconds - other * run.update_seconds for run in bound.good}
    shares = [least[run.round] / run.step_seconds for run in row.good if run.round in least]
    return statistics.median(shares) if shares else None


def render(setting: Setting, runs: Sequence[Run]) -> str:
    """Return the table of one setting, with its ratios below."""
    rows = rows_of(setting, runs)
    count = parameters(SIZES[setting.model])
    bound = next((row for row in rows if row.contender == "bound"), None)
    lines = [
        f"{setting}: {count:,} parameters, {tokens_a_step(setting)} tokens a step",
        HEAD.format(*COLUMNS),
        HEAD.format("", "median", "min - max", "", "s/step", "MB", "update / after", "", "").rstrip(),
    ]
    for row in rows:
        if not row.good:
            lines.append(f"{row.contender:14} FAILED: {row.error}")
            continue
        speeds = row.speeds()
        share = bound_share(row, bound) if bound is not None else None
        at_update = max((run.bytes_at_update for run in row.good if run.bytes_at_update is not None), default=None)
        left = [run.bytes_after for run in row.good if run.bytes_after is not None]
        state = " / ".join("-" if n is None else f"{n / count:.1f}" for n in (at_update, max(left, default=None)))
        lines.append(
            HEAD.format(
                row.contender,
                f"{statistics.median(speeds):.0f}",
                f"{min(speeds):.0f} - {max(speeds):.0f}",
                "-" if share is None else f"{share:.2f}",
                f"{row.median(lambda run: run.processor_seconds):.2f}",
                f"{row.median(rss) / 1e6:.0f}",
                state,
                f"{row.good[-1].losses[-1]:.5f}",
                "(alone)" if row.deviation is None else f"{row.deviation:.0e}",
            )
            + remark(row, setting)
        )
        if row.error:
            lines.append(f"{'':14} a round FAILED: {row.error}")
    return "\n".join([*lines, "", *comparisons(rows, setting)])


def comparisons(rows: Sequence[Row], setting: Setting) -> list[str]:
    """Return a line for each of ours beside each of its peers."""
    by_name = {row.contender: row for row in rows}
    lines = []
    for name, peers in PEERS_OF.items():
        for peer in peers:
            if name not in by_name or peer not in by_name:
                continue
            ours, theirs = by_name[name], by_name[peer]
            speed = paired(ours, theirs, lambda run: 1 / run.step_seconds)
            if speed is None:
                lines.append(f"{name} / {peer}: not measured")
                continue
            lines.append(
                f"{f'{name} / {peer}':28} tokens/s {verdict(speed, round(speed, 2) >= FASTER[peer.partition('-')[0]])}"
                f"   peak RSS {bounded(paired(ours, theirs, rss))}   bytes after {bounded(paired(ours, theirs, after))}"
            )
    if lines:
        bars = ", ".join(f"{peer} {bar:.2f}" for peer, bar in FASTER.items())
        bar = f"bars: tokens/s at least {bars}; memory at most {LEANER:.2f} of the peer's, as printed"
        lines.insert(0, f"ratios, medians of the rounds' ({bar})")
    return lines + promises(rows, setting)


def promises(rows: Sequence[Row], setting: Setting) -> list[str]:
    """Return a line for each stage of ours: live bytes after a step beside what ZeRO's formula promises, in fp32."""
    if setting.precision != "fp32":
        return []
    count, unit = parameters(SIZES[setting.model]), block_parameters(SIZES[setting.model])
    lines = []
    for row in rows:
        stage = int(row.contender[-1]) if row.contender.startswith("powertrain-") else 0
        if stage and row.good and row.median(after) == row.median(after):
            everywhere, shared = FORMULA[stage]
            formula, found = everywhere + shared / RANKS, row.median(after) / count
            allowed = 1.03 * formula + 2 * 4 * unit / count
            lines.append(
                f"{row.contender:28} {found:.2f} bytes a parameter; formula {formula:.2f}, with 3 % and two units "
                f"{allowed:.2f} {'met' if found <= allowed else 'MISSED'}"
            )
    return lines


def remark(row: Row, setting: Setting) -> str:
    """Mark a loss that is not what the others computed: that row's speed is then worth nothing."""
    wrong = row.deviation is not None and not row.deviation <= TOLERANCE[setting.precision]
    return f"  LOSS DIFFERS (over {TOLERANCE[setting.precision]:.0e})" if wrong else ""


def bounded(ratio: float | None) -> str:
    """Return a ratio of memory and its verdict."""
    return "-" if ratio is None or ratio != ratio else verdict(ratio, round(ratio, 2) <= LEANER)


def verdict(ratio: float, met: bool) -> str:
    """Return a ratio and whether its bar is met."""
    return f"{ratio:5.2f} {'met' if met else 'MISSED':6}"


def rss(run: Run) -> float:
    """Return the peak of resident bytes."""
    return run.peak_rss


def after(run: Run) -> float:
    """Return the bytes of live tensors after a step; not a number when nobody looked."""
    return float("nan") if run.bytes_after is None else run.bytes_after
