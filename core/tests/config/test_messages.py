"""Every kind of problem, and the words in which it is told."""

from __future__ import annotations

import pathlib
from typing import Any, Literal

import attrs
import pytest
from attrs import validators

from powertrain.config import read, structure
from powertrain.errors import ConfigError, PluginBroken

INF = float("inf")


@attrs.frozen(kw_only=True)
class Tier:
    device: Literal["cpu", "nvme"]
    size: int = 1


def _even(instance: Any, attribute: Any, value: int) -> None:
    if value % 2:
        raise ValueError(f"must be even, not {value}")


@attrs.frozen(kw_only=True)
class Zero:
    stage: Literal[0, 1, 2, 3] = 2
    bucket_elements: int = attrs.field(default=2, validator=_even)
    overlap: bool = True
    ratio: float = attrs.field(default=0.5, validator=[validators.gt(0), validators.lt(1)])
    mode: str = attrs.field(default="fast", validator=validators.in_(["fast", "exact"]))
    names: list[str] = attrs.field(factory=list, validator=validators.max_len(2))
    tiers: list[Tier] = attrs.field(factory=list)
    sizes: dict[str, int] = attrs.field(factory=dict)
    shape: tuple[int, ...] = ()
    low: int = 0
    high: int = attrs.field(default=10)
    scratch: pathlib.Path = pathlib.Path("scratch")

    @high.validator
    def _ordered(self, attribute: Any, value: int) -> None:
        if value < self.low:
            raise ValueError(f"must not be below low, but {value} < {self.low}")


@attrs.frozen(kw_only=True)
class Needy:
    path: str
    count: int = attrs.field(validator=validators.ge(1))


