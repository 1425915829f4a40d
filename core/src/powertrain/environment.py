"""The one place that reads the launcher's environment variables.

The same script runs under ``python`` (one rank, no variable needed),
``torchrun``, ``srun`` and ``mpirun``: each leaves its own variables, and
``Rank.from_environment`` maps them to one table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import attrs

from powertrain.errors import LaunchError


def setting(name: str, environ: Mapping[str, str] | None = None) -> str | None:
    """Return the value of one variable, or None."""
    return (os.environ if environ is None else environ).get(name)


@attrs.frozen(kw_only=True)
class Rank:
    """This process's place in the launch.

    Attributes:
        index: the global rank.
        world_size: how many ranks there are.
        local_index: the rank among those of this host.
        local_size: how many ranks this host runs.
        address: the host on which rank 0 can be met.
        port: the port on which rank 0 can be met.
        launcher: where the values come from: python, torchrun, srun or mpirun.
    """

    index: int = 0
    world_size: int = 1
    local_index: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 29500
    launcher: str = "python"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Rank:
        """Read the rank table of whichever launcher started this process.

        Raises:
            LaunchError: a variable is missing, not a number, or out of range.
        """
        env = os.environ if environ is None else environ
        # MPI before Slurm: within a Slurm job, mpirun's daemons are tasks of srun, and ranks inherit their variables.
        for reader in (_torchrun, _mpi, _slurm):
            if (rank := reader(env)) is not None:
                return rank
        return cls()

    def checked(self, names: tuple[str, str, str, str]) -> Rank:
        """Return itself if its numbers fit one another.

        Args:
            names: the variables of rank, world size, local rank and local size, for the message.

        Raises:
            LaunchError: they contradict one another.
        """
        rank, world, local_rank, local_size = names
        if not 0 <= self.index < self.world_size:
            raise LaunchError(
                f"rank {self.index} does not exist in a world of {self.world_size}",
                where=f"{rank} and {world}, set by {self.launcher}",
                expected=f"a rank from 0 to {self.world_size - 1}",
            )
        if not 0 <= self.local_index < self.local_size:
            raise LaunchError(
                f"local rank {self.local_index} does not exist among {self.local_size} on this host",
                where=f"{local_rank} and {local_size}, set by {self.launcher}",
                expected=f"a local rank from 0 to {self.local_size - 1}",
            )
        if self.local_size > self.world_size:
            raise LaunchError(
                f"this host cannot run {self.local_size} of {self.world_size} ranks",
                where=f"{local_size} and {world}, set by {self.launcher}",
            )
        return self


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if default is not None:
            return default
        raise LaunchError(f"the variable {name} is not set, though others of its launcher are", where=name)
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"the variable {name} is not a number", where=name, found=repr(text)) from None


def _torchrun(env: Mapping[str, str]) -> Rank | None:
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    index, world = _number(env, names[0]), _number(env, names[1])
    return Rank(
        index=index,
        world_size=world,
        local_index=_number(env, names[2], index),
        local_size=_number(env, names[3], world),
        address=env.get("MASTER_ADDR", "127.0.0.1"),
        port=_number(env, "MASTER_PORT", 29500),
        launcher="torchrun",
    ).checked(names)


def _slurm(env: Mapping[str, str]) -> Rank | None:
    # A batch script runs with SLURM_JOB_ID set but is no task: only srun sets a step's task count.
    if "SLURM_PROCID" not in env or "SLURM_STEP_NUM_TASKS" not in env:
        return None
    tasks = next((n for n in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") if n in env), None)
    counts = [1] if tasks is None else _expand_counts(tasks, env[tasks])
    node = _number(env, "SLURM_NODEID", 0)
    if not 0 <= node < len(counts):
        raise LaunchError(
            f"node {node} does not exist among {len(counts)}",
            where=f"SLURM_NODEID and {tasks}, set by srun",
            expected=f"a node from 0 to {len(counts) - 1}",
        )
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", tasks or "SLURM_STEP_TASKS_PER_NODE")
    return Rank(
        index=_number(env, names[0]),
        world_size=_number(env, names[1]),
        local_index=_number(env, names[2]),
        local_size=counts[node],
        address=env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        # Every task of a job computes the same port, and two jobs on one host differ.
        port=_number(env, "MASTER_PORT", 20000 + _number(env, "SLURM_JOB_ID", 0) % 20000),
        launcher="srun",
    ).checked(names)


def _mpi(env: Mapping[str, str]) -> Rank | None:
    # Open MPI, then MPICH and Intel MPI (hydra).
    for prefix, names in (
        ("OMPI_COMM_WORLD_", ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
        ("", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")),
    ):
        rank, size, local_rank, local_size = (prefix + name for name in names)
        if rank not in env or size not in env:
            continue
        if local_rank not in env and "SLURM_STEP_NUM_TASKS" in env:
            continue  # srun's own PMI: Slurm's variables say more
        index, world = _number(env, rank), _number(env, size)
        rank_table = Rank(
            index=index,
            world_size=world,
            local_index=_number(env, local_rank, index),
            local_size=_number(env, local_size, world),
            address=env.get("MASTER_ADDR", "127.0.0.1"),
            port=_number(env, "MASTER_PORT", 29500),
            launcher="mpirun",
        ).checked((rank, size, local_rank, local_size))
        if rank_table.local_size < world and "MASTER_ADDR" not in env:
            raise LaunchError(
                "mpirun spans several hosts, and none of them is named as the meeting point",
                where="MASTER_ADDR",
                remedy="pass it on: `mpirun -x MASTER_ADDR=<host of rank 0> …` (or -genv)",
            )
        return rank_table
    return None


def _expand_counts(name: str, text: str) -> list[int]:
    """Expand Slurm's ``2(x3),1`` to ``[2, 2, 2, 1]``."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, repeat = part.partition("(x")
        try:
            counts += [int(count)] * int(repeat.rstrip(")") or 1)
        except ValueError:
            raise LaunchError(
                f"the variable {name} is no list of counts", where=name, expected="like 2(x3),1", found=repr(text)
            ) from None
    return counts


