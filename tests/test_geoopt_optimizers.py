"""geoopt's own optimizers, unchanged, on all three manifolds."""

from __future__ import annotations

import warnings

import geoopt
import pytest
import torch
from geoopt.optim import RiemannianAdam, RiemannianLineSearch, RiemannianSGD
from oracles import dense
from strategies import gaussian, orthonormal

import lrmanifold as lrm

# Learning rates are for the loss ‖P_Ω(W - A)‖² with half of the entries in Ω. Its Hessian is about
# the identity, so that rate 1 is about a Newton step.
OPTIMIZERS = {
    "SGD": lambda p: RiemannianSGD(p, lr=1.0),
    "SGD, stabilize": lambda p: RiemannianSGD(p, lr=1.0, stabilize=5),
    "SGD, momentum": lambda p: RiemannianSGD(p, lr=0.5, momentum=0.5),
    "SGD, Nesterov": lambda p: RiemannianSGD(p, lr=0.5, momentum=0.5, nesterov=True),
    "Adam": lambda p: RiemannianAdam(p, lr=1.0, betas=(0.9, 0.99)),
    "Adam, amsgrad": lambda p: RiemannianAdam(p, lr=2.0, betas=(0.9, 0.99), amsgrad=True),
    "LineSearch, Armijo": lambda p: RiemannianLineSearch(p),
    "LineSearch, Fletcher-Reeves": lambda p: RiemannianLineSearch(p, cg_method="fr"),
    "LineSearch, Wolfe, Polak-Ribiere": lambda p: RiemannianLineSearch(
        p, line_search_method="wolfe", cg_method="pr"
    ),
}
SET = {
    "FixedRank": lambda: lrm.FixedRank(60, 50, 5),
    "WellConditioned": lambda: lrm.WellConditioned(60, 50, 5, tau=0.5),
    "WellConditioned, tau = 0": lambda: lrm.WellConditioned(60, 50, 5, tau=0.0),
}


def completion(cond: float | None, seed: int = 0):
    """A 60 x 50 matrix of rank 5 and the mask of the half of its entries that are seen."""
    if cond is None:
        A = 0.3 * gaussian(60, 5, seed=seed) @ gaussian(5, 50, seed=seed + 1)
    else:
        s = 10.0 * torch.linspace(cond, 1.0, 5, dtype=torch.float64)
        A = (orthonormal(60, 5, seed=seed) * s) @ orthonormal(50, 5, seed=seed + 1).mT
    chosen = torch.randperm(3000, generator=torch.Generator().manual_seed(seed))[:1500]
    mask = torch.zeros(3000, dtype=torch.float64)
    mask[chosen] = 1.0
    return A, mask.reshape(60, 50)


def run(X, optimizer, loss_of, steps, stop):
    """Optimize until `stop` says so; returns the number of steps taken."""

    # geoopt hands the value to scipy, which wants a number
    def closure():
        optimizer.zero_grad()
        loss = loss_of(X)
        loss.backward()
        return float(loss)

    for k in range(steps):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "no suitable step size": converged
            if isinstance(optimizer, RiemannianLineSearch):
                try:
                    optimizer.step(closure)
                except ZeroDivisionError:
                    # scipy's, at steps of 1e-65: nothing descends any more. Not that it converged.
                    stop(torch.Tensor(X.detach()))
                    return steps
            else:
                closure()
                optimizer.step()
        if isinstance(optimizer, RiemannianAdam) and k >= steps // 3:
            optimizer.param_groups[0]["lr"] *= 0.94
        if stop(torch.Tensor(X.detach())):
            return k + 1
    return steps


# Adam's length of step is its rate, not the gradient: it is as exact as its schedule is long.
ACCURACY = {name: 1e-4 if name.startswith("Adam") else 1e-6 for name in OPTIMIZERS}


@pytest.mark.parametrize(("name", "accuracy"), ACCURACY.items())
@pytest.mark.parametrize("manifold", SET)
def test_rank_5_completion_from_half_of_the_entries_is_solved(manifold, name, accuracy):
    M = SET[manifold]()
    tau = getattr(M, "tau", None)
    A, mask = completion(None if tau is None else 1.0 + 0.6 * tau)
    X = geoopt.ManifoldParameter(M.random(dtype=torch.float64), manifold=M)

    def stop(Y):
        assert M.check_point_on_manifold(Y, explain=True) == (True, None)  # at every step
        return float((dense(Y, 60, 50) - A).norm() / A.norm()) <= accuracy

    steps = run(
        X, OPTIMIZERS[name]([X]), lambda X: (mask * (M.to_dense(X) - A)).square().sum(), 600, stop
    )  # fmt: skip
    error = float((dense(X, 60, 50) - A).norm() / A.norm())
    assert error <= accuracy, f"relative error {error:.1e} after {steps} steps"
    assert isinstance(X, geoopt.ManifoldParameter)
    assert X.manifold is M


