"""The way of accelerators, forced on CPU tensors: against the CPU's way, oracles, and by count."""

from __future__ import annotations

import contextlib
import copy

import geoopt
import pytest
import torch
from oracles import ForbidHostSynchronisation
from torch import Tensor, nn

import lrmanifold as lrm
from benchmarks.speed.launches import count, steady_step, transformer, vgg16
from lrmanifold import linalg
from lrmanifold.nn import LowRankConv2d, LowRankLinear
from lrmanifold.optim import CondLR, CondLRAdam, CondLRMuon, force_accelerator
from lrmanifold.optim.accelerator import partition

RULES = {
    "CondLR": (CondLR, {"lr": 0.05, "momentum": 0.9}),
    "nesterov, decay, penalty": (
        CondLR,
        {
            "lr": 0.05,
            "momentum": 0.5,
            "nesterov": True,
            "weight_decay": 0.1,
            "penalty": 0.01,
            "penalty_squared": True,
        },
    ),
    "scalar metric, margin": (CondLR, {"lr": 0.05, "metric": "scalar", "clip_margin": 0.5}),
    "Adam": (CondLRAdam, {"lr": 0.02, "weight_decay": 0.1}),
    # Half of Adam's rate: the polar factor brings the rounding of a bfloat16 gradient to unit size.
    "Muon": (CondLRMuon, {"lr": 0.01, "weight_decay": 0.1}),
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def network(tau, gradient="factors", **options) -> nn.Module:
    """Groups, a square basis, several ranks, biases, a dense layer, a complex parameter."""
    low = {"tau": tau, "gradient": gradient, **options}
    return nn.Sequential(
        LowRankConv2d(4, 8, 3, 3, groups=2, **low),
        nn.Tanh(),
        nn.Flatten(),
        LowRankLinear(128, 40, 7, **low),
        nn.Tanh(),
        LowRankLinear(40, 12, 12, **low),
        nn.Tanh(),
        nn.Linear(12, 3, **options),
    )


def train(model, optimizer, x, steps: int, *, forced: bool) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if forced:
            with force_accelerator():
                optimizer.step()
        else:
            optimizer.step()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tau", "gradient"),
    [(None, "factors"), *((t, g) for t in (0.0, 0.1, 3.0) for g in ("factors", "probe"))],
)
def test_networks_train_as_on_the_cpu(rule, dtype, tau, gradient):
    torch.manual_seed(0)
    kind, options = RULES[rule]
    ours = network(tau, gradient, dtype=dtype)
    theirs = copy.deepcopy(ours)
    x = torch.randn(16, 4, 6, 6, dtype=dtype)
    optimizer = kind(ours.parameters(), **options)
    train(ours, optimizer, x, 6, forced=True)
    train(theirs, kind(theirs.parameters(), **options), x, 6, forced=False)
    assert optimizer.skipped_steps == 0
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        M = getattr(p, "manifold", None)
        a, b = p.detach().double(), q.detach().double()
        if M is not None:
            a, b = M.to_dense(a), M.to_dense(b)
            if dtype != torch.bfloat16:
                assert float(M.drift(p.detach().double()).max()) <= 1e-5
                if tau is not None:
                    assert float(M.cond(p.detach().double()).max()) <= (1 + tau) * (1 + 1e-5)
        assert float((a - b).norm()) <= TOLERANCE[dtype] * float(b.norm())


# -- masks and steps that are left out


