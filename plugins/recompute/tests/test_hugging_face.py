"""Models of the transformers library: no cache is filled twice, and their own switch is respected."""

from __future__ import annotations

import logging

import hugging
import pytest
import torch
from torch import nn

from powertrain.errors import PowertrainError
from powertrain_recompute.config import RecomputeConfig
from powertrain_recompute.transform import recompute

CPU = torch.device("cpu")


def grads(model: nn.Module, **more: object) -> list[torch.Tensor]:
    model.zero_grad()
    model(**hugging.micros(1)[0], **more).loss.backward()
    return [param.grad.clone() for param in model.parameters() if param.grad is not None]


@pytest.mark.parametrize("policy", ["full", "every", "selective"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "t5", "bert"])
def test_models_as_they_are(name: str, policy: str) -> None:
    """Each trains to the same bits although its configuration asks for a cache, and generates as before."""
    plain, model = hugging.make(name), hugging.make(name)
    # A cache changes how keys lie in memory, and with that the last bits.
    expected = grads(plain, **({} if name == "bert" else {"use_cache": False}))
    undo = recompute(model, RecomputeConfig(policy=policy), CPU)  # type: ignore[arg-type]
    assert all(map(torch.equal, grads(model), expected))
    if name in ("gpt2", "llama", "t5"):
        ids = torch.tensor([[5, 9, 11]])
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        said = plain.eval().generate(input_ids=ids, **options)
        assert torch.equal(model.eval().generate(input_ids=ids, **options), said)
        with torch.no_grad():
            found = model(**hugging.micros(1)[0], use_cache=True)
        assert "cache" in found or "past_key_values" in found
    for step in undo:
        step()
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


def test_the_start_says_that_there_is_no_cache(caplog: pytest.LogCaptureFixture) -> None:
    """What is changed about the model's calls is logged, once, and the configuration stays as it is."""
    model = hugging.make("llama")
    with caplog.at_level(logging.INFO, logger="powertrain"):
        recompute(model, RecomputeConfig(), CPU)
    assert "3 of 3 blocks (LlamaDecoderLayer); no cache of keys and values while gradients" in caplog.text
    assert model.config.use_cache


def test_a_cache_that_the_caller_gives() -> None:
    """A cache that comes with the call is no detail to drop: its content enters into the result."""
    import transformers

    model = hugging.make("llama")
    recompute(model, RecomputeConfig(), CPU)
    with pytest.raises(PowertrainError, match="given a cache") as caught:
        grads(model, cache=transformers.DynamicCache(config=model.config))
    assert "DynamicCache" in str(caught.value)


def test_its_own_switch() -> None:
    """gradient_checkpointing_enable() and [recompute] do not run blocks three times: the error says how to choose."""
    with pytest.raises(PowertrainError, match="already") as caught:
        recompute(hugging.make("llama", checkpoint="plain"), RecomputeConfig(), CPU)
    assert "gradient_checkpointing_disable" in str(caught.value)


def test_adapters() -> None:
    """Adapters on a frozen model: inputs that need no gradients do not keep blocks from training."""
    expected = grads(hugging.make("llama", lora=True))
    model = hugging.make("llama", lora=True)
    recompute(model, RecomputeConfig(), CPU)
    assert expected
    assert all(map(torch.equal, grads(model), expected))
