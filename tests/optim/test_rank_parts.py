"""The parts of a change of rank: augment, truncate, the rank that is chosen, and resize."""

from __future__ import annotations

import geoopt
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, seeds

import lrmanifold as lrm
from lrmanifold.nn import LowRankLinear
from lrmanifold.optim import DLRT, CondLR, CondLRAdam, CondLRMuon, resize
from lrmanifold.optim.rank import augment, nearest_rank, rank_for_tolerance, truncate

OPTIMIZERS = {
    "CondLR": lambda p: CondLR(p, 0.3, momentum=0.5),
    "CondLRAdam": lambda p: CondLRAdam(p, 0.02),
    "CondLRMuon": lambda p: CondLRMuon(p, 0.02),
}


@given(
    size=st.sampled_from([(9, 7, 2), (7, 9, 3), (6, 6, 1), (5, 8, 5), (8, 5, 4)]),
    count=st.integers(0, 5), zero=st.booleans(), batch=st.sampled_from([(), (3,)]), seed=seeds,
)  # fmt: skip
def test_augmenting_keeps_the_matrix_and_takes_up_the_directions(size, count, zero, batch, seed):
    m, n, r = size
    count = min(count, r, min(m, n) - r)
    M, G = lrm.FixedRank(m, n, r), generator(seed)
    X = M.unpack(M.random(*batch, *M.point_shape, dtype=torch.float64, generator=G))
    dU, dV = (torch.randn(*batch, k, r, dtype=torch.float64, generator=G) for k in (m, n))
    if zero:
        dU, dV = torch.zeros_like(dU), torch.zeros_like(dV)
    Y = augment(X, dU, dV, count)
    torch.testing.assert_close(Y.U @ Y.S @ Y.V.mT, X.U @ X.S @ X.V.mT, rtol=1e-12, atol=1e-12)
    assert Y.S.shape[-1] == r + count
    for Q, old, D in ((Y.U, X.U, dU), (Y.V, X.V, dV)):
        assert oracles.orthonormality(Q) < 1e-13
        torch.testing.assert_close(Q[..., :r], old, rtol=1e-12, atol=1e-12)
        # What is left of D after the new columns is what a best approximation leaves.
        rest = D - old @ (old.mT @ D)
        s = torch.linalg.svdvals(rest)
        left = torch.linalg.matrix_norm(rest - Q @ (Q.mT @ rest))
        torch.testing.assert_close(left, s[..., count:].square().sum(-1).sqrt(), atol=1e-10, rtol=0)


@given(seed=seeds, rank=st.integers(1, 6))
def test_truncating_is_the_best_approximation(seed, rank):
    M = lrm.FixedRank(9, 7, 6)
    X = M.random(2, *M.point_shape, dtype=torch.float64, generator=generator(seed))
    U, S, V = truncate(M.unpack(X), rank)
    best = oracles.best_approximation(M.to_dense(X), rank)
    torch.testing.assert_close(U @ S @ V.mT, best, rtol=1e-10, atol=1e-10)


def test_the_rank_for_a_tolerance_is_the_smallest_that_meets_it():
    s = torch.tensor([4.0, 3.0, 0.4, 0.3, 0.0])
    assert [rank_for_tolerance(s, t) for t in (0.0, 0.0596, 0.0598, 0.0994, 0.0996, 0.7)] == [
        4, 4, 3, 3, 2, 1,
    ]  # fmt: skip
    assert rank_for_tolerance(torch.zeros(3), 0.1) == 1
    batch = torch.stack((s, torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])))
    assert rank_for_tolerance(batch, 0.1) == 5


@given(
    tau=st.sampled_from([0.0, 0.1, 1.0]), scale=st.sampled_from(["free", 0.1, 0.5, 1.0, 3.0]),
    seed=seeds, batch=st.sampled_from([1, 3]),
)  # fmt: skip
def test_the_nearest_rank_is_that_of_the_nearest_well_conditioned_matrix(tau, scale, seed, batch):
    s = torch.rand(batch, 6, generator=generator(seed)).double().sort(descending=True).values ** 3
    M = lrm.WellConditioned(8, 6, 6, tau=tau, scale=scale)
    gaps = []
    for k in range(1, 7):
        S = torch.diag_embed(s[:, :k])
        near = torch.nn.functional.pad(M.project_core(S), (0, 6 - k, 0, 6 - k))
        gaps.append(float((near - torch.diag_embed(s)).square().sum()))
    assert gaps[nearest_rank(M, s, 1, 6) - 1] <= min(gaps) * (1 + 1e-9) + 1e-12
    assert nearest_rank(lrm.FixedRank(8, 6, 6), s, 1, 5) == 5


def test_dlrt_cuts_to_the_rank_that_is_nearest_at_a_fixed_size():
    """Squared distances 0.405, 0.505 and 0.605 for ranks 1, 2, 3: weak directions go."""
    A = torch.zeros(8, 6, dtype=torch.float64)
    A[range(3), range(3)] = torch.tensor([1.0, 0.45, 0.45], dtype=torch.float64)
    M = lrm.WellConditioned(8, 6, 3, tau=0.0, scale=1.0)
    p = geoopt.ManifoldParameter(M.from_dense(A), manifold=M)
    optimizer = DLRT([p], lr=1.0, tol=0.1)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (M.to_dense(p) - A).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert M.rank == 1
    assert 2 * closure().item() == pytest.approx(0.405)


@pytest.mark.parametrize("to", [2, 4, 6])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resizing_projects_the_momentum_exactly_and_keeps_second_moments(name, to):
    torch.manual_seed(0)
    layer = LowRankLinear(9, 8, 4, tau=None, gradient="probe", dtype=torch.float64)
    optimizer = OPTIMIZERS[name](layer.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(5, 9, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    M, state = layer.manifold, optimizer.state[layer.weight]
    key = "exp_avg" if name == "CondLRAdam" else "momentum_buffer"
    X = layer.weight.detach().clone()
    before = oracles.dense_tangent(X, state[key], 8, 9)
    second = state.get("exp_avg_sq", torch.zeros(3)).clone()
    point = M.unpack(X)
    directions = (torch.randn(k, 4, dtype=torch.float64) for k in (8, 9))
    Y = truncate(point, to) if to < 4 else augment(point, *directions, to - 4)
    resize(layer.weight, Y, state)
    assert layer.rank == M.rank == to
    assert layer.weight.grad is None
    left, right = Y.U @ Y.U.mT, Y.V @ Y.V.mT
    expected = left @ before + before @ right - left @ before @ right
    after = oracles.dense_tangent(layer.weight, state[key], 8, 9)
    torch.testing.assert_close(after, expected, rtol=1e-10, atol=1e-12)
    if to >= 4:
        torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-12)
    assert torch.equal(state.get("exp_avg_sq", torch.zeros(3)), second)
