"""Long runs in float32: factors stay orthonormal, and points of a bounded set stay in it."""

from __future__ import annotations

import pytest
import torch

import lrmanifold as lrm


def walk(manifold, X, steps, length, check=lambda Y: None):
    """`steps` random tangent steps of length about `length`; the largest drift on the way."""
    X, worst = torch.Tensor(X), 0.0
    for k in range(steps):
        xi = manifold.proju(X, torch.randn_like(X))
        xi = xi * (length / manifold.norm(X, xi, keepdim=True))
        if hasattr(manifold, "m"):
            # pull back towards size one: a random walk of the core would run into rank loss
            U, S, V = manifold.unpack(X)
            pull = torch.linalg.qr(S).Q - S
            xi = xi + 0.1 * manifold.pack(torch.zeros_like(U), pull, torch.zeros_like(V))
        X = manifold.retr(X, xi)
        check(X)
        if k % 50 == 0 or k == steps - 1:
            worst = max(worst, float(manifold.drift(X).max()))
    return worst


NAMES = lrm.retractions.available()


@pytest.mark.parametrize(
    ("name", "steps"),
    [(name, 1000) for name in NAMES]
    + [pytest.param(name, 10_000, marks=pytest.mark.slow) for name in NAMES],
)
def test_fixed_rank_drifts_less_than_1e5_in_float32(name, steps):
    M = lrm.FixedRank(30, 20, 4, retraction=name)
    assert walk(M, M.origin(dtype=torch.float32), steps, 0.1) <= 1e-5


@pytest.mark.parametrize("retraction", ["polar", "qr", "cayley"])
def test_stiefel_drifts_less_than_1e5_in_2000_float32_steps(retraction):
    M = lrm.Stiefel(retraction)
    assert walk(M, M.random(30, 6, dtype=torch.float32), 2000, 0.3) <= 1e-5


@pytest.mark.parametrize("retraction", ["polar", "qr", "cayley"])
def test_drift_does_not_accumulate(retraction):
    """Each step removes the rounding of the one before; carried over, it would grow like √steps."""
    M, count, drifts = lrm.Stiefel(retraction), 16, []
    X = torch.Tensor(M.random(count, 30, 6, dtype=torch.float32))
    for _ in range(1000):
        X = M.retr(X, 0.05 * M.proju(X, torch.randn_like(X)))
        drifts.append(float(M.drift(X.double()).mean()))
    early, late = sum(drifts[10:60]) / 50, sum(drifts[-50:]) / 50
    assert late <= 1.5 * early


@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
def test_well_conditioned_stays_in_its_set_at_every_one_of_2000_float32_steps(tau):
    M = lrm.WellConditioned(30, 20, 4, tau=tau)

    def check(X):
        assert float(M.cond(X)) <= (1 + tau) * (1 + 1e-5)

    assert walk(M, M.random(dtype=torch.float32), 2000, 0.3, check) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("tau", [0.0, 0.1])
def test_well_conditioned_drifts_less_than_1e5_in_10000_float32_steps(tau):
    M = lrm.WellConditioned(60, 40, 8, tau=tau)
    assert walk(M, M.random(dtype=torch.float32), 10_000, 0.3) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("retraction", ["polar", "qr", "cayley"])
def test_stiefel_drifts_less_than_1e5_in_10000_float32_steps(retraction):
    M = lrm.Stiefel(retraction)
    assert walk(M, M.random(60, 10, dtype=torch.float32), 10_000, 0.3) <= 1e-5
