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
    assert adapter.weight is layer.weight
    assert not adapter.weight.requires_grad
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
    assert torch.equal(adapter.weight, frozen["weight"])
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
    expected = adapter.weight.double() + adapter.delta().double()
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
    torch.save(lrm.checkpoint._save.plain(adapter.state_dict()), buffer)
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
        (lambda: LowRankAdapter(nn.Conv1d(1, 1, 1), 1), TypeError, "dense must be a Linear, got C"),
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
