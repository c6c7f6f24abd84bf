"""A small character-level transformer and its text, shared by several benchmarks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEXT = Path(__file__).resolve().parent / "data" / "python_reference.txt"
WIDTH, HEADS, BLOCKS, CONTEXT, BATCH = 96, 4, 2, 64, 8


class Block(nn.Module):
    """Causal attention and an MLP, pre-norm; four linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, T, width) to the same."""
        parts = self.query_key_value(self.norm1(x)).chunk(3, -1)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Characters (B, T) to logits (B, T, size)."""

    def __init__(self, size: int, width: int = WIDTH) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(size, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, HEADS) for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, size)
        for embedding in (self.token, self.place):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next characters."""
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.token(x) + self.place(places))))


def _parts(text: str, alphabet: str | None = None) -> tuple[list[Tensor], int]:
    """Stretches of 1024 characters, as indices, and the number of characters."""
    index = {c: i for i, c in enumerate(sorted(set(text if alphabet is None else alphabet)))}
    return list(torch.tensor([index[c] for c in text]).split(1024)), len(index)


def windows(parts: list[Tensor]) -> Tensor:
    """Windows (count, CONTEXT + 1) of whole stretches, one behind the other."""
    return torch.cat([p.unfold(0, CONTEXT + 1, CONTEXT) for p in parts if len(p) == 1024])


def load() -> tuple[Tensor, Tensor, int]:
    """Training text, validation windows (count, CONTEXT + 1) and the number of characters.

    Every eighth stretch of 1024 characters is for validation.
    """
    parts, size = _parts(TEXT.read_text(encoding="utf-8"))
    training = torch.cat([p for i, p in enumerate(parts) if i % 8])
    return training, windows([p for i, p in enumerate(parts) if i % 8 == 0]), size


def load_three(
    text: str | None = None, alphabet: str | None = None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Training text, validation windows, test windows and the number of characters.

    Of each eight stretches of 1024 characters, one is for validation and one for the test. The
    characters are those of the text, or those of `alphabet`.
    """
    parts, size = _parts(TEXT.read_text(encoding="utf-8") if text is None else text, alphabet)
    training = torch.cat([p for i, p in enumerate(parts) if i % 8 not in (0, 4)])
    validation, test = (windows([p for i, p in enumerate(parts) if i % 8 == k]) for k in (0, 4))
    return training, validation, test, size


def mean_loss(model: nn.Module, held: Tensor) -> float:
    """Cross-entropy a character on windows of text."""
    with torch.no_grad():
        logits = model(held[:, :-1])
        return float(F.cross_entropy(logits.flatten(0, 1), held[:, 1:].flatten()))


def batch(training: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random batch of inputs and next characters, each (BATCH, CONTEXT)."""
    at = torch.randint(len(training) - CONTEXT, (BATCH, 1), generator=generator)
    window = training[at + torch.arange(CONTEXT + 1)]
    return window[:, :-1], window[:, 1:]
