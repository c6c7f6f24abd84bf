"""What belonged to a layer is there after a conversion, or the layer is left alone and named."""

from __future__ import annotations

import copy

import pytest
import torch
from dense_cases import EXACT, low_rank_conv, low_rank_dense, plan_of
from torch import nn
from torch.nn.utils import parametrizations, prune

import lrmanifold as lrm
from lrmanifold.nn import LowRankAdapter, LowRankConv2d, LowRankLayer, LowRankLinear


def both_ways(model: nn.Module, x: torch.Tensor) -> None:
    """Factorized, then densified or folded, the model computes what it did."""
    expected = model(x)
    low = lrm.factorize(copy.deepcopy(model), rank=2, tau=None, keep_larger=True)
    assert any(isinstance(m, LowRankLayer) for m in low.modules())
    torch.testing.assert_close(low(x), expected, **EXACT)
    for back in (lrm.densify, lrm.fold):
        other = back(copy.deepcopy(low))
        torch.testing.assert_close(other(x), expected, **EXACT)


# -- ties


def test_tied_biases_stay_tied_in_every_conversion():
    a, b = low_rank_dense(), low_rank_dense(12, 12)
    b.bias = a.bias
    head = nn.Module()
    head.bias = b.bias  # as BERT's head does
    model = nn.ModuleDict({"a": a, "b": b, "head": head})
    shared = a.bias
    for convert in (
        lambda m: lrm.factorize(m, rank=2, tau=None),
        lrm.densify,
        lambda m: lrm.factorize(m, rank=2, tau=None),
        lrm.fold,
    ):
        model = convert(model)
        assert model["a"].bias is model["b"].bias is model["head"].bias is shared


def test_biases_that_share_memory_go_on_sharing_it():
    a, b = low_rank_dense(), low_rank_dense()
    b.bias = nn.Parameter(a.bias.data[:])
    model = lrm.factorize(nn.ModuleList([a, b]), rank=2, tau=None)
    assert all(isinstance(m, LowRankLinear) for m in model)
    with torch.no_grad():
        model[0].bias.fill_(3.0)
    assert bool((model[1].bias == 3.0).all())


@pytest.mark.parametrize("back", [lrm.densify, lrm.fold])
def test_tied_low_rank_weights_are_tied_afterwards(back):
    model = nn.Sequential(LowRankLinear(8, 8, 3), nn.Tanh(), LowRankLinear(8, 8, 3)).double()
    model[2].weight = model[0].weight
    x = torch.randn(3, 8).double()
    expected, count = model(x), len(list(model.parameters()))
    model = back(model)
    torch.testing.assert_close(model(x), expected, **EXACT)
    one, other = ([p for n, p in model[i].named_parameters() if "weight" in n] for i in (0, 2))
    assert all(p is q for p, q in zip(one, other, strict=True))
    assert len(list(model.parameters())) == count + (back is lrm.fold)


@pytest.mark.parametrize("back", [lrm.densify, lrm.fold])
def test_low_rank_weights_that_only_share_memory_are_left_alone_and_named(back):
    model = nn.Sequential(LowRankLinear(8, 8, 3), LowRankLinear(8, 8, 3), LowRankLinear(8, 8, 3))
    model[1].weight.data = model[0].weight.data
    with pytest.warns(
        UserWarning, match=r"left alone 0: its weight shares memory with '1\.weight'"
    ):
        back(model)
    assert [isinstance(m, LowRankLinear) for m in model] == [True, True, False]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dense_weights_that_share_memory_without_being_one_stay_dense(device):
    with torch.device(device):
        flat = torch.randn(300)
        model = nn.ModuleDict({k: nn.Linear(10, 10) for k in ("a", "b", "c", "d")})
    model["b"].weight = nn.Parameter(model["a"].weight.data)
    model["c"].weight = nn.Parameter(flat[:100].view(10, 10))
    model["d"].weight = nn.Parameter(flat[100:200].view(10, 10))  # beside it, no tie
    assert plan_of(model) == {
        "a": "its weight is tied to 'b.weight'",
        "b": "its weight is tied to 'a.weight'",
        "c": "",
        "d": "",
    }