def _first_host(nodelist: str) -> str:
    """Return the first host of Slurm's ``node[03-07,12],other``."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket:
        return head.split(",")[0]
    if "," in head:
        return head.split(",")[0]
    inside, _, tail = rest.partition("]")
    return head + inside.split(",")[0].split("-")[0] + tail.split(",")[0]


LOG_LEVELS = ("debug", "info", "warning", "error")


def _misset(name: str, how: str, text: str | None, expected: str) -> LaunchError:
    """Return the error of one of Powertrain's own variables."""
    return LaunchError(
        f"the variable {name} {how}",
        where=name,
        expected=expected,
        found=repr(text),
        remedy=f"set it to {expected}; or unset it",
    )


def log_level(environ: Mapping[str, str] | None = None) -> str | None:
    """Return the level that ``POWERTRAIN_LOG`` asks for, or None if it is not set.

    Raises:
        LaunchError: it is none of debug, info, warning and error.
    """
    env = os.environ if environ is None else environ
    text = env.get("POWERTRAIN_LOG", "").strip().lower()
    if not text:
        return None
    if text not in LOG_LEVELS:
        raise _misset("POWERTRAIN_LOG", "names no level", text, ", ".join(LOG_LEVELS))
    return text


@contextmanager
def exported(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for this process and its children within a ``with`` block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


DISABLE = "POWERTRAIN__PLUGINS__DISABLE"


def disabled_plugins(environ: Mapping[str, str] | None = None) -> frozenset[str]:
    """Return the plugins that ``POWERTRAIN__PLUGINS__DISABLE`` leaves out (an array, or names with commas)."""
    text = (os.environ if environ is None else environ).get(DISABLE, "")
    try:
        names = json.loads(text)
    except ValueError:
        names = text.split(",")
    return (
        frozenset(str(name).strip() for name in names if str(name).strip()) if isinstance(names, list) else frozenset()
    )


def without_plugins(names: Iterable[str]) -> dict[str, str]:
    """Return the variables that leave ``names`` out, beside those that are left out already."""
    return {DISABLE: json.dumps(sorted(disabled_plugins() | set(names)))}


def strict_plugins(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether ``POWERTRAIN_STRICT_PLUGINS=1`` makes every broken plugin an error."""
    return setting("POWERTRAIN_STRICT_PLUGINS", environ) == "1"


def variables(*prefixes: str, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment variables whose names start with one of ``prefixes``, sorted."""
    env = os.environ if environ is None else environ
    return {name: env[name] for name in sorted(env) if name.startswith(prefixes)}


def cache_directory(environ: Mapping[str, str] | None = None) -> Path:
    """Return where what can be made again is kept: ``POWERTRAIN_CACHE``, or the user's cache directory."""
    if (chosen := setting("POWERTRAIN_CACHE", environ)) is not None:
        return Path(chosen).expanduser()
    shared = setting("XDG_CACHE_HOME", environ)
    return (Path(shared) if shared else Path.home() / ".cache") / "powertrain"


def native_wanted(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether C++ may run: ``POWERTRAIN_NATIVE`` is unset or 1.

    Raises:
        LaunchError: it is neither 0 nor 1.
    """
    text = setting("POWERTRAIN_NATIVE", environ)
    if text not in (None, "", "0", "1"):
        raise _misset("POWERTRAIN_NATIVE", "is neither 0 nor 1", text, "0, which leaves C++ kernels out, or 1")
    return text != "0"


def build_limit(environ: Mapping[str, str] | None = None) -> float:
    """Return the seconds that a build of C++, or waiting for one, may take: ``POWERTRAIN_BUILD_TIMEOUT``, or 300.

    Raises:
        LaunchError: it is no positive number.
    """
    text = setting("POWERTRAIN_BUILD_TIMEOUT", environ)
    try:
        seconds = 300.0 if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise _misset("POWERTRAIN_BUILD_TIMEOUT", "is no time", text, "a number of seconds, above 0")
    return seconds
