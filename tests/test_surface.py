"""The public surface, written down: changing it means changing a line here, on purpose."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import powertrain
from powertrain import errors, hookspecs
from powertrain.config.tables import CORE_TABLES
from powertrain.parameter_state import ParameterState, StateView
from powertrain.plugin import API, Phase, Plugin
from powertrain.roles.accelerator import Accelerator
from powertrain.roles.checkpoint import CheckpointReader, CheckpointStore
from powertrain.roles.communicator import Communicator
from powertrain.roles.files import FileEngine, RandomFile
from powertrain.roles.optimizer import OptimizerWrapper
from powertrain.roles.runner import StepRunner
from powertrain.roles.sampler import Sampler
from powertrain.roles.tier import Lease, Slot, Tier

HOOKS_OF_API_1 = {
    "make_accelerator": ["name"],
    "make_communicator": ["name", "accelerator", "mesh", "rank", "timeout"],
    "make_optimizer": ["name", "options", "accelerator"],
    "wrap_optimizer": ["model", "optimizer", "context"],
    "make_runner": ["engine"],
    "make_checkpoint_store": ["uri", "context"],
    "make_sampler": ["dataset", "context"],
    "wrap_communicator": ["communicator", "accelerator", "timeout"],
    "transform_model": ["model", "context"],
    "on_engine_ready": ["engine"],
    "on_step_start": ["engine"],
    "on_step_end": ["engine", "loss"],
    "on_checkpoint_saved": ["engine", "directory", "tag"],
    "on_error": ["engine", "error"],
    "on_close": ["engine"],
    "on_prepare": ["model", "context"],
    "make_tier": ["category", "context"],
    "make_file_engine": ["context"],
    "add_commands": ["cli"],
}

REQUIRED: dict[type[Any], set[str]] = {
    Accelerator: {
        "device_count",
        "device",
        "activate",
        "synchronize",
        "memory",
        "reset_peak_memory",
        "dtypes",
        "seed",
        "rng_state",
        "set_rng_state",
    },
    Communicator: {"issue", "close"},
    CheckpointStore: {"tags", "save", "poll", "wait", "open", "prune"},
    CheckpointReader: {"read"},
    OptimizerWrapper: {"begin", "step", "discard", "tensors", "load", "parts", "publish", "gathered"},
    StepRunner: {"train", "evaluate"},
    Sampler: {"__iter__", "__len__", "advance", "state", "load_state"},
    Tier: {"reserve"},
    Slot: {"fetch", "blank", "free"},
    Lease: {"wait", "store", "release"},
    FileEngine: {"buffer", "open", "close"},
    RandomFile: {"read", "write", "resize", "sync", "close"},
}

TABLES = {
    "run": ["seed", "output"],
    "accelerator": ["use"],
    "communicator": ["use", "timeout"],
    "batch": ["micro", "accumulation", "total"],
    "optimizer": ["name", "clip", "options"],
    "scheduler": ["name", "options"],
    "precision": ["compute", "master", "reduce", "accumulate", "optimizer", "autocast", "loss_scale"],
    "checkpoint": ["directory", "every", "keep_last", "asynchronous"],
    "plugins": ["require", "disable", "pin"],
}

COMMANDS = {
    "config": ["check", "init", "schema", "show"],
    "doctor": [],
    "kernels": ["build", "list", "test"],
    "launch": [],
    "plugins": ["new", "test"],
}

ENGINE = {
    "attach",
    "backward",
    "close",
    "data_rank",
    "data_size",
    "eval_step",
    "grad_norm",
    "learning_rate",
    "load_checkpoint",
    "load_weights",
    "loss",
    "no_sync",
    "runner",
    "save_checkpoint",
    "skipped_steps",
    "step",
    "train_step",
}


def parameters(function: Any) -> list[str]:
    """Return the names of a function's parameters, keyword-only ones after a star."""
    names: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in names:
            names.append("*")
        names.append(name)
    return names


