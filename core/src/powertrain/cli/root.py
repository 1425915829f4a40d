"""The top of the ``powertrain`` command: its options, its own commands and those of plugins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from powertrain import __version__, environment, logs
from powertrain.cli.failures import guarded
from powertrain.cli.lazy import Lazy, LazyGroup

COMMANDS = {
    "config": Lazy("powertrain.cli.config:config", "Check, show and create configuration files."),
    "doctor": Lazy("powertrain.cli.doctor:doctor", "Check this machine and installation; always finishes."),
    "kernels": Lazy("powertrain.cli.kernels:kernels", "List, build and test the C++ kernels."),
    "launch": Lazy("powertrain.cli.launch:launch", "Run a script on several processes or hosts."),
    "plugins": Lazy("powertrain.cli.plugins:plugins", "List, create and test plugins."),
}


class Root(LazyGroup):
    """The ``powertrain`` command; it also offers the commands of installed plugins.

    Plugins are imported only to answer a name that is not the core's own, and
    to list the commands.
    """

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run the command; failures become words on standard error and an exit code."""
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **extra)
        sys.exit(guarded(lambda: run(*args, standalone_mode=False, **extra)))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the core's commands and those of plugins."""
        self._add_plugin_commands(ctx)
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command of the core, else one of a plugin."""
        command = super().get_command(ctx, cmd_name)
        if command is None and not cmd_name.startswith("-"):
            self._add_plugin_commands(ctx)
            command = super().get_command(ctx, cmd_name)
        return command

    def _add_plugin_commands(self, ctx: click.Context) -> None:
        from powertrain.cli.plugin_commands import collect

        if ctx.meta.get("powertrain.plugin_commands") is None:
            ctx.meta["powertrain.plugin_commands"] = collected = collect(set(self.lazy))
            # The group outlives this invocation, and the next may see other plugins.
            ctx.call_on_close(lambda: [self.commands.pop(name, None) for name in collected])
            self.commands.update(collected)


def _leave_out(ctx: click.Context, _option: click.Parameter, names: tuple[str, ...]) -> None:
    if names:
        from powertrain.discovery import installed
        from powertrain.text import did_you_mean

        known = installed()
        for name in names:
            if name not in known:
                raise click.UsageError(f"no plugin called {name!r} is installed{did_you_mean(name, known)}", ctx)
        ctx.with_resource(environment.exported(environment.without_plugins(names)))


@click.group(
    cls=Root,
    lazy=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Environment: POWERTRAIN_LOG=debug|info|warning|error, POWERTRAIN_PLUGINS=NAME,NAME|none.",
)
@click.version_option(__version__, prog_name="powertrain", message="%(prog)s %(version)s")
@click.option(
    "--no-plugin",
    multiple=True,
    metavar="NAME",
    is_eager=True,  # it must act before --help lists the commands of plugins
    expose_value=False,
    callback=_leave_out,
    help="Leave this plugin out, here and in every process started from here; may be repeated.",
)
def cli() -> None:
    """Train PyTorch models on one process or many, composed from plugins."""
    logs.configure()
