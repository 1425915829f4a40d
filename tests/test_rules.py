"""The rules of the house, each held by a tool or by a look at the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core/src/powertrain"
VENDORS = ("cuda", "npu", "hpu", "xpu", "mlu", "sdaa", "supa", "rocm", "hip")
READS_ENVIRONMENT = {
    "core/src/powertrain/environment.py",
    "core/src/powertrain/config/document.py",
    "core/src/powertrain/testing/pool.py",  # hands its environment to the ranks that it starts
    "core/src/powertrain/testing/worker.py",  # sets a rank's variables, and takes them back
}
STATE_PATH = ["core/src/powertrain/saved.py", "core/src/powertrain/random_state.py", "plugins/checkpoint/src"]
CONTAINERS = {"list", "dict", "set", "defaultdict", "deque", "OrderedDict", "Counter", "bytearray"}
CHANGES = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "discard", "clear"}


def sources(*places: str) -> list[Path]:
    """Return the source files of the packages, or below some paths."""
    if places:
        roots = [ROOT / place for place in places]
    else:
        roots = [ROOT / "core/src", *ROOT.glob("plugins/*/src"), *ROOT.glob("plugins/accelerators/*/src")]
    files = [file for root in roots for file in ([root] if root.is_file() else sorted(root.rglob("*.py")))]
    assert files
    return files


@cache
def tree(file: Path) -> ast.Module:
    """Return a file's syntax tree."""
    return ast.parse(file.read_text(encoding="utf-8"))


def place(file: Path, node: ast.AST | None = None) -> str:
    """Return ``path:line`` relative to the root."""
    line = getattr(node, "lineno", None)
    return file.relative_to(ROOT).as_posix() + (f":{line}" if line else "")


def dotted(node: ast.AST) -> str:
    """Return ``a.b.c`` of a chain of attributes, or an empty string."""
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return node.id if isinstance(node, ast.Name) else ""


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    command = [sys.executable, "-B", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


# --- what tools hold ------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "ruff", "check", "--no-cache", "."],
        ["-m", "ruff", "format", "--no-cache", "--check", "."],
        ["-m", "mypy"],
        ["-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"],
    ],
    ids=["ruff", "format", "mypy", "import-linter"],
)
def test_the_tools_find_nothing(command: list[str]) -> None:
    """Lint, format, strict types and import contracts hold over the whole repository."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- what the source may not say --------------------------------------------------------


def test_the_core_names_no_vendor() -> None:
    """No file of the core, templates included, holds the name of a device vendor."""
    word = re.compile(rf"\b({'|'.join(VENDORS)})\b", re.IGNORECASE)
    found = [
        f"{place(file)}:{number}: {line.strip()}"
        for file in sorted(CORE.rglob("*"))
        if file.is_file() and file.suffix != ".pyc"
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if word.search(line)
    ]
    assert not found, "\n".join(found)


def test_saved_state_is_never_pickled() -> None:
    """What writes and reads checkpoints uses neither pickle nor torch's functions that do."""
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
    found = []
    for file in sources(*STATE_PATH):
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]}
            else:
                names = set()
            if names & banned or dotted(node) in ("torch.load", "torch.save"):
                found.append(place(file, node))
    assert not found, found


def torch_names(module: ast.Module) -> set[str]:
    """Return the names that are bound to torch, its modules or their contents."""
    names = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.partition(".")[0]
                for alias in node.names
                if alias.name.split(".")[0] == "torch"
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_torch(module: ast.Module) -> Iterator[ast.AST]:
    """Yield each use of a name of torch that starts with an underscore."""
    names = torch_names(module)
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute):
            parts = dotted(node).split(".")
            if parts[0] in names and private(node.attr):
                yield node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            if any(map(private, [*(node.module or "").split("."), *(alias.name for alias in node.names)])):
                yield node
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "torch" and any(map(private, parts)):
                    yield node


def test_nothing_private_of_torch_is_used() -> None:
    """No source uses an underscore name of torch, except the core's compat.py."""
    found = [place(file, node) for file in sources() for node in private_torch(tree(file)) if file.name != "compat.py"]
    assert not found, found


def test_the_environment_is_read_in_one_place() -> None:
    """Only the modules made for it touch os.environ; everything else asks them."""
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    found = set()
    for file in sources():
        for node in ast.walk(tree(file)):
            touches = isinstance(node, ast.Attribute) and dotted(node) in {f"os.{name}" for name in names}
            imports = isinstance(node, ast.ImportFrom) and node.module == "os"
            if touches or (imports and names & {alias.name for alias in node.names}):
                found.add(place(file))
    assert found == READS_ENVIRONMENT


# --- no module-level mutable state --------------------------------------------------------