def test_an_adapter_of_a_tied_weight_is_not_merged_behind_the_others_back():
    embedding, head = nn.Embedding(12, 10), nn.Linear(10, 12, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": LowRankAdapter(head, 2)})
    with pytest.warns(UserWarning, match=r"head: the weight it adapts is tied to 'embedding"):
        lrm.densify(model)
    assert isinstance(model["head"], LowRankAdapter)
    assert model["head"].base_weight is embedding.weight


# -- hooks, and what they use


def scaled(module: nn.Module) -> nn.Module:
    module.register_buffer("scale", torch.tensor(3.0, dtype=torch.float64))
    module.calls = []

    def hook(m, args):
        m.calls.append(1)
        return (args[0] * m.scale,)

    module.register_forward_pre_hook(hook)
    return module


@pytest.mark.parametrize("make", [low_rank_dense, low_rank_conv])
def test_hooks_find_their_buffers_and_attributes(make):
    layer = scaled(make())
    x = torch.randn(2, *((10,) if isinstance(layer, nn.Linear) else (4, 5, 5))).double()
    both_ways(nn.Sequential(layer), x)
    low = lrm.factorize(layer, rank=2, tau=None, keep_larger=True)
    assert "scale" in low.state_dict()
    low.scale.fill_(0.0)
    torch.testing.assert_close(low(x), low(0 * x))


@pytest.mark.parametrize("make", [low_rank_dense, low_rank_conv])
def test_a_pruned_bias_is_carried_over(make):
    layer = prune.l1_unstructured(make(), "bias", 0.5)
    x = torch.randn(2, *((10,) if isinstance(layer, nn.Linear) else (4, 5, 5))).double()
    expected = layer(x)
    low = lrm.factorize(nn.Sequential(layer), rank=2, tau=None, keep_larger=True)
    torch.testing.assert_close(low(x), expected, **EXACT)
    assert {"0.bias_orig", "0.bias_mask"} <= set(low.state_dict())
    low(x).sum().backward()
    assert low[0].bias_orig.grad is layer.bias_orig.grad is not None
    with pytest.warns(UserWarning, match="left alone 0: its weight or bias is computed by a hook"):
        lrm.fold(low)
    torch.testing.assert_close(low(x), expected, **EXACT)
    dense = lrm.densify(low)
    torch.testing.assert_close(dense(x), expected, **EXACT)
    prune.remove(dense[0], "bias")
    torch.testing.assert_close(dense(x), expected, **EXACT)


WEIGHT_TAKERS = {
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own parametrization": lambda m: nn.utils.parametrize.register_parametrization(
        m, "weight", nn.Identity()
    ),
}


@pytest.fixture(params=list(WEIGHT_TAKERS))
def take_weight(request):
    return WEIGHT_TAKERS[request.param]


pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")


@pytest.mark.parametrize("make", [low_rank_dense, low_rank_conv])
def test_computed_weights_stay_dense_and_work(make, take_weight):
    model = nn.Sequential(take_weight(make())).eval()
    x = torch.randn(2, *((10,) if isinstance(model[0], nn.Linear) else (4, 5, 5))).double()
    expected = model(x)
    with pytest.warns(UserWarning, match="factorize replaced no layer"):
        (reason,) = plan_of(model).values()
    assert "computed" in reason
    torch.testing.assert_close(model(x), expected, **EXACT)


def test_a_parametrized_bias_keeps_its_layer_as_it_is():
    for layer in (low_rank_dense(), LowRankLinear(10, 12, 3, dtype=torch.float64)):
        model = nn.Sequential(layer, LowRankLinear(12, 4, 2, dtype=torch.float64))
        nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Tanh())
        x = torch.randn(3, 10).double()
        expected = model(x)
        if isinstance(layer, LowRankLinear):
            with pytest.warns(UserWarning, match="left alone 0: parametrized: its bias"):
                lrm.densify(model)
        else:
            with pytest.warns(UserWarning, match="0: parametrized: its bias"):
                plan_of(model)
        torch.testing.assert_close(model(x), expected, **EXACT)


def test_hooks_of_the_state_dict_go_with_their_layer():
    model = nn.Sequential(low_rank_dense())
    seen = []
    model[0].register_load_state_dict_pre_hook(lambda m, *a: seen.append(m))
    model[0].register_load_state_dict_post_hook(lambda m, keys: seen.append(m))
    model[0].register_state_dict_pre_hook(lambda m, *a: seen.append(m))
    for convert in (lambda m: lrm.factorize(m, rank=2), lrm.densify):
        convert(model)
        seen.clear()
        model.load_state_dict(model.state_dict())
        assert len(seen) == 3
        assert all(m is model[0] for m in seen)


# -- refusals leave everything as it was


def snapshot(module: nn.Module) -> dict:
    state = {k: v.detach().clone() for k, v in module.state_dict().items()}
    return {
        "class": type(module),
        "parameters": [(n, id(p), p.requires_grad) for n, p in module.named_parameters()],
        "names": sorted(vars(module)),
        "hooks": len(module._forward_pre_hooks) + len(module._load_state_dict_pre_hooks),
        "state": state,
    }