def test_the_package_offers_these_names() -> None:
    """``powertrain.__all__`` is sorted, complete and importable."""
    expected = ["Context", "Engine", "Phase", "Plugin", "PowertrainError", "Probe"]
    functions = ["deferred", "full", "hookimpl", "initialize", "state", "stream"]
    assert powertrain.__all__ == [*expected, "__version__", *functions]
    assert dir(powertrain) == sorted(powertrain.__all__)
    for name in powertrain.__all__:
        assert getattr(powertrain, name) is not None
    with pytest.raises(AttributeError, match="module 'powertrain' has no attribute 'initialise'"):
        powertrain.initialise  # noqa: B018


def test_initialize_takes_these_arguments() -> None:
    """The signature of ``initialize`` is public."""
    expected = ["model", "config", "dataset", "loss_fn", "optimizer", "collate_fn"]
    assert parameters(powertrain.initialize) == [*expected, "*", "scheduler", "weights", "plugins", "overrides"]
    assert parameters(powertrain.deferred) == []


def test_access_to_parameters_takes_these_arguments() -> None:
    """The signatures of ``full``, ``state`` and ``stream``, and what a parameter's state offers, are public."""
    assert parameters(powertrain.full) == ["module_or_params", "*", "write"]
    assert parameters(powertrain.state) == ["param"]
    assert parameters(powertrain.stream) == ["module_or_engine", "*", "dtype"]
    views = {"local", "start", "shape", "dtype", "full", "write", "publish"}
    for kind, offered in ((ParameterState, {"value", "grad", "optimizer"}), (StateView, views)):
        assert {name for name in vars(kind) if not name.startswith("_")} == offered
        for name in offered:
            assert (inspect.getdoc(getattr(kind, name)) or "").strip(), name
    assert parameters(StateView.write) == ["self", "tensor", "*", "publish"]


def test_the_engine_offers_these_names() -> None:
    """The engine's methods and properties are public, with these arguments."""
    public = {name for name in vars(powertrain.Engine) if not name.startswith("_")}
    assert public == ENGINE
    assert parameters(powertrain.Engine.train_step) == ["self", "batch"]
    assert parameters(powertrain.Engine.eval_step) == ["self", "batch"]
    assert parameters(powertrain.Engine.save_checkpoint) == ["self", "directory", "tag", "client_state"]
    assert parameters(powertrain.Engine.load_checkpoint) == ["self", "directory", "tag"]
    assert parameters(powertrain.Engine.load_weights) == ["self", "path", "strict"]
    for name in public:
        assert (inspect.getdoc(getattr(powertrain.Engine, name)) or "").strip(), name


def test_the_hooks_of_api_1_are_frozen() -> None:
    """Names, arguments and their order are the contract with every plugin of API 1."""
    assert API == 1
    specified = {
        name: parameters(function)
        for name, function in vars(hookspecs).items()
        if getattr(function, "powertrain_spec", None) is not None
    }
    assert specified == HOOKS_OF_API_1
    for name in specified:
        assert inspect.getdoc(getattr(hookspecs, name)), name


def test_plugins_declare_these_facts() -> None:
    """The attributes of a plugin class, and the phases, are part of the contract."""
    public = {name for name in vars(Plugin) if not name.startswith("_")}
    expected = {"name", "api", "phase", "options", "fallback", "support", "Config", "is_available", "check_ranks"}
    expected |= {"layer", "kernel_sets", "rests"}
    assert public == expected
    phases = {phase.name: int(phase) for phase in Phase}
    names = ["MATERIALIZE", "COMPRESS", "PARALLELIZE", "RECOMPUTE", "COMPILE", "SHARD"]
    assert phases == {name: 10 * (k + 1) for k, name in enumerate(names)}


@pytest.mark.parametrize("role", REQUIRED, ids=lambda role: role.__name__)
def test_roles_require_these_methods(role: type[Any]) -> None:
    """A role's required methods are fixed; further ones are optional and have defaults."""
    assert role.__abstractmethods__ == REQUIRED[role]  # type: ignore[attr-defined]
    for name in REQUIRED[role]:
        if not name.startswith("__"):
            assert inspect.getdoc(getattr(role, name)), name


