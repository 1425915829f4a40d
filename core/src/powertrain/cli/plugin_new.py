"""``powertrain plugins new NAME``: the source of a plugin that works as it is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from string import Template

import attrs
import click

import powertrain
from powertrain.errors import PluginConflict, PluginError

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@attrs.frozen
class Role:
    """What a template makes.

    Attributes:
        summary: one sentence for the package.
        usage: how a run uses it, for the README.
        keywords: what tells the registry that the package fills the role.
    """

    summary: str
    usage: str
    keywords: tuple[str, ...] = ()


ROLES: Mapping[str, Role] = {
    "accelerator": Role(
        "A device that Powertrain computes on.",
        'Choose it with `[accelerator] use = "$name"`.',
        ("powertrain-accelerator",),
    ),
    "checkpoint": Role(
        "A place where Powertrain keeps checkpoints.",
        'Where another store is installed too, choose it with `[plugins] pin = { make_checkpoint_store = "$name" }`.',
        ("powertrain-checkpoint",),
    ),
    "communicator": Role(
        "A wrapper around what connects Powertrain's ranks.",
        "Switch it on with a section `[$name]`.",
    ),
    "optimizer": Role(
        "A way from gradients to updated parameters in Powertrain.",
        "Switch it on with a section `[$name]`.",
    ),
    "sampler": Role(
        "An order in which Powertrain sees samples.",
        "Switch it on with a section `[$name]`.",
    ),
}


@click.command()
@click.argument("name")
@click.option(
    "--role", required=True, type=click.Choice(list(ROLES)), help="What the plugin does; it can do more later."
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=None,
    help="Where to write it. Default: powertrain-NAME in the working directory.",
)
def new(name: str, role: str, directory: Path | None) -> None:
    """Create the source of a new plugin called NAME.

    The package builds, installs and passes `powertrain plugins test NAME`
    without an edit.
    """
    place = directory or Path(f"powertrain-{name}")
    written = write(name, role, place)
    for path in written:
        click.echo(path)
    click.echo(f"\nNext: pip install -e '{place}[test]' && powertrain plugins test {name}")


def write(name: str, role: str, place: Path) -> list[Path]:
    """Write the package and return its files.

    Raises:
        PluginError: the name or the place cannot be used; nothing is written.
    """
    check_name(name)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise PluginError(
            "the directory for the new plugin is not empty",
            where=str(place),
            remedy="choose another with --directory, or remove it",
        )
    package = f"powertrain_{name.replace('-', '_')}"
    values = {
        "name": name,
        "role": role,
        "package": package,
        "distribution": f"powertrain-{name}",
        "title": "".join(part.capitalize() for part in name.split("-")),
        "core": powertrain.__version__,
        "summary": ROLES[role].summary,
        "usage": Template(ROLES[role].usage).substitute(name=name),
        "keywords": ", ".join(f'"{word}"' for word in ("powertrain-plugin", *ROLES[role].keywords)),
    }
    templates = Path(__file__).parent / "templates"
    contents = {
        "pyproject.toml": render(templates / "common" / "pyproject.toml.tmpl", values),
        "README.md": render(templates / "common" / "README.md.tmpl", values),
        f"src/{package}/__init__.py": render(templates / "common" / "__init__.py.tmpl", values),
        f"src/{package}/plugin.py": render(templates / role / "plugin.py.tmpl", values),
        f"src/{package}/{role}.py": render(templates / role / f"{role}.py.tmpl", values),
        f"src/{package}/py.typed": "",
        "tests/conftest.py": render(templates / "common" / "conftest.py.tmpl", values),
        f"tests/test_{name.replace('-', '_')}.py": render(templates / role / "test.py.tmpl", values),
    }
    written = []
    for relative, text in contents.items():
        path = place / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def check_name(name: str) -> None:
    """Refuse a name that cannot be a section, a distribution and an entry point at once.

    Raises:
        PluginError: and why.
    """
    from powertrain.config.tables import CORE_TABLES
    from powertrain.discovery import installed

    if not NAME.fullmatch(name):
        raise PluginError(
            f"{name!r} cannot be the name of a plugin",
            expected="lower-case words of letters and digits, joined by hyphens",
            remedy="for example: powertrain plugins new my-device --role accelerator",
        )
    if name in CORE_TABLES:
        raise PluginError(
            f"{name!r} cannot be the name of a plugin: the section [{name}] belongs to the core",
            remedy="choose another name",
        )
    if name in (known := installed()):
        raise PluginConflict(
            f"a plugin called {name!r} is installed already, by {known[name].distribution}",
            remedy="choose another name, or uninstall it first",
        )


def render(template: Path, values: Mapping[str, str]) -> str:
    """Fill in a template."""
    return Template(template.read_text(encoding="utf-8")).substitute(values)
