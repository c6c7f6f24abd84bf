"""The monitor's certificate: theorem A holds along training, and its constants are sharp."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankLinear


def train(model, reference, loss, *, lr: float, steps: int, every: int) -> list[dict[str, float]]:
    """Both by plain gradient steps; the rows of the monitor."""
    optimizer = lrm.optim.CondLR(model.parameters(), lr=lr)
    full = torch.optim.SGD(reference.parameters(), lr=lr)
    monitor = lrm.monitor(model, optimizer, every=every, reference=reference, loss=loss)
    rows = [monitor.measure()]
    for _ in range(steps):
        for net, rule in ((model, optimizer), (reference, full)):
            rule.zero_grad()
            loss(net).backward()
            rule.step()
        rows += [row] if (row := monitor.step()) else []
    return rows


def networks(seed: int) -> tuple[nn.Module, nn.Module]:
    """A small network with grouped convolution and biases, near rank 2, and its factorized twin."""
    torch.manual_seed(seed)
    dense = nn.Sequential(
        nn.Conv2d(2, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 5), nn.Linear(5, 2)
    ).double()
    low_rank = lrm.factorize(copy.deepcopy(dense), rank=2, tau=None, exclude="4", keep_larger=True)
    start = lrm.densify(copy.deepcopy(low_rank))
    with torch.no_grad():
        for p in start.parameters():
            p.add_(0.01 * torch.randn_like(p))
    return low_rank, start


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_stays_inside_and_the_parts_are_those_of_dense_algebra(seed):
    model, reference = networks(seed)
    x, y = torch.randn(20, 2, 3, 3).double(), torch.randn(20, 2).double()

    def loss(net: nn.Module):
        return (net(x) - y).square().mean()

    rows = train(model, reference, loss, lr=2e-3, steps=200, every=10)
    assert len(rows) == 21
    assert all(row["flow/holds"] == 1 for row in rows)
    for row in rows:
        assert row["flow/error"] <= row["flow/certificate"] * (1 + 1e-3)
        triangle = row["flow/best"] + row["flow/error"]
        assert row["flow/best"] <= row["flow/distance"] <= triangle
    assert rows[-1]["flow/time"] == pytest.approx(0.4)
    assert rows[-1]["flow/certificate"] < 2 * rows[-1]["flow/distance"] + 1

    twins = (lrm.densify(copy.deepcopy(model)), reference)
    apart = sum(
        float((a - b).detach().square().sum())
        for a, b in zip(twins[0].parameters(), twins[1].parameters(), strict=True)
    )
    assert rows[-1]["flow/distance"] == pytest.approx(math.sqrt(apart))
    tails = [torch.linalg.svdvals(W)[..., 2:] for W in _matrices(reference)]
    best = math.sqrt(sum(float(s.square().sum()) for s in tails))
    assert rows[-1]["flow/best"] == pytest.approx(best)
    # κ of the linear layer, from the dense gradient.
    W, X = (net[3].weight.detach() for net in (reference, twins[0]))
    kappa = 0.0
    for net, point, at in ((twins[0], X, twins[0][3].weight), (reference, W, reference[3].weight)):
        G = torch.autograd.grad(loss(net), at)[0]
        P, s, Qh = torch.linalg.svd(point, full_matrices=True)
        kappa += float(torch.linalg.matrix_norm(P[:, 2:].mT @ G @ Qh[2:].mT, 2) / s[1]) / 2
    assert rows[-1]["flow/kappa/3"] == pytest.approx(kappa, rel=1e-8)
    assert rows[-1]["flow/kappa/0"] > 0


def _matrices(reference: nn.Module) -> list[torch.Tensor]:
    return [reference[0].weight.detach().reshape(2, 3, -1), reference[3].weight.detach()]


@pytest.mark.parametrize("seed", [0, 1])
def test_growth_and_source_are_those_of_dense_algebra(seed):
    """One 5 x 4 matrix of rank 2 with the loss ½‖H ∘ (W - A)‖², the root of H elementwise."""
    torch.manual_seed(seed)
    W, A, H = (torch.randn(5, 4).double() for _ in range(3))
    H = H.abs()
    dense = nn.Sequential(nn.Linear(4, 5, bias=False).double())
    model = lrm.factorize(dense, rank=2, tau=None, keep_larger=True)
    reference = nn.Sequential(nn.Linear(4, 5, bias=False).double())
    with torch.no_grad():
        reference[0].weight.copy_(W)

    def loss(net: nn.Module):
        return 0.5 * (H * (net(torch.eye(4).double()).mT - A).square()).sum()

    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.1)
    monitor = lrm.monitor(model, optimizer, reference=reference, loss=loss)
    row = monitor.measure()
    P, s, Qh = torch.linalg.svd(W)
    X, Y = (P[:, :2] * s[:2]) @ Qh[:2], model[0].dense_weight().detach()
    F_W, F_X, F_Y = (-H * (Z - A) for Z in (W, X, Y))
    one_sided = ((Y - X) * (F_Y - F_X)).sum() / (Y - X).square().sum()
    kappa = row["flow/kappa/0"]
    assert row["flow/rate"] == pytest.approx(float(one_sided) + kappa)
    # (U_p, V_p): what of P_X F(W) is not in both spaces.
    rotated = P.mT @ F_W @ Qh.mT
    bent = torch.cat((rotated[2:, :2].flatten(), rotated[:2, 2:].flatten())).norm()
    delta = s[2] / (s[1] - s[2]) * bent
    assert row["flow/source"] == pytest.approx(float((F_X - F_W).norm() + delta))
    # One step on: E grows by the means of both.
    with torch.no_grad():
        reference[0].weight.sub_(0.1 * A)
    monitor._time = 0.3
    after = monitor.measure()
    a, b = (0.5 * (row[key] + after[key]) for key in ("flow/rate", "flow/source"))
    expected = math.exp(0.3 * a) * row["flow/error"] + b * math.expm1(0.3 * a) / a
    assert after["flow/certificate"] == pytest.approx(expected)


def test_the_growth_is_attained():
    """Rank 1 at σ e₁e₁ᵀ under the force ν e₂e₂ᵀ: deviations grow by exp(νt/σ) exactly."""
    sigma, nu, angle = 1.0, 0.5, 1e-3
    layer = LowRankLinear(2, 2, 1, bias=False, tau=None, dtype=torch.float64)
    with torch.no_grad():
        u = torch.tensor([[math.cos(angle)], [math.sin(angle)]], dtype=torch.float64)
        S = torch.full((1, 1), sigma, dtype=torch.float64)
        layer.weight.copy_(layer.manifold.pack(u, S, u))
    model, reference = nn.Sequential(layer), nn.Sequential(nn.Linear(2, 2, bias=False).double())
    with torch.no_grad():
        reference[0].weight.copy_(torch.diag(torch.tensor([sigma, 0.0], dtype=torch.float64)))
    second = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def loss(net: nn.Module):
        return -nu * net(second)[1]

    rows = train(model, reference, loss, lr=1e-3, steps=1000, every=50)
    for row in rows[1:]:
        expected = rows[0]["flow/error"] * math.exp(nu * row["flow/time"] / sigma)
        assert row["flow/certificate"] == pytest.approx(expected, rel=2e-3)
        assert row["flow/error"] == pytest.approx(row["flow/certificate"], rel=5e-3)


def test_it_says_when_the_theorem_does_not_apply():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 6, bias=False)).double()
    model = lrm.factorize(copy.deepcopy(dense), rank=2, tau=0.1)
    reference = lrm.densify(copy.deepcopy(model))
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.1)

    def loss(net: nn.Module):
        return net(torch.eye(6, dtype=torch.float64)).square().sum()

    options = {"reference": reference, "loss": loss}
    # The spectrum was cut from a wider one, and sits at the bound.
    assert lrm.monitor(model, optimizer, **options).measure()["flow/holds"] == 0
    for options_, word in (
        ({"momentum": 0.9}, "momentum"),
        ({"weight_decay": 0.1}, "weight_decay"),
        ({"metric": "scalar"}, "metric"),
        ({"clip_margin": 0.5}, "clip_margin"),
        ({"maximize": True}, "maximize"),
    ):
        other = lrm.optim.CondLR(model.parameters(), lr=0.1, **options_)
        with pytest.raises(ValueError, match=word):
            lrm.monitor(model, other, **options)
    with pytest.raises(TypeError, match="CondLR"):
        lrm.monitor(model, **options)
    with pytest.raises(ValueError, match="together"):
        lrm.monitor(model, optimizer, reference=reference)
    twin = nn.Sequential(nn.Linear(6, 5, bias=False))
    with pytest.raises(ValueError, match=r"0\.weight has shape \(5, 6\)"):
        lrm.monitor(model, optimizer, reference=twin, loss=loss)
    with pytest.raises(ValueError, match=r"0\.bias"):
        lrm.monitor(model, optimizer, reference=nn.Sequential(nn.Linear(6, 6)), loss=loss)


def test_measuring_changes_neither_model():
    model, reference = networks(0)
    reference[0].weight.requires_grad_(False)
    before = [p.clone() for p in (*model.parameters(), *reference.parameters())]
    x = torch.randn(4, 2, 3, 3).double()
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.1)
    lrm.monitor(
        model, optimizer, reference=reference, loss=lambda net: net(x).square().mean()
    ).measure()
    after = [*model.parameters(), *reference.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)
    assert not reference[0].weight.requires_grad
