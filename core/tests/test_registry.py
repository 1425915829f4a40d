"""Finding, choosing, checking and calling plugins."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from stevedore.extension import ExtensionManager

from powertrain import hookimpl
from powertrain.build import choose_accelerator
from powertrain.config import Config, read, structure
from powertrain.discovery import Schemas, allowed, hooks_of, installed, load, schemas_for
from powertrain.errors import (
    AcceleratorError,
    ConfigError,
    HookInvalid,
    PluginBroken,
    PluginConflict,
    PluginError,
    PluginIncompatible,
    PluginMissing,
)
from powertrain.plugin import NoConfig, Phase, Plugin
from powertrain.registry import Registry
from powertrain.selection import select

SOURCE = """
import attrs
from powertrain.plugin import NoConfig, Phase, Plugin
from powertrain.hookspecs import hookimpl

@attrs.frozen(kw_only=True)
class Table:
    size: int = 3

class ThePlugin(Plugin[Table]):
    name, api = {name!r}, 1
"""


@attrs.frozen
class Site:
    """A directory on sys.path with distributions of our own making."""

    path: Path

    def add(
        self,
        name: str,
        source: str | None = SOURCE,
        *,
        distribution: str | None = None,
        keywords: str = "powertrain-plugin",
        version: str = "1.2",
    ) -> None:
        """Install plugin ``name``; a source of None leaves its module out."""
        distribution = distribution or f"site-{name}"
        module = distribution.replace("-", "_")
        if source is not None:
            (self.path / f"{module}.py").write_text(source.replace("{name!r}", repr(name)))
        info = self.path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\nSummary: A test.\nKeywords: {keywords}\n"
        )
        (info / "entry_points.txt").write_text(f"[powertrain.plugins]\n{name} = {module}:ThePlugin\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A site that vanishes with its modules."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("POWERTRAIN_PLUGINS", raising=False)
    # stevedore remembers a group for as long as the process lives.
    monkeypatch.setattr(ExtensionManager, "ENTRY_POINT_CACHE", {})
    before = set(sys.modules)
    yield Site(tmp_path)
    for name in set(sys.modules) - before:
        if name.startswith("site_"):
            del sys.modules[name]


def plan(given: dict[str, Any] | None = None) -> tuple[Config, Schemas]:
    document = read(given or {}, environ={})
    schemas = schemas_for(document)
    settings = structure(document, schemas.tables, installed=schemas.installed, options=schemas.options)
    return settings, schemas


def selected(given: dict[str, Any] | None = None, *, world_size: int = 1, **environ: str) -> list[str]:
    """Return the names of the plugins that a configuration leads to."""
    settings, schemas = plan(given)
    return [plugin.name for plugin in select(settings, schemas, world_size=world_size, environ=environ)]


# --- plugins given in code ------------------------------------------------------------------


def make(plugin: str, /, **members: Any) -> Plugin[NoConfig]:
    """Return a plugin object with the given hooks and attributes."""
    marked = {key: hookimpl(value) if callable(value) else value for key, value in members.items()}
    return type("Made", (Plugin,), {"name": plugin, "api": 1, **marked})(NoConfig())


def runner(answer: Any) -> Any:
    return lambda self, engine: answer


def test_the_only_answer_counts() -> None:
    """A first-result hook returns the one answer, and None when all decline or none is there."""
    registry = Registry([make("a", make_runner=runner(None)), make("b", make_runner=runner("mine")), make("c")])
    assert registry.one("make_runner", engine=None) == "mine"
    assert Registry([make("a", make_runner=runner(None))]).one("make_runner", engine=None) is None
    assert Registry([]).one("make_runner", engine=None) is None


def test_two_answers_are_a_conflict() -> None:
    """Two answers to a first-result hook are a PluginConflict that names both and shows the pin."""
    registry = Registry([make("a", make_runner=runner(1)), make("b", make_runner=runner(2))])
    with pytest.raises(PluginConflict, match="plugins 'a' and 'b' both answer the hook make_runner") as caught:
        registry.one("make_runner", engine=None)
    assert caught.value.code == "PT203"
    assert '[plugins] pin = { make_runner = "a" }' in caught.value.remedy


def test_a_pin_chooses() -> None:
    """A pin makes one plugin's answer count, and a pinned plugin that does not answer is an error."""
    plugins = [make("a", make_runner=runner(1)), make("b", make_runner=runner(2))]
    assert Registry(plugins, {"make_runner": "b"}).one("make_runner", engine=None) == 2
    with pytest.raises(PluginError, match="the pinned plugin 'c' does not answer the hook make_runner") as caught:
        Registry(plugins, {"make_runner": "c"}).one("make_runner", engine=None)
    assert (caught.value.where, caught.value.expected) == ("plugins.pin.make_runner", "one of a, b")


