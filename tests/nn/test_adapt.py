"""Adapters of whole models: nothing at the start, named, switched, merged and taken out again."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn import AdaptedLayer, LowRankLinear


def network(dtype=torch.float32) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 8, bias=False), nn.Linear(8, 3)
    ).to(dtype)


def train(model: nn.Module, steps: int = 8) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = lrm.optim.CondLR(trained, lr=0.05)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 9, dtype=dtype)
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Give every adapter another point: a change that is not zero."""
    for change in (m for m in model.modules() if isinstance(m, lrm.nn.Change)):
        X = change.update.weight
        X.copy_(change.update.manifold.random(*X.shape, dtype=X.dtype, device=X.device))


def layers(model: nn.Module) -> list[AdaptedLayer]:
    return [m for m in model.modules() if isinstance(m, AdaptedLayer)]


@given(
    rank=st.integers(1, 20),
    tau=st.one_of(st.none(), st.floats(0, 3)),
    alpha=st.one_of(st.none(), st.floats(0.1, 40)),
    dropout=st.sampled_from([0.0, 0.5]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    init=st.sampled_from(["random", "svd"]),
)
def test_outputs_stay_to_the_bit_and_only_the_adapter_trains(
    rank, tau, alpha, dropout, dtype, init
):
    model = network(dtype)
    x = torch.randn(4, 9, dtype=dtype)
    before, weight = model(x), model[0].weight
    lrm.nn.adapt(model, rank, tau=tau, alpha=alpha, dropout=dropout, init=init)
    assert torch.equal(model(x), before)
    assert torch.equal(model.eval()(x), before)
    assert model[0].base_layer.weight is weight
    assert type(model[3]) is nn.Linear  # the output layer
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{i}.changes.default.update.weight" for i in (0, 2)}
    scale = 1.0 if alpha is None else alpha / min(rank, 9)
    assert model[0].changes["default"].change_scale == pytest.approx(scale)


@given(alpha=st.floats(0.1, 8), seed=st.integers(0, 99), keep=st.booleans())
def test_the_function_is_that_of_the_dense_sum_before_and_after_merging(alpha, seed, keep):
    torch.manual_seed(seed)
    model = network(torch.float64)
    frozen = copy.deepcopy(model)
    lrm.nn.adapt(model, 3, alpha=alpha)
    train(model)
    for i in (0, 2):
        change = model[i].changes["default"]
        U, S, V = (t.detach() for t in change.update.factors)
        r, m = 3, change.out_features
        start = change.start[:m] @ change.start[m : m + r] @ change.start[m + r :].T
        frozen[i].weight.data += alpha / r * (U @ S @ V.T - start)
        s = torch.linalg.svdvals(S)
        assert float(s[0] / s[-1]) <= 1.1 + 1e-9
    x = torch.randn(5, 9, dtype=torch.float64)
    weights = [copy.deepcopy(layer.base_layer.weight) for layer in layers(model)]
    torch.testing.assert_close(model(x), frozen(x))
    torch.testing.assert_close(model[0].weight, frozen[0].weight)
    assert lrm.nn.merge(model, keep=keep) is model
    torch.testing.assert_close(model(x), frozen(x))
    torch.testing.assert_close(model[2].base_layer.weight, frozen[2].weight)
    with pytest.raises(RuntimeError, match="merged cannot be saved"):
        model.state_dict()
    with pytest.raises(ValueError, match=r"no adapter of model may be merged, got 'default'"):
        lrm.nn.set_adapter(model, None)
    dense = lrm.densify(copy.deepcopy(model))
    assert [type(m) for m in dense] == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear]
    torch.testing.assert_close(dense(x), frozen(x))
    lrm.nn.unmerge(model)
    for layer, W in zip(layers(model), weights, strict=True):
        assert not keep or torch.equal(layer.base_layer.weight, W)
        torch.testing.assert_close(layer.base_layer.weight, W)
    torch.testing.assert_close(lrm.densify(model)(x), frozen(x))
    with pytest.raises(ValueError, match="must have adapters"):
        lrm.nn.unmerge(model)


