"""The monitor's certificate: T1 and T2 hold along training, whatever the steps, and are sharp."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lrmanifold as lrm
from lrmanifold.monitor._cone import normal_core
from lrmanifold.nn import LowRankLinear


def train(model, reference, loss, *, lr, steps, every=1, batches=None, **options):
    """Both by gradient steps on the same batches; the rows of the monitor."""
    optimizer = lrm.optim.CondLR(model.parameters(), lr=lr, **options)
    momentum = options.get("momentum", 0.0)
    full = torch.optim.SGD(reference.parameters(), lr=lr, momentum=momentum)
    seen = {}
    given_loss = (lambda net: loss(net, seen["k"])) if batches else loss
    monitor = lrm.monitor(model, optimizer, every=every, reference=reference, loss=given_loss)
    rows = [monitor.measure()]
    for k in range(steps):
        seen["k"] = k
        for net, rule in ((model, optimizer), (reference, full)):
            rule.zero_grad()
            given_loss(net).backward()
            rule.step()
        rows += [row] if (row := monitor.step()) else []
    return rows


def networks(seed: int, tau: float | None, noise: float = 0.01, dtype=torch.float64):
    """A network with grouped convolution and biases, near rank 2, and its factorized twin."""
    torch.manual_seed(seed)
    dense = nn.Sequential(
        nn.Conv2d(2, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 5), nn.Linear(5, 2)
    ).double()
    low_rank = lrm.factorize(copy.deepcopy(dense), rank=2, tau=tau, exclude="4", keep_larger=True)
    start = lrm.densify(copy.deepcopy(low_rank))
    with torch.no_grad():
        for p in start.parameters():
            p.add_(noise * torch.randn_like(p))
    return low_rank.to(dtype), start.to(dtype)


def assert_bounded(rows):
    for row in rows:
        assert row["flow/holds"] == 1
        assert row["flow/error"] <= row["flow/certificate"] * (1 + 1e-9) + 1e-12
        assert row["flow/distance"] <= row["flow/bound"] * (1 + 1e-9) + 1e-12
        assert row["flow/best"] <= row["flow/distance"] * (1 + 1e-9) + 1e-6


@pytest.mark.parametrize("tau", [None, 0.0, 0.1, 1.0])
@pytest.mark.parametrize("lr", [0.01, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_minibatch_training_stays_inside_for_every_tau(tau, lr, dtype):
    model, reference = networks(0, tau, dtype=dtype)
    x, y = torch.randn(64, 2, 3, 3, dtype=dtype), torch.randn(64, 2, dtype=dtype)
    order = [torch.randint(64, (8,)) for _ in range(25)]

    def loss(net, k):
        return (net(x[order[k]]) - y[order[k]]).square().mean()

    rows = train(model, reference, loss, lr=lr, steps=25, batches=True)
    assert len(rows) == 26
    assert_bounded(rows)
    assert rows[-1]["flow/time"] == pytest.approx(25 * lr)
    parts = sum(x for key, x in rows[-1].items() if key.startswith("flow/part/"))
    assert parts == pytest.approx(rows[-1]["flow/certificate"] ** 2)


@pytest.mark.parametrize("tau", [None, 0.1])
@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.9}, {"weight_decay": 0.1}, {"metric": "scalar"}, {"clip_margin": 0.5}],
    ids=lambda o: next(iter(o)),
)
def test_it_holds_for_steps_that_are_no_plain_gradient_steps(tau, options):
    model, reference = networks(1, tau)
    x, y = torch.randn(16, 2, 3, 3).double(), torch.randn(16, 2).double()
    rows = train(
        model, reference, lambda net: (net(x) - y).square().mean(), lr=0.05, steps=15, **options
    )
    assert_bounded(rows)


@pytest.mark.parametrize("lr", [0.5, 1.5, 1.9])
def test_long_steps_do_not_violate_it(lr):
    """½‖W - T‖², whose field has Lipschitz constant 1: the pointwise certificate failed here."""
    torch.manual_seed(3)
    dense = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    model = lrm.factorize(copy.deepcopy(dense), rank=2, tau=None, keep_larger=True)
    target, eye = torch.randn(6, 8).double(), torch.eye(8).double()

    def loss(net):
        return 0.5 * (net(eye).mT - target).square().sum()

    assert_bounded(train(model, dense, loss, lr=lr, steps=20))


def test_a_constraint_that_is_left_again_does_not_make_it_hold_by_name():
    """Active for 40 steps, then released: the bound has to remember what happened before."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 6, bias=False)).double()
    model = lrm.factorize(copy.deepcopy(dense), rank=3, tau=0.5, keep_larger=True)
    reference = lrm.densify(copy.deepcopy(model))
    target = torch.diag(torch.tensor([4.0, 1.0, 0.5, 0.1, 0.0, 0.0]).double())
    back, eye = model[0].dense_weight().detach(), torch.eye(6).double()

    def loss(net, k):
        return 0.5 * (net(eye).mT - (target if k < 40 else back)).square().sum()

    rows = train(model, reference, loss, lr=0.05, steps=60, batches=True)
    assert rows[40]["cond"] == pytest.approx(1.5)
    assert rows[50]["flow/error"] > 1e-3
    assert_bounded(rows)


