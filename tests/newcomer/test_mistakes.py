"""The mistakes of a first day: each ends in words that say what to do, never in a traceback of ours."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
import powertrain

with powertrain.initialize(torch.nn.Linear(4, 1), "train.toml", loss_fn=torch.nn.functional.mse_loss) as engine:
    engine.train_step((torch.randn(8, 4), torch.randn(8, 1)))
    print("trained")
"""

LEFT_OUT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def here(tmp_path):
    """Return a directory with a training script and, when a test writes it, its configuration."""
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


def run(where, *arguments, **variables):
    kept = {n: v for n, v in os.environ.items() if n not in LEFT_OUT and not n.startswith("POWERTRAIN")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=where,
        env={**kept, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def powertrain(where, *arguments, **variables):
    return run(where, "-m", "powertrain.cli", *arguments, **variables)


def assert_words(done, *fragments, code=2):
    """Check that a command failed with ``code``, said ``fragments`` and a remedy on stderr, and showed no traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for fragment in (*fragments, "to fix: "):
        assert fragment in done.stderr
    assert done.stdout == ""


MISTAKES = {
    "typo in a key": (
        "[optimizer]\nler = 0.1\n",
        ["[PT100]", "train.toml:2:1", "optimizer.ler: unknown key", "did you mean optimizer.lr?"],
    ),
    "unknown section": (
        "[batc]\nmicro = 8\n",
        ["[PT100]", "train.toml:1:2", "batc: unknown section", "did you mean [batch]?"],
    ),
    "section of a plugin that is not there": (
        "[tensor]\nsize = 1\n",
        ["[PT100]", "train.toml:1:2", "tensor: unknown section", "pip install powertrain-tensor"],
    ),
    "wrong type": (
        '[batch]\nmicro = "8"\n',
        ["[PT100]", "train.toml:2:1", "batch.micro: wrong type", "expected an integer >= 1", "did you mean 8?"],
    ),
    "out of range": (
        "[optimizer]\nlr = -1\n",
        ["[PT100]", "train.toml:2:1", "optimizer.lr: out of range", "expected a number >= 0"],
    ),
    "not TOML": (
        "[batch\nmicro = 8\n",
        ["[PT100]", "train.toml:1:7", "not valid TOML"],
    ),
    "a batch that does not divide": (
        "[batch]\nmicro = 4\ntotal = 6\n",
        ["[PT100]", "batch.total", "micro 4", "does not divide total = 6", "total = 4 or total = 8"],
    ),
    "no such file": (None, ["[PT100]", "train.toml", "no such file", "`powertrain config init`"]),
}
"""What is in train.toml (None: it is not there), and what both commands must say."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_says_what_is_wrong(here, mistake):
    """`powertrain config check` names place, mistake and remedy, and exits with 2."""
    content, fragments = MISTAKES[mistake]
    if content is not None:
        (here / "train.toml").write_text(content)
    assert_words(powertrain(here, "config", "check", "train.toml"), *fragments)


@pytest.mark.parametrize("mistake", ["typo in a key", "a batch that does not divide", "no such file"])
def test_launch_says_the_same(here, mistake):
    """`powertrain launch` of a script with that file says the same, trains nothing, and exits with 2."""
    content, fragments = MISTAKES[mistake]
    if content is not None:
        (here / "train.toml").write_text(content)
    assert_words(powertrain(here, "launch", "train.py"), *fragments)


def test_all_mistakes_are_told_at_once(here):
    """Three mistakes in one file are three problems of one message."""
    (here / "train.toml").write_text('[optimizer]\nler = 0.1\nclip = true\n[batch]\nmicro = "8"\n')
    done = powertrain(here, "config", "check", "train.toml")
    assert_words(done, "3 problems", "train.toml:2:1", "train.toml:3:1", "train.toml:5:1")


def test_check_knows_other_numbers_of_ranks(here):
    """A file that is right for two ranks is refused for three, with totals that would work."""
    (here / "train.toml").write_text("[batch]\nmicro = 8\ntotal = 32\n")
    assert powertrain(here, "config", "check", "train.toml", "--ranks", "2").returncode == 0
    done = powertrain(here, "config", "check", "train.toml", "--ranks", "3")
    assert_words(
        done, "train.toml:3:1", "micro 8 x 3 ranks = 24 does not divide total = 32", "total = 24 or total = 48"
    )


def test_launch_refuses_a_batch_of_another_size(here):
    """A batch that the configuration does not describe is refused with both numbers."""
    (here / "train.toml").write_text("[batch]\nmicro = 3\n")
    done = powertrain(here, "launch", "train.py")
    assert_words(done, "[PT400]", "expected: 3 = micro 3 x accumulation 1", "found: 8")


def test_launch_refuses_a_script_that_is_not_there(here):
    """A misspelt script is an error of the command, before any process starts."""
    assert_words(powertrain(here, "launch", "trian.py"), "[PT310]", "there is no script trian.py")


def test_a_misspelt_command_gets_a_suggestion(here):
    """`powertrain confg` exits with 2 and suggests `config`."""
    done = powertrain(here, "confg", "check", "train.toml")
    assert done.returncode == 2
    assert "Did you mean 'config'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_world_size_without_rank_is_explained(here):
    """WORLD_SIZE set without RANK: under plain `python` the last lines name the variable and the remedy."""
    (here / "train.toml").write_text("")
    done = run(here, "train.py", WORLD_SIZE="2")
    assert done.returncode == 1
    assert "trained" not in done.stdout
    *_, what, where, remedy = done.stderr.strip().splitlines()
    assert what.endswith("[PT310] the variable RANK is not set, though others of its launcher are")
    assert where == "  at: RANK"
    assert remedy.startswith("  to fix: start with `powertrain launch --nproc N script.py`")


def test_launch_wins_over_variables_that_were_left_behind(here):
    """The same leftover WORLD_SIZE does not disturb `powertrain launch`, nor a check."""
    (here / "train.toml").write_text("")
    assert powertrain(here, "config", "check", "train.toml", WORLD_SIZE="2").returncode == 0
    done = powertrain(here, "launch", "train.py", WORLD_SIZE="2")
    assert done.returncode == 0, done.stderr
    assert "trained" in done.stdout
