"""Recomputation under sharding, in every precision: the same bits as without it, dropout included."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import company
import hugging
import plain
import pytest
import sharded
import torch
from torch import nn

import powertrain
from powertrain.plugin import NoConfig, Phase
from powertrain.roles.communicator import Done
from powertrain.roles.tier import Lease, Slot, Tier
from powertrain_offload.activations import OffloadedActivations, offload_activations

WIDTH, LENGTH, WORDS, DEPTH = 16, 12, 20, 4
STEPS = 3


class Block(nn.Module):
    """Attention and a perceptron, with dropout; a keyword argument and a tuple, as model libraries pass them."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.drop = nn.Dropout(dropout)
        self.runs = 0

    def forward(self, x: torch.Tensor, *, angles: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, str]:
        self.runs += 1
        query, key, value = (part.unsqueeze(1) for part in self.mix(self.norm(x)).chunk(3, -1))
        cosine, sine = angles
        mixed = nn.functional.scaled_dot_product_attention(query * cosine, key * sine, value, is_causal=True)
        x = x + self.drop(self.out(mixed.squeeze(1)))
        return x + self.drop(self.mlp(x)), "no tensor"


class Language(nn.Module):
    """Predicts words; the first and the last layer share a weight, and the first block is called twice."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens)
        places = torch.linspace(0, 1, LENGTH).unsqueeze(-1).to(x.dtype)
        for block in [*self.blocks, self.blocks[0]]:
            x, _ = block(x, angles=(places.cos(), places.sin()))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())


def make(dropout: float) -> Language:
    torch.manual_seed(4)
    return Language(dropout)


def micros(engine: powertrain.Engine) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return this rank's micro-batches."""
    generator = torch.Generator().manual_seed(9 + engine.data_rank)
    tokens = torch.randint(0, WORDS, (engine.context.batch.accumulation, 2, 8, LENGTH), generator=generator)
    return [(one[0], one[1]) for one in tokens]


def kept(engine: powertrain.Engine) -> int:
    """Return the bytes of what autograd keeps of one forward pass, and go back through it."""
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine(micros(engine)[0])
    total = sum(storage.nbytes() for storage in found.values())
    found.clear()
    engine.backward(loss)
    return total


def settings(stage: int, precision: dict[str, Any], recompute: dict[str, Any] | None, **zero: Any) -> dict[str, Any]:
    tables: dict[str, Any] = {
        "batch": {"accumulation": 2},
        "precision": precision,
        "optimizer": {"lr": 1e-2, "clip": 0.5},
    }
    if stage:
        tables["zero"] = {"stage": stage, "bucket": 700, **zero}
    if recompute is not None:
        tables["recompute"] = recompute
    return tables


def train(configs: Sequence[dict[str, Any]], dropout: float = 0.2) -> list[dict[str, Any]]:
    """Train one engine after the other; run on every rank."""
    results = []
    for config in configs:
        model = make(dropout)
        with powertrain.initialize(model, config) as engine:
            losses = [float(engine.train_step(iter(micros(engine)))) for _ in range(STEPS)]
            runs = [block.runs for block in model.blocks]
            slices = sharded.slices(engine)
            results.append({"losses": losses, "slices": slices, "runs": runs, "kept": kept(engine)})
    return results


TABLES: list[dict[str, Any]] = [
    {"policy": "full"},
    {"policy": "every", "every": 3},
    {"policy": "selective", "save": ["mm", "sdpa"]},
]
AGAIN = [[0, 1, 2, 3], [0, 3], [0, 1, 2, 3]]
"""The blocks that each policy runs again."""
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"compute": "bf16"},
    "fp16": {"compute": "fp16"},
    "autocast": {"compute": "bf16", "autocast": True},
}


