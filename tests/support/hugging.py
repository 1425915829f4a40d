"""Tiny Hugging Face models with random weights, as their library makes them, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 50
LENGTH = 10


def make(
    name: str, checkpoint: str | None = None, lora: bool = False, attention: str = "eager", width: int = 16
) -> nn.Module:
    """Return a model.

    Args:
        name: gpt2, llama, mixtral, t5 or bert.
        checkpoint: "plain" or "reentrant": blocks are run again in backward, by the library's own switch.
        lora: freeze the model and train adapters that peft puts in.
        attention: eager or sdpa.
        width: of what flows between the blocks.
    """
    torch.manual_seed(4)
    model = _MODELS[name](attention, width)
    with torch.no_grad():  # what starts at zero would be all rounding after a few steps
        for param in model.parameters():
            param.add_(0.05 * torch.randn_like(param))
    if lora:
        import peft

        options = {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "init_lora_weights": False,
            "fan_in_fan_out": name == "gpt2",
        }
        model = peft.get_peft_model(model, peft.LoraConfig(**options))
    if checkpoint is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpoint == "reentrant"})
        if lora:
            model.enable_input_require_grads()
    return model


def _gpt2(attention: str, width: int) -> nn.Module:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": width, "vocab_size": VOCABULARY, "n_positions": 32}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.GPT2Config(**sizes, **dropout, **ends, attn_implementation=attention)
    return transformers.GPT2LMHeadModel(config)


def _sizes(attention: str, width: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": width + width // 2,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": attention,
    }


def _llama(attention: str, width: int) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_sizes(attention, width)))


def _mixtral(attention: str, width: int) -> nn.Module:
    config = transformers.MixtralConfig(**_sizes(attention, width), num_local_experts=6, num_experts_per_tok=1)
    return transformers.MixtralForCausalLM(config)


def _t5(attention: str, width: int) -> nn.Module:
    sizes = {
        "d_model": width,
        "d_kv": 8,
        "d_ff": width + width // 2,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": VOCABULARY,
    }
    config = transformers.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, attn_implementation="eager")
    return transformers.T5ForConditionalGeneration(config)


def _bert(attention: str, width: int) -> nn.Module:
    sizes = _sizes(attention, width)
    del sizes["num_key_value_heads"], sizes["bos_token_id"], sizes["eos_token_id"]
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **dropout))


_MODELS = {"gpt2": _gpt2, "llama": _llama, "mixtral": _mixtral, "t5": _t5, "bert": _bert}


def micros(count: int, samples: int = 2) -> list[dict[str, torch.Tensor]]:
    """Return micro-batches of tokens; each draws from a part of the vocabulary, so that experts differ."""
    generator = torch.Generator().manual_seed(8)
    result = []
    for number in range(count):
        low = 3 + number * 20 % 40
        ids = torch.randint(low, low + 7, (samples, LENGTH), generator=generator)
        result.append({"input_ids": ids, "labels": ids.roll(1, 1)})
    return result
