"""How parameters travel quantized: int8 with a scale by the block (qwZ).

"ZeRO++: Extremely Efficient Collective Communication for Giant Model Training"
(Wang et al., arXiv 2306.10209), section 3.1: half the bytes of fp16.
"""

from __future__ import annotations

import torch

from powertrain.kernels.blockwise import FLOATS, Blockwise
from powertrain.roles.communicator import Communicator, Handle
from powertrain_zero.wire import PlainGather


class QuantizedGather:
    """All-gather along one dimension of quantized shards; what is no float travels as it is.

    Elements and scales share one collective. Every rank, the shard's own
    included, takes what travelled: all compute with the same parameters.

    Args:
        communicator: connects the ranks.
        dimension: along which shards are gathered.
        codec: how elements become bytes; shards are multiples of its block.
    """

    exact = False

    def __init__(self, communicator: Communicator, dimension: str, codec: Blockwise) -> None:
        self._communicator = communicator
        self._dimension = dimension
        self._codec = codec
        self._plain = PlainGather(communicator, dimension)

    def gather(self, full: torch.Tensor, shard: torch.Tensor, label: str) -> Handle:
        """Gather the bytes; ``wait`` turns them into the elements of ``full``."""
        if full.dtype not in FLOATS or shard.dtype not in FLOATS:
            return self._plain.gather(full, shard, label)
        mine = self._codec.encode(shard)
        ranks = self._communicator.size(self._dimension)
        everyone = torch.empty(ranks, mine.numel(), dtype=torch.uint8, device=mine.device)
        inner = self._communicator.all_gather(everyone, mine, self._dimension, label=f"{label}, quantized")
        return _Arriving(inner, mine, everyone, full.view(ranks, -1), self._codec)


class _Arriving:
    """Parameters under way.

    Args:
        inner: the collective that carries their bytes.
        mine: what this rank gives; kept until all of it has been sent.
        rows: where the bytes arrive, one row a rank.
        full: where the elements belong, one row a rank.
        codec: turns one into the other.
    """

    def __init__(
        self, inner: Handle, mine: torch.Tensor, rows: torch.Tensor, full: torch.Tensor, codec: Blockwise
    ) -> None:
        self._inner = inner
        self._bytes: tuple[torch.Tensor, torch.Tensor] | None = (mine, rows)
        self._full = full
        self._codec = codec

    def wait(self) -> None:
        """Return when the elements are in place."""
        if self._bytes is None:
            return
        self._inner.wait()
        self._codec.decode(self._bytes[1], self._full)
        self._bytes = None

    def done(self) -> bool:
        """Return whether ``wait`` has nothing to wait for."""
        return self._bytes is None or self._inner.done()
