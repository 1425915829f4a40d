"""``powertrain plan``: the estimates, the models it takes, and what it says when something does not fit."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from powertrain.errors import PowertrainError
from powertrain_zero.config import ZeroConfig
from powertrain_zero.plan.activations import measure, sample_batch
from powertrain_zero.plan.command import plan
from powertrain_zero.plan.estimate import Case, Need, estimate
from powertrain_zero.plan.model import build_model
from powertrain_zero.plan.probe import OptimizerFacts, probe
from powertrain_zero.plan.settings import load_settings, make_recipe, whole_names
from powertrain_zero.plan.view import parse_size

ROOT = Path(__file__).parents[3]
GPT = f"{ROOT / 'examples/gpt/model.py'}:GPT"
SMALL = {"sequence": 32, "width": 64, "depth": 3, "heads": 4}

SEVENTY = """
import torch, torch.nn.functional as F
from torch import nn

class Block(nn.Module):
    def __init__(self, width, heads, groups, inner):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, groups * self.size, bias=False)
        self.v = nn.Linear(width, groups * self.size, bias=False)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        batch, length, width = x.shape
        y = self.first(x)
        q, k, v = (
            linear(y).view(batch, length, -1, self.size).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, width))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

class Model(nn.Module):
    def __init__(self, width=8192, depth=80, vocabulary=128256, sequence=4096):
        super().__init__()
        self.sequence = sequence
        self.token = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, 64, 8, 28672) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens, targets):
        x = self.token(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "train.toml"
    file.write_text('[accelerator]\nuse = "cpu"\n[batch]\nmicro = 4\n[optimizer]\nname = "adamw"\n[zero]\nstage = 2\n')
    return str(file)


def run(config: str, *arguments: str, model: str = GPT, **model_args: Any) -> Result:
    given = ["--model-args", json.dumps(model_args or SMALL)] if model == GPT or model_args else []
    return CliRunner().invoke(plan, [config, "--model", model, *given, *arguments])


def answer(config: str, *arguments: str, **more: Any) -> Any:
    result = run(config, "--json", *arguments, **more)
    assert result.exception is None, result.output
    return json.loads(result.stdout)


def meta(make: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = make()
    return model


def facts(config: str, *overrides: str) -> OptimizerFacts:
    return probe(load_settings(config, overrides, 1))


# --- the categories ----------------------------------------------------------------------


def need(config: str, model: nn.Module, zero: ZeroConfig | None, ranks: int, *overrides: str) -> Need:
    settings = load_settings(config, overrides, ranks)
    from powertrain_zero.plan.activations import Activations

    accumulation = settings.batch.accumulation
    case = Case(zero=zero, ranks=ranks, recipe=make_recipe(settings.config), on_host=False, accumulation=accumulation)
    return estimate(model, case, probe(settings), Activations(peak=0))


def test_each_stage_shards_what_it_says(config: str) -> None:
    """Four ranks, fp32, no padding: stage 1 quarters AdamW's state, 2 the gradients, 3 the parameters."""
    model = meta(lambda: nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8))))
    bytes_ = 8 * 64 * 64 * 4
    many = "batch.accumulation=2"
    found = [need(config, model, stage and ZeroConfig(stage=stage), 4, many) for stage in (None, 1, 2, 3)]
    flags = 8 * 4  # the replicated buckets carry one number a parameter
    scalars = 8 * 4  # AdamW counts the steps of each parameter
    assert [one.parameters for one in found] == [bytes_, bytes_, bytes_, bytes_ // 4]
    assert [one.gradients for one in found] == [bytes_ + flags, bytes_, bytes_ // 4, bytes_ // 4]
    assert found[0].optimizer == 2 * bytes_ + scalars
    assert all(0 <= one.optimizer - bytes_ // 2 <= scalars for one in found[1:])
    assert [one.gathered for one in found] == [0, 0, 0, 2 * 64 * 64 * 4]  # a block, and one ahead


def test_gradients_of_one_micro_batch_need_no_whole_buffers(config: str) -> None:
    """At stage 1 gradients add up whole only where several micro-batches do; alone they always do."""
    model = meta(lambda: nn.Linear(64, 64, bias=False))
    whole = 64 * 64 * 4
    cases = [(4, "1", whole // 4), (4, "2", whole), (1, "1", whole)]
    for ranks, accumulation, expected in cases:
        found = need(config, model, ZeroConfig(stage=1), ranks, f"batch.accumulation={accumulation}")
        assert found.gradients == expected


def test_padding_is_counted(config: str) -> None:
    """Slices are whole multiples of 16 elements: seven parameters on two ranks take 32."""
    found = need(config, meta(lambda: nn.Linear(7, 1, bias=False)), ZeroConfig(stage=3, unit=[]), 2)
    assert (found.parameters, found.gradients) == (16 * 4, 16 * 4)


def test_low_precision_keeps_masters(config: str) -> None:
    """bf16: two bytes for the model and four for each master; a slice of the masters from stage 1 on."""
    model = meta(lambda: nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))))
    numel = 4 * 64 * 64
    for zero, expected in ((None, 6 * numel), (ZeroConfig(stage=1), 3 * numel), (ZeroConfig(stage=3), numel)):
        found = need(config, model, zero, 4, 'precision.compute="bf16"')
        assert found.parameters == expected


def test_state_in_another_format_is_counted_in_it(config: str) -> None:
    """[precision] optimizer = bf16 halves the state between steps, and the update needs a unit of it converted."""
    model = meta(lambda: nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))))
    exact = need(config, model, ZeroConfig(stage=2), 2)
    small = need(config, model, ZeroConfig(stage=2), 2, 'precision.optimizer="bf16"')
    assert small.optimizer * 2 == pytest.approx(exact.optimizer, rel=0.001)
    assert small.update > exact.update