def test_named_adapters_share_one_base_and_do_not_touch_each_other():
    model = network()
    x = torch.randn(5, 9)
    base = model(x)
    lrm.nn.adapt(model, 2, name="a")
    train(model)
    a = model(x)
    lrm.nn.adapt(model, 3, include="0", name="b")
    assert torch.equal(model(x), base)
    train(model)
    b = model(x)
    assert not torch.equal(a, b)
    lrm.nn.set_adapter(model, "a")
    assert torch.equal(model(x), a)
    assert set(lrm.nn.trained_state_dict(model)) == {
        f"{i}.changes.a.{key}" for i in (0, 2) for key in ("start", "update.weight", "_extra_state")
    }
    lrm.nn.set_adapter(model, None)
    assert torch.equal(model(x), base)
    assert not any(p.requires_grad for p in model.parameters())
    lrm.nn.set_adapter(model, "b")
    assert torch.equal(model(x), b)
    with pytest.raises(ValueError, match=r"one of \['a', 'b'\], got 'c'"):
        lrm.nn.set_adapter(model, "c")
    with pytest.raises(ValueError, match="name must be new, got 'a'"):
        lrm.nn.adapt(model, 2, name="a")


def test_what_was_trained_is_small_and_comes_back():
    frozen = network()
    model = lrm.nn.adapt(copy.deepcopy(frozen), 2, alpha=4)
    train(model)
    state = {k: v.clone() for k, v in lrm.nn.trained_state_dict(model).items()}
    x = torch.randn(5, 9)
    for alpha in (4, None, 7):  # the file's counts
        again = lrm.nn.adapt(copy.deepcopy(frozen), 2, alpha=alpha)
        assert not again.load_state_dict(state, strict=False).unexpected_keys
        assert torch.equal(again(x), model(x))
    again.bfloat16().load_state_dict(model.state_dict())
    assert again[0].changes["default"].change_scale == 2.0
    (key,) = (k for k in state if k.startswith("0.") and k.endswith("_extra_state"))
    for wrong in (float("nan"), [1.0, 2.0]):
        with pytest.raises(RuntimeError, match=f"{key} must be a finite number"):
            again.load_state_dict({**state, key: torch.tensor(wrong)}, strict=False)
        assert again[0].changes["default"].change_scale == 2.0
    refused = {
        **state,
        key: torch.tensor(7.0),
        key.replace("_extra_state", "start"): torch.zeros(3, 3),
    }
    with pytest.raises(RuntimeError):
        again.load_state_dict(refused, strict=False)
    assert again[0].changes["default"].change_scale == 2.0
    old = {k: v for k, v in state.items() if not k.endswith("_extra_state")}
    again.load_state_dict(old, strict=False)
    assert again[0].changes["default"].change_scale == 2.0
    older = {k.replace("_extra_state", "scale"): v for k, v in state.items()}
    again[0].changes["default"].change_scale = 9.0
    assert not again.load_state_dict(older, strict=False).unexpected_keys
    assert again[0].changes["default"].change_scale == 2.0
    state.pop("0.changes.default.start")
    with pytest.raises(RuntimeError, match=r"start is missing"):
        again.load_state_dict(state, strict=False)


def test_low_rank_bases_stay_frozen_and_are_densified_but_not_merged():
    model = lrm.factorize(network(torch.float64), 2, keep_larger=True)
    lrm.nn.adapt(model, 2)
    assert isinstance(model[0].base_layer, LowRankLinear)
    train(model)
    x = torch.randn(5, 9, dtype=torch.float64)
    expected = model(x)
    with pytest.raises(ValueError, match="low-rank and would not stay so"):
        lrm.nn.merge(model)
    torch.testing.assert_close(lrm.densify(model)(x), expected)
    assert type(model[0]) is nn.Linear