def problems(text: str, tmp_path: pathlib.Path, **arguments: Any) -> list[str]:
    file = tmp_path / "train.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        structure(read(file, environ={}), {"zero": Zero}, **arguments)
    return [str(problem).removeprefix(f"{tmp_path}/") for problem in error.value.problems]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[zero]\nstag = 1", "2:1  zero.stag: unknown key; did you mean zero.stage?"),
        ("[zero]\nSTAGE = 1", "2:1  zero.STAGE: unknown key; did you mean zero.stage?"),
        ("[zero]\nzero_stage = 1", "2:1  zero.zero_stage: unknown key; did you mean zero.stage?"),
        ("[zero]\nenable = true", "2:1  zero.enable: unknown key; did you mean zero.enabled?"),
        ("[zero]\nmicro = 1", "2:1  zero.micro: unknown key; did you mean batch.micro?"),
        (
            "[batch]\nzzzzzzzz = 1",
            "2:1  batch.zzzzzzzz: unknown key; expected one of micro, accumulation, total, enabled",
        ),
        (
            "[optimizer]\nmomentum = 0.9",
            "2:1  optimizer.momentum: unknown key; did you mean optimizer.momentum (of sgd or rmsprop)?",
        ),
        ("[zero]\nstage = 4", "2:1  zero.stage: not one of the choices; expected 0, 1, 2 or 3, found 4 (an integer)"),
        (
            "[zero]\nstage = true",
            "2:1  zero.stage: not one of the choices; expected 0, 1, 2 or 3, found true (a boolean)",
        ),
        (
            '[precision]\ncompute = "bf61"',
            (
                '2:1  precision.compute: not one of the choices; expected "fp32", "bf16" or "fp16", found "bf61"; '
                'did you mean "bf16"?'
            ),
        ),
        (
            '[batch]\nmicro = "8"',
            '2:1  batch.micro: wrong type; expected an integer >= 1, found "8" (a string); did you mean 8?',
        ),
        ("[batch]\nmicro = 2.7", "2:1  batch.micro: wrong type; expected an integer >= 1, found 2.7 (a number)"),
        ("[batch]\nmicro = true", "2:1  batch.micro: wrong type; expected an integer >= 1, found true (a boolean)"),
        ("[batch]\nmicro = 0", "2:1  batch.micro: out of range; expected an integer >= 1, found 0"),
        (
            '[zero]\noverlap = "false"',
            '2:1  zero.overlap: wrong type; expected true or false, found "false" (a string); did you mean false?',
        ),
        ("[zero]\noverlap = 0", "2:1  zero.overlap: wrong type; expected true or false, found 0 (an integer)"),
        ("[zero]\nratio = nan", "2:1  zero.ratio: not a number; expected a number, found nan"),
        ("[zero]\nratio = 1", "2:1  zero.ratio: out of range; expected a number > 0 and < 1, found 1.0"),
        ("[zero]\nratio = true", "2:1  zero.ratio: wrong type; expected a number > 0 and < 1, found true (a boolean)"),
        (
            '[zero]\nmode = "fasst"',
            '2:1  zero.mode: out of range; expected a string among "fast", "exact", found "fasst"',
        ),
        ("[zero]\nbucket_elements = 3", "2:1  zero.bucket_elements: must be even, not 3"),
        ("[zero]\nlow = 5\nhigh = 3", "3:1  zero.high: must not be below low, but 3 < 5"),
        ("[zero]\nlow = 11", "1:2  zero: must not be below low, but 10 < 11"),
        (
            '[zero]\nnames = ["a", "b", "c"]',
            "2:1  zero.names: out of range; expected a list of strings of at most 2 items, found ['a', 'b', 'c']",
        ),
        ("[zero]\nnames = ['a', 1]", "2:15  zero.names[1]: wrong type; expected a string, found 1 (an integer)"),
        (
            "[zero]\nnames = 'a'",
            '2:1  zero.names: wrong type; expected a list of strings of at most 2 items, found "a" (a string)',
        ),
        (
            "[[zero.tiers]]\ndevice = 'cpu'\n[[zero.tiers]]\ndevice = 'nvme'\nsise = 2",
            "5:1  zero.tiers[1].sise: unknown key; did you mean zero.tiers[1].size?",
        ),
        (
            "[[zero.tiers]]\n",
            '1:8  zero.tiers[0].device: required key is missing; expected "cpu" or "nvme"',
        ),
        ("[zero.sizes]\na = 'x'", '2:1  zero.sizes.a: wrong type; expected an integer, found "x" (a string)'),
        ("[zero]\nsizes = 1", "2:1  zero.sizes: wrong type; expected a table, found 1 (an integer)"),
        ("[zero]\nshape = [1, 2.5]", "2:13  zero.shape[1]: wrong type; expected an integer, found 2.5 (a number)"),
        (
            "[zero]\nscratch = 1979-05-27",
            "2:1  zero.scratch: wrong type; expected a path, found 1979-05-27 (a date or time)",
        ),
        (
            "[optimizer]\nbetas = [0.9]",
            "2:1  optimizer.betas: wrong length; expected a list of 2 numbers, found [0.9] (1 of them)",
        ),
        (
            "[precision]\nloss_scale = 'dynamik'",
            (
                '2:1  precision.loss_scale: wrong type; expected "dynamic" or a number > 0 and finite, '
                'found "dynamik" (a string); did you mean "dynamic"?'
            ),
        ),
        (
            "[optimizer]\nname = 'adamx'",
            (
                '2:1  optimizer.name: not one of the choices; expected "adamw", "adam", "sgd", "adagrad", "rmsprop", '
                '"nadam", "radam", "adamax" or a dotted path, or one that a plugin\'s section adds (pip install '
                "powertrain-optimizers and add the section [optimizers]), "
                'found "adamx"; did you mean "adam", "adamax" or "adamw"?'
            ),
        ),
        (
            "[optimizer]\nnesterov = true\nname = 'sgd'",
            "2:1  optimizer.nesterov: nesterov needs momentum above 0 and dampening = 0",
        ),
        (
            "[scheduler]\nname = 'cosine'",
            "1:2  scheduler.steps: required key is missing; expected an integer >= 1",
        ),
        (
            "[scheduler]\nname = 'wsd'\nsteps = 10\nwarmup = 6\ndecay = 5",
            "5:1  scheduler.decay: warmup and decay must fit into steps, but 6 + 5 > 10",
        ),
        (
            "[scheduler]\nname = 'linear'\nsteps = 10\nwarmup = 11",
            "4:1  scheduler.warmup: warmup must fit into steps, but 11 > 10",
        ),
        (
            "[scheduler]\nname = 'one-cycle'\nsteps = 10\nwarmup = 11",
            "4:1  scheduler.warmup: warmup must fit into steps, but 11 > 10",
        ),
        (
            "[scheduler]\nname = 'constant'\nfinal = 0.1",
            "3:1  scheduler.final: unknown key; expected one of warmup, name, enabled",
        ),
        (
            "[batch]\nmicro = 8\naccumulation = 4\ntotal = 48",
            (
                "4:1  batch.total: micro 8 x accumulation 4 = 32 does not divide total = 48; "
                "did you mean total = 32 or total = 64?"
            ),
        ),
        ("[zro]", "1:2  zro: unknown section; did you mean [zero]?"),
        (
            "[sequence_parallel]",
            (
                "1:2  sequence_parallel: unknown section; no installed plugin provides it: "
                "pip install powertrain-sequence-parallel"
            ),
        ),
        ("micro = 1", "1:1  micro: a key outside of any section; did you mean batch.micro?"),
        ("zeero = 1", "1:1  zeero: a key outside of any section; did you mean [zero]?"),
        ("zero = 1", "1:1  zero: wrong type; expected a table [zero], found 1 (an integer)"),
        ("[[batch]]\nmicro = 1", "1:3  batch: wrong type; expected a table [batch], found [{'micro': 1}] (a list)"),
        (
            "[zero]\nenabled = 'false'",
            '2:1  zero.enabled: wrong type; expected true or false, found "false" (a string); did you mean false?',
        ),
    ],
)
def test_the_words_of_one_problem(text: str, message: str, tmp_path: pathlib.Path) -> None:
    """A mistake is one problem with its place, its path, what was expected and what was probably meant."""
    assert problems(text, tmp_path) == [f"train.toml:{message}"]


