"""``powertrain config``: check, show, explain and start configuration files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from powertrain.errors import ConfigError, PowertrainError

if TYPE_CHECKING:
    from powertrain.config import Config
    from powertrain.config.schema import Key
    from powertrain.discovery import Schemas

_RANKS = click.option(
    "--ranks", type=click.IntRange(min=1), metavar="N", help="Check batch and group sizes for this many data ranks."
)
_SET = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key: batch.micro=4. May be repeated."
)


@click.group()
def config() -> None:
    """Check, show and create configuration files."""


@config.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@_RANKS
@_SET
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_context
def check(ctx: click.Context, files: Sequence[str], ranks: int | None, settings: Sequence[str], as_json: bool) -> None:
    """Check configuration files without starting anything; exit with 2 if one is wrong."""
    findings = {file: _failure(file, ranks, settings) for file in files}
    if as_json:
        click.echo(json.dumps([_report(file, error) for file, error in findings.items()], indent=2))
    else:
        for file, error in findings.items():
            if error is None:
                click.echo(f"{file}: ok")
            else:
                click.echo(f"Error: {error}", err=True)
    if any(findings.values()):
        ctx.exit(2)


def _failure(file: str, ranks: int | None, settings: Sequence[str]) -> PowertrainError | None:
    try:
        _load(file, ranks, settings)
    except PowertrainError as error:
        return error
    return None


def _report(file: str, error: PowertrainError | None) -> dict[str, Any]:
    if error is None:
        return {"file": file, "ok": True, "problems": []}
    from powertrain.config import Problem

    problems = error.problems if isinstance(error, ConfigError) else ()
    listed = [problem.as_dict() for problem in problems if isinstance(problem, Problem)]
    return {"file": file, "ok": False, "message": error.message, "remedy": error.remedy, "problems": listed}


def _load(file: str | None, ranks: int | None, settings: Sequence[str]) -> Config:
    """Read and check one file, and what depends on the number of ranks where it is known."""
    from powertrain.config import read, resolve_batch, structure
    from powertrain.discovery import schemas_for
    from powertrain.selection import check_names

    document = read(file, overrides=settings)
    schemas = schemas_for(document)
    made = structure(document, schemas.tables, installed=schemas.installed, options=schemas.options)
    check_names(made, schemas)
    if ranks is not None:
        resolve_batch(made.batch, ranks, made.origins)
        for name, plugin in schemas.classes.items():
            if name not in made.plugins.disable:
                plugin.check_ranks(made.tables[name], ranks)
    return made


@config.command()
@click.argument("file", required=False)
@click.option("--origin", is_flag=True, help="Say where each value comes from.")
@click.option("--ranks", type=click.IntRange(min=1), default=1, metavar="N", help="Data ranks to complete it for.")
@_SET
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--toml", "as_toml", is_flag=True, help="Print TOML that reads back as this configuration.")
def show(file: str | None, origin: bool, ranks: int, settings: Sequence[str], as_json: bool, as_toml: bool) -> None:
    """Show the effective configuration: every value, defaults and derived ones included."""
    from powertrain.config import derive

    made = derive(_load(file, None, settings), ranks)
    if as_json and as_toml:
        raise click.UsageError("choose one of --json and --toml")
    if as_toml:
        click.echo(made.to_toml(), nl=False)
    elif as_json and origin:
        values = {path: {"value": value, "origin": str(source)} for path, value, source in made.values()}
        click.echo(json.dumps(_finite(values), indent=2))
    elif as_json:
        click.echo(json.dumps(_finite(made.effective()), indent=2))
    else:
        from powertrain.cli.tables import echo_table

        rows = [(path, _shown(value), *((str(source),) if origin else ())) for path, value, source in made.values()]
        echo_table(rows, ["KEY", "VALUE", "ORIGIN"][: 3 if origin else 2], {"default": "dim", "absent": "dim"})


def _shown(value: Any) -> str:
    from powertrain.config.toml import value as toml_value

    return "absent" if value is None else toml_value(value)


def _finite(value: Any) -> Any:
    """Replace infinities, which JSON cannot hold, by their names."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@config.command()