def test_tied_and_hooked_layers():
    model = nn.ModuleDict({"embed": nn.Embedding(20, 9), "head": nn.Linear(9, 20, bias=False)})
    model["head"].weight = model["embed"].weight
    lrm.nn.adapt(model, 2, include="head")
    before = model["embed"].weight.clone()
    with pytest.raises(ValueError, match=r"tied to 'embed\.weight'"):
        lrm.nn.merge(model)
    assert torch.equal(model["embed"].weight, before)
    hooked = network()
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="left alone 0: it has hooks"):
        lrm.nn.adapt(hooked, 2, include=["0", "2"])
    assert [type(m) for m in hooked][:3] == [nn.Linear, nn.Tanh, AdaptedLayer]


def test_compiled_models_compute_switch_and_train_their_adapters(device):
    model = network().to(device)
    lrm.nn.adapt(model, 2, alpha=4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(5, 9, device=device)
    torch.testing.assert_close(compiled(x), model(x))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = lrm.optim.CondLR(trained, lr=0.05)
    before = model(x)
    compiled(x).square().mean().backward()
    optimizer.step()
    assert not torch.allclose(compiled(x), before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(compiled(x), model(x))
    lrm.nn.set_adapter(model, None)
    torch.testing.assert_close(compiled(x), model(x))


def test_layers_that_are_read_and_not_called_are_left_alone():
    model = nn.Sequential(lrm.nn.ConvexPotential(4, 2), nn.Linear(4, 4), nn.Linear(4, 3))
    x = torch.randn(5, 4)
    before = model(x)
    lrm.nn.adapt(model, 2)
    assert torch.equal(model(x), before)
    with pytest.warns(UserWarning, match=r"left alone 0.layer: ConvexPotential reads its factors"):
        lrm.nn.adapt(model, 2, include=["0.layer", "1"], name="more")


def test_wrong_arguments_change_nothing():
    model = network()
    cases = [
        ({"rank": 0}, ValueError, "rank must be"),
        ({"rank": 2, "include": "nothing"}, ValueError, "include pattern 'nothing' matches no"),
        ({"rank": 2, "name": "a.b"}, ValueError, "name must be a word without a dot"),
        ({"rank": 2, "name": "keys"}, ValueError, "name must be a word"),
        ({"rank": 2, "alpha": 0.0}, ValueError, "alpha must be"),
        ({"rank": 2, "dropout": 1.0}, ValueError, "dropout must be"),
        ({"rank": 2, "tau": -1.0}, ValueError, "tau must be"),
        ({"rank": 2, "exclude": "*"}, ValueError, "must have a linear layer to adapt"),
    ]
    for options, kind, words in cases:
        with pytest.raises(kind, match=words):
            lrm.nn.adapt(model, **options)
    assert all(p.requires_grad for p in model.parameters())
    assert not layers(model)


def test_dropout_changes_a_trained_adapter_in_training_only():
    model = network()
    lrm.nn.adapt(model, 4, dropout=0.5)
    train(model)
    x = torch.randn(64, 9)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("key", ["weight", "bias"])
def test_a_weight_that_is_computed_is_not_set_and_the_right_place_is_named(key):
    model = lrm.nn.adapt(network(), 2)
    words = f"{key} of AdaptedLayer is computed and cannot be set: set that of base_layer"
    value = nn.Parameter(torch.zeros_like(getattr(model[0], key)))
    with pytest.raises(AttributeError, match=words):
        setattr(model[0], key, value)
    setattr(model[0].base_layer, key, value)  # as the message says
    assert getattr(model[0].base_layer, key) is value


def test_lazy_layers_beside_adapters_are_frozen_and_get_their_values_later():
    model = nn.Sequential(nn.Linear(9, 12), nn.Linear(12, 8), nn.LazyLinear(3))
    lrm.nn.adapt(model, 2, include="1")
    assert isinstance(model[1], AdaptedLayer)
    x = torch.randn(5, 9)
    (model(x) - 1).square().mean().backward()
    assert type(model[2]) is nn.Linear
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == ["1.changes.default.update.weight"]


def test_nothing_is_loaded_into_a_model_with_a_merged_adapter():
    model = lrm.nn.adapt(network(), 2, include="2")
    state = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    weight = model[0].weight.clone()
    lrm.nn.merge(model)
    with pytest.raises(
        RuntimeError, match=r"merged cannot be loaded: call lrmanifold\.nn\.unmerge"
    ):
        model.load_state_dict(state)
    assert torch.equal(model[0].weight, weight)


class Doubled(nn.Linear):
    """Its output is not the product with its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


class Cosine(nn.Linear):
    def forward(self, x):
        F = nn.functional
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class Named(nn.Linear):
    """A subclass that computes as torch's layer does."""


@pytest.mark.parametrize("kind", [Doubled, Cosine])
@pytest.mark.parametrize("convert", [lrm.densify, lrm.fold])
def test_a_base_with_a_forward_of_its_own_is_adapted_but_not_merged(kind, convert, device):
    model = nn.Sequential(nn.Linear(9, 9), kind(9, 9), nn.Linear(9, 3)).to(device)
    lrm.nn.adapt(model, 2, include=["0", "1"])
    x = torch.randn(5, 9, device=device)
    move(model)
    expected, weight = model(x), model[0].base_layer.weight.clone()
    with pytest.raises(ValueError, match=rf"'1' cannot be merged: .*its own \({kind.__name__}\)"):
        lrm.nn.merge(model)
    assert torch.equal(model[0].base_layer.weight, weight)
    with pytest.warns(UserWarning, match=r"left alone 1: its base has a forward of its own"):
        convert(model)
    assert isinstance(model[1], AdaptedLayer)
    torch.testing.assert_close(model(x), expected)


def test_a_subclass_that_computes_as_torchs_layer_is_merged_and_kept():
    model = nn.Sequential(Named(9, 9), nn.Linear(9, 3))
    lrm.nn.adapt(model, 2, include="0")
    move(model)
    x = torch.randn(5, 9)
    expected = model(x)
    torch.testing.assert_close(lrm.nn.merge(model)(x), expected)
    assert type(lrm.densify(model)[0]) is Named
    torch.testing.assert_close(model(x), expected)


def test_hooks_put_on_a_base_after_adapt_keep_it_from_being_merged():
    model = lrm.nn.adapt(network(), 2)
    move(model)
    x = torch.randn(5, 9)
    plain = model(x)
    handle = model[0].base_layer.register_forward_hook(lambda module, x, y: y.clamp(-0.1, 0.1))
    expected = model(x)
    with pytest.raises(ValueError, match="layer '0' cannot be merged: its base has hooks"):
        lrm.nn.merge(model)
    assert torch.equal(model(x), expected)
    handle.remove()
    torch.testing.assert_close(lrm.nn.merge(model)(x), plain)


@pytest.mark.parametrize("convert", [lrm.densify, lrm.fold])
def test_what_adapt_froze_stays_frozen_and_a_single_adapter_trains_again(convert):
    model = convert(lrm.nn.adapt(network(), 2))
    assert not any(p.requires_grad for p in model.parameters())
    model = lrm.nn.adapt(network(), 2)
    model[0].base_layer.bias.requires_grad_(True)  # somebody trains it beside the adapter
    trained = [n for n, p in convert(model).named_parameters() if p.requires_grad]
    assert trained == ["0.bias"]
    model = nn.Sequential(lrm.nn.LowRankAdapter(nn.Linear(9, 12), 3), nn.Linear(12, 3))
    assert all(p.requires_grad for p in convert(model).parameters())