def test_a_step_too_long_for_a_polar_factor_is_left_out():
    torch.manual_seed(0)
    model = network(0.1)
    victim, optimizer = model[3].weight, CondLR(model.parameters(), lr=1e9)
    before = {p: p.detach().clone() for p in model.parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p is victim else torch.zeros_like(p)
    with force_accelerator():
        optimizer.step()
    assert torch.equal(victim.detach(), before[victim])
    for p, x in before.items():
        assert int(optimizer.state[p]["skipped"]) == int(p is victim)
        M = getattr(p, "manifold", None)
        a, b = (p.detach(), x) if M is None else (M.to_dense(p.detach()), M.to_dense(x))
        assert float((a - b).norm()) <= 1e-5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("warm", [0, 2])
def test_a_bad_gradient_stops_only_its_weight_state_included(rule, warm):
    torch.manual_seed(0)
    kind, options = RULES[rule]
    model = network(0.1)
    optimizer = kind(model.parameters(), **options)
    x = torch.randn(16, 4, 6, 6)
    train(model, optimizer, x, warm, forced=True)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    victims = [model[0].weight, model[7].bias]
    model[0].weight.grad[1, 2, 1] = float("inf")  # one of two groups
    victims[1].grad[0] = float("nan")
    before = {p: p.detach().clone() for p in model.parameters()}
    states = {p: copy.deepcopy(optimizer.state[p]) for p in victims}
    with force_accelerator():
        optimizer.step()
    for p, old in before.items():
        bad = any(p is q for q in victims)
        assert torch.equal(p.detach(), old) == bad
        assert int(optimizer.state[p]["skipped"]) == int(bad)
        assert int(optimizer.state[p]["step"]) == warm + int(not bad)
    for p, state in states.items():
        for key, value in state.items():
            if key != "skipped":
                assert torch.equal(optimizer.state[p][key], value)


def test_a_healthy_gradient_whose_sum_overflows_is_not_skipped():
    layer = LowRankLinear(9, 8, 3, tau=0.1, bias=False)
    optimizer = CondLR(layer.parameters(), lr=1e-39)
    layer.weight.grad = torch.full_like(layer.weight, 3e38)
    before = layer.weight.detach().clone()
    with force_accelerator():
        optimizer.step()
    assert optimizer.skipped_steps == 0 or torch.equal(before, layer.weight)
    assert torch.isfinite(layer.weight).all()
    small = LowRankLinear(9, 8, 3, tau=0.1, bias=False)
    optimizer = CondLR(small.parameters(), lr=1e-38, metric="scalar")
    small.weight.grad = torch.full_like(small.weight, 2e37)  # 60 of them are Inf
    with force_accelerator():
        optimizer.step()
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("kind", "options", "dtype", "size"),
    [
        (CondLR, {"lr": 1e-6, "momentum": 0.9}, torch.float16, 1.5e4),
        (CondLR, {"lr": 3.0}, torch.float16, 1.5e4),
        (CondLRMuon, {"lr": 1e-3}, torch.float16, 1.5e4),
        (CondLRAdam, {"lr": 1e-3}, torch.float32, 1e19),
        (CondLRAdam, {"lr": 1e-3}, torch.float32, 3e19),
        (CondLRAdam, {"lr": 1e-3}, torch.bfloat16, 3e19),
    ],
)
def test_gradients_that_overflow_the_state_leave_no_trace(kind, options, dtype, size, forced):
    """Inf in a momentum or second moment would stop the weight for ever, one in it lose it."""
    torch.manual_seed(0)
    layer = LowRankLinear(9, 8, 3, tau=0.1, dtype=dtype)
    optimizer = kind(layer.parameters(), **options)
    gradients = [torch.randn(p.shape).to(dtype) for p in layer.parameters()]
    for step in range(6):
        for p, g in zip(layer.parameters(), gradients, strict=True):
            p.grad = g * (size if step < 3 else 1.0)
        before = layer.weight.detach().clone()
        with force_accelerator() if forced else contextlib.nullcontext():
            try:
                optimizer.step()
            except FloatingPointError:
                assert not forced
                assert step < 3
        assert step < 3 or not torch.equal(before, layer.weight)
    for p in layer.parameters():
        assert torch.isfinite(p).all()
        assert all(torch.isfinite(x).all() for x in optimizer.state[p].values())


def test_diverging_runs_stay_on_the_manifold():
    torch.manual_seed(0)
    model = network(0.1)
    optimizer = CondLR(model.parameters(), lr=50.0, momentum=0.9)
    train(model, optimizer, torch.randn(16, 4, 6, 6), 30, forced=True)
    for layer in model.modules():
        if isinstance(layer, lrm.nn.LowRankLayer):
            X = layer.weight.detach().double()
            assert float(layer.manifold.drift(X).max()) <= 1e-5
            assert float(layer.manifold.cond(X).max()) <= 1.1 * (1 + 1e-5)


# -- launches, host synchronisation, capture


@pytest.mark.parametrize(
    ("network", "kind", "options", "most"),
    [
        (vgg16, CondLR, {"momentum": 0.9}, 450),
        (vgg16, CondLRAdam, {}, 550),
        (transformer, CondLR, {"momentum": 0.9}, 900),
    ],
)
def test_launches_of_a_step(network, kind, options, most):
    _, optimizer = steady_step(network, kind, {"lr": 0.1, **options}, share=0.2, tau=0.1)
    with ForbidHostSynchronisation():
        optimizer.step()
    assert sum(count(optimizer.step).values()) <= most


