"""An optimizer of Muon's kind for dense weights: momentum made orthogonal by Newton-Schulz."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Quintic whose slope at 0 is as large as possible while it stays near 1 on (0, 1]; K. Jordan 2024.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(G: Tensor, steps: int = 5) -> Tensor:
    """Approximate polar factor of G (m, n): 5 x (2 m n s + m n s + s³) products, s = min(m, n).

    In bfloat16 on an accelerator, as published; on a CPU that would only be slower.
    """
    a, b, c = COEFFICIENTS
    X = G.bfloat16() if G.device.type == "cuda" else G
    wide = X.shape[-2] <= X.shape[-1]
    X = X if wide else X.mT
    X = X / (X.norm() + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X if wide else X.mT).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Muon on weights of two and more dimensions (as matrices), SGD with momentum on the rest."""

    def __init__(self, params: Iterable[Any], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; `closure` is not used."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "buffer" not in state:
                    state["buffer"] = torch.zeros_like(p)
                buffer = state["buffer"].mul_(group["momentum"]).add_(p.grad)
                if p.ndim >= 2:
                    direction = newton_schulz(buffer.flatten(1)).view(p.shape)
                    p.add_(direction, alpha=-group["lr"])
                else:
                    p.add_(buffer, alpha=-group["lr"])