def test_the_numbers_are_those_of_dense_algebra():
    """One 5 x 4 matrix of rank 2 with the loss ½‖H ∘ (W - A)‖², the root of H elementwise."""
    torch.manual_seed(0)
    W, A, H = (torch.randn(5, 4).double() for _ in range(3))
    H, h = H.abs(), 0.1
    model = lrm.factorize(
        nn.Sequential(nn.Linear(4, 5, bias=False).double()), rank=2, tau=None, keep_larger=True
    )
    reference = nn.Sequential(nn.Linear(4, 5, bias=False).double())
    with torch.no_grad():
        reference[0].weight.copy_(W)
    Y = model[0].dense_weight().detach()
    rows = train(
        model, reference,
        lambda net: 0.5 * (H * (net(torch.eye(4).double()).mT - A).square()).sum(),
        lr=h, steps=1,
    )  # fmt: skip

    def parts(Z):
        P, s, Qh = torch.linalg.svd(Z)
        return P[:, :2], s, Qh[:2].mT, (P[:, :2] * s[:2]) @ Qh[:2]

    def tangent(U, V, Z):
        return Z - (Z - U @ U.mT @ Z) @ (torch.eye(4).double() - V @ V.mT)

    (U, s, V, X), (U_y, s_y, V_y, _) = parts(W), parts(Y)
    F_W, F_X, F_Y = (-H * (Z - A) for Z in (W, X, Y))
    W_next, Y_next = reference[0].weight.detach(), model[0].dense_weight().detach()
    X_next = parts(W_next)[3]
    go_X, go_Y = tangent(U, V, F_W), tangent(U_y, V_y, F_Y)
    bend = sum(
        float(torch.linalg.matrix_norm(Z, 2)) for Z in ((F_W - go_X) / s[1], (F_Y - go_Y) / s_y[1])
    )
    e = float((Y - X).norm())
    lam = float(((Y - X) * (F_Y - F_X)).sum()) / e**2
    d, rho = ((X_next - X) / h - go_X).norm(), ((Y_next - Y) / h - go_Y).norm()
    G, moved = (go_Y - go_X).norm(), (F_X - F_W).norm()
    squared = max(0.0, 1 + 2 * h * (lam + bend / 2)) * e**2
    squared += 2 * h * float(moved + d + rho) * e + float(h * (G + d + rho)) ** 2
    row = rows[-1]
    assert rows[0]["flow/error"] == rows[0]["flow/certificate"] == pytest.approx(e)
    assert row["flow/rate"] == pytest.approx(lam + bend / 2)
    assert row["flow/kappa/0"] == pytest.approx(bend / 2)
    assert row["flow/gradient"] == pytest.approx(float(moved))
    assert row["flow/companion"] == pytest.approx(float(d))
    assert row["flow/step"] == pytest.approx(float(rho))
    assert row["flow/turning"] == pytest.approx(float(G))
    assert row["flow/certificate"] == pytest.approx(math.sqrt(squared))
    assert row["flow/error"] == pytest.approx(float((Y_next - X_next).norm()))