def same(results: list[list[dict[str, Any]]], count: int) -> None:
    """Assert that all runs of each rank ended in the bits of its first one."""
    for run in range(1, count):
        for rank in results:
            assert rank[run]["losses"] == rank[0]["losses"], run
        first, other = (sharded.whole([rank[number]["slices"] for rank in results]) for number in (0, run))
        assert plain.same_bits(other, first), run


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_same_bits(ranks: Any, stage: int, precision: str) -> None:
    """Each policy trains to the bits of the run without it, runs again what it says, and keeps less."""
    tables = [None, {"policy": "none"}, *TABLES]
    configs = [settings(stage, PRECISIONS[precision], table) for table in tables]
    results = ranks(2, train, configs)
    same(results, len(tables))
    once = 2 * STEPS
    for rank in results:
        for found, again in zip(rank, [[], [], *AGAIN], strict=True):
            calls = [2, 1, 1, 1]  # of each block, in a pass
            wanted = [once * count * (2 if number in again else 1) for number, count in enumerate(calls)]
            assert found["runs"] == wanted
        assert rank[2]["kept"] < rank[0]["kept"] / 3
        assert rank[2]["kept"] < rank[3]["kept"] < rank[0]["kept"]


@pytest.mark.parametrize(
    "zero",
    [
        {"unit": "Linear"},
        {"unit": ["blocks.*", "blocks.*.mlp"]},
        {"unit": 5000},
        {"prefetch": 0},
        {"reshard_after_forward": False},
        {"secondary": 2},
    ],
    ids=str,
)
def test_any_units(ranks: Any, zero: dict[str, Any]) -> None:
    """Stage 3 may gather more, less, or something else than what is recomputed together."""
    tables = [None, {"policy": "full"}, {"policy": "every"}, {"policy": "selective"}, {"blocks": "blocks.*.mlp"}]
    results = ranks(2, train, [settings(3, {}, table, **zero) for table in tables])
    same(results, len(tables))


def resume(stage: int, directory: str) -> list[sharded.Slices]:
    """Train with recomputation, go on without it, and the other way round; run on every rank."""
    found = []
    for number, (first, then) in enumerate([(None, None), ({}, None), (None, {})]):
        place = f"{directory}/{number}"
        with powertrain.initialize(make(0.2), settings(stage, {}, first)) as engine:
            for _ in range(2):
                engine.train_step(iter(micros(engine)))
            engine.save_checkpoint(place)
        with powertrain.initialize(make(0.2), settings(stage, {}, then)) as engine:
            engine.load_checkpoint(place)
            engine.train_step(iter(micros(engine)))
            found.append(sharded.slices(engine))
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_a_checkpoint_knows_nothing_of_it(ranks: Any, stage: int, tmp_path: Any) -> None:
    """Recomputation is switched on or off between runs: names and random numbers are those of the plain model."""
    results = ranks(2, resume, stage, str(tmp_path))
    for run in (1, 2):
        first, other = (sharded.whole([rank[number] for rank in results]) for number in (0, run))
        assert plain.same_bits(other, first)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_hugging_face_models(ranks: Any, name: str) -> None:
    """Models that make caches of keys and values, with tied weights, an encoder and a decoder: the plain result."""
    batches = [hugging.micros(2)] * company.STEPS
    cases = [
        (batches, company.config(stage, recompute=table), {"name": name})
        for stage, table in [(0, {}), (3, {}), (3, {"policy": "every"}), (3, {"policy": "selective"})]
    ]
    theirs = company.plain_loop(hugging.make, batches, None, name=name)
    for parts in zip(*ranks(2, company.train_many, hugging.make, cases, None), strict=True):
        company.equal(parts, theirs)


class ElsewhereTier(Tier):
    """Keeps bytes that are no tensors."""

    name, device = "elsewhere", torch.device("cpu")

    def reserve(self, label: str, nbytes: int) -> Slot:
        return ElsewhereSlot(nbytes)


class ElsewhereSlot(Slot):
    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.device = nbytes, ElsewhereTier.device
        self.content = bytearray(nbytes)

    def fetch(self, start: int = 0, stop: int | None = None, device: torch.device | None = None) -> Lease:
        return ElsewhereLease(self, start, self.nbytes if stop is None else stop)

    def blank(self, start: int = 0, stop: int | None = None, device: torch.device | None = None) -> Lease:
        return ElsewhereLease(self, start, self.nbytes if stop is None else stop)

    def free(self) -> None:
        self.content = bytearray()


