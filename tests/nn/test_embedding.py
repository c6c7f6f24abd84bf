"""Low-rank tables of embeddings: lookup, padding, ties to a head, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankEmbedding, LowRankLinear

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def language_model(dtype=torch.float32, padding_idx=None) -> nn.ModuleDict:
    model = nn.ModuleDict({"embed": nn.Embedding(60, 16, padding_idx=padding_idx, dtype=dtype)})
    model["body"] = nn.Linear(16, 16, dtype=dtype)
    model["head"] = nn.Linear(16, 60, bias=False, dtype=dtype)
    model["head"].weight = model["embed"].weight
    return model


def logits(model: nn.ModuleDict, ids):
    return model["head"](model["body"](model["embed"](ids)).tanh())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize("gradient", ["factors", "probe"])
def test_full_rank_is_torchs_table_with_its_gradient(device, dtype, padding_idx, gradient):
    dense = nn.Embedding(20, 6, padding_idx=padding_idx, dtype=dtype, device=device)
    layer = LowRankEmbedding.from_dense(dense, 6, tau=None, gradient=gradient)
    ids = torch.randint(20, (4, 5), device=device)
    ids[0] = 19
    ids[1] = 3
    for many in (ids, ids[0, 0], ids[:1].expand(40, -1)):
        torch.testing.assert_close(layer(many), dense(many), atol=TOLERANCE[dtype], rtol=1e-5)
    G = torch.randn(4, 5, 6, dtype=dtype, device=device)
    for module in (layer, dense):
        (module(ids) * G).sum().backward()
    M, X = layer.manifold, layer.weight.detach()
    if dtype == torch.float64:
        found = M.egrad2rgrad(X, layer.weight.grad)
        expected = M.project_ambient(X, dense.weight.grad)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
    back = layer.to_dense()
    assert repr(back) == repr(dense)
    torch.testing.assert_close(back.weight, dense.weight, atol=TOLERANCE[dtype], rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer", [lrm.optim.CondLR, lrm.optim.CondLRAdam, lrm.optim.CondLRMuon]
)
@pytest.mark.parametrize("how", ["fresh", "converted"])
@pytest.mark.parametrize("retraction", ["factored", "orthographic", "svd", "ksl", "bug"])
def test_a_padding_row_that_is_zero_stays_zero(optimizer, how, retraction):
    options = {"tau": 0.2, "retraction": retraction}
    table = LowRankEmbedding(30, 8, 3, padding_idx=4, **options)
    if how == "converted":
        table = LowRankEmbedding.from_dense(nn.Embedding(30, 8, padding_idx=4), 3, **options)
    pad = torch.tensor([4])
    assert not table(pad).any()
    steps = optimizer(table.parameters(), lr=0.1)
    before = table.weight.detach().clone()
    for _ in range(20):
        steps.zero_grad()
        table(torch.randint(30, (16,))).square().sum().backward()
        steps.step()
    assert not torch.equal(before, table.weight.detach())
    exact = retraction in ("factored", "orthographic")
    assert float(table(pad).detach().abs().max()) <= (0.0 if exact else 1e-5)
    assert lrm.report(table).max_cond <= 1.2 * (1 + 1e-4)


@given(m=st.integers(2, 9), n=st.integers(1, 9), data=st.data())
@pytest.mark.parametrize("how", ["fresh", "random", "svd"])
def test_a_padding_row_is_zero_on_the_manifold_at_every_rank(how, m, n, data):
    """Also of tables of lower rank, whose left singular vectors may lean on the padding."""
    rank = data.draw(st.sampled_from(range(1, min(m - 1, n) + 1)))
    pad = data.draw(st.integers(0, m - 1))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    if how == "fresh":
        table = LowRankEmbedding(m, n, rank, pad, tau=0.1)
    else:
        dense = nn.Embedding(m, n, padding_idx=pad)
        words = data.draw(st.sampled_from([1, m - 1]))  # the others have zero rows, too
        with torch.no_grad():
            dense.weight[[i for i in range(m) if i != pad][words:]] = 0.0
        table = LowRankEmbedding.from_dense(dense, rank, init=how, tau=0.1)
    X, M = table.weight.detach(), table.manifold
    assert float(M.drift(X)) < 1e-5
    assert M.check_point_on_manifold(X, atol=1e-4, rtol=1e-4)
    assert not table(torch.tensor([pad])).any()


def test_no_table_with_padding_has_as_many_columns_as_words():
    words = r"rank must be at most num_embeddings - 1 = 3 with padding_idx, got 4"
    with pytest.raises(ValueError, match=words):
        LowRankEmbedding(4, 10, 4, padding_idx=0)
    dense = nn.Embedding(4, 10, padding_idx=0)
    for init in ("svd", "random"):
        with pytest.raises(ValueError, match=words):
            LowRankEmbedding.from_dense(dense, 4, init=init)
    model = nn.ModuleDict({"e": dense})
    with pytest.raises(ValueError, match=f"layer 'e' cannot be factorized: {words}"):
        lrm.factorize(model, 4, include="e", keep_larger=True)
    assert model["e"] is dense
    lrm.factorize(model, 3, include="e", keep_larger=True)
    assert LowRankEmbedding(4, 10, 4).rank == 4


def test_tables_stay_dense_unless_they_are_named():
    for how in ({"rank": 0.25}, {"rank": 3}, {"rank": 3, "include": "*"}, {"energy": 0.5}):
        model, plans = language_model(), []
        lrm.factorize(model, summary=plans.append, **how)
        assert type(model["embed"]) is nn.Embedding
        assert model["head"].weight is model["embed"].weight
        assert "tied to 'embed.weight'" in str(plans[0])
    alone, plans = nn.ModuleDict({"embed": nn.Embedding(60, 16), "b": nn.Linear(16, 16)}), []
    lrm.factorize(alone, 3, summary=plans.append)
    assert "table of embeddings: include names it" in str(plans[0])


@pytest.mark.parametrize(
    "how",
    [
        {"rank": 4, "include": ["*", "embed"]},
        {"rank": 0.25, "include": "head"},
        {"rank": {"embed": 4}},
        {"rank": {"he*": 0.25}},
        {"energy": 0.4, "include": "emb*"},
    ],
    ids=str,
)
def test_a_tied_head_becomes_low_rank_with_its_table_and_stays_tied(how):
    model, plans = language_model(), []
    size = sum(p.numel() for p in model.parameters())
    lrm.factorize(model, tau=None, summary=plans.append, **how)
    embed, head = model["embed"], model["head"]
    assert isinstance(embed, LowRankEmbedding)
    assert isinstance(head, LowRankLinear)
    assert embed.weight is head.weight
    assert embed.weight.manifold is embed.manifold is head.manifold
    ids = torch.randint(60, (3, 4))
    expected = logits(model, ids)
    expected.sum().backward()
    plan = plans[0]
    assert plan.dense_weights == size
    assert plan.kept_weights == sum(p.numel() for p in model.parameters())
    assert "shares the weight of embed" in str(plan)
    again = copy.deepcopy(model)
    assert again["embed"].weight is again["head"].weight
    fresh = language_model()
    lrm.factorize(fresh, tau=None, **how)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(fresh, ids), expected)
    lrm.densify(model)
    assert type(model["embed"]) is nn.Embedding
    assert model["embed"].weight is model["head"].weight
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_an_excluded_head_keeps_its_table_dense():
    model = language_model()
    lrm.factorize(model, 3, include=["*", "embed"], exclude="head")
    assert type(model["embed"]) is nn.Embedding
    assert model["embed"].weight is model["head"].weight


def test_the_pair_trains_within_its_bound(device):
    model = language_model(padding_idx=0).to(device)
    lrm.factorize(model, 4, tau=0.1, include=["*", "embed"])
    steps = lrm.optim.CondLRAdam(model.parameters(), lr=0.01)
    ids = torch.randint(60, (16, 5), device=device)
    losses = []
    for _ in range(30):
        steps.zero_grad()
        loss = nn.functional.cross_entropy(logits(model, ids).flatten(0, 1), ids.flatten())
        loss.backward()
        steps.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert lrm.report(model).max_cond <= 1.1 * (1 + 1e-4)


def test_fold_gives_a_thin_table_and_leaves_tied_ones_alone():
    dense = nn.Embedding(20, 6, padding_idx=3, dtype=torch.float64)
    model = lrm.fold(nn.ModuleDict({"e": LowRankEmbedding.from_dense(dense, 6, tau=None)}))
    ids = torch.arange(20)
    torch.testing.assert_close(model["e"](ids), dense(ids))
    torch.testing.assert_close(model["e"].weight, dense.weight)
    assert [type(m) for m in model["e"]] == [nn.Embedding, nn.Linear]
    tied = lrm.factorize(language_model(), 4, include=["*", "embed"])
    with pytest.warns(UserWarning, match="fold left alone embed: its weight shares memory"):
        lrm.fold(tied)
    assert tied["embed"].weight is tied["head"].weight


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"max_norm": 1.0}, "max_norm=1.0 rewrites rows"),
        ({"sparse": True}, "sparse=True"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq=True"),
    ],
)
def test_options_that_leave_the_manifold_are_refused_by_name(option, words):
    dense = nn.Embedding(60, 16, **option)
    with pytest.raises(ValueError, match=words):
        LowRankEmbedding.from_dense(dense, 3)
    model, plans = nn.ModuleDict({"e": dense, "b": nn.Linear(16, 16)}), []
    lrm.factorize(model, 3, include=["*", "e"], summary=plans.append)
    assert model["e"] is dense
    assert words in str(plans[0])


def test_state_flags_and_words():
    dense = nn.Embedding(60, 16, padding_idx=2).eval()
    dense.weight.requires_grad_(False)
    layer = LowRankEmbedding.from_dense(dense, 3)
    assert not layer.training
    assert not layer.weight.requires_grad
    assert "60, 16, padding_idx=2, rank=3, tau=0.1" in repr(layer)
    other = LowRankEmbedding(60, 16, 5)
    other.load_state_dict(layer.state_dict())
    assert other.rank == 3
    with pytest.raises(RuntimeError, match="the shape of the dense weight"):
        other.load_state_dict(dense.state_dict())
    with pytest.raises(ValueError, match=r"padding_idx must be an integer in -9\.\.8"):
        LowRankEmbedding(9, 4, 2, padding_idx=9)
    with pytest.raises(lrm.certify.BoundError, match="LowRankEmbedding"):
        lrm.certify.lipschitz(nn.Sequential(layer), (3,))
    found = lrm.report(nn.Sequential(layer), example=torch.zeros(4, 5, dtype=torch.long))
    assert found.layers[0].batch == 20


@pytest.mark.parametrize("gradient", ["factors", "probe"])
@pytest.mark.parametrize("many", [2, 400])
def test_within_autocast_a_row_has_full_precision_as_torchs(device, gradient, many):
    layer = LowRankEmbedding(50, 16, 4, gradient=gradient, device=device)
    ids = torch.randint(50, (many,), device=device)
    found = []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            assert nn.Embedding(50, 16, device=device)(ids).dtype == torch.float32
            y = layer(ids)
        layer.weight.grad = None
        y.square().sum().backward()
        found.append((y, layer.weight.grad))
    for with_, without in zip(*found, strict=True):
        assert with_.dtype == torch.float32
        assert torch.equal(with_, without)


def test_a_folded_table_too_keeps_its_dtype_within_autocast(device):
    layer = LowRankEmbedding(50, 16, 4, device=device)
    folded = lrm.fold(copy.deepcopy(layer))
    ids = torch.randint(50, (7,), device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = folded(ids)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, layer(ids), rtol=2e-2, atol=2e-2)
    assert torch.equal(torch.jit.script(folded)(ids), folded(ids))