def test_what_is_kept_for_backward_is_counted(config: str) -> None:
    """Without resharding all units are whole at once; a secondary slice costs its part of the parameters."""
    model = meta(lambda: nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8))))
    whole = 8 * 64 * 64 * 4
    base = need(config, model, ZeroConfig(stage=3), 4).gathered
    assert need(config, model, ZeroConfig(stage=3, reshard_after_forward=False), 4).gathered == whole
    assert need(config, model, ZeroConfig(stage=3, secondary=2), 4).gathered == base + whole // 2
    assert need(config, model, ZeroConfig(stage=3, prefetch=3), 4).gathered == 2 * base


@pytest.mark.parametrize(
    ("name", "options", "elements"),
    [
        ("adamw", (), 2),
        ("adamw", ("optimizer.amsgrad=true",), 3),
        ("sgd", (), 0),
        ("sgd", ("optimizer.momentum=0.9",), 1),
        ("torch.optim.Adadelta", (), 2),
    ],
)
def test_any_optimizers_state_is_found_by_a_step_of_it(
    config: str, name: str, options: tuple[str, ...], elements: int
) -> None:
    """How many tensors an optimizer keeps, options included, is seen in what a step leaves."""
    found = facts(config, f'optimizer.name="{name}"', *options)
    assert found.state_bytes((1000, 10)) == pytest.approx(elements * 4 * 10_000, abs=16)
    assert found.process > 50e6


def test_factored_state_follows_the_shape(config: str) -> None:
    """Adafactor keeps a row and a column of a matrix, not all of it."""
    found = facts(config, 'optimizer.name="torch.optim.Adafactor"')
    assert found.state_bytes((1000, 300)) < 4 * (1000 + 300 + 8)
    assert not found.pieces