def test_answers_come_in_the_order_of_registration() -> None:
    """Chains go through plugins in the given order, each asked once."""
    asked: list[str] = []

    def wrap(name: str) -> Any:
        return lambda self, communicator: asked.append(name) or f"{name}({communicator})"

    registry = Registry([make(n, wrap_communicator=wrap(n)) for n in ("z", "a", "m")])
    found = list(registry.answers("wrap_communicator", communicator="x", accelerator=None, timeout=1.0))
    assert found == [("z", "z(x)"), ("a", "a(x)"), ("m", "m(x)")]
    assert registry.call("a", "wrap_communicator", communicator="y", accelerator=None, timeout=1.0) == "a(y)"
    assert asked == ["z", "a", "m", "a"]


def test_transforms_go_by_phase_then_by_order() -> None:
    """Lower phases first; within a phase, the order of the configuration."""
    hook = {"transform_model": lambda self, model: model}
    registry = Registry(
        [
            make("shard", phase=Phase.SHARD, **hook),
            make("second", phase=Phase.COMPRESS, **hook),
            make("none"),
            make("first", phase=Phase.MATERIALIZE, **hook),
            make("third", phase=Phase.COMPRESS, **hook),
        ]
    )
    assert registry.transforms() == ["first", "second", "third", "shard"]


def test_listeners_take_only_what_they_name() -> None:
    """An event's callables are plain ones, in order, and a plugin may leave arguments out."""
    seen: list[Any] = []
    registry = Registry(
        [
            make("a", on_step_end=lambda self, loss: seen.append(("a", loss))),
            make("b", on_step_end=lambda self: seen.append(("b", None))),
        ]
    )
    for listener in registry.listeners("on_step_end"):
        listener(engine="engine", loss=3)
    assert seen == [("a", 3), ("b", None)]
    assert registry.listeners("on_close") == []


def test_a_misspelt_hook_is_refused() -> None:
    """A hook that does not exist is a HookInvalid that names it and suggests the right one; nothing stays behind."""
    registry = Registry([])
    with pytest.raises(HookInvalid, match="a hook that does not exist: on_step_ende") as caught:
        registry.add(make("a", on_step_ende=lambda self, engine: None))
    assert caught.value.code == "PT205"
    assert "did you mean 'on_step_end'?" in caught.value.remedy
    assert caught.value.where.endswith("Made.on_step_ende")
    registry.add(make("a", on_step_end=lambda self, engine: None))
    assert list(registry.plugins) == ["a"]


def test_an_unknown_argument_is_refused() -> None:
    """An argument that the specification does not have is a HookInvalid that names it."""
    with pytest.raises(HookInvalid, match="does not match its specification") as caught:
        Registry([make("a", on_step_end=lambda self, engine, los: None)])
    assert "los" in caught.value.found


def test_a_transform_needs_a_phase() -> None:
    """A plugin that transforms the model and declares no phase is a HookInvalid, given in code too."""
    with pytest.raises(HookInvalid, match="'a' transforms the model but declares no phase") as caught:
        Registry([make("a", transform_model=lambda self, model: model)])
    assert "phase = Phase." in caught.value.expected


@pytest.mark.parametrize(
    ("api", "remedy"),
    [
        (2, "upgrade powertrain-core"),
        (0, "upgrade the plugin's distribution"),
        ("1", "upgrade the plugin's distribution"),
    ],
)
def test_another_api_is_refused(api: Any, remedy: str) -> None:
    """A plugin of an API that this core does not serve is a PluginIncompatible that says what to upgrade."""
    with pytest.raises(PluginIncompatible, match=f"written for plugin API {api}") as caught:
        Registry([make("a", api=api)])
    assert (caught.value.code, caught.value.expected, caught.value.remedy) == ("PT204", "API 1", remedy)


def test_two_of_one_name_are_refused() -> None:
    """Two plugin objects of one name are a PluginConflict."""
    with pytest.raises(PluginConflict, match="two plugins are called 'a'"):
        Registry([make("a"), make("a")])