@click.argument("what", required=False, metavar="[SECTION[.KEY]]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON Schema.")
def schema(what: str | None, as_json: bool) -> None:
    """Explain every key that may be written, those of installed plugins included."""
    from powertrain.config.options import all_options
    from powertrain.config.schema import json_schema, legal_keys

    section, _, name = (what or "").partition(".")
    # What else an open table of the core may hold is in the plugins, whatever they are called.
    schemas = _installed_schemas([section] if section and section not in all_options({}) else None)
    legal = list(legal_keys(schemas.tables, schemas.options))
    chosen = [key for key in legal if section in ("", key.section) and name in ("", key.name)]
    sections = {key.section for key in legal} | {*schemas.tables}
    if what and (section not in sections or (name and not chosen)):
        raise _nothing_called(what, legal, sections, schemas.installed)
    if as_json:
        whole = json_schema(schemas.tables, schemas.options)
        part = whole["properties"][section] if section else whole
        part = part["properties"].get(name, part) if name else part
        click.echo(json.dumps(_finite(part), indent=2))
    elif name:
        for key in chosen:
            _explain(key)
    elif not chosen:
        click.echo(f"[{section}] switches the plugin on; it takes no keys")
    else:
        from powertrain.cli.tables import echo_table

        rows = [(_path(key), key.takes, _default(key), key.doc) for key in chosen]
        echo_table(rows, ["KEY", "TAKES", "DEFAULT", "MEANING"], {"absent": "dim"})


def _installed_schemas(names: Sequence[str] | None) -> Schemas:
    """Return the schemas of the named plugins, or of all; a broken one is skipped with a warning when not named.

    Of names that the core has as well (``adamw``), the core's options are shown: they hold without a plugin's section.
    """
    import attrs

    from powertrain.config import read
    from powertrain.config.options import all_options
    from powertrain.discovery import schemas_for

    found = schemas_for(read({}, environ={}))
    for name in found.installed if names is None else names:
        try:
            one = schemas_for(read({name: {}}, environ={}))
        except PowertrainError as error:
            if names is not None:
                raise
            click.echo(f"Warning: {error}", err=True)
            continue
        options = {
            kind: {**found.options.get(kind, {}), **classes, **all_options({}).get(kind, {})}
            for kind, classes in one.options.items()
        }
        found = attrs.evolve(found, tables={**found.tables, **one.tables}, options={**found.options, **options})
    return found


def _nothing_called(what: str, legal: Sequence[Key], sections: set[str], installed: Sequence[str]) -> click.UsageError:
    from powertrain.config.suggest import nearest

    section, dot, _ = what.partition(".")
    known = {f"{key.section}.{key.name}" for key in legal} if dot and section in sections else sections | {*installed}
    near = nearest(what if dot and section in sections else section, sorted(known))
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(sorted(known))}"
    return click.UsageError(f"there is no {what} in any schema{hint}")


def _path(key: Key) -> str:
    return f"{key.section}.{key.name}" + (f" ({key.choice})" if key.choice else "")


def _default(key: Key) -> str:
    return "required" if key.required else _shown(key.default)


def _explain(key: Key) -> None:
    click.echo(f"{_path(key)}\n  takes: {key.takes}\n  default: {_default(key)}\n  {key.doc}")


@config.command()
@click.argument("path", required=False, default="train.toml", type=click.Path(path_type=Path))
@click.option("--plugins", metavar="NAME,NAME", default="", help="Also write the sections of these plugins.")
@click.option("--force", is_flag=True, help="Overwrite the file if it is there.")
def init(path: Path, plugins: str, force: bool) -> None:
    """Write a commented file with every key at its default (train.toml when no PATH is given)."""
    from powertrain.config.template import template

    names = [name.strip() for name in plugins.split(",") if name.strip()]
    schemas = _installed_schemas(names)
    if missing := [name for name in names if name not in schemas.tables]:
        remedy = f"pip install {' '.join(f'powertrain-{name}' for name in missing)}"
        raise click.UsageError(f"not installed: {', '.join(missing)}; {remedy}")
    if path.exists() and not force:
        raise click.UsageError(f"{path} is there already; --force overwrites it")
    path.write_text(template(schemas.tables, schemas.options), encoding="utf-8")
    click.echo(f"wrote {path}; check it with `powertrain config check {path}`")
