"""The README and docs/ say only what is so: examples run, commands exist, references are whole, links lead on."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from powertrain import errors, hookspecs
from powertrain.config.schema import legal_keys

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TAUGHT = ("access", "checkpoints", "configuration", "hooks", "plugins")
TEACHING = ["README.md", *(f"docs/{name}.md" for name in TAUGHT)]
"""The pages that have examples to run."""

DRIVER = """
import json, os, pathlib, sys
for page, blocks in json.loads(pathlib.Path(sys.argv[1]).read_text()).items():
    os.makedirs(page)
    os.chdir(page)
    namespace = {"__name__": "__main__"}
    for line, code in blocks:
        exec(compile("\\n" * line + code, page, "exec"), namespace)
    os.chdir(sys.argv[2])
    print("ran", page)
"""
"""Runs the blocks of each page in a directory and a namespace of its own; tracebacks show the page's own lines."""


@attrs.frozen
class Block:
    """A fenced block: its language, the words after it, its first line's number and its text."""

    language: str
    words: tuple[str, ...]
    line: int
    text: str

    @property
    def file(self) -> str | None:
        return next((word[5:] for word in self.words if word.startswith("file=")), None)


def blocks(page: Path) -> Iterator[Block]:
    opened: tuple[list[str], int] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines()):
        if not line.startswith("```"):
            lines.append(line)
        elif opened is None:
            opened, lines = (line[3:].split() or [""], number + 1), []
        else:
            (language, *words), start = opened
            yield Block(language, tuple(words), start, "\n".join(lines) + "\n")
            opened = None
    assert opened is None, f"{page}: a block is not closed"


def runnable(page: Path, language: str, word: str = "run") -> list[Block]:
    return [block for block in blocks(page) if block.language == language and word in block.words]


def environment() -> dict[str, str]:
    launched = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    kept = {n: v for n, v in os.environ.items() if n not in launched and not n.startswith("POWERTRAIN")}
    return {**kept, "OMP_NUM_THREADS": "1"}


def run(arguments: list[str], where: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=where, env=environment(), capture_output=True, text=True, check=False
    )


def commands(block: Block) -> list[list[str]]:
    """Return the words of each `$ powertrain …` line."""
    lines = [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))[0] == "powertrain"]


def test_examples_run(tmp_path):
    """Each Python block that is marked to run does, page by page, in one process and an empty directory."""
    script, content, where = tmp_path / "driver.py", tmp_path / "blocks.json", tmp_path / "empty"
    script.write_text(DRIVER)
    content.write_text(
        json.dumps({name: [(b.line, b.text) for b in runnable(ROOT / name, "python")] for name in TEACHING})
    )
    where.mkdir()
    done = run(["-W", "error", str(script), str(content), str(where)], where)
    assert done.returncode == 0, done.stderr
    assert [line[4:] for line in done.stdout.splitlines() if line.startswith("ran ")] == TEACHING


def test_no_example_is_left_out():
    """A page with a block that is marked to run is among those whose blocks are run."""
    assert [name for page, name in zip(PAGES, NAMES, strict=True) if runnable(page, "python")] == TEACHING