def assert_as_before(module: nn.Module, before: dict) -> None:
    now = snapshot(module)
    state = before["state"]
    assert {k: v for k, v in now.items() if k != "state"} == {
        k: v for k, v in before.items() if k != "state"
    }
    assert all(torch.equal(now["state"][k], state[k]) for k in state)


@pytest.mark.parametrize("kind", ["linear", "convolution", "adapter"])
def test_a_layer_that_refuses_to_give_its_weight_is_as_it_was(kind, take_weight):
    layer = {
        "linear": lambda: LowRankLinear(10, 12, 3),
        "convolution": lambda: LowRankConv2d(4, 6, 3, 2),
        "adapter": lambda: LowRankAdapter(nn.Linear(10, 12), 3),
    }[kind]()
    before = snapshot(layer)
    with pytest.raises((RuntimeError, TypeError), match=r"weight|Creating a Parameter"):
        take_weight(layer)
    assert_as_before(layer, before)


def test_an_adapter_refuses_a_computed_weight_before_it_freezes_it(take_weight):
    layer = take_weight(low_rank_dense()).eval()
    before = snapshot(layer)
    with pytest.raises(ValueError, match="dense must be a plain Linear with a weight of its own"):
        LowRankAdapter(layer, 2)
    assert_as_before(layer, before)


def test_an_adapter_takes_over_hooks_and_a_pruned_bias():
    layer = scaled(prune.l1_unstructured(low_rank_dense(), "bias", 0.5))
    x = torch.randn(3, 10).double()
    expected = layer(x)
    adapter = LowRankAdapter(layer, 2)
    torch.testing.assert_close(adapter(x), expected, rtol=0, atol=0)
    model = lrm.densify(nn.Sequential(adapter))
    torch.testing.assert_close(model(x), expected, **EXACT)