def test_an_accelerator_is_small() -> None:
    """At most fifteen methods are required of an accelerator."""
    assert len(Accelerator.__abstractmethods__) <= 15


def test_the_core_has_these_tables() -> None:
    """Sections and keys of the core's configuration, in order."""
    import attrs

    assert {name: [field.name for field in attrs.fields(kind)] for name, kind in CORE_TABLES.items()} == TABLES
    assert list(CORE_TABLES) == list(TABLES)


def test_the_command_line_has_these_commands() -> None:
    """The core's commands and their subcommands; plugins add their own beside them."""
    import click

    from powertrain.cli.root import COMMANDS as CORE
    from powertrain.cli.root import cli

    found = {}
    with click.Context(cli) as ctx:
        for name in CORE:
            command = cli.get_command(ctx, name)
            assert command is not None
            found[name] = command.list_commands(ctx) if isinstance(command, click.Group) else []
            assert command.help, name
    assert found == COMMANDS


# --- errors ---------------------------------------------------------------------------------


def classes() -> dict[str, type[errors.PowertrainError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.PowertrainError)
    }


def drawn() -> dict[str, tuple[str, str | None]]:
    """Return code and parent of each error in the tree of the module's docstring."""
    found: dict[str, tuple[str, str | None]] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"^\W*(\w+)\s+(PT\d{3})\b", line):
            column = match.start(1)
            above = [(other, name) for other, name in above if other < column]
            found[match[1]] = (match[2], above[-1][1] if above else None)
            above.append((column, match[1]))
    return found


def test_the_tree_of_errors_is_true() -> None:
    """The tree in the docstring shows every class, under its parent, with its code."""
    parents = {name: kind.__base__.__name__ for name, kind in classes().items() if kind is not errors.PowertrainError}
    assert drawn() == {name: (kind.code, parents.get(name)) for name, kind in classes().items()}


def test_every_error_has_a_code_of_its_own() -> None:
    """Codes are unique, and each class states its own code, docstring and advice."""
    codes = [kind.code for kind in classes().values()]
    assert len(set(codes)) == len(codes)
    for name, kind in classes().items():
        assert re.fullmatch(r"PT\d{3}", vars(kind)["code"]), name
        assert (vars(kind).get("__doc__") or "").strip().endswith("."), name
        assert vars(kind)["advice"], name
        assert kind.exit_code in (1, 2), name


def test_errors_of_one_family_share_its_hundred() -> None:
    """A class below another has a code of the same hundred."""
    for name, (code, parent) in drawn().items():
        if parent not in (None, "PowertrainError"):
            assert code[:3] == drawn()[parent][0][:3], name


def test_an_error_says_what_where_and_what_to_do() -> None:
    """The text has the code, the sentence, the place, what was expected and found, and a remedy."""
    error = errors.ShardCorrupt("bytes differ", where="a.st, block 3", expected="1f", found="2e")
    assert str(error).splitlines() == [
        "[PT605] bytes differ",
        "  at: a.st, block 3",
        "  expected: 1f",
        "  found: 2e",
        "  to fix: copy the file again, or load another tag; check the disk",
    ]
    assert str(errors.BatchError("no", remedy="do this")).endswith("to fix: do this")


@pytest.mark.parametrize("name", classes())
def test_errors_travel_between_processes(name: str) -> None:
    """Every error survives being copied to another process, with all it says."""
    import pickle

    kind = classes()[name]
    error = kind("text", problems=("a", "b")) if kind is errors.ConfigError else kind("text", where="here", found="x")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)


def test_no_module_hides_a_public_name() -> None:
    """A submodule called like a public name would replace it as soon as something imports the submodule."""
    modules = {path.stem for path in (Path(powertrain.__file__).parent).iterdir()}
    assert not modules & {name for name in powertrain.__all__ if name != "__version__"}