def test_readme_example_runs_on_two_ranks(tmp_path):
    """The README's script, with its TOML file in place of the empty configuration, trains on two ranks and saves."""
    page = ROOT / "README.md"
    written = {block.file: block.text for block in blocks(page) if block.file}
    assert written["train.py"].count("{}, dataset") == 1
    (tmp_path / "train.py").write_text(written["train.py"].replace("{}, dataset", '"train.toml", dataset'))
    (tmp_path / "train.toml").write_text(written["train.toml"])
    done = run(["-m", "powertrain.cli", "launch", "--nproc", "2", "train.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"rank [01] of 2: loss \S+ after 16 steps", done.stdout)) == 2
    assert (tmp_path / "runs/checkpoints/step-00000016/manifest.json").exists()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_configurations_are_legal(page, tmp_path):
    """Each TOML block that is marked to be checked passes `powertrain config check`."""
    for index, block in enumerate(runnable(page, "toml", "check")):
        path = tmp_path / f"{index}.toml"
        path.write_text(block.text)
        done = run(["-m", "powertrain.cli", "config", "check", path.name], tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_marked_commands_run(page, tmp_path):
    """Each command of a console block that is marked to run exits with 0."""
    for block in runnable(page, "console"):
        for words in commands(block):
            done = run(["-m", "powertrain.cli", *words[1:]], tmp_path)
            assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"


def test_shown_commands_exist(tmp_path):
    """Each command that a page shows answers to --help, and its help lists each option that is shown."""
    shown: dict[tuple[str, ...], set[str]] = {}
    for page in PAGES:
        inline = re.findall(r"`powertrain ([^`]+)`", page.read_text(encoding="utf-8"))
        listed = [words[1:] for block in blocks(page) if block.language == "console" for words in commands(block)]
        for words in [*listed, *(text.split() for text in inline)]:
            depth = 0 if words[0].startswith("-") else 1
            if words[0] in ("config", "io", "plugins") and len(words) > 1 and re.fullmatch("[a-z]+", words[1]):
                depth = 2
            options = {word.partition("=")[0] for word in words if word.startswith("--")}
            shown.setdefault(tuple(words[:depth]), set()).update(options)
    assert len(shown) > 8
    for path, options in shown.items():
        done = run(["-m", "powertrain.cli", *path, "--help"], tmp_path)
        assert done.returncode == 0, f"powertrain {' '.join(path)}\n{done.stderr}"
        assert not {option for option in options if not re.search(rf"{option}\b", done.stdout)}, path


def signatures() -> dict[str, str]:
    """Return each hook's signature as its source has it."""
    tree = ast.parse(Path(hookspecs.__file__).read_text(encoding="utf-8"))
    return {
        node.name: f"{node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(mark) == "hookspec" for mark in node.decorator_list)
    }


def test_every_hook_is_described():
    """docs/hooks.md has each hook with its exact signature and no other; some runnable block implements it."""
    page = DOCS / "hooks.md"
    text = page.read_text(encoding="utf-8")
    described = dict(re.findall(r"### `(\w+)`\n\n```python\n(.*)\n```", text))
    assert described == signatures()
    examples = "".join(block.text for block in runnable(page, "python"))
    implemented = re.findall(r"@hookimpl\n\s+def (\w+)\(", examples)
    assert set(implemented) == set(signatures())
    design = (DOCS / "design.md").read_text(encoding="utf-8")
    assert [hook for hook in signatures() if f"`{hook}`" not in design] == []


def test_every_key_is_described():
    """docs/configuration.md has each key of each core table, and each option of each named choice, with its meaning."""
    described, heading = set(), ("", "")
    for line in (DOCS / "configuration.md").read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"##+ `\[(\w+)\]`(?: with `name = \"(.*)\"`)?", line):
            heading = (match[1], match[2] or "")
        elif match := re.fullmatch(r"\| `(\w+)` \| .+ \| .+ \| .{10,} \|", line):
            described.add((*heading, match[1]))
    assert {(key.section, key.choice, key.name) for key in legal_keys({})} - described == set()


def test_every_error_is_described():
    """docs/errors.md has each code once, with its class, exit code and remedy."""
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PowertrainError)
    ]
    text = (DOCS / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (PT\d+) \| `(\w+)` \| (\d) \| .+ \| (.+) \|$", text, re.MULTILINE)
    assert sorted(rows) == sorted((kind.code, kind.__name__, str(kind.exit_code), kind.advice) for kind in kinds)


def test_quoted_codes_exist():
    """Each code that a page quotes is one of powertrain.errors."""
    known = {kind.code for kind in vars(errors).values() if hasattr(kind, "code")}
    quoted = {code for page in PAGES for code in re.findall(r"PT\d{3}", page.read_text(encoding="utf-8"))}
    assert quoted <= known


def test_generated_pages_are_fresh(tmp_path):
    """`docs/generate.py --check` passes on the pages, and fails once a generated line is changed."""
    assert run([str(DOCS / "generate.py"), "--check"], tmp_path).returncode == 0
    for name in ("generate.py", "configuration.md", "errors.md"):
        shutil.copy(DOCS / name, tmp_path / name)
    page = tmp_path / "errors.md"
    page.write_text(page.read_text(encoding="utf-8").replace("| PT607 |", "| PT608 |"), encoding="utf-8")
    done = run(["generate.py", "--check"], tmp_path)
    assert done.returncode == 1
    assert "stale: errors.md" in done.stderr


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_resolve(page):
    """Each relative link and image leads to a file that is there, and to a heading where it names one."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


def test_core_files_are_on_the_map():
    """docs/design.md names each file and folder of the core."""
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    core = ROOT / "core" / "src" / "powertrain"
    names = [
        path.name + "/" * path.is_dir()
        for path in core.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    assert [name for name in names if f"  {name} " not in text] == []


def test_readme_lists_every_package():
    """The README's table has each distribution of the tree, with a link to its directory's README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for manifest in [*ROOT.glob("core/pyproject.toml"), *ROOT.glob("plugins/**/pyproject.toml")]:
        name = re.search(r'^name = "(.+)"$', manifest.read_text(encoding="utf-8"), re.MULTILINE)[1]
        place = manifest.parent.relative_to(ROOT).as_posix()
        assert f"| `{name}` | [{place}]({place}/README.md) |" in text


def test_readme_fits_its_promises():
    """The README's make targets exist, and the whole is at most a screen and a half of 80 lines."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [t for t in re.findall(r"`make (\w+)`", text) if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []
    assert len(text.splitlines()) <= 120
