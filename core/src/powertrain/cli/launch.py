"""``powertrain launch``: torchrun's elastic agent, with a person's words around it."""

from __future__ import annotations

import logging
import signal
import sys
import tempfile
import uuid
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from powertrain import environment
from powertrain.cli.failures import INTERRUPTED
from powertrain.cli.launch_plan import (
    LaunchPlan,
    check_endpoint,
    check_script,
    cores,
    parse_nodes,
    rank_variables,
)
from powertrain.errors import LaunchError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

_log = logging.getLogger("powertrain.launch")


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog="Options go before the script; everything after it is the script's own.",
)
@click.option("--nproc", default="auto", metavar="N|auto", help="Ranks on this host; auto: one a device, else 1.")
@click.option("--nnodes", default="1", metavar="N|MIN:MAX", help="Hosts that take part.")
@click.option("--node-rank", type=click.IntRange(min=0), help="This host's place; default: the hosts agree on it.")
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="Where several hosts meet: a port of one of them.")
@click.option(
    "--rdzv-id", default="powertrain", show_default=True, help="Tells this launch from others that meet there."
)
@click.option("--max-restarts", type=click.IntRange(min=0), default=0, help="Starts again after a failure, this often.")
@click.option("--module", "-m", "is_module", is_flag=True, help="SCRIPT is the name of a module.")
@click.option("--dry-run", is_flag=True, help="Print the equivalent torchrun command and start nothing.")
@click.option("--verbose", "-v", is_flag=True, help="Show the agent's own log.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS]...")
def launch(
    nproc: str,
    nnodes: str,
    node_rank: int | None,
    rdzv_endpoint: str | None,
    rdzv_id: str,
    max_restarts: int,
    is_module: bool,
    dry_run: bool,
    verbose: bool,
    script: str,
    arguments: tuple[str, ...],
) -> int:
    """Run SCRIPT on several processes, or on several hosts.

    On one host nothing else is needed. On several, run the same command on
    each with --nnodes and --rdzv-endpoint.
    """
    check_script(script, is_module)
    nodes = parse_nodes(nnodes)
    endpoint = check_endpoint(rdzv_endpoint, nodes)
    if node_rank is not None and not (endpoint and node_rank < nodes[0] == nodes[1]):
        raise LaunchError(
            f"--node-rank {node_rank} does not fit",
            where="--node-rank",
            expected="a fixed --nnodes greater than it, and --rdzv-endpoint with the address of node 0",
        )
    processes = _processes(nproc)
    plan = LaunchPlan(
        script=script,
        arguments=arguments,
        is_module=is_module,
        processes=processes,
        nodes=nodes,
        node_rank=node_rank,
        endpoint=endpoint,
        rendezvous_id=rdzv_id,
        max_restarts=max_restarts,
        variables={**environment.variables(environment.DISABLE), **rank_variables(processes)},
    )
    if dry_run:
        click.echo(plan.shell())
        return 0
    if "OMP_NUM_THREADS" in plan.variables:
        threads = plan.variables["OMP_NUM_THREADS"]
        _log.info("OMP_NUM_THREADS=%s for each of %d ranks (%d cores)", threads, processes, cores())
    return _run(plan, quiet=not verbose and environment.log_level() != "debug")


_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name))


def _processes(nproc: str) -> int:
    if nproc == "auto":
        return max(1, _devices())
    if not nproc.isdigit() or int(nproc) < 1:
        raise LaunchError(
            f"{nproc!r} is no number of processes", where="--nproc", expected="1 or more, or auto", remedy="--nproc 2"
        )
    return int(nproc)


def _devices() -> int:
    """Return how many devices the first available accelerator offers, not counting host processors."""
    from powertrain.cli.plugin_states import usable
    from powertrain.discovery import installed
    from powertrain.registry import Registry

    providers = {name: entry for name, entry in installed().items() if "accelerator" in entry.roles}
    for _entry, plugin, _error in usable(providers):
        if plugin is None or plugin.fallback:
            continue
        try:
            if plugin.is_available().available:
                accelerator = Registry([plugin]).one("make_accelerator", name=plugin.name)
                return int(accelerator.device_count())
        except Exception as error:
            click.echo(
                f"Warning: accelerator {plugin.name!r} is not counted: {type(error).__name__}: {error}", err=True
            )
    return 0