def top_level(module: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements that run on import, outside functions and classes."""
    pending: list[ast.stmt] = list(module.body)
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
            for field in ("body", "orelse", "finalbody"):
                pending += getattr(node, field, [])


def is_container(value: ast.expr | None) -> bool:
    if isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)):
        return True
    return isinstance(value, ast.Call) and dotted(value.func).rpartition(".")[2] in CONTAINERS


def containers(module: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Yield the names that are bound to a list, dict or set on import."""
    for node in top_level(module):
        if isinstance(node, ast.Assign) and is_container(node.value):
            yield from ((node, target.id) for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and is_container(node.value) and isinstance(node.target, ast.Name):
            yield node, node.target.id


def mutations(module: ast.Module, names: set[str]) -> Iterator[ast.AST]:
    """Yield what changes one of ``names``, at whatever depth."""

    def last(node: ast.AST) -> str:
        return dotted(node).rpartition(".")[2]

    for node in ast.walk(module):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            changed: ast.AST = node.value
        elif isinstance(node, ast.AugAssign):
            changed = node.target
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            changed = node.func.value
        else:
            continue
        if last(changed) in names:
            yield node


def test_modules_hold_no_mutable_state() -> None:
    """A module binds lists, dicts and sets to constants only, which nothing ever changes."""
    constants = {name for file in sources() for _, name in containers(tree(file))}
    lower = [
        f"{place(file, node)} {name}"
        for file in sources()
        for node, name in containers(tree(file))
        if name != "__all__" and not re.fullmatch(r"_?[A-Z][A-Z0-9_]*", name)
    ]
    changed = [place(file, node) for file in sources() for node in mutations(tree(file), constants)]
    assert not lower, lower
    assert not changed, changed


def test_nothing_is_global() -> None:
    """No function rebinds a name of its module, and no function remembers results in its module."""
    found = []
    for file in sources():
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Global):
                found.append(place(file, node))
            elif isinstance(node, ast.FunctionDef):
                cached = {dotted(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list}
                if cached & {"cache", "lru_cache", "functools.cache", "functools.lru_cache"}:
                    found.append(place(file, node))
    assert not found, found


@pytest.mark.parametrize(
    ("source", "finder"),
    [
        ("import torch\ntorch._C", private_torch),
        ("import torch.nn as n\nn.modules._x.y", private_torch),
        ("from torch.nn import functional as F\nF._canonical_mask(1)", private_torch),
        ("from torch._utils import x", private_torch),
        ("import torch._dynamo", private_torch),
        ("if True:\n    cache = {}", containers),
        ("cache: dict[str, int] = dict()", containers),
        ("import collections\ncache = collections.defaultdict(list)", containers),
        ("def f(): A['x'] = 1", lambda module: mutations(module, {"A"})),
        ("def f(): m.A.append(1)", lambda module: mutations(module, {"A"})),
        ("def f():\n    A += [1]", lambda module: mutations(module, {"A"})),
        ("def f(): del A[0]", lambda module: mutations(module, {"A"})),
    ],
)
def test_the_rules_can_fail(source: str, finder: object) -> None:
    """Each look at the source finds what it looks for."""
    assert list(finder(ast.parse(source)))  # type: ignore[operator]


# --- what an import may do ------------------------------------------------------------------


def test_importing_powertrain_does_nothing() -> None:
    """The import loads no torch, starts nothing, opens nothing for writing and leaves the environment alone."""
    done = python(
        """
import os, sys, threading
events = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        events.append((event, arguments[0]))
    elif event.startswith(("subprocess.", "os.fork", "os.posix_spawn", "os.putenv", "os.unsetenv", "os.mkdir",
                           "os.remove", "os.rename", "socket.", "os.exec", "os.spawn", "signal.")):
        events.append((event, arguments))
before = dict(os.environ)
sys.addaudithook(hook)
import powertrain
assert not events, events
assert "torch" not in sys.modules
assert dict(os.environ) == before
assert threading.active_count() == 1
assert not [name for name in sys.modules if name.startswith("powertrain_")]
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_the_modules_of_entry_points_are_light() -> None:
    """Importing every first-party plugin module loads no torch."""
    done = python(
        """
import importlib, sys
from importlib.metadata import entry_points
points = [p for p in entry_points(group="powertrain.plugins") if p.value.startswith("powertrain_")]
assert len(points) >= 6, points
for point in points:
    importlib.import_module(point.module)
    assert "torch" not in sys.modules, point
"""
    )
    assert done.returncode == 0, done.stderr


def test_the_hook_contract_is_light() -> None:
    """What plugin modules import (hookspecs, plugin, errors, discovery) loads no torch either."""
    modules = "powertrain.hookspecs, powertrain.plugin, powertrain.errors, powertrain.discovery, powertrain.cli"
    done = python(f"import sys\nimport {modules}\nassert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr
