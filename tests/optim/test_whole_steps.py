"""What goes wrong goes wrong by name, and as a whole: sets of one's own, overflow, files, DLRT."""

from __future__ import annotations

import contextlib
import copy
import pickle

import geoopt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankLinear
from lrmanifold.optim import DLRT, CondLR, CondLRAdam, CondLRMuon, condlr_update, force_accelerator

OPTIMIZERS = [CondLR, CondLRAdam, CondLRMuon]


def on(M, **options) -> geoopt.ManifoldParameter:
    return geoopt.ManifoldParameter(M.random(**options).as_subclass(Tensor), manifold=M)


class NormCap(lrm.FixedRank):
    """‖S‖₂ at most `cap`: two objects of this class are different sets."""

    name = "NormCap"

    def __init__(self, *args, cap: float, **options) -> None:
        super().__init__(*args, **options)
        self.cap = cap

    def project_core(self, S):
        size = torch.linalg.matrix_norm(S, 2, keepdim=True)
        return S * (self.cap / size).clamp_max(1.0)


class CappedAndConditioned(lrm.WellConditioned):
    """A subclass of the library's own bounded set."""

    name = "CappedAndConditioned"

    def project_core(self, S):
        S = super().project_core(S)
        return S / torch.linalg.matrix_norm(S, 2, keepdim=True).clamp_min(1.0)


# -- sets of one's own


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("forced", [False, True])
def test_the_projection_of_a_subclass_is_used_for_single_weights_too(kind, forced):
    torch.manual_seed(0)
    p = on(CappedAndConditioned(30, 20, 4, tau=0.1))
    M, optimizer = p.manifold, kind([p], lr=0.1)
    for _ in range(20):
        p.grad = torch.zeros_like(p)
        M.unpack(p.grad).S.copy_(-M.unpack(p.detach()).S)
        if forced:
            with force_accelerator():
                optimizer.step()
        else:
            optimizer.step()
        assert float(M.svdvals(p.detach())[0]) <= 1 + 1e-6


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("forced", [False, True])
def test_two_sets_of_a_users_class_are_not_moved_by_the_first_ones_bound(kind, forced):
    torch.manual_seed(0)
    loose, tight = (on(NormCap(9, 8, 3, cap=c, retraction="factored")) for c in (10.0, 0.5))
    optimizer = kind([loose, tight], lr=0.1)
    for _ in range(30):
        for p in (loose, tight):
            p.grad = torch.zeros_like(p)
            p.manifold.unpack(p.grad).S.copy_(-p.manifold.unpack(p.detach()).S)
        if forced:
            with force_accelerator():
                optimizer.step()
        else:
            optimizer.step()
    assert float(tight.manifold.svdvals(tight.detach())[0]) <= 0.5 + 1e-6
    assert float(loose.manifold.svdvals(loose.detach())[0]) > 0.6


def test_a_margin_needs_a_projection_that_takes_one():
    with pytest.raises(ValueError, match=r"clip_margin must be 0 .* on NormCap.* got 0.5"):
        CondLR([on(NormCap(9, 8, 3, cap=1.0))], lr=0.1, clip_margin=0.5)


@pytest.mark.parametrize("retraction", lrm.retractions.available())
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("forced", [False, True])
def test_a_core_outside_is_brought_as_far_inside_as_the_margin_says(retraction, kind, forced):
    torch.manual_seed(0)
    p = on(lrm.WellConditioned(9, 8, 3, tau=0.5, retraction=retraction))
    p.manifold.unpack(p.data).S.copy_(torch.diag(torch.tensor([1.5, 1.0, 1.0])))
    optimizer = kind([p], lr=0.01, clip_margin=0.5)
    p.grad = torch.zeros_like(p)
    p.manifold.unpack(p.grad).S[0, 0] = -1.0
    with force_accelerator() if forced else contextlib.nullcontext():
        optimizer.step()
    assert float(p.manifold.cond(p.detach())) == pytest.approx(1.25, abs=1e-3)