def test_all_problems_come_at_once_in_the_order_of_the_file(tmp_path: pathlib.Path) -> None:
    """One error lists every problem, and says how many there are and what to do."""
    text = "[zero]\nstag = 1\nratio = 7\n[batch]\nmicro = 'x'\n[zer]\n[optimizer]\nbetas = [2, 'x']\n"
    assert [line.split("  ")[0] for line in problems(text, tmp_path)] == [
        f"train.toml:{place}" for place in ("2:1", "3:1", "5:1", "6:2", "8:13")
    ]
    with pytest.raises(ConfigError) as error:
        structure(read(tmp_path / "train.toml", environ={}), {"zero": Zero})
    assert str(error.value).startswith(f"[PT100] {tmp_path / 'train.toml'}: 5 problems\n  ")
    assert str(error.value).endswith("to fix: mend the listed keys; `powertrain config schema` lists every legal key")


def test_a_problem_of_another_layer_names_the_layer() -> None:
    """What an override, a variable or the argument set wrong is placed there."""
    document = read(
        {"batch": {"total": "x"}}, overrides=["batch.micro=x"], environ={"POWERTRAIN__BATCH__ACCUMULATION": "x"}
    )
    with pytest.raises(ConfigError) as error:
        structure(document, {})
    assert {problem.path: problem.where for problem in error.value.problems} == {
        "batch.micro": "--set batch.micro",
        "batch.accumulation": "POWERTRAIN__BATCH__ACCUMULATION",
        "batch.total": "config argument",
    }


def test_required_keys_are_asked_for() -> None:
    """A table without its required keys lists each of them."""
    with pytest.raises(ConfigError) as error:
        structure(read({"needy": {}}, environ={}), {"needy": Needy})
    assert [str(problem) for problem in error.value.problems] == [
        "config argument  needy.path: required key is missing; expected a string",
        "config argument  needy.count: required key is missing; expected an integer >= 1",
    ]


def test_installed_plugins_are_suggested(tmp_path: pathlib.Path) -> None:
    """A misspelt section is compared with installed plugins that take no part, too."""
    assert problems("[offlaod]", tmp_path, installed=["offload"]) == [
        "train.toml:1:2  offlaod: unknown section; did you mean [offload]?"
    ]


