"""Low-rank attention: torch's outputs at full rank, all masks, and conversion both ways."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lrmanifold as lrm
from lrmanifold.nn import LowRankLayer, LowRankLinear, LowRankMultiheadAttention

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
TARGETS, SOURCES, BATCH, HEADS, EMBED = 4, 6, 3, 2, 8


def pair(dtype=torch.float64, device="cpu", **options):
    """torch's attention with unlike weights, and the low-rank one of full rank."""
    dense = nn.MultiheadAttention(EMBED, HEADS, dtype=dtype, device=device, **options)
    for p in dense.parameters():
        nn.init.normal_(p, std=0.4)
    return dense, LowRankMultiheadAttention.from_dense(dense, EMBED, tau=None)


def inputs(dtype=torch.float64, device="cpu", kdim=EMBED, vdim=EMBED, batch_first=True):
    sizes = ((TARGETS, EMBED), (SOURCES, kdim), (SOURCES, vdim))
    found = [torch.randn(BATCH, *size, dtype=dtype, device=device) for size in sizes]
    return found if batch_first else [t.transpose(0, 1) for t in found]


def masks(dtype=torch.float64, device="cpu"):
    padding = torch.zeros(BATCH, SOURCES, dtype=torch.bool, device=device)
    padding[0, 4:] = True
    causal = torch.ones(TARGETS, SOURCES, dtype=torch.bool, device=device).triu(1)
    each = torch.rand(BATCH * HEADS, TARGETS, SOURCES, device=device) < 0.3
    each[..., 0] = False
    numbers = torch.randn(TARGETS, SOURCES, dtype=dtype, device=device)
    return [None, causal, each, numbers], [None, padding]


def assert_same(dense, low, args, tolerance, **options):
    expected, weights = dense(*args, **options)
    found, ours = low(*args, **options)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    assert (ours is None) == (weights is None)
    if weights is not None:
        torch.testing.assert_close(ours, weights, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"batch_first": False},
        {"kdim": 5, "vdim": 7},
        {"kdim": 5, "bias": False, "add_bias_kv": True},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": False},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:.*nested")
def test_full_rank_is_torchs_attention(device, dtype, training, options):
    options = {"batch_first": True, **options}
    dense, low = pair(dtype, device, **options)
    dense.train(training), low.train(training)
    sizes = {k: options.get(k, EMBED) for k in ("kdim", "vdim")}
    args = inputs(dtype, device, batch_first=options["batch_first"], **sizes)
    attn_masks, paddings = masks(dtype, device)
    for mask, padding, need, average in itertools.product(
        attn_masks, paddings, [False, True], [False, True]
    ):
        how = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": need}
        assert_same(dense, low, args, TOLERANCE[dtype], average_attn_weights=average, **how)


def test_without_a_batch_and_with_the_causal_hint():
    dense, low = pair(batch_first=True)
    x = torch.randn(SOURCES, EMBED, dtype=torch.float64)
    assert_same(dense, low, (x, x, x), 1e-10)
    mask = nn.Transformer.generate_square_subsequent_mask(SOURCES, dtype=torch.float64)
    padding = torch.tensor([False] * 5 + [True])
    for need, pad in itertools.product([False, True], [None, padding]):
        how = {"need_weights": need, "key_padding_mask": pad, "attn_mask": mask}
        assert_same(dense, low, (x, x, x), 1e-10, is_causal=True, **how)


def test_gradients_are_those_of_the_dense_projections():
    dense, low = pair(batch_first=True)
    args = inputs()
    weights = torch.randn(BATCH, TARGETS, EMBED, dtype=torch.float64)
    for module in (dense, low):
        (module(*args)[0] * weights).sum().backward()
    torch.testing.assert_close(low.in_proj_bias.grad, dense.in_proj_bias.grad)
    torch.testing.assert_close(low.out_proj.bias.grad, dense.out_proj.bias.grad)
    dense_grads = [*dense.in_proj_weight.grad.chunk(3), dense.out_proj.weight.grad]
    layers = (low.q_proj, low.k_proj, low.v_proj, low.out_proj)
    for layer, G in zip(layers, dense_grads, strict=True):
        M, X = layer.manifold, layer.weight.detach()
        found = M.egrad2rgrad(X, layer.weight.grad)
        torch.testing.assert_close(found, M.project_ambient(X, G), rtol=1e-7, atol=1e-9)


def test_dropout_is_on_in_training_only():
    low = LowRankMultiheadAttention(EMBED, HEADS, 4, dropout=0.5, batch_first=True)
    x = torch.randn(BATCH, SOURCES, EMBED)
    for need in (False, True):
        low.train()
        a, b = (low(x, x, x, need_weights=need)[0] for _ in range(2))
        assert not torch.equal(a, b)
        low.eval()
        a, b = (low(x, x, x, need_weights=need)[0] for _ in range(2))
        assert torch.equal(a, b)


# -- conversion