# -- whole or not at all


def mixed(kind, **options):
    torch.manual_seed(0)
    low, dense, bias = on(lrm.WellConditioned(9, 8, 3, tau=0.1)), torch.randn(4, 4), torch.randn(4)
    params = [nn.Parameter(dense), low, nn.Parameter(bias)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params, kind(params, **{"lr": 0.1, **options})


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("lr", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("warm", [0, 2])
def test_a_step_that_overflows_anywhere_leaves_everything(kind, lr, warm):
    params, optimizer = mixed(kind)
    for _ in range(warm):
        optimizer.step()
    for p in params:
        p.grad.mul_(1e3 if kind is CondLR else 1.0)
    optimizer.param_groups[0]["lr"] = lr * (1.0 if kind is CondLR else 1e3)
    before = [p.detach().clone() for p in params]
    states = copy.deepcopy([dict(optimizer.state[p]) for p in params])
    with pytest.raises(FloatingPointError, match=r"group 0 \(.*\) cannot be made.*zero_grad"):
        optimizer.step()
    for p, x, state in zip(params, before, states, strict=True):
        assert torch.equal(p.detach(), x)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, state.get(key, torch.zeros((), dtype=torch.int64)))


@given(victim=st.integers(0, 2), momentum=st.sampled_from([0.0, 0.9]), seed=seeds)
def test_finite_gradients_at_the_end_of_the_range_write_no_infinity(victim, momentum, seed):
    torch.manual_seed(seed)
    params, optimizer = mixed(CondLR, lr=1e3, momentum=momentum)
    params[victim].grad.fill_(3e38)
    before = [p.detach().clone() for p in params]
    with pytest.raises(FloatingPointError, match=f"parameter {victim} of group 0"):
        optimizer.step()
    assert all(torch.equal(p.detach(), x) for p, x in zip(params, before, strict=True))


@pytest.mark.parametrize("retraction", ["svd", "factored", "orthographic"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("seed", range(10))
def test_one_huge_gradient_does_not_poison_the_steps_after_it(kind, retraction, seed):
    torch.manual_seed(seed)
    p = on(lrm.WellConditioned(9, 8, 3, tau=0.5, retraction=retraction))
    optimizer = kind([p], lr=1e-3)
    if kind is CondLR:
        optimizer = CondLR([p], lr=1e-3, momentum=0.9)
    p.grad = 1e38 * torch.randn_like(p).clamp(-3, 3)
    try:
        optimizer.step()
    except FloatingPointError:
        pass
    else:
        assert all(torch.isfinite(v).all() for v in optimizer.state[p].values())
    before = p.detach().clone()
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.isfinite(p).all()
    assert p.manifold.check_point_on_manifold(before, atol=1e-4)


# -- the formulas


@pytest.mark.parametrize("retraction", ["svd", "ksl", "orthographic", "bug"])
def test_momentum_is_transported_for_every_retraction(retraction):
    """The buffer is a tangent vector at the new point, and the old one's projection there."""
    torch.manual_seed(0)
    M = lrm.FixedRank(7, 6, 2, retraction=retraction)
    X = M.random(dtype=torch.float64).as_subclass(Tensor)
    b = M.proju(X, torch.randn_like(X))
    G = torch.randn_like(X)
    options = {"lr": 0.3, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0, "penalty": 0.0}
    Y, moved = condlr_update(M, X, G, b, **options)
    assert M.check_vector_on_tangent(Y, moved, atol=1e-10)
    xi = M.egrad2rgrad(X, G)
    dense = M.tangent_to_dense(X, 0.9 * b + xi)
    U, _, V = M.unpack(Y)
    P, Q = U @ U.mT, V @ V.mT
    projected = P @ dense + dense @ Q - P @ dense @ Q
    torch.testing.assert_close(M.tangent_to_dense(Y, moved), projected, rtol=1e-9, atol=1e-9)
    assert float((moved - (0.9 * b + xi)).norm()) > 1e-2


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (CondLR, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        (CondLRAdam, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    ],
)
@pytest.mark.parametrize("forced", [False, True])
def test_complex_parameters_step_as_in_torch(ours, theirs, options, forced):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(5, dtype=torch.complex64))
    other = nn.Parameter(torch.randn(3))
    q, r = copy.deepcopy(p), copy.deepcopy(other)
    a, b = ours([p, other], **options), theirs([q, r], **options)
    for _ in range(5):
        for x, y in ((p, q), (other, r)):
            x.grad = torch.randn_like(x)
            y.grad = x.grad.clone()
        if forced:
            with force_accelerator():
                a.step()
        else:
            a.step()
        b.step()
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(other, r)


def test_complex_weights_on_manifolds_are_refused_by_name():
    p = geoopt.ManifoldParameter(torch.zeros(5, 2, dtype=torch.complex64), manifold=lrm.Stiefel())
    with pytest.raises(TypeError, match=r"params must be real.*complex64 on Stiefel"):
        CondLR([p], lr=0.1)


@given(lr=st.sampled_from([np.float32(0.1), np.float64(0.1), torch.tensor(0.1), 1]))
def test_numbers_of_numpy_and_torch_are_rates(lr):
    params, optimizer = mixed(CondLR, lr=lr)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)


# -- DLRT


@pytest.mark.parametrize("integrator", ["bug", "augmented_bug", "ksl"])
def test_dlrt_computes_in_full_precision_within_autocast(integrator):
    torch.manual_seed(0)
    model = nn.Sequential(LowRankLinear(12, 10, 3, tau=0.1), nn.Tanh(), nn.Linear(10, 2))
    optimizer, x, dtypes = (
        DLRT(model.parameters(), lr=0.1, integrator=integrator),
        torch.randn(8, 12),
        set(),
    )

    def closure():
        optimizer.zero_grad()
        y = model(x)
        dtypes.add(y.dtype)
        loss = y.float().square().mean()
        loss.backward()
        return loss

    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            optimizer.step(closure)
    assert dtypes == {torch.bfloat16}  # the closure has the caller's autocast
    assert float(model[0].manifold.drift(model[0].weight.detach().double())) <= 1e-6


def test_dlrt_checks_the_dense_step_before_anything_is_kept():
    torch.manual_seed(0)
    model = nn.Sequential(LowRankLinear(12, 10, 3, tau=0.1), nn.Linear(10, 2))
    optimizer = DLRT(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 12)).square().mean()
        loss.backward()
        model[1].bias.grad.fill_(3e38)
        return loss

    optimizer.param_groups[0]["lr"] = 1e3
    with pytest.raises(FloatingPointError):
        optimizer.step(closure)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


