"""An accelerator by somebody else: built, installed apart, trained on, and held to the contract."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOY = Path(__file__).parent / "toy"
QUIET = ("--quiet", "--disable-pip-version-check")
OFFLINE = ("--no-deps", "--no-index")

TRAIN = """
import json
import torch
import powertrain

torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
config = {"optimizer": {"name": "sgd", "lr": 0.1}, "accelerator": {"use": "toy"}}
inputs = torch.randn(8, 4)
targets = inputs.sum(1, keepdim=True)
losses = []
with powertrain.initialize(model, config, loss_fn=torch.nn.functional.mse_loss) as engine:
    for _ in range(5):
        losses.append(float(engine.train_step((inputs, targets))))
    name = engine.context.accelerator.describe()["name"]
print(json.dumps({"losses": losses, "name": name}))
"""

DETECT = """
import torch
import powertrain
from powertrain.errors import PowertrainError

try:
    powertrain.initialize(torch.nn.Linear(4, 1), {})
except PowertrainError as error:
    print(error)
"""


def python(*arguments, site, **variables):
    """Run Python with the installed toy on its path, and no launcher's variables."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(site), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def install(source, site, wheels):
    """Build a wheel of ``source`` and install it into ``site``."""
    for command in (
        ("wheel", *OFFLINE, *QUIET, "--no-build-isolation", "--wheel-dir", wheels, source),
        ("install", *OFFLINE, *QUIET, "--find-links", wheels, "--target", site, "--upgrade", source_name(source)),
    ):
        done = subprocess.run([sys.executable, "-m", "pip", *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def source_name(source):
    """Return a distribution's name from its pyproject."""
    line = next(line for line in (source / "pyproject.toml").read_text().splitlines() if line.startswith("name"))
    return line.split('"')[1]


def copied(place, name):
    """Return a copy of the toy's source under another name: toy becomes ``name``."""
    source = place / name
    shutil.copytree(TOY, source, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "src/powertrain_toy").rename(source / f"src/powertrain_{name}")
    for path in source.rglob("*"):
        if path.suffix in (".py", ".toml"):
            path.write_text(path.read_text().replace("powertrain_toy", f"powertrain_{name}").replace("toy", name))
    return source


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A directory into which nothing but the toy is installed, from a wheel."""
    place = tmp_path_factory.mktemp("toy")
    # Built from a copy: the checkout stays as it is.
    shutil.copytree(TOY, place / "source", ignore=shutil.ignore_patterns("__pycache__"))
    install(place / "source", place / "site", place / "wheels")
    return place / "site"


@pytest.mark.slow
def test_trains_on_the_toy(site):
    """Five steps on the stranger's accelerator lower the loss."""
    done = python("-c", TRAIN, site=site)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["name"] == "Toy 1"
    assert len(result["losses"]) == 5
    assert result["losses"] == sorted(result["losses"], reverse=True)
    assert result["losses"][-1] < 0.9 * result["losses"][0]


@pytest.mark.slow
def test_the_toy_conforms(site):
    """``powertrain plugins test toy`` passes."""
    done = python("-m", "powertrain.cli", "plugins", "test", "toy", "--json", site=site)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {result["role"]: result for result in json.loads(done.stdout)}
    assert results.keys() == {"plugin", "accelerator"}
    assert all(result["failed"] == 0 for result in results.values())
    assert results["accelerator"]["passed"] >= 15


@pytest.mark.slow
def test_two_candidates_must_be_chosen_between(site, tmp_path):
    """Where two accelerators are available and none is named, the error names both."""
    both = tmp_path / "both"
    shutil.copytree(site, both)
    install(copied(tmp_path, "gadget"), both, tmp_path / "wheels")
    done = python("-c", DETECT, site=both, POWERTRAIN_PLUGINS="toy,gadget")
    assert done.returncode == 0, done.stderr
    assert "PT203" in done.stdout
    assert "gadget" in done.stdout
    assert "toy" in done.stdout
    assert "[accelerator] use" in done.stdout


@pytest.mark.slow
def test_a_failing_plugin_fails_its_test(tmp_path):
    """A fault in an installed accelerator is found by ``powertrain plugins test``, which exits with 1."""
    source = copied(tmp_path, "broken")
    file = source / "src/powertrain_broken/accelerator.py"
    file.write_text(file.read_text().replace("torch.default_generator.set_state(state)", "pass"))
    install(source, tmp_path / "site", tmp_path / "wheels")
    done = python("-m", "powertrain.cli", "plugins", "test", "broken", site=tmp_path / "site")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed: accelerator: test_random_state_continues" in done.stdout


@pytest.mark.slow
def test_an_unknown_plugin_is_a_users_mistake(site):
    """Testing a plugin that is not installed exits with 2 and says how to install it."""
    done = python("-m", "powertrain.cli", "plugins", "test", "tyo", site=site)
    assert done.returncode == 2
    assert "'tyo' is not installed" in done.stderr
    assert "Traceback" not in done.stderr
