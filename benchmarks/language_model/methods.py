"""The methods: dense or low-rank weights of the blocks, and the rule that moves them.

All other parameters (embeddings, head, norms, biases) take AdamW at one rate in every method, so
that the searched rate is that of the blocks' matrices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold.optim import CondLRAdam, CondLRMuon

from ..character_model import Transformer

# The rate of all parameters but the matrices of the blocks.
OTHERS = 2e-3


class Pair(nn.Module):
    """W = A Bᵀ without geometry, from the truncated SVD of a dense layer: A = U √Σ, B = V √Σ."""

    def __init__(self, dense: nn.Linear, rank: int) -> None:
        super().__init__()
        U, s, Vh = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
        root = s[:rank].sqrt()
        self.A, self.B = nn.Parameter(U[:, :rank] * root), nn.Parameter(Vh[:rank].mT * root)
        self.bias = dense.bias

    def forward(self, x: Tensor) -> Tensor:
        """A (Bᵀ x) + b."""
        return nn.functional.linear(x @ self.B, self.A, self.bias)


class Spectron(torch.optim.Optimizer):
    """Spectron's rule for weights A Bᵀ (P. Janson et al., arXiv:2602.12429, algorithms 1 and 3).

    Each factor moves by lr / (σ_A + σ_B + 1) along the polar factor of its momentum, by five steps
    of Newton-Schulz. σ_A and σ_B are spectral norms by one step of the power method a step, from
    the vector of the step before. So the product moves by at most about lr in the spectral norm.
    """

    def __init__(self, pairs: list[Pair], lr: float, momentum: float = 0.9) -> None:
        groups = [{"params": [pair.A, pair.B]} for pair in pairs]
        super().__init__(groups, {"lr": lr, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                vector = torch.randn(p.shape[0])
                self.state[p] = {"buffer": torch.zeros_like(p), "vector": vector / vector.norm()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; `closure` is not used."""
        for group in self.param_groups:
            directions, sigmas = [], []
            for p in group["params"]:
                state = self.state[p]
                state["buffer"].lerp_(p.grad, 1 - group["momentum"])
                directions.append(orthogonalized(state["buffer"]))
                right = nn.functional.normalize(p.mT @ state["vector"], dim=0)
                left = p @ right
                sigmas.append(left.norm())
                state["vector"] = left / left.norm()
            size = float(group["lr"] / (sum(sigmas) + 1))
            for p, direction in zip(group["params"], directions, strict=True):
                p.sub_(direction, alpha=size)


def orthogonalized(G: Tensor, steps: int = 5) -> Tensor:
    """The approximate polar factor that Muon takes: five quintic steps, here in float32."""
    X = G if G.shape[0] <= G.shape[1] else G.mT
    X = X / (X.norm() + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X if G.shape[0] <= G.shape[1] else X.mT


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes
    ----------
    weights : "dense", "pair" or "manifold"
    rule : callable
        From the blocks' matrices, all other parameters and a rate to the optimizers.
    guess : float
        Where the search of the rate begins at width 128.
    tau : float or None
        Of weights on the manifold.
    """

    weights: str
    rule: Callable[[list[Any], list[Any], float], list[torch.optim.Optimizer]]
    guess: float
    tau: float | None = None

    def build(
        self, size: int, ratio: float, lr: float, seed: int, width: int = 128
    ) -> tuple[Transformer, list[torch.optim.Optimizer]]:
        """The model at its start and its optimizers; the dense start is the same in all methods."""
        torch.manual_seed(seed)
        model = Transformer(size, width)
        rank = round(ratio * width)
        if self.weights == "manifold":
            lrm.factorize(model.blocks, rank=rank, tau=self.tau, keep_larger=True)
        elif self.weights == "pair":
            for block in model.blocks:
                for name, layer in list(block.named_children()):
                    if isinstance(layer, nn.Linear):
                        setattr(block, name, Pair(layer, rank))
        matrices: list[Any] = [p for p in model.blocks.parameters() if p.ndim == 2]
        inside = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in inside]
        if self.rule is _spectron:
            matrices = [m for m in model.blocks.modules() if isinstance(m, Pair)]
        return model, self.rule(matrices, others, lr)


def _adamw(parameters: list[Any], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr, weight_decay=0.0)


def _all_adamw(matrices: list[Any], others: list[Any], lr: float) -> list[torch.optim.Optimizer]:
    return [_adamw(matrices, lr), _adamw(others, OTHERS)]


def _muon(matrices: list[Any], others: list[Any], lr: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.Muon(matrices, lr, weight_decay=0.0), _adamw(others, OTHERS)]


def _spectron(pairs: list[Any], others: list[Any], lr: float) -> list[torch.optim.Optimizer]:
    return [Spectron(pairs, lr), _adamw(others, OTHERS)]


def _geometric(kind: Callable[..., Any]) -> Callable[..., list[torch.optim.Optimizer]]:
    def rule(matrices: list[Any], others: list[Any], lr: float) -> list[torch.optim.Optimizer]:
        groups = [{"params": matrices, "lr": lr}, {"params": others, "lr": OTHERS}]
        return [kind(groups, weight_decay=0.0)]

    return rule


METHODS = {
    "dense AdamW": Method("dense", _all_adamw, 2e-3),
    "dense Muon": Method("dense", _muon, 0.02),
    "A Bᵀ, AdamW": Method("pair", _all_adamw, 4e-3),
    "A Bᵀ, Spectron": Method("pair", _spectron, 0.08),
    "CondLRMuon τ = 0.1": Method("manifold", _geometric(CondLRMuon), 0.02, 0.1),
    "CondLRAdam τ = 0.1": Method("manifold", _geometric(CondLRAdam), 8e-3, 0.1),
    "CondLRMuon τ = 0": Method("manifold", _geometric(CondLRMuon), 0.02, 0.0),
    "CondLRMuon τ = 0.5": Method("manifold", _geometric(CondLRMuon), 0.02, 0.5),
    "CondLRMuon no bound": Method("manifold", _geometric(CondLRMuon), 0.02, None),
}
