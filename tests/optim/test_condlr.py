"""CondLR's step against dense float64 formulas, its invariances, and torch.optim.SGD."""

from __future__ import annotations

import copy

import dense_reference
import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold.optim import CondLR

taus = st.sampled_from([None, 0.0, 0.1, 0.5])


def manifold_of(m: int, n: int, rank: int, tau: float | None) -> lrm.FixedRank:
    if tau is None:
        return lrm.FixedRank(m, n, rank, retraction="factored")
    return lrm.WellConditioned(m, n, rank, tau=tau)


def random_weight(
    M: lrm.FixedRank, lead: tuple[int, ...] = (), **options
) -> geoopt.ManifoldParameter:
    X = M.random(*lead, *M.point_shape, dtype=torch.float64, **options)
    return geoopt.ManifoldParameter(X.as_subclass(Tensor), manifold=M)


@st.composite
def sizes(draw) -> tuple[int, int, int]:
    m, n = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return m, n, draw(st.integers(1, min(m, n)))


@st.composite
def step_options(draw) -> dict:
    momentum = draw(st.sampled_from([0.0, 0.3, 0.9]))
    return {
        "lr": draw(st.sampled_from([1e-3, 0.05, 0.3])),
        "momentum": momentum,
        "nesterov": momentum > 0 and draw(st.booleans()),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "penalty": draw(st.sampled_from([0.0, 0.03])),
        "penalty_squared": draw(st.booleans()),
    }


def smooth(options: dict, tau: float | None) -> dict:
    """R itself has no gradient at perfectly conditioned cores, where tau = 0 puts every step."""
    return options if tau != 0.0 else {**options, "penalty_squared": True}


