"""Reading: layers, their order, and what cannot be read."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powertrain.config import Document, read
from powertrain.config.overrides import parse_value
from powertrain.errors import ConfigError


def write(folder: Path, text: str) -> str:
    path = folder / "train.toml"
    path.write_text(text)
    return str(path)


def only_problem(error: pytest.ExceptionInfo[ConfigError]) -> str:
    (problem,) = error.value.problems
    return str(problem)


def test_later_layers_win_and_are_named(tmp_path: Path) -> None:
    """The file loses to the environment, the environment to --set, and each value knows who set it."""
    file = write(tmp_path, "[zero]\na = 1\nb = 1\nc = 1\n")
    document = read(file, overrides=["zero.c=3"], environ={"POWERTRAIN__ZERO__B": "2", "POWERTRAIN__ZERO__C": "2"})
    assert document.raw == {"zero": {"a": 1, "b": 2, "c": 3}}
    assert str(document.origin("zero.a")) == f"{file}:2:1"
    assert str(document.origin("zero.b")) == "POWERTRAIN__ZERO__B"
    assert str(document.origin("zero.c")) == "--set zero.c"
    assert [document.origin(f"zero.{key}").kind for key in "abc"] == ["file", "environment", "override"]


def test_a_mapping_has_the_shape_of_a_file() -> None:
    """A dict is read as TOML would be: tuples as lists, paths as strings, and its origin is the argument."""
    document = read({"run": {"output": Path("here")}, "optimizer": {"betas": (0.9, 0.95)}}, environ={})
    assert document.raw == {"run": {"output": "here"}, "optimizer": {"betas": [0.9, 0.95]}}
    assert str(document.origin("run.output")) == "config argument"


def test_reading_does_not_share_the_caller_s_dict() -> None:
    """Overrides change a copy, never the mapping that was passed."""
    given_config = {"batch": {"micro": 1}}
    read(given_config, overrides=["batch.micro=2"], environ={})
    assert given_config == {"batch": {"micro": 1}}


def test_nothing_is_an_empty_configuration() -> None:
    """None reads as a document without sections."""
    assert read(None, environ={}) == Document("config", {}, {})


def test_sections_keep_the_order_of_the_file(tmp_path: Path) -> None:
    """Sections come as written, switched-off ones are set apart, later layers come last."""
    file = write(tmp_path, "[b]\n[off]\nenabled = false\n[a]\nenabled = true\n")
    document = read(file, overrides=["late.x=1"], environ={})
    assert document.sections == ("b", "a", "late")
    assert document.disabled == ("off",)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("2.5", 2.5),
        ("true", True),
        ('"2"', "2"),
        ("[1, 2]", [1, 2]),
        ("{ a = 1 }", {"a": 1}),
        ("adamw", "adamw"),
        ("", ""),
        ("torch.optim.SGD", "torch.optim.SGD"),
        ("1\nb = 2", "1\nb = 2"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_override_values_are_toml_or_strings(text: str, value: object) -> None:
    """A value that is TOML is read as TOML; anything else is the string itself."""
    assert parse_value(text) == value


@given(st.text())
def test_any_text_is_some_override_value(text: str) -> None:
    """No text of a value is an error."""
    parse_value(text)


def test_variables_ignore_case() -> None:
    """A variable's path matches the file's keys whatever their case, and is lower case otherwise."""
    document = read({"plugins": {"pin": {"Zero": "a"}}}, environ={"POWERTRAIN__Plugins__PIN__ZERO": "b"})
    assert document.raw == {"plugins": {"pin": {"Zero": "b"}}}
    assert read(None, environ={"POWERTRAIN__zero__STAGE": "3"}).raw == {"zero": {"stage": 3}}


@pytest.mark.parametrize("name", ["POWERTRAIN__", "POWERTRAIN__ZERO", "POWERTRAIN__ZERO__", "POWERTRAIN____STAGE"])
def test_a_malformed_variable_is_an_error(name: str) -> None:
    """A variable that names no section and key is an error that shows the right form."""
    with pytest.raises(ConfigError) as error:
        read(None, environ={name: "1"})
    assert only_problem(error) == f"{name}  malformed variable; expected POWERTRAIN__SECTION__KEY, found {name}"


@pytest.mark.parametrize("setting", ["zero", "zero=1", "=1", "zero.=1", ".x=1", "a b.c=1", "a.b"])
def test_a_malformed_setting_is_an_error(setting: str) -> None:
    """A --set without section, key and value is an error that shows the right form."""
    with pytest.raises(ConfigError) as error:
        read(None, overrides=[setting], environ={})
    assert only_problem(error) == f"--set  malformed --set; expected section.key=value, found {setting!r}"


def test_every_malformed_override_is_listed() -> None:
    """Several malformed overrides make one error."""
    with pytest.raises(ConfigError) as error:
        read(None, overrides=["a", "b"], environ={"POWERTRAIN__C": "1"})
    assert len(error.value.problems) == 3


def test_nothing_is_set_below_a_value() -> None:
    """An override below something that is no table says what stands in the way."""
    with pytest.raises(ConfigError) as error:
        read({"zero": {"stage": 1}}, overrides=["zero.stage.x=1"], environ={})
    expected = "--set zero.stage.x  zero.stage.x: zero.stage is not a table, so nothing can be set below it"
    assert only_problem(error) == expected


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("POWERTRAIN_PLUGIN", "; did you mean POWERTRAIN_PLUGINS?"),
        ("POWERTRAIN_ZERO__STAGE", "; did you mean POWERTRAIN__ZERO__STAGE?"),
        ("POWERTRAIN_ZERO_STAGE", "; did you mean POWERTRAIN__ZERO__STAGE?"),
        ("POWERTRAIN_COLOUR", ""),
    ],
)
def test_unknown_variables_are_warned_of(name: str, hint: str, caplog: pytest.LogCaptureFixture) -> None:
    """A variable with our prefix that nothing reads is logged, with the nearest that is."""
    with caplog.at_level(logging.WARNING, logger="powertrain"):
        read(None, environ={name: "1", "POWERTRAIN_LOG": "info", "OTHER": "x"})
    assert [record.getMessage() for record in caplog.records] == [f"{name} is no variable that Powertrain reads{hint}"]


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("[zero\n", ":1:6", "Expected ']'"),
        ("a = 1\nb = \n", ":2:5", "Invalid value"),
        ("a = 1\na = 2\n", ":2:6", "Cannot overwrite a value"),
        ("a = [1,", ":1:8", "Invalid value"),
        ("[a]\nx = 1\n[a]\n", ":3:3", "Cannot declare ('a',) twice"),
    ],
)
def test_syntax_errors_have_a_place(tmp_path: Path, text: str, place: str, what: str) -> None:
    """A file that is not TOML is one problem with line and column."""
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        read(file, environ={})
    (problem,) = error.value.problems
    assert str(problem).startswith(f"{file}{place}  not valid TOML: {what}")


@pytest.mark.parametrize("text", ["a = " + "[" * 10_000, "a = " + "1" * 10_000, "x = 1\ry = 2"])
def test_hostile_files_are_errors_in_words(tmp_path: Path, text: str) -> None:
    """Endless nesting, numbers and odd line ends are problems, never a traceback."""
    with pytest.raises(ConfigError, match="not valid TOML"):
        read(write(tmp_path, text), environ={})


def test_a_missing_file_suggests_its_neighbours(tmp_path: Path) -> None:
    """A path that is not there names the nearest file beside it, and how to make one."""
    write(tmp_path, "")
    with pytest.raises(ConfigError) as error:
        read(tmp_path / "trian.toml", environ={})
    missing = tmp_path / "trian.toml"
    assert only_problem(error) == f"{missing}  no such file; did you mean {tmp_path / 'train.toml'}?"
    assert "powertrain config init" in str(error.value)
    with pytest.raises(ConfigError, match=f"found train.toml in {tmp_path}"):
        read(tmp_path / "quite_different.toml", environ={})


def test_what_is_no_text_file_is_told(tmp_path: Path) -> None:
    """A directory, and bytes that are not UTF-8, are problems in words."""
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        read(tmp_path, environ={})
    (tmp_path / "x.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="not UTF-8 text at byte 5"):
        read(tmp_path / "x.toml", environ={})


def test_mapping_keys_are_strings() -> None:
    """A dict with a key that TOML cannot hold is an error."""
    with pytest.raises(ConfigError, match=r"zero: wrong type of key; expected a string, found 3"):
        read({"zero": {3: 1}}, environ={})


def test_a_mapping_that_holds_itself_is_an_error() -> None:
    """A dict with a cycle is a problem in words."""
    loop: dict[str, object] = {}
    loop["zero"] = loop
    with pytest.raises(ConfigError, match="nested too deeply"):
        read(loop, environ={})


def test_no_plugin_leaves_more_out_than_the_file(tmp_path: Path) -> None:
    """The variable behind --no-plugin adds to ``[plugins] disable``, and each name keeps its origin; --set replaces."""
    file = write(tmp_path, '[plugins]\ndisable = ["a", "b"]\n')
    environ = {"POWERTRAIN__PLUGINS__DISABLE": '["b", "c"]'}
    document = read(file, environ=environ)
    assert document.raw["plugins"]["disable"] == ["a", "b", "c"]
    assert str(document.origin(("plugins", "disable", 0))) == f"{file}:2:12"
    assert str(document.origin(("plugins", "disable", 2))) == "POWERTRAIN__PLUGINS__DISABLE"
    replaced = read(file, environ=environ, overrides=['plugins.disable=["d"]'])
    assert replaced.raw["plugins"]["disable"] == ["d"]