@pytest.mark.parametrize(
    "options",
    [{}, {"kdim": 5, "vdim": 7}, {"bias": False}, {"add_bias_kv": True, "dropout": 0.2}],
    ids=str,
)
def test_densify_gives_torchs_layer_back(options):
    dense, _ = pair(batch_first=True, **options)
    dense.eval()
    model = nn.ModuleDict({"attention": copy.deepcopy(dense)})
    lrm.factorize(model, 8, tau=None, keep_larger=True)
    low = model["attention"]
    assert isinstance(low, LowRankMultiheadAttention)
    for key in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        mine, theirs = getattr(low, key), getattr(dense, key)
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine, theirs)
    lrm.densify(model)
    back = model["attention"]
    assert type(back) is nn.MultiheadAttention
    assert repr(back) == repr(dense)
    assert not back.training
    for (name, p), (other, q) in zip(
        back.state_dict().items(), dense.state_dict().items(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(p, q)
    for key in ("dropout", "batch_first", "add_zero_attn", "kdim", "vdim", "num_heads"):
        assert getattr(back, key) == getattr(dense, key)


def test_fold_folds_the_projections():
    dense, low = pair(batch_first=True)
    model = lrm.fold(nn.ModuleDict({"attention": low}))
    assert not any(isinstance(m, LowRankLayer) for m in model.modules())
    assert_same(dense, model["attention"], inputs(), 1e-10)
    torch.testing.assert_close(model["attention"].in_proj_weight, dense.in_proj_weight)


def test_ranks_by_name_and_projections_that_stay_dense():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 2)})
    bias = model["attention"].in_proj_bias
    plans = []
    ranks = {"*.q_proj": 3, "*.out_proj": 0.25}
    lrm.factorize(model, rank=ranks, summary=plans.append)
    low = model["attention"]
    assert low.in_proj_bias is bias
    assert (low.q_proj.rank, low.out_proj.rank) == (3, 8)
    assert type(low.k_proj) is type(low.v_proj) is nn.Linear
    reasons = {d.name: d.reason for d in plans[0].decisions}
    assert reasons["attention.k_proj"] == "no rank given for it"
    y, _ = low(*[torch.randn(4, 2, 32)] * 3)
    lrm.densify(model)
    torch.testing.assert_close(model["attention"](*[torch.zeros(4, 2, 32)] * 3)[0].shape, y.shape)


def test_patterns_may_name_the_attention_itself():
    for how in ({"exclude": "attention"}, {"include": "linear"}):
        model = nn.ModuleDict(
            {"attention": nn.MultiheadAttention(32, 2), "linear": nn.Linear(64, 64)}
        )
        lrm.factorize(model, 4, **how)
        assert type(model["attention"]) is nn.MultiheadAttention
        assert isinstance(model["linear"], LowRankLinear)


def test_a_state_dict_comes_back_also_of_other_ranks_and_a_dense_one_is_named():
    a, b = (LowRankMultiheadAttention(EMBED, HEADS, r, batch_first=True) for r in (4, 2))
    b.load_state_dict(a.state_dict())
    x = torch.randn(BATCH, SOURCES, EMBED)
    assert torch.equal(a(x, x, x)[0], b(x, x, x)[0])
    dense = nn.MultiheadAttention(EMBED, HEADS).state_dict()
    with pytest.raises(RuntimeError, match="in_proj_weight: of a dense attention; load it into"):
        b.load_state_dict(dense)
    again = copy.deepcopy(a)
    assert torch.equal(a(x, x, x)[0], again(x, x, x)[0])
    assert again.q_proj.weight.manifold is again.q_proj.manifold