class Quadratic:
    """½ Σ H ∘ (W - A)² over a batch of matrices, with its dense gradient."""

    def __init__(self, shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.H = (0.2 + torch.rand(shape, dtype=torch.float64)).to(device)
        self.A = torch.randn(shape, dtype=torch.float64).to(device)

    def __call__(self, W: Tensor) -> Tensor:
        return 0.5 * (self.H * (W - self.A).square()).sum()

    def gradient(self, W: Tensor) -> Tensor:
        return self.H * (W - self.A)


# -- the step


@given(size=sizes(), batch=st.integers(0, 2), tau=taus, options=step_options(), seed=seeds)
def test_steps_equal_the_dense_formulas(device, size, batch, tau, options, seed):
    torch.manual_seed(seed)
    options = smooth(options, tau)
    M, lead = manifold_of(*size, tau), (batch,) if batch else ()
    loss = Quadratic((*lead, *size[:2]), device)
    p = random_weight(M, lead, device=device)
    optimizer = CondLR([p], **options)
    start = p.detach().cpu().clone().reshape(-1, *M.point_shape)
    reference = [(*M.unpack(X), None) for X in start]
    targets = Quadratic((0,))
    for _ in range(3):  # the second and third use transported momentum
        optimizer.zero_grad()
        loss(M.to_dense(p)).backward()
        optimizer.step()
        for i, (U, S, V, b) in enumerate(reference):
            flat = (x.cpu().reshape(-1, *size[:2])[i] for x in (loss.H, loss.A))
            targets.H, targets.A = flat
            G = targets.gradient(U @ S @ V.mT)
            reference[i] = dense_reference.step(U, S, V, G, b, tau=tau, **options)
    W = M.to_dense(p.detach()).cpu().reshape(-1, *size[:2])
    expected = torch.stack([U @ S @ V.mT for U, S, V, _ in reference])
    torch.testing.assert_close(W, expected, rtol=1e-7, atol=1e-9)
    if options["momentum"]:
        b = M.tangent_to_dense(p.detach(), optimizer.momentum(p)).cpu()
        expected = torch.stack([b for *_, b in reference])
        torch.testing.assert_close(b.reshape_as(expected), expected, rtol=1e-7, atol=1e-8)


@given(size=sizes(), tau=taus, options=step_options(), seed=seeds)
def test_maximizing_is_minimizing_the_negative(size, tau, options, seed):
    torch.manual_seed(seed)
    M = manifold_of(*size, tau)
    loss = Quadratic(size[:2])
    p, bias = random_weight(M), nn.Parameter(torch.randn(size[0], dtype=torch.float64))
    q, other = copy.deepcopy(p), copy.deepcopy(bias)
    down, up = CondLR([p, bias], **options), CondLR([q, other], maximize=True, **options)
    for _ in range(3):
        down.zero_grad(), up.zero_grad()
        loss(M.to_dense(p) + bias[:, None]).backward()
        (-loss(M.to_dense(q) + other[:, None])).backward()
        down.step(), up.step()
    assert torch.equal(p, q)
    assert torch.equal(bias, other)


@given(size=sizes(), tau=taus, options=step_options(), seed=seeds)
def test_dense_trajectory_does_not_depend_on_the_gauge(size, tau, options, seed):
    torch.manual_seed(seed)
    options = smooth(options, tau)
    M = manifold_of(*size, tau)
    loss = Quadratic(size[:2])
    p = random_weight(M)
    U, S, V = M.unpack(p.detach())
    A, B = (torch.linalg.qr(torch.randn_like(S)).Q for _ in range(2))
    q = geoopt.ManifoldParameter(M.pack(U @ A, A.mT @ S @ B, V @ B), manifold=M)
    optimizers = CondLR([p], **options), CondLR([q], **options)
    for _ in range(20):
        for x, optimizer in zip((p, q), optimizers, strict=True):
            optimizer.zero_grad()
            loss(M.to_dense(x)).backward()
            optimizer.step()
    if M.cond(p.detach()) < 1e6:  # without a bound the core may become singular on the way
        torch.testing.assert_close(
            M.to_dense(p.detach()), M.to_dense(q.detach()), rtol=1e-6, atol=1e-7
        )


@given(size=sizes(), tau=taus, options=step_options(), seed=seeds)
def test_gradients_are_only_read(size, tau, options, seed):
    torch.manual_seed(seed)
    M = manifold_of(*size, tau)
    p, q = random_weight(M), nn.Parameter(torch.randn(3, dtype=torch.float64))
    optimizer = CondLR([p, q], maximize=bool(seed % 2), **options)
    grads = torch.randn_like(p), torch.randn_like(q)
    for _ in range(3):
        p.grad, q.grad = (g.clone() for g in grads)
        optimizer.step()
        assert torch.equal(p.grad, grads[0])
        assert torch.equal(q.grad, grads[1])


def test_momentum_does_not_share_memory_with_the_gradient():
    p = nn.Parameter(torch.ones(3))
    optimizer = CondLR([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(3)
    optimizer.step()
    p.grad.fill_(7.0)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.ones(3))


@given(size=sizes(), tau=taus, seed=seeds)
def test_rate_zero_leaves_the_dense_weight(size, tau, seed):
    torch.manual_seed(seed)
    M = manifold_of(*size, tau)
    p = random_weight(M)
    before = M.to_dense(p.detach())
    optimizer = CondLR([p], lr=0.0, momentum=0.9, weight_decay=0.1, penalty=0.1)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    torch.testing.assert_close(M.to_dense(p.detach()), before, rtol=1e-12, atol=1e-12)


@given(size=sizes(), tau=taus, seed=seeds)
def test_small_steps_lower_the_loss_at_the_rate_of_the_gradient(size, tau, seed):
    torch.manual_seed(seed)
    M = manifold_of(*size, tau)
    loss = Quadratic(size[:2])
    p, lr = random_weight(M), 1e-7
    optimizer = CondLR([p], lr=lr)
    before = loss(M.to_dense(p))
    before.backward()
    xi = M.egrad2rgrad(p.detach(), p.grad)
    optimizer.step()
    drop = float(before.detach() - loss(M.to_dense(p.detach())))
    bound = float("inf") if tau is None else 1.0 + tau
    if M.cond(p.detach()) < bound * (1 - 1e-6):
        assert drop == pytest.approx(lr * float(M.inner(p, xi)), rel=1e-2, abs=1e-13)
    else:  # on the boundary the outward part is removed
        assert drop >= -1e-13


@pytest.mark.parametrize("tau", [None, 0.0, 0.5])
def test_least_squares_converges_to_a_target_in_the_set(device, tau):
    torch.manual_seed(0)
    M = manifold_of(20, 15, 4, tau)
    A = M.to_dense(M.random(dtype=torch.float64, device=device)).as_subclass(Tensor)
    p = random_weight(M, device=device)
    optimizer = CondLR([p], lr=0.3, momentum=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        (0.5 * (M.to_dense(p) - A).square().sum()).backward()
        optimizer.step()
    assert float(torch.linalg.matrix_norm(M.to_dense(p.detach()) - A)) < 1e-8


def test_completion_from_half_of_the_entries_converges():
    torch.manual_seed(1)
    M = lrm.FixedRank(30, 25, 2, retraction="factored")
    A = M.to_dense(M.random(dtype=torch.float64)).as_subclass(Tensor)
    mask = torch.rand(30, 25) < 0.5
    p = geoopt.ManifoldParameter(M.from_dense(2.0 * mask * A), manifold=M)
    optimizer = CondLR([p], lr=0.8, momentum=0.7)
    for _ in range(400):
        optimizer.zero_grad()
        (0.5 * (mask * (M.to_dense(p) - A)).square().sum()).backward()
        optimizer.step()
    assert float(torch.linalg.matrix_norm(M.to_dense(p.detach()) - A)) < 1e-6


# -- ordinary parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    options=step_options().map(lambda o: {k: o[k] for k in o if not k.startswith("penalty")}),
    maximize=st.booleans(),
    seed=seeds,
)
def test_ordinary_parameters_take_the_step_of_sgd(device, dtype, options, maximize, seed):
    torch.manual_seed(seed)
    shapes = (4, 3), (5,), ()
    ours = [nn.Parameter(torch.randn(s, dtype=dtype, device=device)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = (
        CondLR(ours, maximize=maximize, penalty=0.3, **options),
        torch.optim.SGD(theirs, maximize=maximize, **options),
    )
    for _ in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    tol = 1e-6 if dtype == torch.float32 else 1e-13
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=tol, atol=tol)


# -- what step() does around the update


def test_closure_is_called_once_with_gradients_and_its_loss_returned():
    p = nn.Parameter(torch.ones(3))
    optimizer, calls = CondLR([p], lr=0.1), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) == 3.0
    assert calls == [True]
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.8))