def test_a_plugins_optimizer_is_planned_as_it_is_run(tmp_path: Path) -> None:
    """Moments of 8 bits, scales by the block, and matrices that come whole beside embeddings that are cut."""
    file = tmp_path / "run.toml"
    file.write_text('[optimizers]\n[optimizer]\nname = "adamw8bit"\n')
    found = facts(str(file))
    assert (found.pieces, found.flat, found.align) == (True, True, 256)
    assert found.state_bytes((1024, 512)) == pytest.approx(1024 * 512 * (2 + 8 / 256), abs=16)
    model = meta(lambda: nn.ModuleDict({"embed": nn.Embedding(1000, 16), "hidden": nn.Linear(16, 16, bias=False)}))
    sharded = need(str(file), model, ZeroConfig(stage=3), 4)
    assert sharded.optimizer == pytest.approx((16_000 + 256) * (2 + 8 / 256) / 4, rel=0.05)

    file.write_text('[optimizers]\n[optimizer]\nname = "muon"\n')
    assert not facts(str(file)).pieces
    settings = load_settings(str(file), (), 1)
    assert whole_names(settings.config, model) == {"hidden.weight"}
    case = Case(zero=ZeroConfig(stage=3), ranks=4, recipe=make_recipe(settings.config), on_host=False,
                accumulation=1, whole=whole_names(settings.config, model))  # fmt: skip
    from powertrain_zero.plan.activations import Activations

    found_need = estimate(model, case, probe(settings), Activations(peak=0))
    # AdamW's two moments of a quarter of the embedding, and the whole matrix's momentum.
    assert found_need.optimizer == pytest.approx(4 * (2 * 4000 + 256), rel=0.02)
    assert found_need.parameters == pytest.approx(4 * (4000 + 256), rel=0.02)


def test_state_in_another_format_needs_no_room_where_the_optimizer_keeps_it(tmp_path: Path) -> None:
    """An optimizer that reads and writes bf16 moments in its pass needs no converted copies."""
    file = tmp_path / "run.toml"
    file.write_text('[optimizers]\n[precision]\ncompute = "bf16"\noptimizer = "bf16"\n')
    model = meta(lambda: nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))))
    small = need(str(file), model, ZeroConfig(stage=2), 2)
    exact = need(str(file), model, ZeroConfig(stage=2), 2, 'precision.optimizer="fp32"')
    assert small.optimizer * 2 == pytest.approx(exact.optimizer, rel=0.001)
    assert small.update == exact.update


# --- activations ---------------------------------------------------------------------------


