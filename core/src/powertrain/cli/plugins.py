"""``powertrain plugins``: what is installed, in which state, and why."""

from __future__ import annotations

import json

import attrs
import click

from powertrain.cli.lazy import Lazy, LazyGroup
from powertrain.cli.plugin_states import PluginState, survey

COMMANDS = {
    "new": Lazy("powertrain.cli.plugin_new:new", "Create the source of a new plugin."),
    "test": Lazy("powertrain.cli.plugin_test:test", "Run the conformance suite on an installed plugin."),
}

STYLES = {
    "available": "green",
    "disabled": "dim",
    "broken": "red",
    "conflict": "red",
    "incompatible": "red",
}


@click.group(cls=LazyGroup, lazy=COMMANDS, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array, for programs.")
@click.option("--probe", is_flag=True, help="Also ask each accelerator whether its device is there (slower).")
@click.pass_context
def plugins(ctx: click.Context, as_json: bool, probe: bool) -> None:
    """List the installed plugins; `new` and `test` are for those who write one.

    A plugin that is broken, disabled or in conflict is listed with the
    reason. Installing a plugin does not change a run: a section of the
    configuration switches it on.
    """
    if ctx.invoked_subcommand is not None:
        return
    states = survey(probe=probe)
    if as_json:
        click.echo(json.dumps([attrs.asdict(state) for state in states], indent=2))
    elif states:
        _table(states, probe)
    else:
        click.echo("No plugin is installed. To start: pip install powertrain-cpu")


def _table(states: list[PluginState], probe: bool) -> None:
    from powertrain.cli.tables import echo_table

    headers = ["NAME", "DISTRIBUTION", "VERSION", "API", "STATE", "WHY", "HOOKS", "SUPPORT", "SUMMARY"]
    if probe:
        headers.insert(6, "DEVICE")
    rows = []
    for plugin in states:
        row = [
            plugin.name,
            plugin.distribution,
            plugin.version,
            "-" if plugin.api is None else str(plugin.api),
            plugin.state,
            plugin.why,
            ", ".join(plugin.hooks) or "-",
            plugin.support or "-",
            plugin.summary,
        ]
        if probe:
            row.insert(6, plugin.device or "-")
        rows.append(row)
    echo_table(rows, headers, STYLES)
