"""The adapter: nothing at the start, well-conditioned all along, nothing left after merging."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankAdapter


def dense(dtype=torch.float32, bias=True) -> nn.Linear:
    return nn.Linear(10, 7, bias=bias, dtype=dtype)


def train(adapter: LowRankAdapter, steps: int = 40, lr: float = 0.1, **options) -> list[float]:
    target = torch.randn(7, 10)
    optimizer = lrm.optim.CondLR(
        [p for p in adapter.parameters() if p.requires_grad], lr=lr, momentum=0.5, **options
    )
    losses = []
    for _ in range(steps):
        x = torch.randn(64, 10)
        optimizer.zero_grad()
        y = adapter(x.to(adapter.weight.dtype)).float()
        loss = (y - x @ target.mT).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        M, X = adapter.update.manifold, adapter.update.weight.detach().double()
        assert float(M.cond(X)) <= 1 + (adapter.update.tau or 1e9) + 2e-2
    return losses


@given(
    rank=st.integers(1, 7),
    tau=st.one_of(st.none(), st.floats(0, 3)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    update=st.sampled_from([None, torch.float32]),
    init=st.sampled_from(["random", "svd"]),
    gradient=st.sampled_from(["factors", "probe"]),
    bias=st.booleans(),
)
def test_it_starts_as_the_dense_layer_to_the_bit(rank, tau, dtype, update, init, gradient, bias):
    layer = dense(dtype, bias)
    x = torch.randn(3, 4, 10, dtype=dtype)
    before = layer(x)
    adapter = LowRankAdapter(layer, rank, tau=tau, init=init, dtype=update, gradient=gradient)
    assert torch.equal(adapter(x), before)
    assert adapter.base_weight is layer.weight
    assert torch.equal(adapter.weight, layer.weight)
    assert not adapter.base_weight.requires_grad
    assert not adapter.delta().any() or float(adapter.delta().abs().max()) <= 1e-5
    M = adapter.update.manifold
    assert float(M.svdvals(adapter.update.weight.detach().double()).min()) > 1e-3  # S is not zero
    assert [name for name, p in adapter.named_parameters() if p.requires_grad] == ["update.weight"]


def test_it_learns_within_its_bound_while_the_dense_weight_is_frozen():
    layer = dense()
    frozen = copy.deepcopy(layer.state_dict())
    adapter = LowRankAdapter(layer, 4, tau=0.1)
    losses = train(adapter, 200)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert torch.equal(adapter.base_weight, frozen["weight"])
    assert torch.equal(adapter.bias, frozen["bias"])
    assert torch.linalg.matrix_rank(adapter.delta(), rtol=1e-4) <= 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_merging_keeps_the_function(dtype, bias):
    adapter = LowRankAdapter(dense(dtype, bias), 3, dtype=torch.float32)
    train(adapter)
    merged = adapter.merge()
    assert type(merged) is nn.Linear
    assert merged.weight.dtype == dtype
    assert merged.weight.requires_grad
    x = torch.randn(20, 10, dtype=dtype)
    tol = 5e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(merged(x), adapter(x), atol=tol, rtol=tol)
    expected = adapter.base_weight.double() + adapter.delta().double()
    tol = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(merged.weight.double(), expected, atol=tol, rtol=tol)


def test_densify_and_factorize_know_adapters():
    model = nn.Sequential(dense(), nn.ReLU(), nn.Linear(7, 3))
    model[0] = LowRankAdapter(model[0], 3)
    train(model[0])
    x = torch.randn(5, 10)
    expected = model(x)
    report = lrm.report(model)
    assert [layer.name for layer in report.layers] == ["0.update", "2"]
    assert report.layers[0].cond <= 1.1 + 1e-5
    lrm.densify(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)
    whole = LowRankAdapter(dense(), 2)
    assert type(lrm.densify(whole)) is nn.Linear


def test_copies_and_state_dicts_keep_it_whole():
    adapter = LowRankAdapter(dense(), 3)
    train(adapter)
    x = torch.randn(5, 10)
    buffer = io.BytesIO()
    plain = {k: v.as_subclass(torch.Tensor) for k, v in adapter.state_dict().items()}
    torch.save(plain, buffer)
    buffer.seek(0)
    other = LowRankAdapter(dense(), 3)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for same in (copy.deepcopy(adapter), other):
        assert torch.equal(same(x), adapter(x))
        assert same.update.weight.manifold is same.update.manifold
    other.load_state_dict(dense().state_dict(), strict=False)  # keys of the dense layer
    assert not torch.equal(other(x), adapter(x))


def test_wrong_arguments_leave_the_dense_layer_as_it_was():
    layer = dense()
    cases = [
        (
            lambda: LowRankAdapter(nn.Conv1d(1, 1, 1), 1),
            TypeError,
            "dense must be a Linear, got a",
        ),
        (lambda: LowRankAdapter(layer, 8), ValueError, "rank must be in 1..min"),
        (lambda: LowRankAdapter(layer, 2, init="zero"), ValueError, "init must be 'random' or"),
        (lambda: LowRankAdapter(layer, 2, tau=-1.0), ValueError, "tau must be a finite number"),
    ]
    for make, kind, words in cases:
        with pytest.raises(kind, match=words):
            make()
    assert layer.weight.requires_grad
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"dense\.weight must be finite"):
        LowRankAdapter(layer, 2)
    assert layer.weight.requires_grad
    zero = dense()
    nn.init.zeros_(zero.weight)
    assert LowRankAdapter(zero, 2).update.weight.isfinite().all()


@pytest.mark.parametrize("tau", [0.0, 0.1, None])
@pytest.mark.parametrize("init", ["random", "svd"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("door", ["to", "load"])
def test_a_longer_dtype_leaves_the_update_zero_to_the_bit(tau, init, half, door):
    adapter = LowRankAdapter(dense(half), 4, tau=tau, init=init)
    if door == "to":
        adapter = adapter.to(torch.float32)
    else:
        other = LowRankAdapter(dense(torch.float32), 4, tau=tau, init=init)
        other.load_state_dict(adapter.state_dict())
        adapter = other
    assert not adapter.delta().any() or float(adapter.delta().abs().max()) <= 1e-6
    assert torch.equal(adapter.weight, adapter.base_weight)
    x = torch.randn(3, 10)
    plain = nn.functional.linear(x, adapter.base_weight, adapter.bias)
    assert torch.equal(adapter(x), plain)
    M = adapter.update.manifold
    assert float(M.drift(adapter.start)) <= 1e-4


def test_the_trained_state_brings_everything_back_and_its_half_is_refused():
    frozen = dense()
    adapter = LowRankAdapter(copy.deepcopy(frozen), 3)
    model = nn.Sequential(adapter, nn.Linear(7, 2))
    train(adapter)
    state = lrm.nn.trained_state_dict(model)
    assert set(state) == {"0.update.weight", "0.start", "1.weight", "1.bias"}
    other = nn.Sequential(LowRankAdapter(copy.deepcopy(frozen), 3), nn.Linear(7, 2))
    other.load_state_dict(state, strict=False)
    x = torch.randn(5, 10)
    assert torch.equal(other(x), model(x))
    trainable = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for half in (trainable, {k: v for k, v in state.items() if k != "0.update.weight"}):
        fresh = nn.Sequential(LowRankAdapter(copy.deepcopy(frozen), 3), nn.Linear(7, 2))
        before = fresh[0](x)
        with pytest.raises(RuntimeError, match=r"is missing, and .*trained_state_dict"):
            fresh.load_state_dict(half, strict=False)
        assert torch.equal(fresh[0](x), before)


def test_an_adapter_of_another_rank_is_loaded_with_its_start():
    adapter = LowRankAdapter(dense(), 5)
    train(adapter)
    other = LowRankAdapter(dense(), 2)
    other.load_state_dict(adapter.state_dict())
    x = torch.randn(5, 10)
    assert torch.equal(other(x), adapter(x))
    assert other.rank == 5