def test_saved_activations_are_those_of_a_real_run() -> None:
    """On the meta device autograd saves the same bytes as on the processor, attention's fused kernel included."""
    model = build_model(GPT, SMALL)
    batch = sample_batch(model, 4, None, {})
    assert not isinstance(batch, str)
    found = measure(model, batch, dtype=torch.float32)
    real = real_model()
    kept: dict[int, torch.UntypedStorage] = {}
    parameters = {param.untyped_storage().data_ptr() for param in real.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.zeros(4, 32, dtype=torch.int64)
    inputs = {tokens.untyped_storage().data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        real(tokens, tokens)
    expected = sum(storage.nbytes() for place, storage in kept.items() if place not in inputs)
    assert found.saved == pytest.approx(expected, rel=0.02)
    assert found.peak is not None and found.saved <= found.peak <= 1.3 * found.saved


def real_model() -> nn.Module:
    """Return the same model with memory."""
    sys.path.insert(0, str(ROOT / "examples/gpt"))
    try:
        module = importlib.import_module("model")
    finally:
        sys.path.pop(0)
    model: nn.Module = module.GPT(**SMALL)
    return model


class Looks(nn.Module):
    """Looks at a value in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum().item() > 0 else x


def test_what_cannot_be_measured_is_unknown(config: str) -> None:
    """A model that looks at values has unknown activations, not none, and the reason is told."""
    spec = f"{__file__}:Looks"
    found = answer(config, model=spec)
    assert found["needs"]["config"]["activations"] is None
    assert any("could not be measured" in note and "meta" in note for note in found["notes"])
    assert "unknown" in run(config, model=spec).output


def test_an_input_can_be_described(config: str, tmp_path: Path) -> None:
    """What cannot be guessed is described by --input; until then it is said that it is missing."""
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 30 * 30, 2))\n"
    )
    guess = answer(config, model=f"{file}:Net")
    assert guess["needs"]["config"]["activations"] is None
    found = answer(config, "--input", "input=4x3x32x32:fp32", model=f"{file}:Net")
    assert found["needs"]["config"]["activations"] >= 4 * 8 * 30 * 30 * 4


def test_activations_follow_the_batch(config: str) -> None:
    """Twice the samples, twice the activations; the sequence is the model's unless given."""
    small, large = (answer(config, "--batch", size)["needs"]["config"]["activations"] for size in ("2", "4"))
    assert large == pytest.approx(2 * small, rel=0.05)
    assert answer(config, "--batch", "4", "--sequence", "16")["needs"]["config"]["activations"] < 0.6 * large


# --- what is printed ---------------------------------------------------------------------------


def test_json_holds_every_category_of_every_stage(config: str) -> None:
    """--json: the configuration's need and each stage's, in bytes, and what they add up to."""
    found = answer(config, "--ranks", "2")
    assert list(found["needs"]) == ["config", "0", "1", "2", "3"]
    assert found["needs"]["config"] == found["needs"]["2"]
    fields = set(attrs.fields_dict(Need)) | {"training", "peak", "process_peak"}
    for one in found["needs"].values():
        assert set(one) == fields
        passes = max(one["gathered"] + one["activations"], one["update"])
        parts = one["parameters"] + one["gradients"] + one["optimizer"] + one["communication"] + one["allocator"]
        assert one["training"] == parts + passes
        assert one["process_peak"] == one["peak"] + found["fixed"] and one["peak"] >= one["birth"]
    assert (found["ranks"], found["stage"], found["batch"], found["fits"]) == (2, 2, 4, True)
    assert found["limit"] is None and found["changes"] == []


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_table_fits_the_terminal(config: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and bars keep to the width, without colours where they are not wanted; each stage has its bar."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    result = run(config, "--ranks", "2")
    assert result.exit_code == 0, result.output
    table = [line for line in result.output.splitlines()[1:] if not line.startswith("- ")]
    assert max(map(len, table)) <= width, max(table, key=len)
    assert "\x1b" not in result.output
    for word in ("parameters", "activations", "peak at birth", "the process", "stage 3 "):
        assert word in result.output


def test_without_a_zero_section_it_is_stage_0(tmp_path: Path) -> None:
    """A configuration without [zero] is planned as replicated, and ranks come from the batch sizes."""
    file = tmp_path / "plain.toml"
    file.write_text("[batch]\nmicro = 2\naccumulation = 2\ntotal = 16\n")
    found = answer(str(file))
    assert (found["stage"], found["ranks"]) == (0, 4)
    assert found["needs"]["config"] == found["needs"]["0"]


# --- limits -------------------------------------------------------------------------------------


def test_what_cannot_fit_is_refused_with_changes_that_would(config: str) -> None:
    """Half the memory: exit code 1, and at least two changes, each of which fits when it is planned itself."""
    tables = ("--ranks", "2", "--batch", "16", "--set", "zero.stage=1")
    sizes = {"sequence": 64, "width": 512, "depth": 12, "heads": 8}
    found = answer_of(run(config, *tables, "--json", **sizes))
    base = found["fixed"]
    limit = base + (found["needs"]["config"]["process_peak"] - base) // 2
    result = run(config, *tables, "--limit", str(limit), **sizes)
    assert result.exit_code == 1
    assert "cannot fit" in result.output
    refused = answer_of(run(config, *tables, "--limit", str(limit), "--json", **sizes))
    assert refused["fits"] is False and len(refused["changes"]) >= 2
    assert all(change["process_peak"] <= limit for change in refused["changes"])
    steps = {step for change in refused["changes"] for step in change["steps"]}
    assert any("micro" in step for step in steps)
    assert run(config, *tables, "--limit", "1TB", **sizes).exit_code == 0


def answer_of(result: Result) -> Any:
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("text", "expected"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("10", 10), ("3g", 3 * 10**9)]
)
def test_sizes(text: str, expected: int) -> None:
    """Sizes are written as people write them."""
    assert parse_size(text) == expected


# --- models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere/model.py:GPT", ("nowhere/model.py", "tried")),
        (GPT.replace("GPT", "GTP"), ("did you mean 'GPT'",)),
        ("no_such_package.module:Model", ("cannot be imported", "no_such_package")),
        ("examples/gpt/model.py", ("--model", "write examples/gpt/model.py:Name")),
        ("json:dumps", ("cannot be built",)),
        ("json:__name__", ("cannot be called",)),
        ("platform:node", ("is no model", "str")),
        (f"{ROOT / 'examples/gpt'}", ("no Hugging Face configuration",)),
    ],
)
def test_a_wrong_model_says_what_to_write(config: str, spec: str, words: tuple[str, ...]) -> None:
    """Each wrong --model is an error for the user, with what was tried and what would be right."""
    with pytest.raises(PowertrainError) as caught:
        build_model(spec, {})
    assert caught.value.exit_code == 2
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_constructor_that_looks_at_values_is_told(tmp_path: Path) -> None:
    """A constructor that needs elements cannot be planned; the message names its error."""
    file = tmp_path / "odd.py"
    file.write_text(
        "import torch\nfrom torch import nn\n\nclass Odd(nn.Linear):\n"
        "    def __init__(self):\n        super().__init__(4, 4)\n        self.size = self.weight.sum().item()\n"
    )
    with pytest.raises(PowertrainError, match="cannot be built on the meta device"):
        build_model(f"{file}:Odd", {})


