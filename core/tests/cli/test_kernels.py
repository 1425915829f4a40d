"""`powertrain kernels` on a module that compiles in a moment, and on machines where nothing can be built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from building import compiler, needs_compiler, residue, tiny

from powertrain.cli.kernels import State

PLUGIN = """
from pathlib import Path

from powertrain.native import Finding, KernelSet, Source, Unit, load
from powertrain.plugin import Plugin

SOURCE = Source("tiny", Path({directory!r}), (Unit("tiny.cpp", ("-O0",)),), ("answer", "question"))


def check():
    off = abs(load(SOURCE).answer() - 42)
    yield Finding("answer", "plain", 3, float(off))
    yield Finding("question", "plain", 1, 0.25)


class ThePlugin(Plugin):
    name, api = "little", 1

    @classmethod
    def kernel_sets(cls):
        return (KernelSet("tiny", "farm_little:SOURCE", "farm_little:check"),)
"""

NO_COMPILER = {"CXX": "/nonexistent/c++"}

FAILING = pytest.mark.parametrize("arguments", [["build"], ["build", "--json"], ["test", "--json"]], ids=" ".join)
"""What fails where nothing can be built."""


@pytest.fixture
def kernels(powertrain, farm, tmp_path):
    """Run ``powertrain kernels`` with a plugin whose kernels are right, an empty cache, and the usual compiler."""
    source = tiny(tmp_path / "source", 42).directory
    farm.add("little", PLUGIN.replace("{directory!r}", repr(str(source))))

    def run(*arguments, **variables):
        ours = {"POWERTRAIN_CACHE": str(tmp_path / "cache"), "CXX": "", **variables}
        done = powertrain("kernels", *arguments, farm=farm, **ours)
        assert "Traceback" not in done.stderr
        return done

    run.source = source
    run.cache = tmp_path / "cache" / "native"
    return run


def line_of(done, name="tiny"):
    """The one line of a table that begins with ``name``."""
    (line,) = [line for line in done.stdout.splitlines() if line.split()[0] == name]
    return line


def listed(done, name="tiny"):
    """What ``list --json`` says of one set; every set has the same keys."""
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {key for state in found for key in state} == set(State.__annotations__)
    (state,) = [state for state in found if state["name"] == name]
    return state


@needs_compiler
def test_what_is_built_is_listed(kernels):
    """Both forms of the list say what is not built, and what is: where it lies, its size and its time."""
    bare = {"name": "tiny", "plugin": "little", "kernels": ["answer", "question"]}
    before = listed(kernels("list", "--json"))
    assert before == {**bare, "state": "not built", "where": "-", "seconds": None, "size": None}
    assert not kernels.cache.exists()
    assert kernels("build", "tiny").returncode == 0
    after = listed(kernels("list", "--json"))
    path = Path(after["where"])
    assert path.parent.parent == kernels.cache
    assert after == {**after, **bare, "state": "built", "size": path.stat().st_size}
    assert after["seconds"] > 0
    done = kernels("list")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n")[0].split() == ["NAME", "PLUGIN", "STATE", "BUILT", "IN", "SIZE", "KERNELS", "WHERE"]
    line = line_of(done)
    assert "little" in line and "built" in line and "answer, question" in line and line.endswith(after["where"])


@needs_compiler
def test_it_is_built_once_and_again_when_asked(kernels):
    """``build`` says whether it built or found the file there; ``--again`` builds; ``--json`` is all there is."""
    texts = [kernels("build", *options, "tiny") for options in ([], [], ["--again"])]
    assert [done.returncode for done in texts] == [0, 0, 0], texts[0].stderr
    notes = [done.stdout.split(": ")[1] for done in texts]
    assert [note.split(" in ")[0] for note in notes] == ["built", "was there", "built"]
    done = kernels("build", "tiny", "--json")
    (result,) = json.loads(done.stdout)
    assert (result["name"], Path(result["where"]).is_file()) == ("tiny", True)
    assert texts[0].stdout.rstrip().endswith(result["where"])
    assert result["seconds"] > 0
    assert residue(kernels.cache) == []


@needs_compiler
def test_right_kernels_pass(kernels):
    """``test`` builds what is not there, has one line a kernel, and exits with 0 when all are right."""
    done = kernels("test", "tiny")
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["SET", "KERNEL", "PATH", "CASES", "ERROR", "/", "ALLOWED"]
    assert [line.split() for line in lines] == [
        ["tiny", "answer", "plain", "3", "0.00", "right"],
        ["tiny", "question", "plain", "1", "0.25", "right"],
    ]
    assert listed(kernels("list", "--json"))["state"] == "built"


@needs_compiler
def test_a_wrong_kernel_fails(kernels):
    """``test`` exits with 1 when one is wrong, in both forms, and still tells of the others."""
    tiny(kernels.source, 49)
    done = kernels("test", "tiny")
    assert done.returncode == 1
    assert [line.split()[1:] for line in done.stdout.splitlines()[1:]] == [
        ["answer", "plain", "3", "7.00", "WRONG"],
        ["question", "plain", "1", "0.25", "right"],
    ]
    done = kernels("test", "tiny", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout) == [
        {"set": "tiny", "kernel": "answer", "path": "plain", "cases": 3, "worst": 7.0, "good": False},
        {"set": "tiny", "kernel": "question", "path": "plain", "cases": 1, "worst": 0.25, "good": True},
    ]


def test_without_a_compiler_the_list_says_so(kernels):
    """The list is no place to fail: every set is there, with what is missing and how to get it."""
    done = kernels("list", **NO_COMPILER)
    assert (done.returncode, done.stderr) == (0, "")
    line = line_of(done)
    assert "no compiler" in line and "/nonexistent/c++" in line and "install a C++ compiler" in line
    state = listed(kernels("list", "--json", **NO_COMPILER))
    assert (state["state"], state["seconds"], state["size"]) == ("no compiler", None, None)
    assert "install a C++ compiler" in state["where"]


@FAILING
def test_without_a_compiler_nothing_is_built(kernels, arguments):
    """``build`` and ``test`` end in PT701 and 1, with nothing on standard output that a program could misread."""
    done = kernels(*arguments, "tiny", **NO_COMPILER)
    assert (done.returncode, done.stdout) == (1, "")
    assert "[PT701] CXX names no compiler: /nonexistent/c++" in done.stderr
    assert "to fix: install a C++ compiler" in done.stderr


@needs_compiler
@FAILING
def test_what_does_not_compile_ends_in_words(kernels, arguments):
    """A compiler's refusal is PT702 and 1, with its own message; the cache keeps nothing of it."""
    (kernels.source / "answer.h").write_text("#error so it is not\n")
    done = kernels(*arguments, "tiny")
    assert (done.returncode, done.stdout) == (1, "")
    assert "[PT702] tiny does not compile" in done.stderr
    assert "so it is not" in done.stderr
    assert list(kernels.cache.iterdir()) == []


