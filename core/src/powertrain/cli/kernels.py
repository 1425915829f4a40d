"""``powertrain kernels``: what is built of the plugins' C++, how long it took, and whether it is right."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence

import attrs
import click

from powertrain import discovery, native
from powertrain.errors import CompilerMissing, PluginError
from powertrain.native import KernelSet
from powertrain.text import did_you_mean

_log = logging.getLogger("powertrain.kernels")


@attrs.frozen(kw_only=True)
class State:
    """One set of kernels.

    Attributes:
        name: what commands call it.
        plugin: whose it is.
        state: ``built``, ``not built`` or ``no compiler``.
        kernels: what it offers.
        where: the built file, or what is missing.
        seconds: that building took.
        size: of the file, in bytes.
    """

    name: str
    plugin: str
    state: str
    kernels: tuple[str, ...]
    where: str
    seconds: float | None = None
    size: int | None = None


def sets() -> Iterator[tuple[str, KernelSet]]:
    """Yield every set of kernels of the installed plugins, with the plugin's name; broken plugins have none."""
    known = discovery.installed()
    for name in known:
        try:
            found = discovery.load(name, known).kernel_sets()
        except PluginError:
            continue
        except Exception as error:  # one plugin's mistake does not hide the others' kernels
            _log.warning("plugin %r does not tell its kernels: %s: %s", name, type(error).__name__, error)
            continue
        for each in found:
            yield name, each


def state_of(plugin: str, each: KernelSet) -> State:
    """Return whether a set is built."""
    source = each.load_source()
    bare = State(name=each.name, plugin=plugin, kernels=source.kernels, state="not built", where="-")
    try:
        built = native.find(source)
    except CompilerMissing as error:
        return attrs.evolve(bare, state="no compiler", where=f"{error.message}: {error.remedy}")
    if built is None:
        return bare
    size = built.path.stat().st_size
    return attrs.evolve(bare, state="built", where=str(built.path), seconds=built.seconds, size=size)


def _chosen(names: Sequence[str]) -> list[tuple[str, KernelSet]]:
    """Return the sets that are named, or all."""
    known = {each.name: (plugin, each) for plugin, each in sets()}
    for name in names:
        if name not in known:
            there = f" (there are: {', '.join(known)})" if known else " (no plugin has any)"
            raise click.UsageError(f"there are no kernels called {name!r}{did_you_mean(name, known)}{there}")
    return [known[name] for name in names or known]


@click.group()
def kernels() -> None:
    """List, build and test the C++ that installed plugins have.

    It is built by itself when it is first used, once on a machine, into a
    cache (POWERTRAIN_CACHE, or the user's cache directory).
    """


@kernels.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array, for programs.")
def list_(as_json: bool) -> None:
    """Show what is built, where, and how long it took."""
    states = [state_of(plugin, each) for plugin, each in sets()]
    if as_json:
        click.echo(json.dumps([attrs.asdict(state) for state in states], indent=2))
        return
    if not states:
        click.echo("No installed plugin has kernels. To start: pip install powertrain-cpu")
        return
    from powertrain.cli.tables import echo_table

    rows = [
        (
            state.name,
            state.plugin,
            state.state,
            "-" if state.seconds is None else f"{state.seconds:.1f} s",
            "-" if state.size is None else f"{state.size / 2**20:.1f} MiB",
            ", ".join(state.kernels),
            state.where,
        )
        for state in states
    ]
    headers = ["NAME", "PLUGIN", "STATE", "BUILT IN", "SIZE", "KERNELS", "WHERE"]
    echo_table(rows, headers, {"built": "green", "not built": "yellow", "no compiler": "red"})


@kernels.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--again", is_flag=True, help="Build even what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array, for programs.")
def build(names: tuple[str, ...], again: bool, as_json: bool) -> None:
    """Build kernels now rather than when they are first used."""
    results = []
    for _, each in _chosen(names):
        started = time.time_ns()
        built = native.build(each.load_source(), again=again)
        results.append({"name": each.name, "where": str(built.path), "seconds": built.seconds})
        if not as_json:
            note = f"built in {built.seconds:.1f} s" if built.made >= started else "was there"
            click.echo(f"{each.name}: {note}: {built.path}")
    if as_json:
        click.echo(json.dumps(results, indent=2))


@kernels.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array, for programs.")
@click.pass_context
def test(ctx: click.Context, names: tuple[str, ...], as_json: bool) -> None:
    """Try every kernel against its reference; exit with 1 if one is wrong."""
    findings = [(each.name, finding) for _, each in _chosen(names) for finding in each.run_check()]
    if as_json:
        click.echo(json.dumps([{"set": name, **attrs.asdict(f), "good": f.good} for name, f in findings], indent=2))
    else:
        from powertrain.cli.tables import echo_table

        rows = [
            (name, f.kernel, f.path, str(f.cases), f"{f.worst:.2f}", "right" if f.good else "WRONG")
            for name, f in findings
        ]
        headers = ["SET", "KERNEL", "PATH", "CASES", "ERROR / ALLOWED", ""]
        echo_table(rows, headers, {"right": "green", "WRONG": "bold red"})
    ctx.exit(0 if all(finding.good for _, finding in findings) else 1)
