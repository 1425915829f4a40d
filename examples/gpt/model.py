"""A small GPT that returns its own loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 256  # bytes


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each after a norm and around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the next values of ``x`` (batch, length, width)."""
        batch, length, width = x.shape
        heads = self.query_key_value(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, width / heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class GPT(nn.Module):
    """Predicts the next byte.

    Args:
        sequence: the longest context, in bytes.
        width: the size of a position's vector.
        depth: how many blocks.
        heads: attention heads in a block.
    """

    def __init__(self, sequence: int, width: int = 192, depth: int = 4, heads: int = 6) -> None:
        super().__init__()
        self.sequence = sequence
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(sequence, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Residual branches start small, so that depth does not change the output's scale (GPT-2).
                scale = (2 * depth) ** -0.5 if name.endswith("_out.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return scores (batch, length, 256) of the byte after each of ``tokens`` (batch, length)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        scores: torch.Tensor = self.head(self.norm(x))
        return scores

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss in nats per byte."""
        return F.cross_entropy(self.logits(tokens).flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def continue_text(self, prompt: str, length: int, temperature: float, seed: int) -> str:
        """Return ``prompt`` and ``length`` sampled bytes after it."""
        device = self.head.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        tokens = torch.tensor([list(prompt.encode())], device=device)
        for _ in range(length):
            scores = self.logits(tokens[:, -self.sequence :])[0, -1].float() / temperature
            tokens = torch.cat([tokens, torch.multinomial(scores.softmax(0), 1, generator=generator)[None]], 1)
        return bytes(tokens[0].tolist()).decode(errors="replace")