@pytest.mark.parametrize("name", ["orthographic", "factored", "ksl", "bug"])
@pytest.mark.parametrize("seed", [1, 2])
def test_completion_by_riemannian_sgd_works_with_every_kind_of_retraction(name, seed):
    M = lrm.FixedRank(60, 50, 5, retraction=name)
    A, mask = completion(None, seed)
    # from the truncated SVD of the seen entries: "factored" and "orthographic" need σ_r not small
    start = M.from_dense(2.0 * mask * A)
    X = geoopt.ManifoldParameter(start, manifold=M)
    loss = lambda X: (mask * (M.to_dense(X) - A)).square().sum()  # noqa: E731
    stop = lambda Y: float((dense(Y, 60, 50) - A).norm() / A.norm()) <= 1e-6  # noqa: E731
    assert run(X, RiemannianSGD([X], lr=0.8), loss, 500, stop) < 500


@pytest.mark.parametrize("tau", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_runs_towards_a_target_outside_stay_in_the_set_at_every_step(name, tau):
    """The target has condition number 20: the constraint is active all the way."""
    M = lrm.WellConditioned(20, 16, 4, tau=tau)
    W = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.2]))
    target = torch.nn.functional.pad(W, (0, 12, 0, 16))
    X = geoopt.ManifoldParameter(M.random(dtype=torch.float32), manifold=M)
    loss = lambda X: 0.5 * (M.to_dense(X) - target).square().sum()  # noqa: E731
    first = float(loss(X))

    def stop(Y):
        s = torch.linalg.svdvals(dense(Y, 20, 16))[:4]
        assert float(s[0] / s[-1]) <= (1 + tau) * (1 + 1e-5)
        assert float(M.drift(Y)) <= 1e-5
        return False

    run(X, OPTIMIZERS[name]([X]), loss, 40, stop)
    best = float(0.5 * (M.to_dense(M.from_dense(target)) - target).square().sum())
    assert float(loss(X)) <= first
    assert float(loss(X)) >= best * (1 - 1e-5)  # nothing in the set is nearer than the projection


@pytest.mark.parametrize("retraction", ["polar", "qr", "cayley"])
@pytest.mark.parametrize(("name", "accuracy"), ACCURACY.items())
def test_stiefel_finds_the_leading_invariant_subspace(name, accuracy, retraction):
    """max tr(XᵀBX) over frames is the sum of the largest eigenvalues of B."""
    M = lrm.Stiefel(retraction)
    Q = orthonormal(12, 12, seed=3)
    values = torch.tensor([5.0, 4.0, 3.0, *[1.0 / k for k in range(1, 10)]], dtype=torch.float64)
    B = (Q * values) @ Q.mT
    X = geoopt.ManifoldParameter(M.random(12, 3, dtype=torch.float64), manifold=M)
    loss = lambda X: 12.0 - torch.einsum("ia,ij,ja->", X, B, X)  # noqa: E731

    def stop(Y):
        assert M.check_point_on_manifold(Y, explain=True) == (True, None)
        return float(loss(Y)) <= accuracy**2

    optimizer = OPTIMIZERS[name]([X])
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] *= 0.1
    run(X, optimizer, loss, 500, stop)
    assert abs(float(loss(X))) <= accuracy**2  # the error of the frame, squared


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_weight_decay_of_geoopt_acts_on_the_core_alone(weight_decay):
    """The decay adds wd X to the Euclidean gradient; of it only wd S survives the projection."""
    M = lrm.FixedRank(8, 6, 2)
    X = geoopt.ManifoldParameter(M.random(dtype=torch.float64), manifold=M)
    before = dense(X, 8, 6)
    X.grad = torch.zeros_like(X)
    RiemannianSGD([X], lr=0.5, weight_decay=weight_decay).step()
    assert float((dense(X, 8, 6) - (1 - 0.5 * weight_decay) * before).abs().max()) <= 1e-14


def test_adam_does_not_turn_roundoff_into_steps_at_full_rank():
    """With r = m the block U_p is exactly zero: nothing there for Adam to blow up to unit size."""
    M = lrm.FixedRank(4, 7, 4, retraction="factored")
    X = geoopt.ManifoldParameter(M.random(dtype=torch.float32), manifold=M)
    optimizer = RiemannianAdam([X], lr=1e-3)
    for _ in range(50):
        optimizer.zero_grad()
        (M.to_dense(X) - 1.0).square().sum().backward()
        optimizer.step()
        U_p = M.unpack(optimizer.state[X]["exp_avg"]).U
        assert float(U_p.abs().max()) == 0.0
