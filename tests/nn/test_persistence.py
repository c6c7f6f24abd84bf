"""A layer keeps its geometry through everything torch does to modules, or an error is raised."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import geoopt
import pytest
import torch
from layer_cases import BAD, LAYERS, assert_whole, off_manifold
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankLayer, LowRankLinear
from lrmanifold.optim import CondLR

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Roundings of storage, in the shorter of two dtypes.
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.fixture(params=list(LAYERS))
def build(request) -> Callable[..., LowRankLayer]:
    return LAYERS[request.param]


@pytest.fixture(params=["set data", "swap", "overwrite"])
def conversion(request):
    """The three ways in which torch replaces the values of parameters."""
    switches = torch.__future__
    if request.param == "swap":
        switches.set_swap_module_params_on_conversion(True)
    elif request.param == "overwrite":
        switches.set_overwrite_module_params_on_conversion(True)
    yield request.param
    switches.set_swap_module_params_on_conversion(False)
    switches.set_overwrite_module_params_on_conversion(False)


def assert_same_function(a: LowRankLayer, b: LowRankLayer) -> None:
    dtypes = a.weight.dtype, b.weight.dtype
    tol = max(CLOSE[d] for d in dtypes)
    for x, y in ((a.dense_weight(), b.dense_weight()), (a.bias, b.bias)):
        torch.testing.assert_close(
            x.detach().double().cpu(), y.detach().double().cpu(), rtol=tol, atol=tol
        )


# -- copies


def through_torch_save(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), through_torch_save]


@pytest.mark.parametrize("copy_of", COPIES, ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_are_whole_and_independent(device, build, copy_of, dtype):
    layer = build(device=device, dtype=dtype)
    layer.weight.requires_grad_(False)
    other = copy_of(nn.Sequential(layer))[0]
    assert not other.weight.requires_grad
    assert_whole(other)
    assert_same_function(layer, other)
    assert other.manifold is not layer.manifold
    assert other.extra_repr() == layer.extra_repr()
    with torch.no_grad():
        other.weight.zero_()
    assert_whole(layer)


def test_copies_keep_what_is_shared_shared():
    layer = LowRankLinear(6, 6, 2)
    tied = LowRankLinear(6, 6, 2)
    tied.weight = layer.weight
    model = nn.ModuleList([layer, layer, tied])
    for copy_of in COPIES:
        a, b, c = copy_of(model)
        assert a is b
        assert a.weight is c.weight
        assert a.manifold is c.manifold
        assert_whole(c)


# -- conversions


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_conversions_both_ways(device, build, conversion, dtype):
    layer = build(device=device)
    original = copy.deepcopy(layer)
    assert layer.to(dtype) is layer
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert_whole(layer)
    assert_same_function(layer, original)
    layer.to(torch.float32)
    assert_whole(layer)
    error = (layer.dense_weight() - original.dense_weight()).detach().abs().max()
    assert float(error) <= CLOSE[dtype] + 1e-5


@pytest.mark.parametrize("method", ["double", "half", "bfloat16", "float", "cpu", "share_memory"])
def test_methods_that_convert(build, conversion, method):
    layer = build()
    original = copy.deepcopy(layer)
    getattr(layer, method)()
    assert_whole(layer)
    assert_same_function(layer, original)


def test_moves_between_devices(device, build, conversion):
    layer = build()
    original = copy.deepcopy(layer)
    layer.to(device)
    assert layer.weight.device.type == device.type
    assert_whole(layer)
    assert_same_function(layer, original)
    layer.cpu()
    assert_whole(layer)


def test_gradients_and_optimizers_go_with_a_conversion(build, conversion):
    layer = build()
    optimizer = CondLR(layer.parameters(), lr=0.1, momentum=0.5)
    layer.dense_weight().square().sum().backward()
    optimizer.step()
    grad, weight = layer.weight.grad.clone(), layer.weight
    layer.to(torch.float64)
    assert layer.weight.grad.dtype == torch.float64
    torch.testing.assert_close(layer.weight.grad, grad.double())
    if conversion != "overwrite":  # which makes new parameters, in torch too
        assert layer.weight is weight
        before = layer.weight.detach().clone()
        optimizer.step()
        assert not torch.equal(before, layer.weight.detach())
    assert_whole(layer)


def test_through_meta_and_back(build, conversion):
    layer, source = build().to("meta"), build()
    assert layer.weight.is_meta
    assert layer.weight.manifold is layer.manifold
    assert isinstance(layer.weight, geoopt.ManifoldParameter)
    layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    assert_whole(layer)
    assert_same_function(layer, source)
    built_empty = build(device="meta")
    built_empty.load_state_dict(source.state_dict(), assign=True)
    assert_whole(built_empty)
    assert_same_function(built_empty, source)
    emptied = build(device="meta").to_empty(device="cpu")
    emptied.reset_parameters()
    assert_whole(emptied)


# -- state dicts


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("mine", [torch.float64, torch.float32, torch.bfloat16])
def test_state_dicts_of_any_dtype_load(device, build, conversion, assign, saved, mine):
    source, layer = build(device=device, dtype=saved), build(device=device, dtype=mine)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    held = layer.weight
    assert str(layer.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert layer.weight.dtype == (saved if assign else mine)
    assert_whole(layer)
    assert_same_function(layer, source)
    if not assign or conversion == "swap":
        assert layer.weight is held


def test_an_optimizer_made_before_loading_goes_on(build, conversion):
    layer, source = build(), build()
    optimizer = CondLR(layer.parameters(), lr=0.1)
    layer.load_state_dict(source.state_dict())
    layer.dense_weight().square().sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, layer.weight.detach())


def test_assigned_parameters_are_taken_themselves(build):
    layer, source = build(), build()
    layer.load_state_dict(source.state_dict(keep_vars=True), assign=True)
    assert layer.weight is source.weight
    assert layer.manifold is source.manifold
    assert_whole(layer)


def test_missing_keys_are_torchs_business(build):
    layer = build()
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        layer.load_state_dict({"bias": torch.zeros_like(layer.bias)})
    result = layer.load_state_dict({"bias": torch.ones_like(layer.bias)}, strict=False)
    assert result.missing_keys == ["weight"]
    assert torch.equal(layer.weight.detach(), before)
    assert_whole(layer)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("spoil", BAD)
def test_a_bad_weight_is_refused_by_name_and_nothing_of_the_layer_loaded(
    build, conversion, assign, strict, spoil
):
    model = nn.Sequential(nn.Identity(), build())
    layer, source = model[1], build()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    state = {f"1.{k}": v for k, v in source.state_dict().items()}
    state["1.weight"] = spoil(state["1.weight"])
    with pytest.raises(RuntimeError, match=r"1\.weight is not a point of"):
        model.load_state_dict(state, strict=strict, assign=assign)
    for k, v in layer.state_dict().items():
        assert torch.equal(v, before[k])
    assert_whole(layer)


def test_a_checkpoint_beyond_the_bound_is_refused():
    loose, tight = LowRankLinear(7, 9, 3, tau=10.0), LowRankLinear(7, 9, 3, tau=0.1)
    with torch.no_grad():
        loose.manifold.unpack(loose.weight).S.copy_(torch.diag(torch.tensor([1.0, 2.0, 5.0])))
    with pytest.raises(RuntimeError, match=r"weight is not.*cond\(S\) = 5 > 1 \+ tau = 1\.1"):
        tight.load_state_dict(loose.state_dict())
    tight.load_state_dict(
        {**loose.state_dict(), "weight": tight.manifold.projx(loose.weight.detach())}
    )
    assert_whole(tight)


@pytest.mark.parametrize("name", ["linear", "grouped convolution"])
def test_a_dense_checkpoint_says_what_to_do(name):
    layer = LAYERS[name]()
    dense = layer.to_dense()
    with pytest.raises(RuntimeError, match="is the shape of the dense weight; load it into the de"):
        layer.load_state_dict(dense.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        dense.load_state_dict(layer.state_dict())
    assert_whole(layer)


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_another_rank_changes_the_rank(conversion, assign):
    layer, source = LowRankLinear(7, 9, 3, tau=0.1), LowRankLinear(7, 9, 5, tau=0.1)
    x = torch.randn(4, 7)
    # A graph that remembers the old shape; where torch swaps, it allows none to be alive.
    alive = layer(x).sum() if conversion != "swap" else None
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert layer.rank == 5
    assert layer.weight.shape == source.weight.shape
    assert_same_function(layer, source)
    layer(x).sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape
    assert_whole(layer)
    del alive
    bad = {k: off_manifold(v) for k, v in LowRankLinear(7, 9, 2).state_dict().items()}
    with pytest.raises(RuntimeError, match="is not a point of"):
        layer.load_state_dict(bad, assign=assign)
    assert layer.rank == 5
    assert_whole(layer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda X: 2 * X, r"orthonormal"),
        (lambda X: torch.zeros(7 + 8 + 9, 8), r"\(9 \+ r \+ 7, r\), r <= 7, got \(24, 8\)$"),
    ],
    ids=["off-manifold", "rank-too-large"],
)
def test_what_is_wrong_with_a_weight_of_another_rank_is_said(change, words):
    layer = LowRankLinear(7, 9, 3)
    bad = {**layer.state_dict(), "weight": change(LowRankLinear(7, 9, 5).weight.detach())}
    with pytest.raises(RuntimeError, match=words):
        layer.load_state_dict(bad)


def renaming(value):
    """A hook that finds the weight under an older name and another form."""

    def hook(module, state, prefix, *rest):
        state[prefix + "weight"] = value(state.pop(prefix + "old"))

    return hook


def renamed(layer):
    state = dict(layer.state_dict())
    state["old"] = state.pop("weight")
    return state


def test_load_hooks_come_before_the_check(build):
    layer, source = build(), build()
    layer.register_load_state_dict_pre_hook(renaming(lambda X: X))
    layer.load_state_dict(renamed(source))
    assert torch.equal(layer.weight, source.weight)
    assert_whole(layer)
    other = build()
    other.register_load_state_dict_pre_hook(renaming(lambda X: X + 8.0))
    with pytest.raises(RuntimeError, match="is not a point of"):
        other.load_state_dict(renamed(source))
    assert_whole(other)


def test_load_hooks_run_once_and_may_bring_another_rank():
    layer, source = LowRankLinear(7, 9, 3), LowRankLinear(7, 9, 5)
    calls = []
    layer.register_load_state_dict_pre_hook(lambda *a: calls.append(1))
    layer.register_load_state_dict_pre_hook(renaming(lambda X: X))
    layer.load_state_dict(renamed(source))
    assert len(calls) == 1
    assert layer.rank == 5
    assert torch.equal(layer.weight, source.weight)
    assert_whole(layer)


def mixed(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10))
    return lrm.factorize(model, **options) if options else model


def refusal(source, target):
    with pytest.raises(RuntimeError) as caught:
        target.load_state_dict(source.state_dict())
    return str(caught.value)


def test_a_layer_that_is_low_rank_in_the_file_only_is_named_with_its_rank():
    target = mixed(rank=4, exclude=["2", "3"])
    said = refusal(mixed(rank={"0": 8, "2": 6}), target)
    assert "2.weight: the layer is dense here, (64, 64), and of rank 6 of 64 x 64 in the" in said
    assert "same rank and exclude" in said
    assert "0.weight:" not in said
    # also within a larger model, after another conversion, in copies and from files
    lrm.factorize(target, rank={"3": 2})
    for copied in (copy.deepcopy(target), pickle.loads(pickle.dumps(target))):
        outer = nn.Sequential(copied)
        said = refusal(nn.Sequential(mixed(rank=8)), outer)
        assert said.count("0.2.weight: the layer is dense here") == 1


def test_a_layer_that_is_dense_in_the_file_only_is_named_with_its_rank():
    said = refusal(mixed(rank=8, exclude="2"), mixed(rank=4))
    assert "2.weight: the layer is low-rank here, rank 4 of 64 x 64, and (64, 64) is" in said
    assert "exclude" in said


def test_attention_that_is_low_rank_in_the_file_only_is_named():
    def model():
        return nn.ModuleDict({"a": nn.MultiheadAttention(16, 2), "b": nn.Linear(16, 16)})

    target = lrm.factorize(model(), rank=4, exclude="a")
    said = refusal(lrm.factorize(model(), rank=4), target)
    assert "a: the attention is dense here, low-rank in the state dict" in said


def test_dense_models_have_nothing_of_it_left():
    model = lrm.densify(mixed(rank=8))
    assert not any(m._load_state_dict_pre_hooks for m in model.modules())
    assert "the layer is dense" not in refusal(mixed(rank=8), model)
