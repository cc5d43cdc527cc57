"""A GPT of 38 M parameters, for `hvdx plan`: what docs/scaling.md draws.

OMP_NUM_THREADS=1 hvdx plan benchmarks/profiles/gpt.py --ranks 1 --hosts 1 --save gpt.json
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

LAYERS, WIDTH, HEADS, LENGTH, SYMBOLS, BATCH = 12, 512, 8, 128, 256, 4


class Start(nn.Module):
    """Bytes and places become vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, WIDTH)
        self.places = nn.Parameter(torch.zeros(LENGTH, WIDTH))

    def forward(self, read: torch.Tensor) -> torch.Tensor:
        """Return (batch, length, width)."""
        return self.symbols(read) + self.places


class Block(nn.Module):
    """Attention, then two dense layers, each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.parts, self.joined = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the shape of ``x``: (batch, length, width)."""
        parts = self.parts(self.before(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.joined(seen.transpose(1, 2).flatten(2))
        return x + self.narrow(nn.functional.gelu(self.wide(self.between(x))))


def model() -> nn.Module:
    """Return the model."""
    torch.manual_seed(0)
    return nn.Sequential(
        Start(), *(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS)
    )


def sample() -> torch.Tensor:
    """Return what a rank reads in a step."""
    return torch.randint(0, SYMBOLS, (BATCH, LENGTH))