def test_sections_that_are_switched_off_may_be_unknown() -> None:
    """`enabled = false` and [plugins] disable make a section count as absent, whether or not it is installed."""
    raw = {"zero": {"enabled": False, "stage": 3}, "gone": {"enabled": False}, "offload": {}}
    config = structure(read({**raw, "plugins": {"disable": ["offload"]}}, environ={}), {"zero": Zero})
    assert dict(config.tables) == {}


def test_a_core_table_that_is_switched_off_is_at_its_defaults() -> None:
    """`enabled = false` in a core table leaves its defaults, and their origin."""
    config = structure(read({"checkpoint": {"enabled": False, "every": 5}}, environ={}), {})
    assert config.checkpoint.every is None
    assert str(config.origins["checkpoint.every"]) == "default"


def test_a_switched_off_section_is_still_checked() -> None:
    """A misspelt key is an error also where the section is off."""
    with pytest.raises(ConfigError, match=r"zero.stag: unknown key; did you mean zero.stage"):
        structure(read({"zero": {"enabled": False, "stag": 3}}, environ={}), {"zero": Zero})


def test_odd_values_of_disable_are_problems() -> None:
    """[plugins] disable with anything but names is a wrong type."""
    with pytest.raises(ConfigError, match=r"plugins.disable\[0\]: wrong type"):
        structure(read({"plugins": {"disable": [[1]]}, "x": {}}, environ={}), {})


def test_options_of_plugins_are_checked() -> None:
    """An optimizer that a plugin adds is a legal name, and its options are checked."""

    @attrs.frozen(kw_only=True)
    class Lion:
        lr: float = 1e-4

    options = {"optimizer": {"lion": Lion}}
    config = structure(read({"optimizer": {"name": "lion", "lr": 1}}, environ={}), {}, options=options)
    assert config.optimizer.options == {"lr": 1.0}
    with pytest.raises(ConfigError, match=r"optimizer.lt: unknown key; did you mean optimizer.lr"):
        structure(read({"optimizer": {"name": "lion", "lt": 1}}, environ={}), {}, options=options)


def test_a_dotted_path_takes_any_option() -> None:
    """The options of a class named by its path are left to whoever imports it."""
    table = {"name": "torch.optim.ASGD", "clip": 1.0, "lambd": 1e-4}
    config = structure(read({"optimizer": table}, environ={}), {})
    assert (config.optimizer.clip, config.optimizer.options) == (1.0, {"lambd": 1e-4})


def test_types_that_cannot_be_resolved_are_the_plugin_s_fault() -> None:
    """A schema whose field types exist for type checkers only is reported as a broken plugin."""

    @attrs.frozen(kw_only=True)
    class Broken:
        x: Nowhere = 1  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(PluginBroken, match="Nowhere"):
        structure(read({"broken": {"x": 1}}, environ={}), {"broken": Broken})


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("precision", "loss_scale", 0, '"dynamic" or a number > 0 and finite, found 0.0'),
        ("precision", "loss_scale", -8.0, '"dynamic" or a number > 0 and finite, found -8.0'),
        ("precision", "loss_scale", INF, '"dynamic" or a number > 0 and finite, found inf'),
        ("optimizer", "clip", INF, "a number > 0 and finite, found inf"),
        ("optimizer", "lr", INF, "a number >= 0 and finite, found inf"),
        ("optimizer", "lr", -0.1, "a number >= 0 and finite, found -0.1"),
        ("communicator", "timeout", INF, "a number > 0 and <= 2592000, found inf"),
        ("communicator", "timeout", 1e300, "a number > 0 and <= 2592000, found 1e+300"),
    ],
)
def test_numbers_that_no_run_can_use(section: str, key: str, value: float, expected: str) -> None:
    """Infinite or negative factors, rates and times are out of range, in words."""
    with pytest.raises(ConfigError) as error:
        structure(read({section: {key: value}}, environ={}), {})
    (problem,) = error.value.problems
    assert str(problem) == f"config argument  {section}.{key}: out of range; expected {expected}"


@pytest.mark.parametrize("value", ["dynamic", 1, 128.0])
def test_loss_scales_that_are_legal(value: Any) -> None:
    """A loss scale is "dynamic" or any number above 0."""
    assert structure(read({"precision": {"loss_scale": value}}, environ={}), {}).precision.loss_scale == value
