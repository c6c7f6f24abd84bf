"""CondLRMuon: the direction against dense oracles, its norm, its size, and what a step keeps."""

from __future__ import annotations

import copy
import io

import dense_reference as dense
import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, shapes
from torch import Tensor, nn

import lrmanifold as lrm
from benchmarks.speed.launches import count, steady_step, transformer, vgg16
from lrmanifold import linalg
from lrmanifold.factors import Factors
from lrmanifold.nn import LowRankLinear
from lrmanifold.optim import CondLR, CondLRAdam, CondLRMuon, force_accelerator
from lrmanifold.optim.muon_step import DAMPING, steepest

PHI = (1 + 5**0.5) / 2
taus = st.sampled_from([None, 0.0, 0.1, 0.5])
retractions = st.sampled_from(["factored", "orthographic", "svd"])


def manifold_of(m: int, n: int, rank: int, tau, retraction: str = "factored") -> lrm.FixedRank:
    if tau is None:
        return lrm.FixedRank(m, n, rank, retraction=retraction)
    return lrm.WellConditioned(m, n, rank, tau=tau, retraction=retraction)


def weight(M: lrm.FixedRank, *lead: int, dtype=torch.float64) -> geoopt.ManifoldParameter:
    X = M.random(*lead, *M.point_shape, dtype=dtype)
    return geoopt.ManifoldParameter(X.as_subclass(Tensor), manifold=M)


def blocks_of(U: Tensor, V: Tensor, Z: Tensor) -> Factors:
    """(U_p, M, V_p) of a dense matrix; exactly 0 at a full basis."""
    M = U.mT @ Z @ V
    U_p = Z @ V - U @ M if U.shape[0] > U.shape[1] else torch.zeros_like(U)
    V_p = Z.mT @ U - V @ M.mT if V.shape[0] > V.shape[1] else torch.zeros_like(V)
    return Factors(U_p, M, V_p)


def dense_of(U: Tensor, V: Tensor, xi: Factors) -> Tensor:
    return U @ xi.S @ V.mT + xi.U @ V.mT + U @ xi.V.mT


def largest(xi: Factors) -> float:
    """N(ξ)."""
    return max(float(torch.linalg.matrix_norm(block, 2)) for block in xi)


def nuclear(xi: Factors) -> float:
    return sum(float(torch.linalg.svdvals(block).sum()) for block in xi)


def damped(xi: Factors, damping: float = DAMPING) -> Factors:
    """σ/√(σ² + d²) by LAPACK's SVD."""
    whole = sum(float(block.square().sum()) for block in xi) ** 0.5
    found = []
    for block in xi:
        P, s, Qh = torch.linalg.svd(block, full_matrices=False)
        found.append((P * (s / (s.square() + (damping * whole) ** 2).sqrt())) @ Qh)
    return Factors(*found)


def point_and_gradient(size, seed, spread=0.0):
    """Bases U, V and the tangent blocks of a gradient, whose spectrum is spread by 10^spread."""
    torch.manual_seed(seed)
    m, n, r = size
    U, V = (torch.linalg.qr(torch.randn(k, r, dtype=torch.float64)).Q for k in (m, n))
    P, s, Qh = torch.linalg.svd(torch.randn(m, n, dtype=torch.float64), full_matrices=False)
    return U, V, blocks_of(U, V, (P * s * torch.logspace(0, -spread, len(s)).double()) @ Qh)


# -- the direction