# -- files and copies


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_copies_still_share_out_their_work(copying, kind):
    _, optimizer = mixed(kind, distribute=True)
    with pytest.raises(RuntimeError, match="distribute=True needs a process group"):
        copying(optimizer).step()


def test_state_is_read_after_the_hooks_that_may_replace_it():
    params, optimizer = mixed(CondLRAdam)
    for _ in range(3):
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = CondLRAdam([params[2], params[1], params[0]])  # another order

    def reordered(_, state_dict):
        moved = {0: 2, 1: 1, 2: 0}
        return {**state_dict, "state": {moved[k]: v for k, v in state_dict["state"].items()}}

    calls = []
    other.register_load_state_dict_pre_hook(reordered)
    other.register_load_state_dict_post_hook(lambda o: calls.append(o.state[params[0]]["step"]))
    other.load_state_dict(saved)
    assert int(calls[0]) == 3
    for p in params:
        for key, value in optimizer.state[p].items():
            assert torch.equal(other.state[p][key], value)


def test_the_state_of_adamw_goes_on_as_adamw_would():
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.ones(6)) for _ in range(2))
    start, twin = torch.optim.AdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1)
    gradients = torch.randn(8, 6)
    for g in gradients[:4]:
        for x, optimizer in ((p, start), (q, twin)):
            x.grad = g.clone()
            optimizer.step()
    ours = CondLRAdam([p], lr=0.3)
    ours.load_state_dict(start.state_dict())
    for g in gradients[4:]:
        for x, optimizer in ((p, ours), (q, twin)):
            x.grad = g.clone()
            optimizer.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.SGD, geoopt.optim.RiemannianSGD])