class ElsewhereLease(Lease):
    def __init__(self, slot: ElsewhereSlot, start: int, stop: int) -> None:
        self.slot, self.start, self.stop = slot, start, stop
        self.tensor = torch.zeros(stop - start, dtype=torch.uint8)

    def wait(self) -> torch.Tensor:
        content = self.slot.content[self.start : self.stop]
        return self.tensor.copy_(torch.frombuffer(content, dtype=torch.uint8))

    def store(self) -> Done:
        self.slot.content[self.start : self.stop] = self.tensor.numpy().tobytes()
        self.tensor.fill_(1)
        return Done()

    def release(self) -> None:
        self.tensor.fill_(2)


class Away(powertrain.Plugin[NoConfig]):
    """Offloads activations to the tier above."""

    name, api, phase = "away", 1, Phase.RECOMPUTE
    activations: OffloadedActivations

    @powertrain.hookimpl
    def transform_model(self, model: nn.Module) -> None:
        self.activations = offload_activations(model, ElsewhereTier(), least=256)

    @powertrain.hookimpl
    def on_close(self) -> None:
        self.activations.close()


def offloaded(configs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train each run twice, the second time with activations elsewhere; run on every rank."""
    results = []
    for config in configs:
        for plugins in ([], [Away(NoConfig())]):
            with powertrain.initialize(make(0.2), config, plugins=plugins) as engine:
                losses = [float(engine.train_step(iter(micros(engine)))) for _ in range(STEPS)]
                result = {"losses": losses, "slices": sharded.slices(engine), "kept": 0, "moved": 0, "left": 0}
                loss = engine(micros(engine)[0])
                if plugins:
                    result["moved"] = plugins[0].activations.resting
                engine.backward(loss)
                del loss
                if plugins:
                    result["left"] = plugins[0].activations.resting
                results.append(result)
    return results


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_activations_elsewhere(ranks: Any, stage: int, precision: str) -> None:
    """Offloaded activations, with each policy and without: the same bits; of recomputed blocks only inputs move."""
    tables = [None, {"policy": "full"}, {"policy": "selective"}]
    results = ranks(2, offloaded, [settings(stage, PRECISIONS[precision], table) for table in tables])
    same(results, 2 * len(tables))
    item = 2 if precision == "bf16" else 4
    for rank in results:
        assert [found["left"] for found in rank] == [0] * 6
        assert [found["moved"] for found in rank[::2]] == [0] * 3
        plain_bytes, full_bytes, selective_bytes = (found["moved"] for found in rank[1::2])
        assert full_bytes == selective_bytes < plain_bytes / 3
        # What goes into five calls of blocks, and what the model keeps outside of them: the logits among it.
        assert (
            5 * 8 * LENGTH * WIDTH * item <= full_bytes <= 12 * 8 * LENGTH * WIDTH * item + 4 * 8 * LENGTH * WORDS * 4
        )


def budgets(configs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train compiled blocks; run on every rank."""
    import tqdm
    from torch._inductor import config

    tqdm.tqdm.monitor_interval = 0  # no thread is to stay behind
    with config.patch(compile_threads=1):
        return train(configs, dropout=0.0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
def test_a_memory_budget(ranks: Any) -> None:
    """Blocks compiled under a budget train as plain ones do, to rounding, and keep less the smaller it is."""
    tables = [None, *({"policy": "budget", "budget": share} for share in (0.0, 1.0))]
    results = ranks.run(2, budgets, [[settings(3, {}, table) for table in tables]], timeout=250.0)
    expected = sharded.parameters([rank[0]["slices"] for rank in results])
    for run in (1, 2):
        found = sharded.parameters([rank[run]["slices"] for rank in results])
        assert plain.difference(found, expected) <= 1e-4
    for rank in results:
        assert rank[1]["kept"] < 0.7 * rank[2]["kept"] <= 0.7 * rank[0]["kept"]
