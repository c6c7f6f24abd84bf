"""DLRT's integrators against dense formulas, what happens when a pass fails, and adaptive ranks."""

from __future__ import annotations

import dense_dlrt
import geoopt
import pytest
import torch
from adaptive import (
    Regression,
    assert_certified,
    assert_same,
    classes,
    classify,
    manifold_like,
    mlp,
    snapshot,
    target,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankConv2d, LowRankLinear
from lrmanifold.optim import DLRT

INTEGRATORS = ("bug", "augmented_bug", "ksl")
sizes = st.sampled_from([(7, 6, 3), (6, 9, 1), (12, 8, 4), (4, 5, 2)])
full = st.sampled_from([(7, 4, 4), (4, 7, 4), (5, 5, 5), (6, 1, 1), (1, 1, 1)])
taus = st.sampled_from([None, 0.1, 1.0])


class Quadratic:
    """½ Σ H ∘ (W - A)² over a batch, counting its evaluations."""

    def __init__(self, *shape: int) -> None:
        self.H, self.A = 0.2 + torch.rand(shape).double(), torch.randn(shape).double()
        self.calls = 0

    def gradient(self, i: int):
        return lambda W: self.H[i] * (W - self.A[i])

    def closure(self, p: Tensor, optimizer: DLRT):
        def evaluate() -> Tensor:
            self.calls += 1
            optimizer.zero_grad()
            loss = 0.5 * (self.H * (p.manifold.to_dense(p) - self.A).square()).sum()
            loss.backward()
            return loss.detach()

        return evaluate


def weight(M: lrm.FixedRank, *lead: int) -> geoopt.ManifoldParameter:
    X = M.random(*lead, *M.point_shape, dtype=torch.float64).as_subclass(Tensor)
    return geoopt.ManifoldParameter(X, manifold=M)


# -- one step


@pytest.mark.parametrize("gradient", ["factors", "probe"])
@pytest.mark.parametrize("integrator", INTEGRATORS)
@given(
    size=sizes, batch=st.integers(1, 2), tau=taus, seed=seeds,
    lr=st.sampled_from([0.01, 0.4]), s_steps=st.integers(1, 3),
    terms=st.sampled_from([(0.0, 0.0), (0.1, 0.0), (0.1, 0.05)]),
)  # fmt: skip
def test_steps_equal_the_dense_formulas(
    integrator, gradient, size, batch, tau, seed, lr, s_steps, terms
):
    torch.manual_seed(seed)
    M = manifold_like(*size, tau, gradient=gradient)
    p, loss = weight(M, batch), Quadratic(batch, *size[:2])
    s_steps = 1 if integrator == "ksl" else s_steps
    extra = {"weight_decay": terms[0], "penalty": terms[1], "s_steps": s_steps}
    optimizer = DLRT([p], lr, integrator=integrator, penalty_squared=True, **extra)
    points = [M.unpack(X) for X in p.detach().clone()]
    optimizer.step(loss.closure(p, optimizer))
    expected = [
        dense_dlrt.step(integrator, X, loss.gradient(i), lr=lr, tau=tau, **extra)
        for i, X in enumerate(points)
    ]
    torch.testing.assert_close(M.to_dense(p.detach()), torch.stack(expected), rtol=1e-8, atol=1e-9)
    shared = gradient == "probe" and integrator != "ksl"
    assert loss.calls == (3 if integrator == "ksl" else 2 - shared + s_steps)
    assert M.check_point_on_manifold(p.detach())


@pytest.mark.parametrize("integrator", INTEGRATORS)
@given(size=full, tau=taus, seed=seeds)
def test_at_full_rank_any_matrix_of_the_set_is_reached(integrator, size, tau, seed):
    torch.manual_seed(seed)
    M = manifold_like(*size, tau)
    p, A = weight(M), M.to_dense(weight(M).detach())
    optimizer = DLRT([p], 1.0, integrator=integrator)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (M.to_dense(p) - A).square().sum()
        loss.backward()
        return loss.detach()

    for _ in range(3):
        optimizer.step(closure)
    torch.testing.assert_close(M.to_dense(p.detach()), A, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("integrator", ["bug", "augmented_bug"])
def test_grouped_convolutions_step_group_by_group(integrator):
    torch.manual_seed(0)
    conv = LowRankConv2d(4, 6, 3, 1, groups=2, tau=0.5, gradient="probe").double()
    x, y = torch.randn(5, 4, 6, 6).double(), torch.randn(5, 6, 4, 4).double()

    def loss(kernel: Tensor) -> Tensor:
        kernel = kernel.reshape(6, 3, 3, 2).movedim(-1, 1)
        out = nn.functional.conv2d(x, kernel, conv.bias.detach(), groups=2)
        return (out - y).square().mean()

    points = [conv.manifold.unpack(X) for X in conv.weight.detach().clone()]
    start = torch.stack([U @ S @ V.mT for U, S, V in points])

    def gradient(i: int):
        def of(W: Tensor) -> Tensor:
            kernel = start.clone()
            kernel[i] = W
            return torch.autograd.functional.jacobian(loss, kernel)[i]

        return of  # exact for group i alone: the groups do not interact in this loss

    optimizer = DLRT([conv.weight], 0.3, integrator=integrator)

    def closure() -> Tensor:
        optimizer.zero_grad()
        out = (conv(x) - y).square().mean()
        out.backward()
        return out.detach()

    optimizer.step(closure)
    expected = torch.stack(
        [dense_dlrt.step(integrator, X, gradient(i), lr=0.3, tau=0.5, weight_decay=0.0, penalty=0.0)
         for i, X in enumerate(points)]
    )  # fmt: skip
    W = conv.manifold.to_dense(conv.weight.detach())
    torch.testing.assert_close(W, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_a_rank_deficient_start_steps_where_singular_cores_are_points(integrator):
    torch.manual_seed(0)
    for gradient in ("probe", "factors"):
        M = lrm.FixedRank(6, 5, 2, gradient=gradient)
        p, loss = weight(M, 1), Quadratic(1, 6, 5)
        X = M.unpack(p.detach()[0])
        X.S.copy_(torch.diag(torch.tensor([1.0, 0.0])))
        X, optimizer = M.unpack(p.detach()[0].clone()), DLRT([p], 0.3, integrator=integrator)
        if gradient == "factors":
            with pytest.raises(lrm.GeometryError, match="with gradient='probe' it would be a p"):
                optimizer.step(loss.closure(p, optimizer))
            continue
        expected = dense_dlrt.step(
            integrator, X, loss.gradient(0), lr=0.3, tau=None, weight_decay=0.0, penalty=0.0
        )
        optimizer.step(loss.closure(p, optimizer))
        torch.testing.assert_close(M.to_dense(p.detach()[0]), expected)


def test_the_truncated_step_is_the_best_approximation_of_the_augmented_one():
    torch.manual_seed(0)
    M = lrm.FixedRank(12, 10, 4)
    p, loss = weight(M, 1), Quadratic(1, 12, 10)
    X = M.unpack(p.detach()[0].clone())
    optimizer = DLRT([p], 0.5, tol=0.1)
    optimizer.step(loss.closure(p, optimizer))
    U, S, V = dense_dlrt.augmented_bug(X, loss.gradient(0), 0.5, weight_decay=0.0, penalty=0.0)
    s = torch.linalg.svdvals(S)
    tails = torch.stack([s[k:].norm() for k in range(9)])
    rank = int((tails > 0.1 * s.norm()).sum())
    assert 1 < rank < 8
    assert M.rank == rank
    W = M.to_dense(p.detach()[0])
    torch.testing.assert_close((W - U @ S @ V.mT).norm(), tails[rank])


def test_ordinary_parameters_step_by_the_last_gradient_and_the_start_loss_is_returned():
    torch.manual_seed(0)
    model, seen = nn.Sequential(LowRankLinear(6, 5, 2, tau=0.5)), []
    optimizer = DLRT(model.parameters(), 0.1, weight_decay=0.2)
    x = torch.randn(8, 6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        seen.append((float(loss.detach()), model[0].bias.grad.clone()))
        return loss.detach()

    before = model[0].bias.detach().clone()
    assert float(optimizer.step(closure)) == seen[0][0]
    expected = before - 0.1 * (seen[-1][1] + 0.2 * before)
    torch.testing.assert_close(model[0].bias.detach(), expected)
    assert len(seen) == 3


def test_maximizing_is_minimizing_the_negative():
    weights = []
    for sign in (1.0, -1.0):
        problem = Regression(target().double(), 4, tau=None)
        optimizer = DLRT(problem.model.parameters(), 0.1, tol=0.01, maximize=sign < 0)

        def closure(problem=problem, sign=sign) -> Tensor:
            problem.model.zero_grad()
            loss = sign * problem.loss()
            loss.backward()
            return loss.detach()

        for _ in range(3):
            optimizer.step(closure)
        weights.append(problem.W)
    torch.testing.assert_close(*weights)


# -- a pass that fails


@pytest.mark.parametrize("gradient", ["factors", "probe"])
@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("how", ["raises", "nan"])
def test_a_failing_pass_leaves_everything_bit_for_bit(integrator, gradient, at, how):
    torch.manual_seed(0)
    model, (x, y) = mlp(3, 0.5, gradient=gradient), classes()
    tol = 0.05 if integrator == "augmented_bug" else None
    optimizer = DLRT(model.parameters(), 0.1, integrator=integrator, tol=tol)
    good, losses = classify(model, x, y), []
    optimizer.step(good)

    def bad() -> Tensor:
        losses.append(good())
        if len(losses) == at and how == "raises":
            raise KeyboardInterrupt
        if len(losses) == at:
            model[2].weight.grad[0, 0] = float("nan")
        return losses[-1]

    before, passes = snapshot(model, optimizer), 2 if gradient == "probe" else 3
    fails = at <= (3 if integrator == "ksl" else passes)
    if fails and how == "raises":
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(bad)
    else:
        assert torch.equal(optimizer.step(bad), losses[0])
    if fails:
        assert_same(before, snapshot(model, optimizer))
        assert bool(optimizer.skipped_steps) == (how == "nan")
    optimizer.step(good)  # and training goes on
    assert_certified(model)


def test_without_skipping_a_bad_gradient_raises_and_names_its_parameter():
    model, (x, y) = mlp(3, 0.5), classes()
    optimizer = DLRT(model.named_parameters(), 0.1, skip_nonfinite=False)
    good, before = classify(model, x, y), snapshot(model, optimizer)

    def bad() -> Tensor:
        loss = good()
        model[2].bias.grad[0] = float("inf")
        return loss

    with pytest.raises(FloatingPointError, match=r"'2\.bias'"):
        optimizer.step(bad)
    assert_same(before, snapshot(model, optimizer))


def test_a_step_that_overflows_raises_and_leaves_everything():
    problem = Regression(target(), 4, tau=None)
    optimizer = DLRT(problem.model.parameters(), 1e39, tol=0.01)
    before = snapshot(problem.model, optimizer)
    with pytest.raises((FloatingPointError, ValueError)):
        optimizer.step(problem.closure)
    assert_same(before, snapshot(problem.model, optimizer))


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_weights_that_are_frozen_or_unused_stay_bit_for_bit(integrator):
    torch.manual_seed(0)
    model = nn.ModuleList(LowRankLinear(12, 12, 5, tau=None, gradient="probe") for _ in range(3))
    model[0].requires_grad_(False)
    tol = 0.5 if integrator == "augmented_bug" else None
    optimizer = DLRT(model.parameters(), 0.1, integrator=integrator, tol=tol, weight_decay=0.1)
    before, x = snapshot(model, optimizer), torch.randn(20, 12)

    def closure() -> Tensor:
        model.zero_grad()
        loss = model[1](model[0](x)).square().mean()  # model[2] is not used
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    after = snapshot(model, optimizer)
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]) == (not name.startswith("1."))
    assert int(optimizer.state[model[2].weight]["step"]) == 0


# -- options


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"tol": 1.0}, "tol"), ({"tol": -0.1}, "tol"), ({"tol": float("nan")}, "tol"),
        ({"tol": 0.1, "integrator": "bug"}, "tol"), ({"integrator": "euler"}, "integrator"),
        ({"s_steps": 0}, "s_steps"), ({"s_steps": 2, "integrator": "ksl"}, "s_steps"),
        ({"max_rank": 3}, "tol"), ({"min_rank": 3}, "tol"), ({"tol": 0.1, "max_rank": 0}, "rank"),
        ({"tol": 0.1, "min_rank": 0}, "rank"), ({"tol": 0.1, "min_rank": 4, "max_rank": 3}, "rank"),
        ({"lr": -0.1}, "lr"), ({"lr": 0.1, "penalty": float("inf")}, "penalty"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(options, word):
    with pytest.raises(ValueError, match=word):
        DLRT(LowRankLinear(6, 5, 3).parameters(), **{"lr": 0.1, **options})


def test_a_step_needs_a_closure():
    with pytest.raises(ValueError, match="closure"):
        DLRT(LowRankLinear(6, 5, 3).parameters(), 0.1).step()


def test_two_weights_cannot_adapt_with_one_manifold():
    M = lrm.FixedRank(6, 5, 2)
    with pytest.raises(ValueError, match="manifold of its own"):
        DLRT([weight(M), weight(M)], 0.1, tol=0.1)


def test_a_manifold_without_a_rank_is_refused():
    p = geoopt.ManifoldParameter(torch.eye(4, 2), manifold=lrm.Stiefel())
    with pytest.raises(ValueError, match="Stiefel"):
        DLRT([p], 0.1)


def test_a_closure_without_backward_is_warned_of():
    model = nn.Sequential(LowRankLinear(6, 5, 2, tau=0.1))
    optimizer = DLRT(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"left no gradient\. Does it call backward") as caught:
        optimizer.step(lambda: model(torch.ones(2, 6)).sum())
    assert caught[0].filename == __file__
    with pytest.raises(TypeError, match="closure must be a function that returns the loss, got a"):
        optimizer.step(model(torch.ones(2, 6)).sum())