@pytest.mark.parametrize(
    "optimizer", [lrm.optim.CondLR, lrm.optim.CondLRAdam, lrm.optim.CondLRMuon]
)
def test_it_trains_within_its_bound(device, optimizer):
    low = LowRankMultiheadAttention(16, 2, 4, batch_first=True, tau=0.1, device=device)
    x = torch.randn(8, 5, 16, device=device)
    target = x.flip(1)
    steps = optimizer(low.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        steps.zero_grad()
        loss = (low(x, x, x, need_weights=False)[0] - target).square().mean()
        loss.backward()
        steps.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert lrm.report(low).max_cond <= 1.1 * (1 + 1e-4)


# -- inside torch's transformer


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested")
def test_an_encoder_at_a_quarter_of_the_rank_loses_nearly_60_percent():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 4, 512, batch_first=True), 2)
    before = sum(p.numel() for p in model.parameters())
    lrm.factorize(model, 0.25)
    assert 0.57 < 1 - sum(p.numel() for p in model.parameters()) / before < 0.60


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested")
def test_a_whole_transformer_computes_the_same_with_and_without_gradients(masked):
    dense = nn.Transformer(16, 2, 2, 2, 32, batch_first=True, dtype=torch.float64).eval()
    low = lrm.factorize(copy.deepcopy(dense), 16, tau=None, keep_larger=True)
    assert not any(type(m) is nn.MultiheadAttention for m in low.modules())
    source, target = (torch.randn(3, n, 16, dtype=torch.float64) for n in (6, 5))
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    how = {"tgt_mask": causal, "tgt_is_causal": True}
    if masked:
        how |= {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    expected = dense(source, target, **how)
    torch.testing.assert_close(low(source, target, **how), expected)
    with torch.no_grad():
        torch.testing.assert_close(low(source, target, **how), expected)
        lrm.densify(low)
        torch.testing.assert_close(low(source, target, **how), expected)


def padded(device):
    padding = torch.zeros(3, 5, dtype=torch.bool, device=device)
    padding[0, 3:] = True
    return torch.randn(3, 5, 16, device=device), padding


def encoder_layer(device):
    dense = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, device=device).eval()
    by_hand = copy.deepcopy(dense)
    by_hand.self_attn = LowRankMultiheadAttention.from_dense(dense.self_attn, 16, tau=None)
    return dense, by_hand


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested")
def test_put_by_hand_into_an_encoder_layer_it_keeps_torchs_fused_path_away(device):
    dense, low = encoder_layer(device)
    x, padding = padded(device)
    for depth in (0, 2):
        if depth:
            dense, low = (nn.TransformerEncoder(e, depth).eval() for e in (dense, low))
        for how in ({}, {"src_key_padding_mask": padding}):
            with torch.no_grad():
                found, expected = low(x, **how)[~padding], dense(x, **how)[~padding]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_put_by_hand_into_a_whole_encoder_it_says_what_to_do_about_nested_tensors(device):
    dense, low = encoder_layer(device)
    encoder, (x, padding) = nn.TransformerEncoder(dense, 2).eval(), padded(device)
    encoder.layers[0].self_attn = encoder.layers[1].self_attn = low.self_attn
    with torch.no_grad():
        with pytest.raises(TypeError, match="unless its use_nested_tensor is False"):
            encoder(x, src_key_padding_mask=padding)
        encoder.use_nested_tensor = False
        assert encoder(x, src_key_padding_mask=padding).isfinite().all()


def test_a_linear_layer_by_hand_needs_the_fused_path_switched_off(device):
    """The docstring of LowRankLinear."""
    dense, _ = encoder_layer(device)
    with torch.no_grad():
        expected = dense(x := padded(device)[0])
        dense.linear1 = LowRankLinear.from_dense(dense.linear1, 16, tau=None)
        with pytest.raises(RuntimeError):
            dense(x)
        dense.activation_relu_or_gelu = 0
        torch.testing.assert_close(dense(x), expected, atol=1e-5, rtol=1e-5)


# -- what is refused, by name


def test_what_stands_in_the_way_is_named():
    def hooked(a):
        a.out_proj.register_forward_hook(lambda *_: None)

    def tied(a):
        a.twin = nn.Module()
        a.twin.w = a.in_proj_weight

    def pruned(a):
        prune.l1_unstructured(a.out_proj, "weight", 0.5)

    for change, words in (
        (hooked, "hooks"),
        (tied, "is tied to"),
        (pruned, "nn.MultiheadAttention reads"),
    ):
        attention = nn.MultiheadAttention(16, 2)
        change(attention)
        model, plans = nn.ModuleDict({"a": attention, "b": nn.Linear(32, 32)}), []
        lrm.factorize(model, 3, summary=plans.append)
        assert model["a"] is attention
        assert words in str(plans[0]), change


def test_bad_arguments_are_refused_by_name():
    low = LowRankMultiheadAttention(EMBED, HEADS, 3, batch_first=True)
    x = torch.randn(BATCH, SOURCES, EMBED)
    for error, words, options in (
        (ValueError, "attn_mask must have shape", {"attn_mask": torch.zeros(2, 2)}),
        (ValueError, "key_padding_mask must", {"key_padding_mask": torch.zeros(1, 2)}),
        (TypeError, "attn_mask must be of bool", {"attn_mask": torch.zeros(6, 6).int()}),
        (ValueError, "is_causal is a hint", {"is_causal": True}),
    ):
        with pytest.raises(error, match=words):
            low(x, x, x, **options)
    with pytest.raises(ValueError, match="2 without a batch"):
        low(x[None], x[None], x[None])
    nested = torch.nested.nested_tensor([x[0], x[1]])
    with pytest.raises(TypeError, match="nested"):
        low(nested, nested, nested)
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads = 3"):
        LowRankMultiheadAttention(EMBED, 3, 2)
    with pytest.raises(ValueError, match="rank must name some of"):
        LowRankMultiheadAttention.from_dense(nn.MultiheadAttention(8, 2), {"query": 2})


def test_certification_refuses_it_by_name():
    with pytest.raises(lrm.certify.BoundError, match="LowRankMultiheadAttention"):
        lrm.certify.lipschitz(nn.Sequential(LowRankMultiheadAttention(8, 2, 2)), (3, 8))


@pytest.mark.parametrize("kdim", [None, 6])
def test_weights_that_are_computed_are_not_set_and_the_right_place_is_named(kdim):
    layer = LowRankMultiheadAttention(8, 2, 3, kdim=kdim)
    for key in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        with pytest.raises(AttributeError, match=f"{key} of LowRank.* set the weights"):
            setattr(layer, key, nn.Parameter(torch.zeros(24, 8)))