def test_batches_are_few_and_hold_every_weight_once():
    sizes = [(64, 576, 12), (512, 4608, 102), (512, 2304, 102), (128, 576, 25), (10, 9, 1)]
    parts = partition([lrm.FixedRank(*size) for size in sizes])
    assert sorted(i for part in parts for i in part) == list(range(5))
    assert len(parts) == 1
    huge = [lrm.FixedRank(50_000, 4_096, 2_000), *(lrm.FixedRank(30, 30, 3) for _ in range(9))]
    parts = partition(huge)
    assert [0] in parts
    assert all(sum(m in part for part in parts) == 1 for m in range(10))


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("one", [True, False])
def test_a_captured_step_writes_in_place_and_takes_its_rate_from_a_tensor(skip, one):
    torch.manual_seed(0)
    model = LowRankLinear(6, 5, 2, bias=False, tau=0.1) if one else network(0.1)
    x = torch.randn(16, 4, 6, 6)
    options = {"momentum": 0.9, "capturable": True, "skip_nonfinite": skip}
    with force_accelerator():
        optimizer = CondLR(model.parameters(), lr=0.1, **options)
        assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, x, 1, forced=True)
    places = [t.data_ptr() for p in model.parameters() for t in (p, *optimizer.state[p].values())]
    rate = optimizer.param_groups[0]["lr"]
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.05)
    train(model, optimizer, x, 1, forced=True)
    assert places == [
        t.data_ptr() for p in model.parameters() for t in (p, *optimizer.state[p].values())
    ]


@pytest.mark.parametrize("forced", [False, True])
def test_momentum_that_is_switched_off_is_forgotten(forced):
    model = network(0.1)
    optimizer = CondLR(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(16, 4, 6, 6)
    train(model, optimizer, x, 1, forced=forced)
    assert all("momentum_buffer" in state for state in optimizer.state.values())
    optimizer.param_groups[0]["momentum"] = 0.0
    train(model, optimizer, x, 1, forced=forced)
    assert not any("momentum_buffer" in state for state in optimizer.state.values())


def test_capturable_needs_an_accelerator():
    with pytest.raises(ValueError, match="capturable must be False for parameters on cpu"):
        CondLR([nn.Parameter(torch.ones(2))], lr=0.1, capturable=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_is_captured_in_a_cuda_graph():
    torch.manual_seed(0)
    model = network(0.1).cuda()
    optimizer = CondLR(model.parameters(), lr=0.1, momentum=0.9, capturable=True)
    twin = copy.deepcopy(model)
    other = CondLR(twin.parameters(), lr=0.1, momentum=0.9)
    for net in (model, twin):
        for i, p in enumerate(net.parameters()):
            torch.manual_seed(i)
            p.grad = torch.randn(p.shape).cuda()
    for rule in (optimizer, other):
        rule.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        graph.replay()
        other.step()
    torch.cuda.synchronize()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("setting", ["medium", "high"])
def test_products_of_less_than_float32_are_off_within_a_step(monkeypatch, setting, forced):
    """Emulated where the CPU has no such products: the setting itself is looked at."""
    model = network(0.1)
    optimizer = CondLR(model.parameters(), lr=0.05, momentum=0.9)
    seen = []
    polar = linalg.polar_pair if forced else linalg.polar

    def watched(*args):
        backends = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
        new = all(hasattr(b, "fp32_precision") for b in backends)
        seen.extend(
            [b.fp32_precision for b in backends] if new else [torch.get_float32_matmul_precision()]
        )
        return polar(*args)

    monkeypatch.setattr(linalg, "polar_pair" if forced else "polar", watched)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        train(model, optimizer, torch.randn(16, 4, 6, 6), 1, forced=forced)
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen
    assert set(seen) <= {"highest", "ieee"}


def test_sets_of_ones_own_use_their_own_projection_on_accelerators():
    class Capped(lrm.FixedRank):
        name = "Capped"

        def project_core(self, S, *, margin=0.0):
            return S / torch.linalg.matrix_norm(S, keepdim=True).clamp_min(1.0)

    M = Capped(9, 8, 3, retraction="factored")
    p = geoopt.ManifoldParameter(M.random().as_subclass(Tensor), manifold=M)
    optimizer = CondLR([p], lr=0.3)
    for _ in range(10):
        p.grad = torch.zeros_like(p)
        p.grad[9:12] = -torch.eye(3)
        with force_accelerator():
            optimizer.step()
    assert float(M.unpack(p.detach()).S.norm()) <= 1 + 1e-6
