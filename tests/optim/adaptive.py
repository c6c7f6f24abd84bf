"""Problems whose rank is known, and what must hold while a rank adapts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankLayer, LowRankLinear


def target(
    m: int = 48, n: int = 40, rank: int = 8, cond: float = 1.0, noise: float = 1e-3
) -> Tensor:
    """‖A‖₂ = 1, singular values from 1 to 1/cond, Gaussian noise of Frobenius norm `noise`."""
    generator = torch.Generator().manual_seed(7)
    U, V = (torch.linalg.qr(torch.randn(k, rank, generator=generator)).Q for k in (m, n))
    E = torch.randn(m, n, generator=generator) / (m * n) ** 0.5
    return (U * torch.linspace(1.0, 1.0 / cond, rank)) @ V.mT + noise * E


class Regression:
    """½ ‖W - A‖² for the matrix W of one linear layer, as a model with a closure."""

    def __init__(
        self, A: Tensor, start: int, *, tau: float | None, gradient: str = "probe"
    ) -> None:
        torch.manual_seed(start)
        m, n = A.shape
        options = {"tau": tau, "gradient": gradient, "dtype": A.dtype}
        self.A, self.layer = A, LowRankLinear(n, m, start, bias=False, **options)
        self.model = nn.Sequential(self.layer)
        self.inputs = torch.eye(n, dtype=A.dtype)

    def loss(self) -> Tensor:
        return 0.5 * (self.model(self.inputs).mT - self.A).square().sum()

    def closure(self) -> Tensor:
        self.model.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss.detach()

    @property
    def W(self) -> Tensor:
        return self.layer.dense_weight().detach()

    def error(self) -> float:
        """Distance to A relative to ‖A‖."""
        return float((self.W - self.A).norm() / self.A.norm())


def assert_certified(model: nn.Module) -> None:
    """Every layer: cond <= 1 + τ, orthonormal bases, shapes and ranks that agree."""
    for layer in model.modules():
        if isinstance(layer, LowRankLayer):
            X, M = layer.weight.detach(), layer.manifold
            assert tuple(X.shape[-2:]) == M.point_shape
            assert layer.rank == M.rank == X.shape[-1]
            U, S, V = (block.double() for block in M.unpack(X))
            for Q in (U, V):
                eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
                assert float((Q.mT @ Q - eye).abs().max()) <= 1e-5
            if layer.tau is not None:
                s = torch.linalg.svdvals(S)
                assert float((s[..., 0] / s[..., -1]).max()) <= (1 + layer.tau) * (1 + 1e-5)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Bit patterns of weights and tensors of the optimizer's state, and ranks."""
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    for i, (_, state) in enumerate(optimizer.state.items()):
        tensors.update({f"{i}.{k}": v.clone() for k, v in state.items() if k != "skipped"})
    layers = (x for x in model.modules() if isinstance(x, LowRankLayer))
    return {"tensors": tensors, "ranks": [x.rank for x in layers]}


def assert_same(before: dict, after: dict) -> None:
    assert before["ranks"] == after["ranks"]
    assert before["tensors"].keys() <= after["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]), name


def mlp(rank: int, tau: float | None, *, gradient: str = "probe", **options) -> nn.Module:
    """12 -> 16 -> 14 -> 3 with two low-rank layers and a dense one."""
    how = {"tau": tau, "gradient": gradient, **options}
    return nn.Sequential(
        LowRankLinear(12, 16, rank, **how), nn.Tanh(),
        LowRankLinear(16, 14, rank, **how), nn.Tanh(), nn.Linear(14, 3, **options),
    )  # fmt: skip


def classes(count: int = 64, **options) -> tuple[Tensor, Tensor]:
    """Inputs (count, 12) and labels of a rule that an mlp can learn."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(count, 12, generator=generator)
    y = (x[:, :3] + 0.5 * x[:, 3:6]).argmax(1)
    return x.to(**options), y.to(options.get("device", "cpu"))


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    """Closure of the cross entropy."""

    def closure() -> Tensor:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    return closure


def manifold_like(m: int, n: int, r: int, tau: float | None, **options) -> lrm.FixedRank:
    if tau is None:
        return lrm.FixedRank(m, n, r, **options)
    return lrm.WellConditioned(m, n, r, tau=tau, **options)
