"""The model and the batches that every contender trains; plain PyTorch, so that each environment can import it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

MICRO_BATCH = 2
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Size:
    """The shape of a model.

    Attributes:
        depth: blocks.
        width: of the residual stream; heads are 64 wide.
        vocabulary: tokens; the head is not tied to the embedding.
        sequence: tokens that are predicted in a sample.
    """

    depth: int
    width: int
    vocabulary: int
    sequence: int = 256


SIZES = {
    "tiny": Size(depth=2, width=128, vocabulary=512, sequence=64),
    "34m": Size(depth=8, width=512, vocabulary=8192),
    "118m": Size(depth=12, width=768, vocabulary=21248),
}


class Block(nn.Module):
    """Attention and MLP, each after a norm, each added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, length, width) for (batch, length, width)."""
        batch, length, width = x.shape
        heads = self.attention(self.norm_1(x)).view(batch, length, 3, width // 64, 64)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """A GPT that returns its loss."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.token = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Embedding(size.sequence, size.width)
        self.blocks = nn.ModuleList(Block(size.width) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        for module in (self.token, self.position, self.head):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy, in fp32, of (batch, sequence + 1) tokens."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.token(inputs) + self.position.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build(size: Size) -> GPT:
    """Return the model with the same weights in every process."""
    torch.manual_seed(0)
    return GPT(size)


def batch(size: Size, accumulation: int, step: int, rank: int) -> torch.Tensor:
    """Return the tokens of one rank's step, (accumulation x micro-batch, sequence + 1).

    Small tokens are frequent, so that there is something to learn: the loss of
    contenders that train wrongly then differs from the first steps on.
    """
    generator = torch.Generator().manual_seed(1000 * step + rank)
    shape = (accumulation * MICRO_BATCH, size.sequence + 1)
    return (torch.rand(shape, generator=generator) ** 3 * size.vocabulary).long()


def parameters(size: Size) -> int:
    """Return the exact number of parameters, without making them."""
    with torch.device("meta"):
        return sum(param.numel() for param in GPT(size).parameters())


def block_parameters(size: Size) -> int:
    """Return the exact number of parameters of one block."""
    with torch.device("meta"):
        return sum(param.numel() for param in Block(size.width).parameters())
