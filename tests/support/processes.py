"""Scripts that run as ranks in processes of their own, which may die."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

from powertrain.testing.ports import free_port


def run_ranks(
    directory: Path, script: str, n: int = 2, *, environment: Mapping[str, str] | None = None
) -> list[tuple[int, str, str]]:
    """Run a script on ``n`` ranks; return the exit code and the two outputs of each."""
    file = directory / "script.py"
    file.write_text(textwrap.dedent(script))
    port = free_port()
    processes = []
    for rank in range(n):
        facts = {"RANK": rank, "WORLD_SIZE": n, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
        variables = {**os.environ, **{k: str(v) for k, v in facts.items()}, "MASTER_ADDR": "127.0.0.1"}
        outputs = [(directory / f"{name}{rank}").open("w+") for name in ("out", "err")]
        command = [sys.executable, str(file)]
        process = subprocess.Popen(
            command, env={**variables, **(environment or {})}, stdout=outputs[0], stderr=outputs[1]
        )
        processes.append((process, outputs))
    try:
        for process, _ in processes:
            process.wait(120)
    finally:
        for process, _ in processes:
            process.kill()
            process.wait()
        texts = []
        for _, outputs in processes:
            for output in outputs:
                output.seek(0)
            texts.append([output.read() for output in outputs])
            for output in outputs:
                output.close()
    return [(process.returncode, out, err) for (process, _), (out, err) in zip(processes, texts, strict=True)]
