"""How long one waits for the first answer: cold processes, beside what they would otherwise import.

Each row is the median over several processes started one after the other,
the rows taking turns so that a busy moment hits all of them. A bare
interpreter is the first row; `import powertrain` is judged by what it adds to
it.

    python benchmarks/startup.py [--runs 9] [--peer-python PATH]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER = Path(__file__).resolve().parent.parent / ".peers" / "deepspeed" / "bin" / "python"

CONFIG = """
[batch]
micro = 8
accumulation = 4

[optimizer]
name = "adamw"
lr = 3e-4
"""


def seconds(command: list[str]) -> float:
    """Return how long ``command`` takes; what it prints is dropped."""
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def medians(commands: dict[str, list[str]], runs: int) -> dict[str, float]:
    """Return the median time of each command, after one run of each that fills the file cache."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for command in commands.values():
        seconds(command)
    for _ in range(runs):
        for name, command in commands.items():
            times[name].append(seconds(command))
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> int:
    """Measure, print the table, and return 1 if a bar is not held."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=9, help="processes per row")
    parser.add_argument("--peer-python", type=Path, default=PEER, help="an interpreter that has deepspeed")
    options = parser.parse_args()
    cli = [sys.executable, "-m", "powertrain.cli"]
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory, "train.toml")
        config.write_text(CONFIG)
        commands = {
            "python": [sys.executable, "-c", "pass"],
            "import powertrain": [sys.executable, "-c", "import powertrain"],
            "powertrain --help": [*cli, "--help"],
            "powertrain plugins": [*cli, "plugins"],
            "powertrain config check FILE": [*cli, "config", "check", str(config)],
            "import torch": [sys.executable, "-c", "import torch"],
        }
        if options.peer_python.exists():
            commands["import deepspeed"] = [str(options.peer_python), "-c", "import deepspeed"]
        taken = medians(commands, max(options.runs, 7))
    bare = taken["python"]
    bars = {
        "import powertrain": (taken["import powertrain"] - bare, 0.100),
        **{name: (taken[name], 0.400) for name in taken if name.startswith("powertrain ")},
    }
    print(f"{'':30} {'median':>9} {'over python':>12} {'bar':>8}  verdict")
    for name, took in taken.items():
        judged, bar = bars.get(name, (0.0, 0.0))
        verdict = "" if not bar else "holds" if judged < bar else "MISSED"
        limit = f"{bar * 1e3:5.0f} ms" if bar else ""
        print(f"{name:30} {took * 1e3:6.0f} ms {(took - bare) * 1e3:9.0f} ms {limit:>8}  {verdict}".rstrip())
    if "import deepspeed" not in taken:
        print(f"import deepspeed: not measured, there is no {options.peer_python}")
    return int(any(judged >= bar for judged, bar in bars.values()))


if __name__ == "__main__":
    sys.exit(main())