def test_a_removed_plugin_is_asked_no_more() -> None:
    """After ``remove`` a plugin neither answers nor stands in the way of its name."""
    registry = Registry([make("a", make_runner=runner(1)), make("b", make_runner=runner(2))])
    registry.remove("a")
    assert registry.one("make_runner", engine=None) == 2
    registry.add(make("a"))


def test_calls_can_be_traced(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """POWERTRAIN_TRACE_HOOKS=1 prints each call as a line of JSON on standard error, and nothing does without."""
    Registry([make("a", make_runner=runner(1))]).one("make_runner", engine=None)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("POWERTRAIN_TRACE_HOOKS", "1")
    registry = Registry([make("a", make_runner=runner(1)), make("b", make_runner=runner(None))])
    registry.one("make_runner", engine=None)
    output = capsys.readouterr()
    rows = [json.loads(line) for line in output.err.splitlines()]
    assert [(row["hook"], row["plugins"], row["result"]) for row in rows] == [
        ("make_runner", ["a"], ["int"]),
        ("make_runner", ["b"], []),
    ]
    assert all(row["ms"] >= 0 for row in rows)
    assert output.out == ""


# --- installed plugins -------------------------------------------------------------------------


def test_metadata_describes_a_plugin_without_its_import(site: Site) -> None:
    """Name, distribution, version, summary and roles come from metadata, sorted by name; nothing is imported."""
    site.add("zeta", None, keywords="powertrain-plugin, powertrain-accelerator,powertrain-checkpoint")
    site.add("alpha", None)
    found = installed()
    assert list(found) == sorted(found)
    entry = found["zeta"]
    assert (entry.distribution, entry.version, entry.summary) == ("site-zeta", "1.2", "A test.")
    assert entry.roles == {"accelerator", "checkpoint"}
    assert entry.rivals == ()
    assert found["alpha"].roles == frozenset()


def test_two_distributions_of_one_name_are_a_conflict(site: Site) -> None:
    """A name that two distributions claim is a PluginConflict that names both; a pin or an uninstall ends it."""
    site.add("twice", distribution="site-one")
    site.add("twice", distribution="site-two")
    with pytest.raises(PluginConflict, match="claimed by site-one and site-two") as caught:
        load("twice")
    assert "uninstall all but one" in caught.value.remedy
    assert 'pin = { twice = "site-one" }' in caught.value.remedy
    assert selected({"twice": {}, "plugins": {"pin": {"twice": "site-two"}}})[0] == "twice"
    known = installed({"twice": "site-two"})
    assert load("twice", known).__module__ == "site_two"


BROKEN = [
    ("import a_module_that_is_not_there", PluginBroken, "cannot be imported", "ModuleNotFoundError"),
    ("class ThePlugin(:", PluginBroken, "cannot be imported", "SyntaxError"),
    ("raise SystemExit(3)", PluginBroken, "cannot be imported", "SystemExit: 3"),
    ("assert False, 'no such luck'", PluginBroken, "cannot be imported", "AssertionError: no such luck"),
    ("", PluginBroken, "cannot be imported", "ThePlugin"),
    ("ThePlugin = 42", PluginBroken, "is not a Plugin class", "42"),
    (None, PluginBroken, "cannot be imported", "ModuleNotFoundError"),
    (SOURCE.replace("{name!r}", "'other'"), PluginBroken, "calls itself 'other'", ""),
    (SOURCE.replace(", 1", ", 99"), PluginIncompatible, "written for plugin API 99", ""),
    (
        SOURCE + "    @hookimpl\n    def transform_model(self, model): return model\n",
        HookInvalid,
        "declares no phase",
        "",
    ),
]


@pytest.mark.parametrize(("source", "kind", "says", "found"), BROKEN)
def test_a_plugin_that_cannot_be_used_says_why(
    site: Site, source: str | None, kind: type[PluginError], says: str, found: str
) -> None:
    """Whatever is wrong with an installed plugin, the error names it, its module and its distribution."""
    site.add("bad", source)
    with pytest.raises(kind, match=says) as caught:
        load("bad")
    assert "site_bad:ThePlugin of site-bad 1.2" in (caught.value.where or "")
    assert found in (caught.value.found or "")
    assert "'bad'" in caught.value.message


def test_a_missing_plugin_says_what_to_install() -> None:
    """A name that is not installed is a PluginMissing with the pip line and the nearest name."""
    with pytest.raises(PluginMissing, match="plugin 'chekpoint' is not installed") as caught:
        load("chekpoint")
    assert caught.value.code == "PT201"
    assert "pip install powertrain-chekpoint, or did you mean 'checkpoint'?" in caught.value.remedy
    assert "cpu" in caught.value.expected


def test_schemas_hold_tables_and_options(site: Site) -> None:
    """Only plugins with a section are loaded; their tables and options extend the schema."""
    site.add("lion", SOURCE + "    options = {'optimizer': {'lion': Table}}\n")
    site.add("unnamed", "raise RuntimeError('imported for nothing')")
    schemas = schemas_for(read({"lion": {"size": 5}}, environ={}))
    assert list(schemas.classes) == list(schemas.tables) == ["lion"]
    assert schemas.options["optimizer"]["lion"] is schemas.tables["lion"]
    assert {"lion", "unnamed", "cpu"} <= set(schemas.installed)
    settings, _ = plan({"lion": {"size": 5}, "optimizer": {"name": "lion", "size": 8}})
    assert settings.tables["lion"].size == 5
    assert settings.optimizer.options == {"size": 8}


def test_hooks_are_listed() -> None:
    """The hooks of a class and of an object are its marked methods, in alphabetical order."""
    plugin = make("a", on_close=lambda self: None, make_runner=runner(1))
    assert hooks_of(plugin) == hooks_of(type(plugin)) == ["make_runner", "on_close"]


# --- which plugins a run has ---------------------------------------------------------------------


def test_sections_come_first_in_their_order(site: Site) -> None:
    """Sections in the order of the file, then required plugins, then providers of the roles that a run needs."""
    for name in ("one", "two", "three", "idle"):
        site.add(name)
    found = selected({"two": {}, "one": {}, "plugins": {"require": ["three"]}})
    assert found[:3] == ["two", "one", "three"]
    assert "idle" not in found
    assert {"cpu", "checkpoint"} <= set(found)
    assert "comm" not in found
    assert "comm" in selected(world_size=2)


def test_plugins_get_their_tables(site: Site) -> None:
    """A plugin is constructed with its section, or with its defaults where it has none."""
    site.add("one")
    site.add("two")
    settings, schemas = plan({"one": {"size": 7}, "plugins": {"require": ["two"]}})
    sizes = {p.name: p.config.size for p in select(settings, schemas, world_size=1, environ={}) if p.name in "one two"}
    assert sizes == {"one": 7, "two": 3}


def test_what_is_given_is_not_made_again(site: Site) -> None:
    """A plugin that exists already, as an object in code, is neither constructed nor refused."""
    site.add("one", SOURCE + "    def __init__(self, config): raise RuntimeError\n")
    settings, schemas = plan({"one": {}})
    found = select(settings, schemas, world_size=1, given=["one"], environ={"POWERTRAIN_PLUGINS": "none"})
    assert found == []


def test_a_named_accelerator_is_the_only_one_loaded(site: Site) -> None:
    """With ``[accelerator] use`` naming a plugin, the other accelerators are not even imported."""
    site.add("fast", "raise RuntimeError('imported for nothing')", keywords="powertrain-plugin,powertrain-accelerator")
    assert "cpu" in selected({"accelerator": {"use": "cpu"}}, POWERTRAIN_STRICT_PLUGINS="1")


def test_disabled_plugins_are_left_out(site: Site) -> None:
    """``[plugins] disable`` wins over sections, requirements and roles."""
    site.add("one")
    found = selected({"one": {}, "plugins": {"disable": ["one", "checkpoint"]}})
    assert not {"one", "checkpoint"} & set(found)


@pytest.mark.parametrize(
    ("text", "names"), [(None, None), ("none", set()), ("", set()), ("a, b", {"a", "b"}), ("none,a", {"a"})]
)
def test_the_variable_lists_what_is_allowed(text: str | None, names: set[str] | None) -> None:
    """POWERTRAIN_PLUGINS is a list with commas; ``none`` allows nothing; unset allows all."""
    assert allowed({} if text is None else {"POWERTRAIN_PLUGINS": text}) == names


def test_only_allowed_plugins_are_loaded(site: Site) -> None:
    """POWERTRAIN_PLUGINS leaves role providers out in silence, and refuses what the configuration names."""
    site.add("one")
    assert selected(POWERTRAIN_PLUGINS="cpu") == ["cpu"]
    assert selected(POWERTRAIN_PLUGINS="none") == []
    with pytest.raises(PluginMissing, match="the configuration needs plugin 'one'") as caught:
        selected({"one": {}}, POWERTRAIN_PLUGINS="cpu")
    assert caught.value.where == "POWERTRAIN_PLUGINS=cpu"
    with pytest.raises(PluginMissing, match="needs plugin 'cpu'"):
        selected({"accelerator": {"use": "cpu"}}, POWERTRAIN_PLUGINS="none")


def test_accelerators_that_the_variable_leaves_out_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any accelerator, the error tells those that are installed but not in POWERTRAIN_PLUGINS."""
    monkeypatch.setenv("POWERTRAIN_PLUGINS", "none")
    with pytest.raises(AcceleratorError) as caught:
        choose_accelerator(Registry([]), None)
    assert "cpu" in caught.value.found and "not in POWERTRAIN_PLUGINS" in caught.value.found
    assert "add cpu" in caught.value.remedy


def test_a_broken_provider_costs_a_warning(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """A broken plugin that nothing names is skipped with a warning; strict, or named, it is fatal."""
    site.add("bad", "import a_module_that_is_not_there", keywords="powertrain-plugin,powertrain-checkpoint")
    logger = logging.getLogger("powertrain")
    propagates, logger.propagate = logger.propagate, True
    try:
        with caplog.at_level(logging.WARNING, "powertrain"):
            assert "cpu" in selected()
    finally:
        logger.propagate = propagates
    assert "plugin 'bad' is skipped" in caplog.text
    assert "a_module_that_is_not_there" in caplog.text
    with pytest.raises(PluginBroken):
        selected(POWERTRAIN_STRICT_PLUGINS="1")
    with pytest.raises(PluginBroken):
        selected({"plugins": {"require": ["bad"]}})


def test_a_plugin_that_cannot_be_constructed_says_why(site: Site) -> None:
    """An exception in a plugin's constructor is a PluginBroken with its type and words."""
    site.add("bad", SOURCE + "    def __init__(self, config): raise RuntimeError('no such luck')\n")
    with pytest.raises(PluginBroken, match="plugin 'bad' cannot be constructed") as caught:
        selected({"bad": {}})
    assert (caught.value.where, caught.value.found) == ("site_bad:ThePlugin", "RuntimeError: no such luck")


def test_a_required_plugin_needs_its_keys(site: Site) -> None:
    """A required plugin whose table has keys without defaults cannot do without a section, and says which."""
    site.add("needy", SOURCE.replace("size: int = 3", "size: int"))
    with pytest.raises(ConfigError) as caught:
        selected({"plugins": {"require": ["needy"]}})
    assert "needy.size: required key is missing" in str(caught.value)
    assert "expected an integer" in str(caught.value)


@pytest.mark.parametrize("text", ["one", "site-one", "site-one>=1.0,<2", "one==1.2"])
def test_requirements_name_plugins_or_distributions(site: Site, text: str) -> None:
    """A requirement is a plugin's or a distribution's name, with versions if need be."""
    site.add("one")
    assert selected({"plugins": {"require": [text]}})[0] == "one"


@pytest.mark.parametrize(
    ("text", "kind", "says", "remedy"),
    [
        ("tensor", PluginMissing, "required plugin 'tensor' is not installed", "pip install 'powertrain-tensor'"),
        ("powertrain-tensor>=1", PluginMissing, "'powertrain-tensor' is not installed", "'powertrain-tensor>=1'"),
        ("site-one>=2", PluginError, "plugin 'one' has the wrong version", "pip install 'site-one>=2'"),
        ("one two", PluginError, "'one two' is not a requirement", ""),
    ],
)
def test_requirements_that_are_not_met_are_refused(
    site: Site, text: str, kind: type[PluginError], says: str, remedy: str
) -> None:
    """A missing plugin, a wrong version and a garbled requirement are errors with the way out."""
    site.add("one")
    with pytest.raises(kind, match=says) as caught:
        selected({"plugins": {"require": [text]}})
    assert caught.value.where == "plugins.require"
    assert remedy in caught.value.remedy