def test_a_missing_transformers_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A Hugging Face configuration without the package: the remedy is to install it."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PowertrainError, match="pip install transformers"):
        build_model(str(tmp_path), {})


# --- processes of their own --------------------------------------------------------------------------------

COMMAND = """
import json, pathlib, resource, sys
from powertrain_zero.plan.command import plan
try:
    plan.main(sys.argv[1:], prog_name="powertrain plan")
finally:
    # Not getrusage: its peak is inherited from the process that started this one.
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    # The optimizer is probed in a fork; what it shares with this process is counted twice.
    beside = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps({"peak": peak + beside}), file=sys.stderr)
"""


def alone(*arguments: str) -> tuple[Any, Any]:
    """Run the command in a process of its own; return its JSON, and what it used."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments, "--json"],
        capture_output=True, text=True, timeout=280, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), json.loads(done.stderr.splitlines()[-1])


@pytest.mark.slow
def test_seventy_billion_parameters_are_planned_in_little_memory(config: str, tmp_path: Path) -> None:
    """A 70B model is planned in less than 1 GB, the process beside it included."""
    file = tmp_path / "seventy.py"
    file.write_text(SEVENTY)
    found, used = alone(config, "--model", f"{file}:Model", "--ranks", "64", "--set", "zero.stage=3")
    assert found["parameters"] > 70e9
    assert found["needs"]["config"]["activations"] > 100e9
    assert used["peak"] * 1024 < 1e9


@pytest.mark.slow
def test_a_hugging_face_configuration(config: str, tmp_path: Path) -> None:
    """A directory with config.json is built through transformers, whatever weights it lacks."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    more = {"model_type": "llama", "vocab_size": 512, "max_position_embeddings": 48, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **more}))
    found, _ = alone(config, "--model", str(tmp_path), "--ranks", "2", "--model-args", '{"num_hidden_layers": 2}')
    block = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert found["parameters"] == 2 * block + 2 * 512 * 64 + 64
    assert found["inputs"] == "input_ids (4, 48), labels (4, 48)"
    assert found["needs"]["config"]["activations"] > 4 * 48 * 512 * 4
