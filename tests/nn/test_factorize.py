"""factorize and densify: what is replaced, what stays dense and why; errors change nothing."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import lrmanifold as lrm
from lrmanifold.nn import (
    LowRankConv2d,
    LowRankLayer,
    LowRankLinear,
    LowRankMultiheadAttention,
    Plan,
)
from lrmanifold.optim import CondLR


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 16, 3))
        self.shared = nn.Linear(16, 16)
        self.blocks = nn.ModuleDict({"a": nn.Linear(16, 20), "b": nn.Linear(20, 16)})
        self.alias = self.shared
        self.again = nn.ModuleList([self.shared, nn.Identity()])
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.features(x).mean((-2, -1))
        x = self.again[0](self.alias(self.shared(x)).tanh()).tanh()
        return self.head(self.blocks["b"](self.blocks["a"](x).tanh()))


def plan_of(model: nn.Module, **options) -> dict[str, tuple[int | None, str]]:
    plans: list[Plan] = []
    lrm.factorize(model, summary=plans.append, **options)
    return {d.name: (d.rank, d.reason) for d in plans[0].decisions}


def is_dense(model: nn.Module) -> bool:
    return not any(isinstance(m, LowRankLayer) for m in model.modules())


# -- the tree


def test_names_and_tree_are_kept_and_the_model_is_changed_in_place():
    net = Net()
    names = [n for n, _ in net.named_modules()]
    keys = list(net.state_dict())
    assert lrm.factorize(net, rank=4) is net
    assert [n for n, _ in net.named_modules()] == names
    assert list(net.state_dict()) == keys
    assert isinstance(net.features[0], LowRankConv2d)
    assert isinstance(net.blocks["a"], LowRankLinear)
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_shared_modules_stay_shared():
    net = lrm.factorize(Net(), rank=4)
    assert isinstance(net.shared, LowRankLinear)
    assert net.shared is net.alias is net.again[0]
    lrm.densify(net)
    assert type(net.shared) is nn.Linear
    assert net.shared is net.alias is net.again[0]


def test_densify_gives_the_same_function_and_torchs_layers(device):
    net = lrm.factorize(Net().double().to(device), rank=0.5)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, device=device)
    expected = net(x)
    assert lrm.densify(net) is net
    assert is_dense(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)
    assert {k: v.shape for k, v in net.state_dict().items()} == {
        k: v.shape for k, v in Net().state_dict().items()
    }
    assert lrm.densify(net) is net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_device_mode_and_gradient_flags_are_kept(device, dtype):
    net = Net().to(device, dtype).eval()
    net.blocks["a"].train()
    net.head.weight.requires_grad_(False)
    for model in (lrm.factorize(net, rank=4), lrm.densify(net)):
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {p.device.type for p in model.parameters()} == {device.type}
        assert model.blocks["a"].training
        assert not model.blocks["b"].training
        assert not model.head.weight.requires_grad
        assert model.head.bias.requires_grad


def test_a_model_that_is_itself_a_layer_is_returned_new():
    dense = nn.Linear(12, 10)
    low = lrm.factorize(dense, rank=3)
    assert isinstance(low, LowRankLinear)
    back = lrm.densify(low)
    assert type(back) is nn.Linear
    torch.testing.assert_close(back.weight, low.dense_weight())
    assert plan_of(nn.Linear(12, 10), rank=3) == {"": (3, "")}
    assert type(lrm.factorize(nn.Linear(2, 2), rank=2)) is nn.Linear
    assert isinstance(lrm.factorize(nn.ReLU(), rank=2), nn.ReLU)


def test_a_second_call_finds_nothing_left_to_do():
    net = lrm.factorize(Net(), rank=4)
    before = dict(net.named_modules())
    lrm.factorize(net, rank=2)
    assert dict(net.named_modules()) == before


def test_an_optimizer_over_the_result_steps():
    net = lrm.factorize(Net(), compression=0.3, tau=0.2)
    optimizer = CondLR(net.parameters(), lr=0.1, momentum=0.5)
    net(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    for layer in net.modules():
        if isinstance(layer, LowRankLayer):
            assert layer.tau == 0.2
            assert float(layer.manifold.cond(layer.weight.detach()).max()) <= 1.2 * (1 + 1e-5)


def test_hooks_go_with_their_module_both_ways():
    net, calls = Net(), []
    handle = net.head.register_forward_hook(lambda m, a, y: calls.append(type(m)))
    net.head.register_forward_pre_hook(lambda m, a: calls.append("pre"))
    net.head.register_full_backward_hook(lambda m, gx, gy: calls.append("backward"))
    lrm.factorize(net, rank=4)(torch.randn(2, 3, 8, 8)).sum().backward()
    assert calls == ["pre", LowRankLinear, "backward"]
    handle.remove()
    lrm.densify(net)(torch.randn(2, 3, 8, 8))
    assert calls == ["pre", LowRankLinear, "backward", "pre"]


# -- what stays dense


def test_tied_weights_stay_dense_and_tied():
    class LanguageModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(50, 16)
            self.body = nn.Linear(16, 16)
            self.twin = nn.Linear(16, 16)
            self.twin.weight = self.body.weight
            self.free = nn.Linear(16, 16)
            self.head = nn.Linear(16, 50, bias=False)
            self.head.weight = self.embedding.weight

    model = LanguageModel()
    plan = plan_of(model, rank=3)
    assert plan == {
        "body": (None, "its weight is tied to 'twin.weight'"),
        "twin": (None, "its weight is tied to 'body.weight'"),
        "free": (3, ""),
        "head": (None, "its weight is tied to 'embedding.weight'"),
    }
    assert model.head.weight is model.embedding.weight
    assert model.twin.weight is model.body.weight
    plans: list[Plan] = []
    lrm.factorize(LanguageModel(), rank=3, summary=plans.append)
    total = sum(p.numel() for p in LanguageModel().parameters())
    assert plans[0].compression == pytest.approx((256 - (16 + 3 + 16) * 3) / total)


class Loud(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


class Named(nn.Linear):
    pass


def test_subclasses_stay_dense_and_say_so():
    model = nn.Sequential(Loud(16, 16), nn.Linear(16, 16), Named(16, 16))
    plan = plan_of(model, rank=3)
    assert plan["0"] == (None, "a subclass (Loud) with a forward of its own")
    assert plan["2"] == (None, "a subclass (Named), which may have more to it than a Linear")
    assert type(model[0]) is Loud


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        nn.utils.spectral_norm,
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
    ],
)
def test_weights_that_are_computed_stay_dense_and_computed(wrap):
    model = nn.Sequential(wrap(nn.Linear(16, 16)), nn.Linear(16, 16))
    x = torch.randn(3, 16)
    first = model[0]
    plan = plan_of(model.eval(), rank=3)
    assert plan["0"][0] is None
    assert plan["0"][1]
    assert plan["1"] == (3, "")
    assert model[0] is first
    model(x)


def test_lazy_layers_are_refused_by_name_until_they_have_a_shape():
    model = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.Linear(16, 16), nn.LazyConv2d(3, 3))
    with pytest.raises(ValueError, match="layer '0' is lazy and has no shape yet: run a batch"):
        lrm.factorize(model, rank=3)
    assert type(model[2]) is nn.Linear
    assert plan_of(model, rank=3, exclude=["0", "3"]) == {"2": (3, "")}
    model = nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 16))
    model(torch.randn(2, 12))
    assert plan_of(model, rank=3) == {"0": (3, ""), "1": (3, "")}


def test_layers_that_would_not_get_smaller_stay_unless_asked():
    # (m + r + n) r < m n: 8 x 8 is smaller at rank 3 (57) and larger at rank 4 (80).
    sizes = nn.Sequential(nn.Linear(8, 8), nn.Linear(32, 32))
    assert plan_of(copy.deepcopy(sizes), rank=3)["0"] == (3, "")
    plan = plan_of(copy.deepcopy(sizes), rank=4)
    assert plan["0"] == (None, "would not get smaller at rank 4")
    assert plan["1"] == (4, "")
    assert plan_of(copy.deepcopy(sizes), rank=4, keep_larger=True)["0"] == (4, "")
    same = nn.Linear(6, 4)  # at rank 2 exactly as large: 24
    assert plan_of(same, rank=2)[""] == (None, "would not get smaller at rank 2")


@pytest.mark.parametrize("options", [{"include": "blocks.*"}, {"include": ["blocks.a", "*.b"]}])
def test_include_takes_only_what_matches(options):
    plan = plan_of(Net(), rank=4, **options)
    assert {n for n, (rank, _) in plan.items() if rank} == {"blocks.a", "blocks.b"}
    assert plan["head"] == (None, "not included")


def test_exclude_wins_over_include():
    plan = plan_of(Net(), rank=4, include=["blocks.*", "head"], exclude=["*.a"])
    assert {n for n, (rank, _) in plan.items() if rank} == {"blocks.b", "head"}
    assert plan["blocks.a"] == (None, "excluded")
    assert type(lrm.factorize(Net(), rank=4, exclude="head").head) is nn.Linear


# -- transformers


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested")
def test_transformer_encoders_compute_the_same_on_the_fast_path(masked, norm_first, activation):
    layer = nn.TransformerEncoderLayer(
        16, 2, 48, activation=activation, norm_first=norm_first, batch_first=True
    )
    dense = nn.TransformerEncoder(layer, 2).eval()
    for p in dense.parameters():
        nn.init.normal_(p, std=0.3)
    low = lrm.factorize(copy.deepcopy(dense), rank=16, tau=None, keep_larger=True)
    assert isinstance(low.layers[0].linear1, LowRankLinear)
    assert isinstance(low.layers[0].self_attn, LowRankMultiheadAttention)
    x, mask = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    options = {"src_key_padding_mask": mask} if masked else {}
    keep = ~mask if masked else torch.ones_like(mask)
    back = lrm.densify(copy.deepcopy(low))
    with torch.no_grad():
        expected = dense(x, **options)[keep]
        for model in (low, back):
            torch.testing.assert_close(model(x, **options)[keep], expected, rtol=1e-3, atol=1e-4)
    # With gradients torch takes the other path.
    torch.testing.assert_close(low(x, **options)[keep], expected, rtol=1e-3, atol=1e-4)
    # densify gives the fast path back.
    for a, b in zip(back.layers, dense.layers, strict=True):
        assert a.activation_relu_or_gelu == b.activation_relu_or_gelu > 0


def test_a_subclass_of_attention_keeps_the_projection_that_it_reads_itself():
    class Own(nn.MultiheadAttention):
        pass

    plan = plan_of(Own(16, 2), rank=2)
    assert plan == {"out_proj": (None, "Own reads its weight directly")}


# -- errors change nothing


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{"rank": 4}, {"compression": 0.3}, {"energy": 0.5}])
def test_a_weight_that_cannot_be_factorized_is_named_and_nothing_changed(fill, options):
    net = Net()
    nn.init.constant_(net.blocks["b"].weight, fill)
    before = dict(net.named_modules())
    if fill == 0.0 and "energy" in options:  # of nothing every rank keeps too little
        assert type(lrm.factorize(net, **options).blocks["b"]) is nn.Linear
        return
    with pytest.raises(ValueError, match=r"layer 'blocks\.b' cannot"):
        lrm.factorize(net, tau=0.1, **options)
    assert dict(net.named_modules()) == before
    assert is_dense(net)


@pytest.mark.parametrize("name", ["0", "1.k_proj", "1.out_proj"])
def test_a_zero_weight_is_named_with_the_way_to_leave_it_out(name):
    net = nn.Sequential(nn.Linear(16, 16), nn.MultiheadAttention(16, 2), nn.Linear(16, 80))
    zero = {"0": net[0].weight, "1.k_proj": net[1].in_proj_weight[16:32]}
    nn.init.zeros_(zero.get(name, net[1].out_proj.weight))
    words = f"layer '{name}' cannot .* W must not be zero.*; exclude='{name}' leaves it dense"
    with pytest.raises(ValueError, match=words):
        lrm.factorize(net, rank=4)
    assert type(net[1]) is nn.MultiheadAttention
    lrm.factorize(net, rank=4, exclude=name)
    assert type(net.get_submodule(name)) is nn.Linear
    assert len([m for m in net.modules() if isinstance(m, LowRankLayer)]) == 5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 3, "compression": 0.5},
        {"rank": 0},
        {"rank": 0.0},
        {"rank": 1.5},
        {"rank": {"head": 3, "nothing": 2}},
        {"compression": 0.0},
        {"compression": 1.0},
        {"compression": 0.999},
        {"energy": 0.0},
        {"energy": 1.1},
        {"rank": 3, "include": "nothing"},
        {"rank": 3, "exclude": ["head", "blocks"]},
        {"rank": 3, "tau": -1.0},
        {"rank": 3, "init": "zeros"},
    ],
)
def test_bad_options_raise_and_change_nothing(options):
    net = Net()
    before = dict(net.named_modules())
    with pytest.raises(ValueError, match=r"must|cannot|matches no layer"):
        lrm.factorize(net, **options)
    assert dict(net.named_modules()) == before


@pytest.mark.parametrize("rank", [True, "3", None, [3], {"head": "3"}])
def test_ranks_of_a_wrong_type_raise(rank):
    with pytest.raises((TypeError, ValueError), match="rank"):
        lrm.factorize(Net(), rank=rank)


def test_an_error_of_the_summary_changes_nothing():
    net = Net()
    with pytest.raises(ZeroDivisionError):
        lrm.factorize(net, rank=3, summary=lambda plan: 1 / 0)
    assert is_dense(net)


def test_the_plan_is_logged_and_reads_as_a_table(caplog):
    with caplog.at_level(logging.INFO, logger="lrmanifold"):
        lrm.factorize(Net(), rank=4, exclude="head")
    for word in ("features.0", "24 x 27", "excluded", "whole model", "%"):
        assert word in caplog.text


def test_models_without_storage_are_factorized():
    with torch.device("meta"):
        net = Net()
    lrm.factorize(net, rank=4)
    assert net.head.weight.is_meta
    assert net.head.weight.manifold is net.head.manifold
    net.to_empty(device="cpu").load_state_dict(lrm.factorize(Net(), rank=4).state_dict())
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("how", [{"rank": 0.4}, {"compression": 0.4}, {"energy": 0.9}])
def test_ranks_can_be_rounded_to_a_multiple(how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 90), nn.ReLU(), nn.Linear(90, 70), nn.Linear(70, 10))
    lrm.factorize(model, rank_multiple=16, **how)
    ranks = [m.rank for m in model if isinstance(m, lrm.nn.LowRankLinear)]
    assert ranks
    assert all(r % 16 == 0 or r <= 10 for r in ranks)


@pytest.mark.parametrize("multiple", [0, -4])
def test_rank_multiples_that_are_none_raise(multiple):
    with pytest.raises(ValueError, match="rank_multiple must be an integer >= 1"):
        lrm.factorize(nn.Sequential(nn.Linear(9, 9)), rank=2, rank_multiple=multiple)