@given(size=shapes, spread=st.sampled_from([0.0, 2.0, 8.0]), seed=seeds)
def test_the_direction_is_the_damped_polar_factor_of_each_block(size, spread, seed):
    _, _, G = point_and_gradient(size, seed, spread)
    for found, expected in zip(steepest(G), damped(G), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    for found, expected in zip(steepest(G._make(b.float() for b in G)), damped(G), strict=True):
        # Rounding, 1e-7 of the whole, against the damping, 1e-3 of it.
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


@given(size=shapes, spread=st.sampled_from([0.0, 1.0, 3.0]), seed=seeds)
def test_no_competitor_of_the_unit_ball_gains_more(size, spread, seed):
    U, V, G = point_and_gradient(size, seed, spread)
    xi, D = steepest(G), dense_of(U, V, G)
    torch.testing.assert_close(D, dense.project_tangent(U, V, D))
    best = nuclear(G)
    gain = float((D * dense_of(U, V, xi)).sum())
    values = sum(int(torch.linalg.matrix_rank(block)) for block in G)
    assert largest(xi) <= 1 + 1e-12
    assert (1 - 0.3003 * values * DAMPING) * best <= gain <= best * (1 + 1e-12)
    # The direction is tangent, and no other tangent vector of the ball comes above the bound.
    torch.testing.assert_close(
        dense_of(U, V, blocks_of(U, V, dense_of(U, V, xi))), dense_of(U, V, xi), atol=1e-9, rtol=0
    )
    for k in range(20):
        eta = blocks_of(U, V, torch.randn_like(D))
        if k % 2:  # near ours, where a better one would be
            eta = Factors(*(a + 0.05 * b for a, b in zip(xi, eta, strict=True)))
        other = dense_of(U, V, eta)
        assert float((D * other).sum()) / largest(eta) <= gain / (1 - 0.3003 * values * DAMPING)
        # For the spectral norm of the whole vector ours is the best up to the golden ratio.
        spectral = float((D * other).sum() / torch.linalg.matrix_norm(other, 2))
        ours = gain / float(torch.linalg.matrix_norm(dense_of(U, V, xi), 2))
        assert spectral <= PHI * ours / (1 - 0.3003 * values * DAMPING)


@given(size=shapes, seed=seeds)
def test_undamped_the_direction_gains_the_whole_dual_norm(size, seed):
    U, V, G = point_and_gradient(size, seed)
    xi = steepest(G, 1e-6)  # smaller ones let in the rounding of zero singular values
    gain = float((dense_of(U, V, G) * dense_of(U, V, xi)).sum())
    assert gain == pytest.approx(nuclear(G), rel=3e-6)


@given(size=shapes, scales=st.tuples(*[st.sampled_from([0.0, 0.1, 1.0, 10.0])] * 3), seed=seeds)
def test_the_spectral_norm_lies_between_the_largest_block_and_1_618_of_it(size, scales, seed):
    U, V, G = point_and_gradient(size, seed)
    xi = Factors(*(s * block for s, block in zip(scales, G, strict=True)))
    spectral = float(torch.linalg.matrix_norm(dense_of(U, V, xi), 2))
    assert largest(xi) * (1 - 1e-12) <= spectral <= PHI * largest(xi) * (1 + 1e-12)


def test_both_constants_are_attained():
    def unit(i):
        return torch.eye(3, dtype=torch.float64)[:, i : i + 1]

    U = V = unit(0)
    all_three = Factors(unit(1), torch.ones(1, 1).double(), unit(1))
    assert float(torch.linalg.matrix_norm(dense_of(U, V, all_three), 2)) == pytest.approx(PHI)
    alone = Factors(unit(1), torch.zeros(1, 1).double(), 0 * unit(1))
    assert float(torch.linalg.matrix_norm(dense_of(U, V, alone), 2)) == pytest.approx(1.0)


@given(x=st.floats(0, 1e6))
def test_the_loss_by_damping_is_at_most_0_3003(x):
    assert x - x**2 / (1 + x**2) ** 0.5 <= 0.3003


def test_a_block_of_rounding_stays_small_and_zero_stays_zero():
    _, _, G = point_and_gradient((9, 8, 3), 0)
    xi = steepest(G._replace(U=1e-12 * G.U))
    assert largest(Factors(xi.U, 0 * xi.S, 0 * xi.V)) <= 1e-8
    assert largest(xi) > 0.9
    assert all(torch.equal(b, torch.zeros_like(b)) for b in steepest(G._make(0 * b for b in G)))


@given(
    size=st.sampled_from([(1, 7, 3), (2, 3, 4), (30, 20, 20)]),
    damping=st.sampled_from([1e-1, 1e-3, 1e-5]),
    seed=seeds,
)
def test_damped_polar_factors_of_any_rank_in_float32(size, damping, seed):
    torch.manual_seed(seed)
    X = torch.randn(2, *size[1:], dtype=torch.float64) * torch.logspace(0, -7, size[2]).double()
    X = X / torch.linalg.matrix_norm(X, keepdim=True)
    P, s, Qh = torch.linalg.svd(X, full_matrices=False)
    exact = (P * (s / (s.square() + damping**2).sqrt())[:, None]) @ Qh
    torch.testing.assert_close(linalg.damped_polar(X, damping), exact, rtol=0, atol=1e-8)
    found = linalg.damped_polar(X.float(), damping).double()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6 / damping)
    assert float(torch.linalg.matrix_norm(found, 2).max()) <= 1 + 1e-5