def test_every_term_is_that_of_dense_algebra_where_both_models_are_at_the_bound():
    """As above with cond <= 1.5, at which both models are and stay: normal vectors in the core."""
    torch.manual_seed(0)
    h, kappa = 0.1, 1.5 * (1.0 - 64.0 * torch.finfo(torch.float32).eps)  # the monitor's set
    eye, H = torch.eye(4).double(), torch.rand(5, 4).double()
    P, Q = (torch.linalg.qr(torch.randn(*size).double()).Q for size in ((5, 4), (4, 4)))
    spectrum = torch.diag(torch.tensor([3.0, 1.0, 0.3, 0.1]).double())
    start = P @ spectrum @ Q.mT
    W = start + 0.1 * torch.randn(5, 4).double()
    dense = nn.Sequential(nn.Linear(4, 5, bias=False).double())
    with torch.no_grad():
        dense[0].weight.copy_(start)
    model = lrm.factorize(copy.deepcopy(dense), rank=2, tau=0.5, keep_larger=True)
    with torch.no_grad():
        dense[0].weight.copy_(W)

    def parts(Z):
        """U, s, V of the nearest point of rank 2 with cond <= kappa; it, and its outward normal."""
        P, s, Qh = torch.linalg.svd(Z)
        (u, v), s = (P[:, :2], Qh[:2].mT), s[:2]
        assert s[0] > 0.999 * kappa * s[1]
        t = (kappa * s[0] + s[1]) / (kappa**2 + 1)
        s = torch.stack((kappa * t, t))
        out = u @ torch.diag(torch.tensor([1.0, -kappa]).double()) @ v.mT
        return u, s, v, (u * s) @ v.mT, out

    def tangent(u, v, Z):
        return Z - (Z - u @ u.mT @ Z) @ (eye - v @ v.mT)

    def share(Z, out):
        """Of the outward normal in Z."""
        return float((Z * out).sum()) / (1.0 + kappa**2)

    Y = model[0].dense_weight().detach()
    A = Y + 2.0 * (parts(Y)[4] + parts(W)[4])  # both are pushed outwards
    rows = train(
        model, dense, lambda net: 0.5 * (H * (net(eye).mT - A).square()).sum(), lr=h, steps=1
    )
    (U, s, V, X, out_X), (u, s_y, v, Y, _) = parts(W), parts(Y)
    _, s_next, _, Y_next, out = parts(model[0].dense_weight().detach())
    X_next = parts(dense[0].weight.detach())[3]
    F_W, F_X, F_Y = (-H * (Z - A) for Z in (W, X, Y))
    go_X, go_Y = tangent(U, V, F_W), tangent(u, v, F_Y)
    normal_X, normal_Y = (torch.linalg.matrix_norm(Z, 2) for Z in (F_W - go_X, F_Y - go_Y))
    inward, clipped = share(go_X - (X_next - X) / h, out_X), share(go_Y - (Y_next - Y) / h, out)
    assert inward > 0.01
    assert clipped > 0.01
    go_X = go_X - inward * out_X
    bend = 0.5 * float(normal_Y / s_y[1] + (normal_X + kappa * inward) / s[1])
    e = float((Y - X).norm())
    lam = float(((Y - X) * (F_Y - F_X)).sum()) / e**2
    d, rho = (X_next - X) / h - go_X, (Y_next - Y) / h + clipped * out - go_Y
    d, rho, turned = (float(Z.norm()) for Z in (d, rho, go_Y - go_X))
    expected = {
        "loss": max(-(e**2) * (1 + 2 * h * bend), 2 * h * lam * e**2),
        "curvature": 2 * h * bend * e**2,
        "gradient": 2 * h * float((F_X - F_W).norm()) * e,
        "companion": 2 * h * d * e,
        "step": 2 * h * rho * e,
        "square": (h * (turned + d + rho)) ** 2,
    }
    reached = e**2 + sum(expected.values())
    normal, twice_q = h * clipped * float(out.norm()), h * kappa * clipped / float(s_next[1])
    expected["clip"] = (reached - normal**2) / (1 - twice_q) - reached
    for name, size in expected.items():
        assert rows[-1][f"flow/part/{name}"] == pytest.approx(size, rel=1e-6), name
    assert_bounded(rows)


def test_the_growth_is_attained():
    """Rank 1 at σ e₁e₁ᵀ under the force ν e₂e₂ᵀ: deviations grow by exp(νt/σ) exactly."""
    nu, angle = 0.5, 1e-3
    layer = LowRankLinear(2, 2, 1, bias=False, tau=None, dtype=torch.float64)
    with torch.no_grad():
        u = torch.tensor([[math.cos(angle)], [math.sin(angle)]], dtype=torch.float64)
        layer.weight.copy_(layer.manifold.pack(u, torch.ones(1, 1).double(), u))
    model, reference = nn.Sequential(layer), nn.Sequential(nn.Linear(2, 2, bias=False).double())
    with torch.no_grad():
        reference[0].weight.copy_(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)))
    second = torch.tensor([0.0, 1.0], dtype=torch.float64)
    rows = train(model, reference, lambda net: -nu * net(second)[1], lr=2e-3, steps=250, every=50)
    for row in rows[1:]:
        expected = rows[0]["flow/error"] * math.exp(nu * row["flow/time"])
        assert row["flow/certificate"] == pytest.approx(expected, rel=5e-3)
        assert row["flow/error"] == pytest.approx(row["flow/certificate"], rel=5e-3)


def test_a_lost_certificate_does_not_come_back():
    model, reference = networks(0, None)
    x = torch.randn(4, 2, 3, 3).double()
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.1)
    scale = {"of": 1.0}
    monitor = lrm.monitor(
        model, optimizer, every=1, reference=reference,
        loss=lambda net: scale["of"] * net(x).square().mean(),
    )  # fmt: skip
    assert monitor.step()["flow/holds"] == 1
    scale["of"] = float("inf")
    assert monitor.step()["flow/holds"] == 0
    scale["of"] = 1.0
    assert monitor.step()["flow/holds"] == 0


