"""What a launch will start, worked out before anything is started."""

from __future__ import annotations

import importlib.util
import os
import shlex
from pathlib import Path

import attrs

from powertrain import environment
from powertrain.errors import LaunchError
from powertrain.text import did_you_mean


@attrs.frozen(kw_only=True)
class LaunchPlan:
    """One host's share of a launch.

    Attributes:
        script: the script's path, or the module's name.
        arguments: what the script is given.
        is_module: whether ``script`` names a module.
        processes: how many ranks this host runs.
        nodes: the least and the most hosts.
        node_rank: this host's place among them; None lets the rendezvous decide.
        endpoint: ``host:port`` where the hosts meet; None for a single host.
        rendezvous_id: tells this launch from others that meet there.
        max_restarts: how often the ranks are started again after a failure.
        variables: environment variables that are set for the ranks.
    """

    script: str
    arguments: tuple[str, ...] = ()
    is_module: bool = False
    processes: int = 1
    nodes: tuple[int, int] = (1, 1)
    node_rank: int | None = None
    endpoint: str | None = None
    rendezvous_id: str = "powertrain"
    max_restarts: int = 0
    variables: dict[str, str] = attrs.field(factory=dict)

    @property
    def standalone(self) -> bool:
        """Whether everything happens on this host, on a free port of its loopback."""
        return self.endpoint is None

    def torchrun(self) -> list[str]:
        """Return the torchrun command that starts the same ranks."""
        command = ["torchrun", f"--nproc-per-node={self.processes}"]
        if self.endpoint is None:
            command += ["--standalone", "--local-addr=127.0.0.1"]
        else:
            least, most = self.nodes
            command += [f"--nnodes={least}" if least == most else f"--nnodes={least}:{most}"]
            if self.node_rank is None:
                command += [
                    "--rdzv-backend=c10d",
                    f"--rdzv-endpoint={self.endpoint}",
                    f"--rdzv-id={self.rendezvous_id}",
                ]
            else:
                host, _, port = self.endpoint.rpartition(":")
                command += [f"--node-rank={self.node_rank}", f"--master-addr={host}", f"--master-port={port}"]
        command += [f"--max-restarts={self.max_restarts}"] if self.max_restarts else []
        command += ["--module"] if self.is_module else []
        return [*command, self.script, *self.arguments]

    def shell(self) -> str:
        """Return the variables and the torchrun command as one line for a shell."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*assignments, shlex.join(self.torchrun())])


def cores() -> int:
    """Return how many processor cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def rank_variables(processes: int) -> dict[str, str]:
    """Return what several ranks need in their environment and nobody has set.

    Threads so that the ranks share the cores, and quiet for torch's native
    log, whose stack dumps would bury the report of why a run ended.
    """
    if processes == 1:
        return {}
    wanted = {"OMP_NUM_THREADS": str(max(1, cores() // processes)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return {name: value for name, value in wanted.items() if not environment.variables(name)}


def parse_nodes(text: str) -> tuple[int, int]:
    """Read ``N`` or ``MIN:MAX``.

    Raises:
        LaunchError: it is neither, or the range is empty.
    """
    least, _, most = text.partition(":")
    try:
        nodes = int(least), int(most or least)
    except ValueError:
        nodes = (0, 0)
    if not 1 <= nodes[0] <= nodes[1]:
        raise LaunchError(
            f"{text!r} is no number of nodes",
            where="--nnodes",
            expected="N or MIN:MAX",
            remedy="for example --nnodes 2",
        )
    return nodes


def check_endpoint(endpoint: str | None, nodes: tuple[int, int]) -> str | None:
    """Return the endpoint of a launch over several hosts.

    Raises:
        LaunchError: several hosts have none, or it is not ``host:port``.
    """
    remedy = "name the first host: --rdzv-endpoint HOST:29400, the same on every host"
    if endpoint is None:
        if nodes != (1, 1):
            raise LaunchError("several nodes need a place to meet", where="--rdzv-endpoint", remedy=remedy)
        return None
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise LaunchError(
            f"{endpoint!r} is no place to meet", where="--rdzv-endpoint", expected="HOST:PORT", remedy=remedy
        )
    return endpoint


def check_script(script: str, is_module: bool) -> None:
    """Make sure that there is something to run.

    Raises:
        LaunchError: there is no such script or module, or it cannot be read.
    """
    if is_module:
        _check_module(script)
        return
    path = Path(script)
    if path.is_dir() and not (path / "__main__.py").is_file():
        raise LaunchError(f"{script} is a directory", expected="a Python script, or a directory with __main__.py")
    if not path.exists():
        beside = path.parent.iterdir() if path.parent.is_dir() else []
        scripts = [str(path.parent / other.name) for other in beside if other.suffix == ".py"]
        raise LaunchError(
            f"there is no script {script}{did_you_mean(script, scripts)}",
            where=str(path.absolute()),
            remedy="give the path of a Python script; a module's name needs --module",
        )
    if not os.access(path, os.R_OK):
        raise LaunchError(f"{script} cannot be read", remedy=f"chmod u+r {shlex.quote(script)}")


def _check_module(name: str) -> None:
    top = name.partition(".")[0]
    # The ranks will find it from the working directory as well, as `python -m` does.
    if not importlib.util.find_spec(top) and not any(Path(found).exists() for found in (top, f"{top}.py")):
        raise LaunchError(
            f"there is no module {name}", remedy="give an importable module, or a script without --module"
        )