@pytest.mark.parametrize("shape", [(40, 20), (3, 9, 4), (2, 2, 130, 110), (5, 1)])
def test_both_ways_to_a_damped_polar_factor_agree(shape):
    torch.manual_seed(0)
    X = torch.randn(shape)
    X = X / torch.linalg.matrix_norm(X, keepdim=True)
    X[..., 0] = 0.0
    found = linalg.damped_polar(X, 1e-3)
    exact = linalg.damped_polar_by_products(X.double(), 1e-3)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-5)
    if X.ndim == 3:
        X[1, 2, 3] = float("nan")
        broken = linalg.damped_polar(X, 1e-3)
        assert broken[1].isnan().any()
        torch.testing.assert_close(broken[::2], found[::2], rtol=0, atol=2e-5)


def test_a_damped_polar_factor_is_differentiable_where_singular_values_meet():
    X = torch.cat([torch.linalg.qr(torch.randn(8, 3))[0] / 2, torch.zeros(8, 2)], 1)
    X.requires_grad_()
    weights = torch.randn(8, 5)
    (g,) = torch.autograd.grad((linalg.damped_polar(X, 1e-1) * weights).sum(), X)
    Z = X.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad((linalg.damped_polar(Z, 1e-1) * weights).sum(), Z)
    torch.testing.assert_close(g.double(), exact, rtol=1e-3, atol=1e-4)


# -- the step


def reference_step(X, G, b, *, tau, lr, momentum, nesterov, weight_decay, penalty):
    """One step of one matrix; `b` is a dense tangent vector, kept as velocities between steps."""
    U, S, V = X
    inverse = torch.linalg.inv(S)
    velocity = blocks_of(U, V, dense.project_tangent(U, V, G))
    velocity = Factors(velocity.U @ inverse, velocity.S, velocity.V @ inverse.mT)
    b = (
        velocity
        if b is None
        else Factors(*(a + momentum * c for a, c in zip(velocity, b, strict=True)))
    )
    b = Factors(b.U - U @ (U.mT @ b.U), b.S, b.V - V @ (V.mT @ b.V))
    d = b
    if nesterov and momentum:
        d = Factors(*(a + momentum * c for a, c in zip(velocity, b, strict=True)))
    size = (U.shape[0] / V.shape[0]) ** 0.5
    U_p, M, V_p = (size * B for B in damped(Factors(d.U @ S, d.S, d.V @ S.mT)))
    M = M + weight_decay * S
    if penalty:
        M = M + penalty * dense.penalty_gradient(S, squared=True)
    Y = [dense.polar(U - lr * U_p @ inverse), S - lr * M, dense.polar(V - lr * V_p @ inverse.mT)]
    if tau is not None:
        Y[1] = dense.nearest_well_conditioned(Y[1], 1.0 + tau)
    return Y, b