def _run(plan: LaunchPlan, *, quiet: bool) -> int:
    """Start the ranks, wait for them, and return the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    with tempfile.TemporaryDirectory(prefix="powertrain-launch-") as reports, environment.exported(plan.variables):
        worker = ["-u", "-m", "powertrain.cli.worker", reports, "module" if plan.is_module else "script", plan.script]
        previous = logging.root.manager.disable
        if quiet:
            logging.disable(logging.CRITICAL)  # the agent is all that runs in this process
        # The agent installs handlers of its own and leaves them behind.
        handlers = {number: signal.getsignal(number) for number in (*_ENDING, signal.SIGINT)}
        try:
            elastic_launch(_agent_config(plan, reports), sys.executable)(*worker, *plan.arguments)
        except ChildFailedError as error:
            return _report(error.failures, Path(reports))
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            click.echo(f"Stopped by {error.sigval.name}; all ranks were ended.", err=True)
            return 128 + int(error.sigval)
        except (RendezvousError, RuntimeError, OSError) as error:
            raise LaunchError(
                "the hosts could not meet" if plan.endpoint else "the ranks could not be started",
                where=plan.endpoint,
                found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                remedy="choose a free port of a host that all can reach; --verbose shows the agent's log",
            ) from error
        finally:
            logging.disable(previous)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0


def _agent_config(plan: LaunchPlan, directory: str) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    fixed = plan.node_rank is not None
    return LaunchConfig(
        min_nodes=plan.nodes[0],
        max_nodes=plan.nodes[1],
        nproc_per_node=plan.processes,
        run_id=str(uuid.uuid4()) if plan.standalone else plan.rendezvous_id,
        rdzv_backend="static" if fixed else "c10d",
        rdzv_endpoint=plan.endpoint or "localhost:0",
        rdzv_configs={"rank": plan.node_rank} if fixed else {},
        local_addr="127.0.0.1" if plan.standalone else None,
        max_restarts=plan.max_restarts,
        logs_specs=DefaultLogsSpecs(log_dir=directory),
    )


def _report(failures: Mapping[int, ProcessFailure], reports: Path) -> int:
    """Say in one line which rank failed first, and return the exit code."""
    codes = {each.pid: each.exitcode for each in failures.values()}
    ranks = {each.pid: rank for rank, each in failures.items()}
    told = _first_told(reports, ranks)
    if told is not None:
        pid, codes[pid] = told
        above = "; its message is above"
    else:
        # The agent ends the ranks that are left with SIGTERM: they failed last. One that was killed
        # otherwise could not say so itself, and the others may have failed for want of it.
        pid = min(codes, key=lambda each: (codes[each] == -signal.SIGTERM, codes[each] >= 0, ranks[each]))
        above = ""
    code = codes[pid]
    same = sum(other == code for other in codes.values()) - 1
    others = f", as did {same} more" if same else ""
    if code < 0:
        name = failures[ranks[pid]].signal_name()
        hint = " (out of memory? see dmesg)" if name == "SIGKILL" else ""
        click.echo(f"rank {ranks[pid]} (pid {pid}) was killed by {name}{hint}{others}", err=True)
        return INTERRUPTED if name == "SIGINT" else 1
    click.echo(f"rank {ranks[pid]} (pid {pid}) exited with code {code}{others}{above}", err=True)
    return code


def _first_told(reports: Path, pids: Container[int]) -> tuple[int, int] | None:
    """Return pid and exit code of the rank that told its error first, if it is one of ``pids``.

    A rank of an earlier attempt is not.
    """
    for report in reports.glob("first-*"):
        pid, _, code = report.read_text().partition(" ")
        if pid.isdigit() and int(pid) in pids:
            return int(pid), int(code)
    return None
