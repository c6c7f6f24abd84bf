"""Saving, loading and copying the optimizer; options and groups that it refuses."""

from __future__ import annotations

import copy
import io
import pickle

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankConv2d, LowRankLinear
from lrmanifold.optim import CondLR


def model_of(seed: int, **options) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        LowRankConv2d(2, 4, 3, 2, groups=2, tau=0.5, **options),
        nn.Flatten(),
        LowRankLinear(16, 5, 3, tau=None, **options),
        nn.Linear(5, 2, **options),
    )


def optimizer_of(model: nn.Module, **changes) -> CondLR:
    options = {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01, "penalty": 0.1}
    return CondLR(model.parameters(), **{**options, **changes})


def run(model: nn.Module, optimizer: CondLR, steps: range) -> None:
    like = next(model.parameters())
    for i in steps:
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(6, 2, 4, 4, generator=generator).to(like)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if i % 4 == 3:
            model[2].weight.grad[0, 0] = float("nan")
        optimizer.step()


def through_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("file", [False, True])
def test_state_dict_continues_bit_for_bit(device, dtype, file):
    model = model_of(0, device=device, dtype=dtype)
    optimizer = optimizer_of(model)
    run(model, optimizer, range(6))
    states = model.state_dict(), optimizer.state_dict()
    states = through_file(states) if file else copy.deepcopy(states)
    run(model, optimizer, range(6, 14))

    other = model_of(1, device=device, dtype=dtype)
    resumed = CondLR(other.parameters(), lr=1.0)
    run(other, resumed, range(2))
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    run(other, resumed, range(6, 14))
    assert_same(model, other)
    assert resumed.skipped_steps == optimizer.skipped_steps == 3


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_the_training_continue_bit_for_bit(device, how):
    model = model_of(0, device=device)
    optimizer = optimizer_of(model)
    run(model, optimizer, range(5))
    pair = (model, optimizer)
    if how == "torch.save":
        buffer = io.BytesIO()
        torch.save(pair, buffer)
        buffer.seek(0)
        other, resumed = torch.load(buffer, weights_only=False)
    else:
        other, resumed = (
            copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
        )
    assert other[0].weight is resumed.param_groups[0]["params"][0]
    run(model, optimizer, range(5, 12))
    run(other, resumed, range(5, 12))
    assert_same(model, other)
    assert resumed.skipped_steps == optimizer.skipped_steps


def test_counters_stay_integers_through_every_copy():
    model = model_of(0, dtype=torch.bfloat16)
    optimizer = optimizer_of(model)
    run(model, optimizer, range(5))
    resumed = optimizer_of(model)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    for x in (optimizer, resumed, copy.deepcopy(optimizer)):
        for state in x.state.values():
            assert state["step"].dtype == state["skipped"].dtype == torch.int64
            assert state["momentum_buffer"].dtype == torch.bfloat16


def test_counters_survive_numbers_that_bfloat16_cannot_hold():
    model = model_of(0, dtype=torch.bfloat16)
    optimizer = optimizer_of(model)
    run(model, optimizer, range(2))
    for state in optimizer.state.values():
        state["skipped"].fill_(1001)
    resumed = optimizer_of(model)
    resumed.load_state_dict(optimizer.state_dict())
    assert {int(s["skipped"]) for s in resumed.state.values()} == {1001}


def test_a_state_saved_before_the_first_step_loads():
    model = model_of(0)
    optimizer = optimizer_of(model)
    optimizer.load_state_dict(optimizer_of(model).state_dict())
    run(model, optimizer, range(2))


def test_the_state_of_torch_sgd_loads_and_its_missing_options_take_the_defaults():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    sgd = torch.optim.SGD(model.parameters(), lr=0.07, momentum=0.9)
    ours = CondLR(model.parameters(), lr=0.1, momentum=0.5, penalty=0.2)
    x = torch.randn(5, 4)
    model(x).square().sum().backward()
    sgd.step()
    ours.load_state_dict(copy.deepcopy(sgd.state_dict()))
    assert (ours.param_groups[0]["lr"], ours.param_groups[0]["momentum"]) == (0.07, 0.9)
    assert (ours.param_groups[0]["penalty"], ours.param_groups[0]["skip_nonfinite"]) == (0.2, True)
    twin = copy.deepcopy(model)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.07, momentum=0.9)
    theirs.load_state_dict(sgd.state_dict())
    for m, optimizer in ((model, ours), (twin, theirs)):
        optimizer.zero_grad()
        m(x).square().sum().backward()
        optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_hooks_of_torch_run():
    model = model_of(0)
    optimizer, calls = optimizer_of(model), []
    optimizer.register_step_pre_hook(lambda *a: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *a: calls.append("post"))
    run(model, optimizer, range(1))
    assert calls == ["pre", "post"]


# -- options