@given(
    size=st.sampled_from([(7, 5, 3), (5, 9, 2), (6, 6, 1), (12, 10, 4)]),
    tau=taus,
    momentum=st.sampled_from([0.0, 0.5, 0.95]),
    nesterov=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.1]),
    penalty=st.sampled_from([0.0, 0.03]),
    seed=seeds,
)
def test_steps_equal_the_dense_formulas(size, tau, momentum, nesterov, weight_decay, penalty, seed):
    torch.manual_seed(seed)
    options = {
        "lr": 0.05, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
        "penalty": penalty,
    }  # fmt: skip
    M, A = manifold_of(*size, tau), torch.randn(size[:2], dtype=torch.float64)
    p = weight(M)
    X, b = list(M.unpack(p.detach().clone())), None
    optimizer = CondLRMuon([p], penalty_squared=True, **options)
    for _ in range(3):
        G = X[0] @ X[1] @ X[2].mT - A
        X, b = reference_step(X, G, b, tau=tau, **options)
        optimizer.zero_grad()
        (0.5 * (M.to_dense(p) - A).square()).sum().backward()
        optimizer.step()
    torch.testing.assert_close(M.to_dense(p.detach()), X[0] @ X[1] @ X[2].mT, rtol=1e-6, atol=1e-7)


@given(
    size=shapes, tau=taus, retraction=retractions, seed=seeds,
    power=st.sampled_from([1e-6, 1e-3, 7.0, 1e6]), dtype=st.sampled_from(["float32", "float64"]),
)  # fmt: skip
def test_the_step_does_not_depend_on_the_scale_of_the_gradient(
    size, tau, retraction, seed, power, dtype
):
    torch.manual_seed(seed)
    M = manifold_of(*size, tau, retraction)
    p = weight(M, dtype=getattr(torch, dtype))
    q = copy.deepcopy(p)
    # A true gradient: entries that contradict the gauge would be rounding of the tangent part.
    G = torch.randn(size[:2], dtype=p.dtype)
    optimizers = CondLRMuon([p], lr=0.05), CondLRMuon([q], lr=0.05)
    for _ in range(3):
        for x, optimizer, scale in zip((p, q), optimizers, (1.0, power), strict=True):
            optimizer.zero_grad()
            (scale * (G * M.to_dense(x)).sum()).backward()
            optimizer.step()
    tolerance = 1e-9 if dtype == "float64" else 2e-3
    if M.cond(p.detach().double()) < 100:  # without a bound the core may become singular
        torch.testing.assert_close(
            M.to_dense(p.detach()), M.to_dense(q.detach()), rtol=tolerance, atol=tolerance
        )


@given(size=shapes, lr=st.sampled_from([1e-4, 1e-3]), seed=seeds)
def test_a_step_has_the_size_that_lr_says(size, lr, seed):
    """Relative to √(m/n), the inverse retraction of a small step has N near lr and at most lr."""
    torch.manual_seed(seed)
    M = lrm.FixedRank(*size, retraction="factored")
    X = lrm.WellConditioned(*size, tau=0.5).random(dtype=torch.float64)
    p = geoopt.ManifoldParameter(X.as_subclass(Tensor), manifold=M)
    before = p.detach().clone()
    (M.to_dense(p) * torch.randn(size[:2], dtype=torch.float64)).sum().backward()
    CondLRMuon([p], lr=lr).step()
    U, _, V = M.unpack(before)
    step = M.to_dense(p.detach()) - M.to_dense(before)
    size_of_step = largest(blocks_of(U, V, step)) / (size[0] / size[1]) ** 0.5
    assert 0.9 * lr <= size_of_step <= lr * (1 + 30 * lr)


