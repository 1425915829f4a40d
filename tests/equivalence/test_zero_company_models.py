"""Models of other libraries, as they are, under sharding: each trains as in a plain loop."""

from __future__ import annotations

import copy
import threading
from typing import Any

import company
import hugging
import pytest
import sharded
import threads
import torch

import powertrain

NAMES = ["gpt2", "llama", "mixtral", "t5", "bert"]
STAGES = [1, 2, 3]


@pytest.mark.parametrize("name", NAMES)
def test_hugging_face_models_unchanged(name: str) -> None:
    """Tied embeddings, experts, encoder and decoder: at every stage the plain loop's parameters."""
    batches = [hugging.micros(2)] * company.STEPS
    cases = [(batches, company.config(stage), {"name": name}) for stage in STAGES]
    if name in ("gpt2", "llama"):
        cases.append((batches, company.config(3), {"name": name, "attention": "sdpa"}))
    # What used to be called gradient_checkpointing_enable:
    again = [(1, "plain"), (2, "reentrant"), (3, "plain"), (3, "reentrant")]
    cases += [(batches, company.config(stage), {"name": name, "checkpoint": how}) for stage, how in again]
    theirs = company.plain_loop(hugging.make, batches, None, name=name)
    for parts in zip(*threads.run(2, company.train_many, hugging.make, cases, None), strict=True):
        company.equal(parts, theirs)
    four = [hugging.micros(4)] * company.STEPS
    theirs = company.plain_loop(hugging.make, four, None, name=name)
    for world in (1, 4):
        settings = company.config(3, accumulation=4 // world)
        company.equal(threads.run(world, company.train, hugging.make, four, settings, None, name=name), theirs)


def adapters(settings: dict[str, Any], batches: list[list[Any]], gate: Any, **kwargs: Any) -> dict[str, Any]:
    """Train adapters on a frozen model, and count the memory of what is frozen; run on every rank."""
    with company.start(hugging.make, settings, lora=True, **kwargs) as engine:
        for micros in batches:
            engine.train_step(iter(company.mine(engine, micros)))
        gate.wait()
        live = company.live_bytes() if engine.data_rank == 0 else 0  # of all ranks: they are threads
        gate.wait()
        state = engine.optimizer_wrapper.optimizer.state
        moments = sum(value.numel() for entry in state.values() for value in entry.values() if value.ndim)
        return {"slices": sharded.slices(engine), "moments": moments, "live": live}


@pytest.mark.parametrize(("name", "stage"), [("llama", 3), ("gpt2", 1), ("gpt2", 2), ("gpt2", 3)])
def test_lora_on_a_frozen_model(name: str, stage: int) -> None:
    """Only adapters train; the frozen rest has no gradient and no optimizer state, and at stage 3 rests in pieces."""
    batches = [hugging.micros(2)] * company.STEPS
    arguments: dict[str, Any] = {"name": name, "width": 64}
    theirs = company.plain_loop(hugging.make, batches, None, lora=True, **arguments)
    before = {n: p.detach().clone() for n, p in hugging.make(lora=True, **arguments).named_parameters()}
    trained = sum(tensor.numel() for n, tensor in before.items() if "lora" in n)
    frozen = sum(tensor.numel() for n, tensor in before.items() if "lora" not in n)
    assert frozen > 6 * trained
    live = company.live_bytes()
    results = threads.run(2, adapters, company.config(stage), batches, threading.Barrier(2), **arguments)
    company.equal([result["slices"] for result in results], theirs)
    assert any(not torch.equal(theirs[n], before[n]) for n in before if "lora" in n)
    found = sharded.parameters([result["slices"] for result in results])
    assert all(torch.equal(found[n], before[n]) for n in before if "lora" not in n)
    assert sum(result["moments"] for result in results) == 2 * trained
    # Of what is frozen one copy, or one a rank where it stays whole; of what is trained value, gradient, two
    # moments, and lent buffers.
    copies = 1 if stage == 3 else 2
    assert results[0]["live"] - live < 4 * (1.1 * copies * frozen + 9 * trained)


PROMPTS = [[5, 9, 11], [7, 3, 8]]


def generation(stage: int, batches: list[list[Any]], name: str) -> dict[str, Any]:
    """Generate, each rank from its own prompt and to its own end, then train on; run on every rank."""
    with company.start(hugging.make, company.config(stage), name=name) as engine:
        ids = torch.tensor([PROMPTS[engine.data_rank]])
        said = []
        for micros in batches:
            engine.module.eval()
            for length in [2 + 9 * engine.data_rank, 11 - 9 * engine.data_rank, 4]:
                options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
                said.append(engine.module.generate(input_ids=ids, **options).tolist())
            engine.train_step(iter(company.mine(engine, micros)))
        return {"slices": sharded.slices(engine), "said": said}


@pytest.mark.parametrize(("name", "processes"), [("gpt2", False), ("t5", False), ("gpt2", True)])
def test_generate(ranks: Any, name: str, processes: bool) -> None:
    """Ranks that stop after 2 and 11 tokens do not wait for ever, say what the whole model says, and train on."""
    batches = [hugging.micros(2)] * 2
    results = (ranks if processes else threads.run)(2, generation, 3, batches, name)
    company.equal([r["slices"] for r in results], company.plain_loop(hugging.make, batches, None, name=name))
    model = hugging.make(name=name).eval()
    for rank, result in enumerate(results):
        ids = torch.tensor([PROMPTS[rank]])
        for place, length in enumerate([2 + 9 * rank, 11 - 9 * rank, 4]):
            options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
            assert result["said"][place] == model.generate(input_ids=ids, **options).tolist()


def copies(stage: int) -> list[Any]:
    """Copy a model that an engine holds; run on every rank."""
    ids = torch.tensor([PROMPTS[0]])
    with company.start(hugging.make, company.config(stage), name="gpt2") as engine:
        with powertrain.full(engine):
            copied: Any = copy.deepcopy(engine.module)
        if engine.data_rank == 0:  # alone: the copy is no part of the engine
            options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
            said = copied.generate(input_ids=ids, **options).tolist()
            copied(input_ids=ids, labels=ids).loss.backward()
            return [said, all(param.grad is not None for param in copied.parameters())]
    return []


def test_a_copy_is_free() -> None:
    """A copy made inside powertrain.full runs, generates and trains by itself, on one rank alone."""
    found = threads.run(2, copies, 3)[0]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    said = hugging.make(name="gpt2").generate(input_ids=torch.tensor([PROMPTS[0]]), **options).tolist()
    assert found == [said, True]
