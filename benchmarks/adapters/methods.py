"""The adapters and the rules that move them, each from its paper's formulas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import geoopt
import torch
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold.optim import CondLRAdam, CondLRMuon

from ..character_model import Transformer

Optimizers = list[torch.optim.Optimizer]


class LoRA(nn.Module):
    """W + 2 B A with B = 0 at the start (E. J. Hu et al., 2021); alpha = 2 rank, as is usual."""

    def __init__(self, dense: nn.Linear, rank: int) -> None:
        super().__init__()
        self.dense = dense
        self.A = nn.Parameter(torch.empty(rank, dense.in_features))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.B = nn.Parameter(torch.zeros(dense.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """W x + b + 2 B (A x)."""
        return self.dense(x) + 2.0 * (x @ self.A.mT @ self.B.mT)


class ThreeFactors(nn.Module):
    """W + U S Vᵀ with random orthonormal U and V.

    Parameters
    ----------
    dense : nn.Linear
    rank : int
    start : {"zero", "identity", "subtracted"}
        S = 0, S = I, or S = I with U Vᵀ of the start subtracted, so that ΔW starts at 0.
    """

    def __init__(self, dense: nn.Linear, rank: int, start: str) -> None:
        super().__init__()
        self.dense = dense
        bases = [torch.randn(n, rank) for n in (dense.out_features, dense.in_features)]
        self.U, self.V = (nn.Parameter(lrm.linalg.orthonormalize(A)) for A in bases)
        self.S = nn.Parameter(torch.zeros(rank, rank) if start == "zero" else torch.eye(rank))
        if start == "subtracted":
            self.register_buffer("before", (self.U @ self.V.mT).detach())
        else:
            self.before = None

    def forward(self, x: Tensor) -> Tensor:
        """W x + b + U (S (Vᵀ x)), less the start."""
        y = self.dense(x) + x @ self.V @ self.S.mT @ self.U.mT
        return y if self.before is None else y - x @ self.before.mT


class Landing(torch.optim.AdamW):
    """PoLAR's rule (K. Lion et al., arXiv:2506.03133): Adam on the landing field of U and V.

    ½(G Xᵀ - X Gᵀ) X + λ X (XᵀX - I) in place of the gradient G: nothing is retracted, and X stays
    near orthonormal by the second term.
    """

    def __init__(self, layers: list[ThreeFactors], lr: float, pull: float) -> None:
        self.bases = [X for layer in layers for X in (layer.U, layer.V)]
        super().__init__([*self.bases, *(layer.S for layer in layers)], lr, weight_decay=0.0)
        self.pull = pull

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; `closure` is not used."""
        for X in self.bases:
            G: Any = X.grad
            along = 0.5 * (G @ (X.mT @ X) - X @ (G.mT @ X))
            defect = X.mT @ X - torch.eye(X.shape[1])
            X.grad = along + self.pull * (X @ defect)
        return super().step()


class StelLA(torch.optim.AdamW):
    """StelLA's rule (Z. Li et al., arXiv:2510.01938, algorithm 1) around Adam.

    The gradient of U is made Riemannian, G - U Gᵀ U; Adam's step is scaled by √(d/m), projected
    onto the tangent space and retracted by the polar factor. V likewise.
    """

    def __init__(self, layers: list[ThreeFactors], lr: float, width: int) -> None:
        self.bases = [X for layer in layers for X in (layer.U, layer.V)]
        super().__init__([*self.bases, *(layer.S for layer in layers)], lr, weight_decay=0.0)
        self.width = width
        self.canonical, self.euclidean = geoopt.CanonicalStiefel(), geoopt.EuclideanStiefel()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; `closure` is not used."""
        before = [X.clone() for X in self.bases]
        for X in self.bases:
            X.grad = self.canonical.egrad2rgrad(X, X.grad)
        super().step()
        for X, old in zip(self.bases, before, strict=True):
            step = (self.width / len(X)) ** 0.5 * (X - old)
            X.copy_(lrm.linalg.polar(old + self.euclidean.proju(old, step)))


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes
    ----------
    put : callable
        From the frozen model and a rank to the model with adapters, and what the rule moves.
    rule : callable
        From that and a rate to the optimizers.
    guess : float
        Where the search of the rate begins.
    """

    put: Callable[[Transformer, int], list[Any]]
    rule: Callable[[list[Any], float], torch.optim.Optimizer]
    guess: float


def _layers(make: Callable[[nn.Linear, int], nn.Module]) -> Callable[[Transformer, int], list[Any]]:
    """Puts a module in place of each linear layer of the blocks."""

    def put(model: Transformer, rank: int) -> list[Any]:
        model.requires_grad_(False)
        new = []
        for block in model.blocks:
            for name, layer in list(block.named_children()):
                if isinstance(layer, nn.Linear):
                    new.append(make(layer, rank))
                    setattr(block, name, new[-1])
        return new

    return put


def _three(start: str) -> Callable[[Transformer, int], list[Any]]:
    return _layers(lambda dense, rank: ThreeFactors(dense, rank, start))


def _ours(tau: float | None) -> Callable[[Transformer, int], list[Any]]:
    def put(model: Transformer, rank: int) -> list[Any]:
        lrm.nn.adapt(model, rank, include="blocks.*", tau=tau)
        return [p for p in model.parameters() if p.requires_grad]

    return put


def _whole(model: Transformer, rank: int) -> list[Any]:
    return list(model.parameters())


def _parameters(moved: list[Any]) -> list[Any]:
    return [p for x in moved for p in ([x.A, x.B] if isinstance(x, LoRA) else [x])]


def _adamw(moved: list[Any], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_parameters(moved), lr, weight_decay=0.0)


def _muon(moved: list[Any], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Muon(_parameters(moved), lr, weight_decay=0.0)


def _landing(moved: list[Any], lr: float) -> torch.optim.Optimizer:
    return Landing(moved, lr, pull=0.1)  # 0.1 and 1 were alike on the validation part


def _stella(moved: list[Any], lr: float) -> torch.optim.Optimizer:
    return StelLA(moved, lr, width=moved[0].dense.in_features)


FULL = "all weights, AdamW"
METHODS = {
    FULL: Method(_whole, _adamw, 1e-3),
    "LoRA, AdamW": Method(_layers(LoRA), _adamw, 8e-3),
    "LoRA, Muon": Method(_layers(LoRA), _muon, 0.02),
    "PoLAR": Method(_three("zero"), _landing, 0.032),
    "StelLA": Method(_three("identity"), _stella, 0.016),
    "StelLA, start subtracted": Method(_three("subtracted"), _stella, 0.016),
    "CondLRAdam τ = 0.1": Method(_ours(0.1), CondLRAdam, 0.016),
    "CondLRAdam τ = 0": Method(_ours(0.0), CondLRAdam, 0.016),
    "CondLRAdam no bound": Method(_ours(None), CondLRAdam, 0.016),
    "CondLRMuon τ = 0.1": Method(_ours(0.1), CondLRMuon, 0.04),
    "CondLRMuon τ = 0": Method(_ours(0.0), CondLRMuon, 0.04),
    "CondLRMuon no bound": Method(_ours(None), CondLRMuon, 0.04),
}