class Listed(nn.Module):
    """Calls its layers through a list that is no ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        self.order = [self.first]


def test_layers_that_a_plain_list_holds_too_stay_dense():
    assert plan_of(Listed()) == {
        "first": "Listed.order refers to it too, outside of the module tree",
        "second": "",
    }


def test_forwards_replaced_on_the_object_and_compiled_layers_stay():
    model = nn.Sequential(low_rank_dense(), low_rank_dense(10, 12), nn.Linear(10, 10).double())
    model[0].forward = lambda x: x
    model[1].compile(backend="eager")
    outer = nn.Sequential(model, torch.compile(low_rank_dense(10, 10), backend="eager"))
    plan = plan_of(outer)
    assert plan["0.0"] == "its forward was replaced on the object"
    assert plan["0.1"] == plan["1._orig_mod"] == "it is compiled: convert first, then compile"
    assert plan["0.2"] == ""


class Rectified(LowRankLinear):
    def forward(self, x):
        return super().forward(x).relu()


class DenseRectified(Rectified):
    def to_dense(self):
        return nn.Sequential(super().to_dense(), nn.ReLU())


class RectifiedAdapter(LowRankAdapter):
    def forward(self, x):
        return super().forward(x).relu()


class Labelled(LowRankLinear):
    label = "no other function"


@pytest.mark.parametrize("back", [lrm.densify, lrm.fold])
@pytest.mark.parametrize(
    ("make", "stays"),
    [
        (lambda: Rectified(12, 12, 3), {"densify", "fold"}),
        (lambda: RectifiedAdapter(low_rank_dense(12, 12), 3), {"densify", "fold"}),
        (lambda: DenseRectified(12, 12, 3), {"fold"}),
        (lambda: Labelled(12, 12, 3), set()),
    ],
    ids=["forward", "adapter", "forward-and-to_dense", "neither"],
)
def test_a_subclass_is_converted_only_by_what_knows_its_function(make, stays, back):
    model = nn.Sequential(LowRankLinear(12, 12, 3), make()).double()
    x = torch.randn(4, 12).double()
    expected, kind = model(x), type(model[1])
    if back.__name__ in stays:
        with pytest.warns(UserWarning, match=r"left alone 1: a subclass \(.*own$"):
            back(model)
        assert type(model[1]) is kind
    else:
        back(model)
        assert not isinstance(model[1], LowRankLayer)
    assert not isinstance(model[0], LowRankLayer)
    torch.testing.assert_close(model(x), expected, **EXACT)


@pytest.mark.parametrize(
    "convert",
    [lambda m: lrm.factorize(m, rank=2), lrm.densify, lrm.fold],
    ids=["factorize", "densify", "fold"],
)
def test_scripted_models_are_refused(convert):
    with pytest.raises(ValueError, match="model must be an ordinary module, got a Recursive"):
        convert(torch.jit.script(nn.Sequential(nn.Linear(10, 10))))


# -- no work, said


class Hidden(nn.Module):
    """A weight that no class of torch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 30))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Hidden(), r"1 x Hidden \(300 weights\)"),
        (nn.LSTM(3, 4), r"1 x LSTM \(112 weights\)"),
        (nn.Embedding(9, 8), r"1 x Embedding \(72 weights\)"),
        (nn.Bilinear(2, 3, 4), r"1 x Bilinear \(24 weights\)"),
        (nn.ConvTranspose2d(2, 3, 2), r"\(model\): would not get smaller at rank 2"),
        (nn.MultiheadAttention(4, 2), r"q_proj: would not get smaller at rank 2"),
        (LowRankLinear(9, 8, 2), r"1 x LowRankLinear, low-rank already: densify it first"),
        (nn.Sequential(torch.jit.script(nn.Linear(3, 4))), r"1 x Linear, scripted \(12 weights\)"),
        (nn.ReLU(), "it holds no weights"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_conversion_that_finds_nothing_says_what_it_saw(model, words):
    with pytest.warns(UserWarning, match=f"factorize replaced no layer.*{words}"):
        lrm.factorize(model, rank=2)


@pytest.mark.parametrize("convert", [lrm.densify, lrm.fold])
def test_conversions_back_say_so_where_there_is_nothing_to_do(convert):
    with pytest.warns(UserWarning, match=f"{convert.__name__} found no low-rank layer"):
        convert(nn.Sequential(nn.Linear(3, 4)))


# -- what hangs on a weight


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_weights_with_hooks_stay_and_their_hooks_run(register):
    calls: list[str] = []
    model = nn.Sequential(
        nn.Linear(12, 12), nn.Linear(12, 12), nn.MultiheadAttention(12, 2), LowRankLinear(12, 12, 3)
    )
    for name, weight in (
        ("dense", model[0].weight),
        ("attention", model[2].in_proj_weight),
        ("low", model[3].weight),
    ):
        getattr(weight, register)(lambda *_, name=name: calls.append(name))
    plan = plan_of(model)
    assert plan["0"].startswith("its weight has hooks")
    assert plan["2.q_proj"].startswith("its weight has hooks")
    assert plan["1"] == ""
    with pytest.warns(UserWarning, match="densify left alone 3: its weight has hooks"):
        lrm.densify(model)
    x = model[1](model[0](torch.randn(3, 1, 12)))
    model[3](model[2](x, x, x)[0]).sum().backward()
    assert sorted(calls) == ["attention", "dense", "low"]


def test_marks_on_a_weight_go_on_in_every_conversion():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(12, 12),
            "conv": nn.Conv2d(4, 6, 3),
            "attention": nn.MultiheadAttention(12, 2),
            "apart": nn.MultiheadAttention(12, 2, kdim=8),
            "table": nn.Embedding(20, 12),
        }
    )

    def weights(m: nn.Module) -> list[nn.Parameter]:
        return [p for name, p in m.named_parameters() if "bias" not in name]

    for i, p in enumerate(weights(model)):
        p.no_weight_decay, p.group = True, i
    rank = {"*": 2}
    for convert in (
        lambda m: lrm.factorize(m, rank=rank, include=["*", "table"], keep_larger=True),
        lrm.densify,
        lambda m: lrm.factorize(m, rank=rank, include=["*", "table"], keep_larger=True),
        lrm.fold,
    ):
        before = len(list(model.modules()))
        convert(model)
        assert len(list(model.modules())) != before  # attentions get projections, pairs two layers
        assert all(p.no_weight_decay for p in weights(model))
    assert {p.group for p in model["table"].parameters()} == {8}
    adapter = LowRankAdapter(model_of_mark(), 2)
    assert adapter.merge().weight.no_weight_decay
    adapted = lrm.nn.adapt(nn.Sequential(model_of_mark(), nn.Linear(12, 3)), 2)
    assert lrm.densify(adapted)[0].weight.no_weight_decay


def model_of_mark() -> nn.Linear:
    layer = nn.Linear(12, 12)
    layer.weight.no_weight_decay = True
    return layer


def test_a_weight_with_a_tensor_of_its_entries_stays_dense():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model[0].weight.main_grad = torch.zeros(12, 12)
    assert plan_of(model) == {"0": "its weight has tensors as attributes: 'main_grad'", "1": ""}