def test_parameters_without_gradient_stay_and_get_no_state():
    M = manifold_of(4, 3, 2, 0.1)
    p, q = random_weight(M), nn.Parameter(torch.ones(3))
    before = p.detach().clone()
    optimizer = CondLR([p, q], lr=0.1, momentum=0.9, weight_decay=0.1)
    q.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p, before)
    assert p not in optimizer.state
    assert not torch.equal(q.detach(), torch.ones(3))


def test_sparse_gradients_raise_and_name_the_parameter():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = CondLR(embedding.named_parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse.*'weight'.*SparseAdam"):
        optimizer.step()


def other_points(device) -> list[geoopt.ManifoldParameter]:
    torch.manual_seed(0)
    options = {"dtype": torch.float64, "device": device}
    frame = lrm.Stiefel().random(8, 3, **options).as_subclass(Tensor)
    ball = nn.functional.normalize(torch.randn(5, 7, **options), dim=-1)
    manifolds = geoopt.EuclideanStiefel(), lrm.Stiefel("polar"), lrm.Stiefel("cayley")
    points = [geoopt.ManifoldParameter(frame.clone(), manifold=M) for M in manifolds]
    return [*points, geoopt.ManifoldParameter(ball, manifold=geoopt.Sphere())]


def test_other_manifolds_move_as_by_geoopt(device):
    for p in other_points(device):
        q, A = copy.deepcopy(p), torch.randn_like(p)
        optimizers = CondLR([p], lr=0.05), geoopt.optim.RiemannianSGD([q], lr=0.05)
        for _ in range(30):
            for y, optimizer in zip((p, q), optimizers, strict=True):
                optimizer.zero_grad()
                (y * A).sum().backward()
                optimizer.step()
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-9, atol=1e-9)


def test_other_manifolds_with_momentum_reach_the_known_minimum(device):
    for p in other_points(device):
        A = torch.randn_like(p).detach()
        optimizer = CondLR([p], lr=0.05, momentum=0.8, nesterov=True)
        for _ in range(500):
            optimizer.zero_grad()
            (p * A).sum().backward()
            optimizer.step()
        assert p.manifold.check_point_on_manifold(p.detach(), atol=1e-9)
        # min <A, X> over frames is minus the nuclear norm; over a product of spheres, row by row.
        frames = not isinstance(p.manifold, geoopt.Sphere)
        best = torch.linalg.svdvals(A).sum() if frames else A.norm(dim=-1).sum()
        assert float((p.detach() * A).sum()) == pytest.approx(-float(best), rel=1e-8)