def test_a_change_of_rank_is_a_new_start():
    model, reference = networks(0, None)
    x = torch.randn(4, 2, 3, 3).double()
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.1)
    monitor = lrm.monitor(
        model, optimizer, every=1, reference=reference, loss=lambda net: net(x).square().mean()
    )
    monitor.step()
    other = lrm.factorize(
        lrm.densify(copy.deepcopy(model)), rank=1, tau=None, exclude="4", keep_larger=True
    )
    model.load_state_dict(other.state_dict())
    row = monitor.step()
    assert row["flow/certificate"] == row["flow/error"]
    assert row["flow/holds"] == 1


def test_wrong_arguments_are_refused():
    model, reference = networks(0, 0.1)
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.1)
    options = {"reference": reference, "loss": lambda net: net(torch.ones(1, 2, 3, 3)).sum()}
    with pytest.raises(TypeError, match="needs the optimizer"):
        lrm.monitor(model, **options)
    with pytest.raises(ValueError, match="together"):
        lrm.monitor(model, optimizer, reference=reference)
    twin = copy.deepcopy(reference)
    twin[3] = nn.Linear(24, 6)
    with pytest.raises(ValueError, match=r"3\.weight has shape \(6, 24\)"):
        lrm.monitor(model, optimizer, **{**options, "reference": twin})
    twin[3] = nn.Linear(24, 5, bias=False)
    with pytest.raises(ValueError, match=r"3\.bias"):
        lrm.monitor(model, optimizer, **{**options, "reference": twin})
    with pytest.raises(ValueError, match="reference and loss"):
        lrm.monitor(model, optimizer).output_bound(torch.ones(1, 2, 3, 3))


def test_measuring_changes_neither_model():
    model, reference = networks(0, 0.1)
    reference[0].weight.requires_grad_(False)
    before = [p.clone() for p in (*model.parameters(), *reference.parameters())]
    x = torch.randn(4, 2, 3, 3).double()
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.1)
    monitor = lrm.monitor(
        model, optimizer, reference=reference, loss=lambda net: net(x).square().mean()
    )
    monitor.measure()
    monitor.step()
    after = [*model.parameters(), *reference.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)
    assert not reference[0].weight.requires_grad


# -- the normal cone


@given(
    r=st.integers(1, 5),
    kappa=st.sampled_from((1.0, 1.1, 2.0)),
    top=st.integers(1, 4),
    low=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_normal_core_is_normal_and_nearest(r, kappa, top, low, seed):
    """N is proximal normal: clip(S + tN) = S; and B - N is in the polar cone, orthogonal to N."""
    generator = torch.Generator().manual_seed(seed)
    s = 1.0 + (kappa - 1.0) * torch.rand(r, dtype=torch.float64, generator=generator)
    if r > 1:
        s[: min(top, r - 1)], s[max(r - low, min(top, r - 1)) :] = kappa, 1.0
    s = s.sort(descending=True).values
    B = torch.randn(r, r, dtype=torch.float64, generator=generator)
    N, inward = normal_core(B, s, kappa)
    S = torch.diag(s)
    t = 0.5 / max(float(torch.linalg.matrix_norm(N, 2)), 1e-3)
    assert torch.allclose(lrm.linalg.spectral_clip(S + t * N, kappa - 1.0), S, atol=1e-8)
    assert abs(float(((B - N) * N).sum())) < 1e-8
    least = float(torch.linalg.eigvalsh(N)[0])
    assert float(inward) == pytest.approx(max(0.0, -least), abs=1e-9)
    # No nearer normal vector: the remainder points into the set.
    eta = 1e-6
    moved = (lrm.linalg.spectral_clip(S + eta * (B - N), kappa - 1.0) - S) / eta
    assert torch.allclose(moved, B - N, atol=1e-3)


@pytest.mark.parametrize("place", [0, 1])
def test_an_unused_layer_without_singular_values_loses_the_certificate(place):
    """Its bend is 0/0, whichever layer it is."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    model = lrm.factorize(copy.deepcopy(dense), 2, tau=None, include="*")
    with torch.no_grad():
        model[place].S.zero_()
    x = torch.randn(8, 6, dtype=torch.float64)
    rows = train(model, dense, lambda net: net[1 - place](x).square().mean(), lr=0.01, steps=2)
    assert math.isnan(rows[-1][f"flow/kappa/{place}"])
    assert rows[-1]["flow/holds"] == 0