@needs_compiler
def test_a_build_that_takes_too_long_ends_in_words(kernels, tmp_path):
    """POWERTRAIN_BUILD_TIMEOUT ends a compiler that hangs with PT702, and names itself."""
    slow = compiler(tmp_path / "slow", "sleep 60")
    done = kernels("build", "tiny", CXX=slow, POWERTRAIN_BUILD_TIMEOUT="0.5")
    assert (done.returncode, done.stdout) == (1, "")
    assert "[PT702]" in done.stderr and "set POWERTRAIN_BUILD_TIMEOUT" in done.stderr


@needs_compiler
def test_the_switch_of_the_runs_is_not_that_of_the_command(kernels):
    """POWERTRAIN_NATIVE=0 keeps kernels out of runs; who asks for a build or a test by name gets it."""
    off = {"POWERTRAIN_NATIVE": "0"}
    assert kernels("build", "tiny", **off).stdout.startswith("tiny: built in ")
    assert kernels("test", "tiny", **off).returncode == 0


def test_unknown_kernels_are_a_usage_error(kernels):
    """A name that no plugin has exits with 2 before anything is built, and the nearest is named."""
    done = kernels("build", "tiny", "tinny")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there are no kernels called 'tinny'; did you mean 'tiny'?" in done.stderr
    assert not kernels.cache.exists()


def test_broken_plugins_hide_no_kernels(kernels, broken_farm):
    """Beside plugins that cannot be imported the list has the others' kernels."""
    assert listed(kernels("list", "--json", **NO_COMPILER))["plugin"] == "little"


def test_one_plugins_mistake_does_not_hide_the_others(kernels, farm):
    """A plugin that cannot tell its kernels is named in a line; the rest is shown."""
    source = PLUGIN.replace("{directory!r}", repr(str(kernels.source))).replace('"little"', '"faulty"')
    farm.add("faulty", source.replace("return (", "return 1 / 0, ("))
    done = kernels("list")
    assert done.returncode == 0
    assert "'faulty' does not tell its kernels: ZeroDivisionError" in done.stderr
    assert line_of(done)
