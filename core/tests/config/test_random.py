"""Whatever a file holds, reading it gives a configuration or one error in words."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from powertrain.cli.root import cli
from powertrain.config import Config, derive, read, resolve_batch, structure
from powertrain.config.schema import legal_keys
from powertrain.config.tables import CORE_TABLES
from powertrain.discovery import installed, load
from powertrain.errors import ConfigError

TABLES = {name: load(name).Config for name in installed() if name not in CORE_TABLES}
LEGAL = [(key.section, key.name) for key in legal_keys(TABLES)]
VALUES = [
    *("0", "1", "-1", "2.5", "nan", "inf", "-inf", "1e400", "true", '"adamw"', '"8"', '""', '"torch.optim.SGD"'),
    *("[]", "[0.9, 0.95]", "[0.9]", "[[1]]", "{}", "{ a = 1 }", "1979-05-27", "07:32:00", '"cosine"', '"fp16"'),
    *('"dynamic"', "9" * 30, "[1,", "'", '"""x"""', "0x1F", "1_000", "True", "", "{ a.b = [ { c = 1 } ] }"),
]
JUNK = st.text(alphabet="[]{}=.,#\"'\\ \n\t\r01-_:aeTZñ\x00\u2028", max_size=40)


@st.composite
def likely(draw: Any) -> str:
    """A file of legal keys in odd places with odd values."""
    lines = []
    for _ in range(draw(st.integers(0, 5))):
        section, key = draw(st.sampled_from(LEGAL))
        value = draw(st.sampled_from(VALUES))
        style = draw(st.integers(0, 4))
        lines.append(
            (
                f"[{section}]\n{key} = {value}",
                f"{section}.{key} = {value}",
                f"{key} = {value}",
                f"[[{section}]]\n{key} = {value}",
                f"[{section}.{key}]\nx = {value}",
            )[style]
        )
    return "\n".join(lines)


@pytest.fixture(scope="module")
def path() -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder) / "any.toml"


def attempt(path: pathlib.Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = structure(read(path, environ={}), TABLES, installed=list(TABLES))
        for ranks in (1, 3):
            assert resolve_batch(config.batch, ranks, config.origins).total % ranks == 0
            assert isinstance(derive(config, ranks), Config)
    except ConfigError as error:
        assert error.problems
        assert all(str(problem) for problem in error.problems)
    else:
        assert isinstance(config, Config)
        assert all(isinstance(key, str) for key, _, _ in config.values())


MANY = settings(max_examples=5_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@MANY
@given(text=JUNK)
def test_junk_gives_an_error_in_words(path: pathlib.Path, text: str) -> None:
    """Five thousand texts of TOML's own characters raise nothing but ConfigError."""
    attempt(path, text)


@MANY
@given(text=likely())
def test_misused_keys_give_an_error_in_words(path: pathlib.Path, text: str) -> None:
    """Five thousand files of legal keys, misplaced and with odd values, raise nothing but ConfigError."""
    attempt(path, text)


@settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(text=st.one_of(JUNK, likely()), ranks=st.sampled_from(["1", "2", "7"]))
def test_the_command_tells_any_file_in_words(path: pathlib.Path, text: str, ranks: str) -> None:
    """`powertrain config check` and `show` exit with 0 or 2 on any file, never with a traceback."""
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    codes = set()
    for command in (["check", str(path), "--ranks", ranks], ["show", str(path), "--ranks", ranks, "--origin"]):
        result = CliRunner().invoke(cli, ["config", *command])
        assert isinstance(result.exception, (SystemExit, type(None))), result.exception
        assert result.exit_code in (0, 2), result.output
        assert (result.exit_code == 0) == (result.stderr == ""), result.stderr
        assert "Traceback" not in result.output and "internal error" not in result.output
        codes.add(result.exit_code)
    assert len(codes) == 1  # what passes the check can be shown


@attrs.frozen(kw_only=True)
class Inner:
    size: int = 1


@attrs.frozen(kw_only=True)
class Rich:
    one: Inner = attrs.field(factory=Inner)
    many: list[Inner] = attrs.field(factory=list)
    named: dict[str, float] = attrs.field(factory=dict)
    either: int | list[Inner] | None = None
    path: pathlib.Path = pathlib.Path()
    anything: Any = None


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates() | st.just(object()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["size", "x", ""]), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=500, deadline=None, database=None)
@given(table=st.dictionaries(st.sampled_from([field.name for field in attrs.fields(Rich)]), PLAIN))
def test_odd_objects_in_a_dict_give_an_error_in_words(table: dict[str, Any]) -> None:
    """A dict of any Python values, against a table of every kind of type, raises nothing but ConfigError."""
    try:
        config = structure(read({"rich": table}, environ={}), {"rich": Rich})
    except ConfigError as error:
        assert all(problem.path.startswith("rich.") for problem in error.problems)
    else:
        assert isinstance(config.tables["rich"], Rich)