def test_foreign_state_of_low_rank_weights_is_refused_at_loading(kind):
    p = on(lrm.WellConditioned(9, 8, 3, tau=0.1))
    foreign, ours = kind([p], lr=0.1, momentum=0.9), CondLR([p], lr=0.1, momentum=0.9)
    p.grad = 1e-3 * torch.ones_like(p)
    foreign.step()
    with pytest.raises(ValueError, match="must come from an optimizer of lrmanifold"):
        ours.load_state_dict(foreign.state_dict())


def broken(path: str, value) -> dict:
    _, optimizer = mixed(CondLR, momentum=0.9)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    where = state
    *parts, last = path.split(".")
    for part in parts:
        where = where[int(part) if part.isdigit() else part]
    if value is None:
        del where[last]
    else:
        where[last] = value
    return state


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        ("param_groups.0.lr", -3.0, "lr must be"),
        ("param_groups.0.momentum", 2.0, "momentum must be"),
        ("param_groups.0.metric", "zzz", "metric must be"),
        ("param_groups.0.nesterov", "yes", "nesterov must be"),
        ("param_groups", None, "param_groups"),
        ("state", [1, 2], "state"),
        ("state.1.momentum_buffer", torch.zeros(3), "momentum_buffer of .* must have shape"),
        ("state.1.momentum_buffer", torch.full((20, 3), float("nan")), "must be finite"),
        ("state.1.step", torch.tensor(-1), "step of .* must be a whole number"),
        ("state.1.other", torch.zeros(20, 3), "must have entries of CondLR"),
    ],
)
def test_values_from_a_file_pass_the_constructors_checks(path, value, match):
    _, optimizer = mixed(CondLR, momentum=0.5)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises((ValueError, TypeError), match=match):
        optimizer.load_state_dict(broken(path, value))
    assert optimizer.param_groups[0]["momentum"] == 0.5
    for key, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, before["state"][key][k]) for k, v in state.items())


@pytest.mark.parametrize("wrong", [None, 3, "state", [1]])
def test_what_is_no_state_dict_is_refused(wrong):
    _, optimizer = mixed(CondLR)
    with pytest.raises(TypeError, match="state_dict must be a dict"):
        optimizer.load_state_dict(wrong)


def test_a_state_dict_of_version_0_1_goes_on_where_it_stopped():
    """Its momentum was the velocity before transport, beside what was to be subtracted."""
    torch.manual_seed(0)
    params, optimizer = mixed(CondLR, momentum=0.9)
    optimizer.step()
    M, p = params[1].manifold, params[1]
    old = copy.deepcopy(optimizer.state_dict())
    X, v = M.unpack(p.detach()), M.unpack(old["state"][1]["momentum_buffer"])
    old["state"][1]["momentum_overlap"] = torch.stack((X.U.mT @ v.U, X.V.mT @ v.V))
    old["param_groups"][0]["orthonormality_tol"] = 0.0
    other = CondLR(copy.deepcopy(params), lr=0.5)
    other.load_state_dict(old)
    for a, b in zip(params, other.param_groups[0]["params"], strict=True):
        b.grad = a.grad.clone()
    optimizer.step()
    other.step()
    for a, b in zip(params, other.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)