@given(size=shapes, tau=taus, retraction=retractions, seed=seeds)
def test_dense_trajectory_does_not_depend_on_the_gauge(size, tau, retraction, seed):
    torch.manual_seed(seed)
    M, A = manifold_of(*size, tau, retraction), torch.randn(size[:2], dtype=torch.float64)
    p = weight(M)
    U, S, V = M.unpack(p.detach())
    P, Q = (torch.linalg.qr(torch.randn_like(S)).Q for _ in range(2))
    q = geoopt.ManifoldParameter(M.pack(U @ P, P.mT @ S @ Q, V @ Q), manifold=M)
    for x in (p, q):
        optimizer = CondLRMuon([x], lr=0.02, weight_decay=0.1)
        for _ in range(8):
            optimizer.zero_grad()
            (0.5 * (M.to_dense(x) - A).square()).sum().backward()
            optimizer.step()
    if M.cond(p.detach()) < 1e3:
        torch.testing.assert_close(
            M.to_dense(p.detach()), M.to_dense(q.detach()), rtol=1e-6, atol=1e-6
        )


def test_decay_acts_on_the_core_alone_and_at_the_rate_itself():
    M = lrm.WellConditioned(9, 4, 3, tau=0.1)
    p = weight(M)
    before = M.unpack(p.detach().clone())
    optimizer = CondLRMuon([p], lr=0.1, weight_decay=0.5)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    after = M.unpack(p.detach())
    torch.testing.assert_close(after.S, 0.95 * before.S)
    torch.testing.assert_close(after.U, before.U)
    torch.testing.assert_close(after.V, before.V)
    assert float(optimizer.state[p]["momentum_buffer"].abs().max()) == 0.0


# -- networks


def network(tau=0.1, dtype=torch.float32) -> nn.Module:
    return nn.Sequential(
        lrm.nn.LowRankConv2d(2, 8, 3, 3, groups=2, tau=tau, dtype=dtype), nn.Tanh(), nn.Flatten(),
        LowRankLinear(8 * 16, 20, 7, tau=tau, dtype=dtype), nn.Tanh(),
        LowRankLinear(20, 20, 4, tau=tau, dtype=dtype), nn.Tanh(),
        LowRankLinear(20, 20, 4, tau=tau, dtype=dtype), nn.Tanh(),
        LowRankLinear(20, 4, 4, tau=tau, dtype=dtype),
    )  # fmt: skip


