"""What benchmarks/zero.py measured, as the tables of docs/performance.md.

    python benchmarks/zero_report.py PATH [PATH ...]

PATH: what zero.py wrote with --json. Each setting becomes a column; a setting
that several files measured, or one file twice, becomes one with all rounds.
Ratios are medians of the rounds' ratios; one below its bar is in bold.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from zero_bench.launch import Run, Setting
from zero_bench.table import FASTER, PEERS_OF, Row, after, paired, rows_of, rss

NAMES = {
    "bound": "bound: no communication",
    "ddp": "DDP",
    "zero1-torch": "ZeroRedundancyOptimizer",
    "fsdp2": "FSDP2, a block a unit",
    "fsdp2-once": "FSDP2, gradients reduced once a step",
    **{f"deepspeed-{stage}": f"DeepSpeed, stage {stage}" for stage in range(4)},
    **{f"powertrain-{stage}": f"Powertrain, stage {stage}" for stage in range(4)},
}
LATER = 10_000  # between the rounds of one file and the next


def read(paths: Sequence[Path]) -> list[Run]:
    """Return the runs of all files; the rounds of different files have different numbers."""
    runs = []
    for number, path in enumerate(paths):
        for fields in json.loads(path.read_text())["runs"]:
            run = Run(**{**fields, "setting": Setting(**fields["setting"]), "losses": tuple(fields["losses"])})
            runs.append(replace(run, round=run.round + LATER * number))
    return runs


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; rows without any number are left out."""
    lines = [
        f"| {' | '.join(line)} |" for line in (head, *(row for row in rows if any(cell != "-" for cell in row[1:])))
    ]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def contenders(title: str, columns: dict[Setting, dict[str, Row]], value: Callable[[Row], float], form: str) -> str:
    """Return a table with a line a contender."""

    def cell(row: Row | None) -> str:
        number = value(row) if row is not None and row.good else float("nan")
        return "-" if number != number else format(number, form)

    rows = ([NAMES[name], *(cell(column.get(name)) for column in columns.values())] for name in NAMES)
    return table([title, *map(heading, columns)], rows)


def ratios(
    title: str,
    columns: dict[Setting, dict[str, Row]],
    value: Callable[[Run], float],
    missed: Callable[[float, str], bool],
) -> str:
    """Return a table with a line for each of ours beside each of its peers."""
    rows = []
    for name, peers in PEERS_OF.items():
        for peer in peers:
            cells = []
            for column in columns.values():
                found = paired(column[name], column[peer], value) if {name, peer} <= set(column) else None
                shown = "-" if found is None or found != found else f"{found:.2f}"
                cells.append(f"**{shown}**" if found is not None and missed(round(found, 2), peer) else shown)
            rows.append([f"{NAMES[name].partition(', ')[2]} / {NAMES[peer]}", *cells])
    return table([title, *map(heading, columns)], rows)


def heading(setting: Setting) -> str:
    """Return the head of a column."""
    return f"{setting.model.upper()}, {setting.precision}, {setting.accumulation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    runs = read(parser.parse_args().paths)
    columns = {
        setting: {row.contender: row for row in rows_of(setting, runs)}
        for setting in dict.fromkeys(run.setting for run in runs)
    }
    for setting, column in columns.items():
        for row in column.values():
            print(f"{heading(setting)}: {NAMES[row.contender]}: {len(row.good)} rounds {row.error}".rstrip())
    print()
    print(contenders("tokens/s", columns, lambda row: sorted(row.speeds())[len(row.good) // 2], ",.0f"), end="\n\n")
    speed = ratios("tokens/s, ratio", columns, lambda run: 1 / run.step_seconds, slower)
    print(speed, end="\n\n")
    print(contenders("processor s/step", columns, lambda row: row.median(lambda run: run.processor_seconds), ".2f"))
    print()
    print(contenders("peak RSS, MB", columns, lambda row: row.median(rss) / 1e6, ",.0f"), end="\n\n")
    print(ratios("peak RSS, ratio", columns, rss, lambda ratio, _: ratio > 1), end="\n\n")
    print(contenders("live bytes after a step, MB", columns, lambda row: row.median(after) / 1e6, ",.0f"), end="\n\n")
    print(contenders("deviation of the losses", columns, lambda row: row.deviation or float("nan"), ".0e"))


def slower(ratio: float, peer: str) -> bool:
    """Say whether a ratio of speeds is below the bar."""
    return ratio < FASTER[peer.partition("-")[0]]


if __name__ == "__main__":
    main()