@pytest.mark.parametrize("key", ["lr", "weight_decay", "penalty", "momentum"])
@given(value=st.one_of(st.floats(max_value=-1e-300), st.sampled_from([float("nan"), float("inf")])))
def test_options_out_of_range_raise_with_name_and_value(key, value):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=key) as error:
        CondLR([p], **{"lr": 0.1, key: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [1.0, 1.5])
def test_momentum_of_one_or_more_raises(value):
    with pytest.raises(
        ValueError, match=rf"momentum must be a finite number in \[0, 1\), got {value}"
    ):
        CondLR([nn.Parameter(torch.ones(2))], lr=0.1, momentum=value)


def test_nesterov_without_momentum_raises():
    with pytest.raises(ValueError, match="nesterov"):
        CondLR([nn.Parameter(torch.ones(2))], lr=0.1, nesterov=True)


@pytest.mark.parametrize("value", ["0.1", None])
def test_a_rate_that_is_no_number_raises(value):
    with pytest.raises(TypeError, match="lr must be a finite number"):
        CondLR([nn.Parameter(torch.ones(2))], lr=value)


@pytest.mark.parametrize("flag", ["foreach", "fused", "differentiable", "dampening", "betas"])
def test_flags_that_do_not_exist_raise(flag):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match=flag):
        CondLR([p], lr=0.1, **{flag: True})
    if flag != "betas":
        with pytest.raises(TypeError, match=f"{flag} is not an option of CondLR"):
            CondLR([{"params": [p], flag: True}], lr=0.1)


def test_bad_options_of_a_group_leave_the_optimizer_as_it_was():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = CondLR([p], lr=0.1)
    for bad, kind in (({"lr": -1.0}, ValueError), ({"fused": True}, TypeError)):
        with pytest.raises(kind):
            optimizer.add_param_group({"params": [q], **bad})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [q], "lr": 1.0})
    q.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(q.detach(), torch.zeros(2))


@pytest.mark.parametrize("key", ["weight_decay", "penalty"])
def test_decay_and_penalty_are_refused_where_there_is_no_core(key):
    frame = lrm.Stiefel().random(5, 2).as_subclass(Tensor)
    p = geoopt.ManifoldParameter(frame, manifold=lrm.Stiefel())
    with pytest.raises(ValueError, match=r"weight_decay and penalty must be 0.*Stiefel"):
        CondLR([p], lr=0.1, **{key: 0.1})


@given(lr=st.floats(1e-6, 1.0))
def test_a_tensor_rate_steps_as_a_number_does(lr):
    p, q = LowRankLinear(5, 4, 2, dtype=torch.float64), LowRankLinear(5, 4, 2, dtype=torch.float64)
    q.load_state_dict(p.state_dict())
    rates = lr, torch.tensor(lr, dtype=torch.float64)
    for layer, rate in zip((p, q), rates, strict=True):
        for x in layer.parameters():
            x.grad = torch.ones_like(x)
        CondLR(layer.parameters(), lr=rate, momentum=0.5).step()
    torch.testing.assert_close(p.weight.detach(), q.weight.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "options"), [(CondLR, {}), (CondLR, {"clip_margin": 0.5}), (lrm.optim.CondLRAdam, {})]
)
def test_large_cores_continue_bit_for_bit_too(kind, options):
    """What is remembered of a core, and not saved, may spare work but change nothing."""
    torch.manual_seed(0)
    model = lrm.nn.LowRankLinear(90, 80, 40, tau=0.1)
    optimizer = kind(model.parameters(), lr=0.02, **options)

    def train(net, rule, steps) -> None:
        for step in steps:
            torch.manual_seed(step)
            rule.zero_grad()
            net(torch.randn(30, 90)).square().mean().backward()
            rule.step()

    train(model, optimizer, range(5))
    other = copy.deepcopy(model)
    resumed = kind(other.parameters(), lr=0.02, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(5, 15))
    train(other, resumed, range(5, 15))
    assert_same(model, other)


def test_a_state_of_other_ranks_says_what_to_load_first():
    def training(rank):
        model = lrm.factorize(torch.nn.Sequential(torch.nn.Linear(16, 16)), rank=rank)
        optimizer = CondLR(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.ones(2, 16)).sum().backward()
        optimizer.step()
        return model, optimizer

    (model, optimizer), (other, resumed) = training(4), training(2)
    with pytest.raises(ValueError, match="of rank 4 instead of 2: load the model's state dict fir"):
        resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    groups = lrm.optim.param_groups(model)
    with pytest.raises(ValueError, match="same rank and exclude"):
        CondLR(groups, lr=0.1).load_state_dict(optimizer.state_dict())


# -- momentum in the coordinates of another retraction