def run(model, optimizer, steps, *, forced=False, start=0, after=None) -> list[float]:
    like, losses = next(model.parameters()), []
    for i in range(start, start + steps):
        x = torch.randn(32, 2, 6, 6, generator=torch.Generator().manual_seed(i % 4)).to(like)
        y = x[:, 0, :2, :2].flatten(1).argmax(1)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if forced:
            with force_accelerator():
                optimizer.step()
        else:
            optimizer.step()
        losses.append(float(loss.detach()))
        if after is not None:
            after()
    return losses


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("lr", [pytest.param(3e-3, marks=pytest.mark.slow), 0.05, 0.5])
def test_the_certificate_holds_after_every_step(tau, lr, forced):
    torch.manual_seed(0)
    model = network(tau)
    layers = [m for m in model.modules() if isinstance(m, lrm.nn.LowRankLayer)]

    def check():
        for layer in layers:
            X = layer.weight.detach().double()
            assert float(layer.manifold.cond(X).max()) <= (1 + tau) * (1 + 1e-5)
            assert float(layer.manifold.drift(X).max()) <= 1e-5

    optimizer = CondLRMuon(model.parameters(), lr=lr, weight_decay=0.01)
    losses = run(model, optimizer, 40, forced=forced, after=check)
    assert lr != 0.05 or losses[-1] < 0.9 * losses[0]
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("nesterov", [False, True])
def test_bundled_single_and_accelerated_steps_are_the_same(nesterov):
    torch.manual_seed(0)
    ours = network(dtype=torch.float64)
    alone, forced = copy.deepcopy(ours), copy.deepcopy(ours)
    options = {"lr": 0.02, "nesterov": nesterov, "weight_decay": 0.1}
    run(ours, CondLRMuon(ours.parameters(), **options), 6)
    # A group each: no two weights are bundled.
    groups = [{"params": [p]} for p in alone.parameters()]
    run(alone, CondLRMuon(groups, **options), 6)
    run(forced, CondLRMuon(forced.parameters(), **options), 6, forced=True)
    for p, q, x in zip(ours.parameters(), alone.parameters(), forced.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(p, x, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_resumed_run_goes_on_to_the_bit(dtype):
    torch.manual_seed(0)
    model = network(dtype=dtype)
    optimizer = CondLRMuon(model.parameters(), lr=0.03, weight_decay=0.1)
    run(model, optimizer, 5)
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    run(model, optimizer, 5, start=5)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    other = network(dtype=dtype)
    resumed = CondLRMuon(other.parameters(), lr=1.0)
    run(other, resumed, 1)
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    run(other, resumed, 5, start=5)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        assert all(torch.equal(v, resumed.state[q][k]) for k, v in optimizer.state[p].items())


def test_each_kind_of_parameter_remembers_what_its_step_needs():
    model = network()
    optimizer = CondLRMuon(model.parameters(), lr=0.03)
    run(model, optimizer, 1)
    for p in model.parameters():
        low = isinstance(getattr(p, "manifold", None), lrm.FixedRank)
        names = {"momentum_buffer"} if low else {"exp_avg", "exp_avg_sq"}
        assert set(optimizer.state[p]) == {"step", "skipped"} | names
        assert not low or float(optimizer.momentum(p).norm()) > 0


def test_the_state_of_another_rule_is_refused_by_name():
    model = network()
    optimizer = CondLR(model.parameters(), lr=0.03, momentum=0.9)
    run(model, optimizer, 1)
    with pytest.raises(ValueError, match="must have entries of CondLRMuon"):
        CondLRMuon(model.parameters()).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("forced", [False, True])
def test_gradients_that_are_not_finite_are_skipped_state_included(forced):
    torch.manual_seed(0)
    model = network()
    optimizer = CondLRMuon(model.parameters(), lr=0.03)
    run(model, optimizer, 2)
    victim = model[3].weight
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    victim.grad[1, 0] = float("nan")
    before = {p: p.detach().clone() for p in model.parameters()}
    state = copy.deepcopy(optimizer.state[victim])
    if forced:
        with force_accelerator():
            optimizer.step()
    else:
        optimizer.step()
    for p, x in before.items():
        assert torch.equal(p.detach(), x) == (p is victim)
        assert int(optimizer.state[p]["skipped"]) == int(p is victim)
    for key, value in state.items():
        assert key == "skipped" or torch.equal(optimizer.state[victim][key], value)


def test_ordinary_parameters_take_adamws_step_and_other_manifolds_that_of_adam():
    torch.manual_seed(0)
    X = lrm.Stiefel().random(6, 3)
    frames = [geoopt.ManifoldParameter(X.clone(), manifold=lrm.Stiefel()) for _ in range(2)]
    plain = [nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    ours = CondLRMuon([frames[0], plain[0]], lr=0.01)
    theirs = CondLRAdam([frames[1]], lr=0.01), torch.optim.AdamW([plain[1]], 0.01, weight_decay=0)
    for _ in range(4):
        for pair in (frames, plain):
            pair[0].grad = torch.randn_like(pair[0])
            pair[1].grad = pair[0].grad.clone()
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    assert torch.equal(*frames)
    torch.testing.assert_close(*plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("build", "most"), [(vgg16, 640), (transformer, 1200)])
def test_launches_of_a_step(build, most):
    """604 of VGG16 and 1138 of a transformer (two padded batches) when this was written."""
    _, optimizer = steady_step(build, CondLRMuon, {}, share=0.2, tau=0.1)
    assert sum(count(optimizer.step).values()) <= most


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"momentum": 1.0}, "momentum must be"),
        ({"betas": (0.9, 1.0)}, "betas.* must be"),
        ({"nesterov": "yes"}, "nesterov must be"),
        ({"eps": -1.0}, "eps must be"),
        ({"lr": -1.0}, "lr must be"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        CondLRMuon(network().parameters(), **options)