def moved(kind, retraction, dtype, *, steps=4):
    """A linear layer and a grouped convolution, with the optimizer that has trained them."""
    torch.manual_seed(0)
    options = {"tau": 0.5, "retraction": retraction, "dtype": dtype}
    model = nn.Sequential(
        LowRankConv2d(2, 4, 3, 2, groups=2, **options),
        nn.Flatten(),
        LowRankLinear(16, 5, 3, **options),
    )
    optimizer = kind(model.parameters(), lr=0.05, momentum=0.8)
    for i in range(steps):
        x = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(i)).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [CondLR, lrm.optim.CondLRMuon])
@pytest.mark.parametrize(("old", "new"), [("factored", "svd"), ("svd", "factored"), ("svd", "ksl")])
def test_momentum_is_the_same_vector_under_another_retraction(kind, dtype, old, new):
    model, optimizer = moved(kind, old, dtype)
    other, resumed = moved(kind, new, dtype, steps=0)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    eps = torch.finfo(dtype).eps
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        if lrm.optim.CondLRMuon is kind and p.ndim == 1:
            continue  # a bias, which Adam moves
        want = optimizer.momentum(p).double()
        assert (resumed.momentum(q).double() - want).norm() <= 20 * eps * want.norm()
        assert (resumed.state[q]["momentum_buffer"].dtype, want.norm() > 0) == (dtype, True)
    for m, o in ((model, optimizer), (other, resumed)):  # and the next step is made
        m(torch.ones(6, 2, 4, 4, dtype=dtype)).square().mean().backward()
        o.step()


@pytest.mark.parametrize(("old", "new"), [("factored", "svd"), ("svd", "factored")])
def test_a_state_without_the_mark_is_loaded_as_it_is(old, new):
    model, optimizer = moved(CondLR, old, torch.float64)
    saved = optimizer.state_dict()
    assert saved.pop("velocities") == {0: old == "factored", 2: old == "factored"}
    other, resumed = moved(CondLR, new, torch.float64, steps=0)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        found, kept = (o.state[x]["momentum_buffer"] for o, x in ((resumed, q), (optimizer, p)))
        assert torch.equal(found, kept)


def test_a_momentum_that_is_not_tangent_here_says_what_to_load_first():
    _, optimizer = moved(CondLR, "svd", torch.float64)
    _, resumed = moved(CondLR, "factored", torch.float64, steps=1)
    before = copy.deepcopy(resumed.state_dict()["state"])
    with pytest.raises(ValueError, match=r"tangent at the parameter.*load the model's state dict"):
        resumed.load_state_dict(optimizer.state_dict())
    for key, state in resumed.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], before[key]["momentum_buffer"])


@pytest.mark.parametrize("mark", [[0, 2], {0: 1, 2: True}, {0: "tangent"}, "all"])
def test_a_mark_that_says_nothing_is_refused(mark):
    _, optimizer = moved(CondLR, "svd", torch.float64)
    with pytest.raises((TypeError, ValueError), match=r"velocities of .* must be"):
        optimizer.load_state_dict({**optimizer.state_dict(), "velocities": mark})


@pytest.mark.parametrize("retraction", ["factored", "svd"])
@pytest.mark.parametrize("kind", [CondLR, lrm.optim.CondLRAdam, lrm.optim.CondLRMuon])
def test_the_momentum_is_what_the_gradients_sum_to(kind, retraction):
    """One step of rate 0: the gradient, times the weight that a mean of the rule gives it."""
    torch.manual_seed(0)
    model = LowRankLinear(16, 12, 3, retraction=retraction, dtype=torch.float64)
    optimizer = kind(model.parameters(), lr=0.0, **({"momentum": 0.9} if kind is CondLR else {}))
    assert not any(optimizer.momentum(p).any() for p in model.parameters())
    model(torch.randn(6, 16, dtype=torch.float64)).square().mean().backward()
    grad = {p: p.grad.clone() for p in model.parameters()}
    M, p, bias = model.manifold, model.weight, model.bias
    grad[p] = M.tangent_to_dense(p.detach(), M.egrad2rgrad(p.detach(), grad[p]))
    optimizer.step()  # the retraction "svd" turns the factors
    found = {bias: optimizer.momentum(bias)}
    found[p] = M.tangent_to_dense(p.detach(), optimizer.momentum(p))
    for q in (p, bias):
        of_adam = "exp_avg" in optimizer.state[q]
        share = 0.1 if of_adam else 1.0  # 1 - beta1, and no bias correction
        torch.testing.assert_close(found[q], share * grad[q], rtol=1e-9, atol=1e-12)
    assert M.check_vector_on_tangent(p.detach(), optimizer.momentum(p), atol=1e-10)


def test_the_momentum_of_what_the_optimizer_does_not_move_is_refused():
    model, other = model_of(0), model_of(0)
    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match="p must be a parameter that this CondLR moves, got a par"):
        optimizer.momentum(other[0].weight)
    with pytest.raises(TypeError, match="p must be a tensor, got 3"):
        optimizer.momentum(3)
