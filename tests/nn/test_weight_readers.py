"""Code that reads ``layer.weight`` instead of calling the layer gets the matrix, or stays dense."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from dense_cases import EXACT, low_rank_dense, plan_of
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankAdapter, LowRankConv2d, LowRankLinear


def encoder(where: str, kind: str) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    for block in model.layers:
        dense = getattr(block, where)
        if kind == "adapter":
            new = LowRankAdapter(dense, 4)
            with torch.no_grad():
                new.update.weight.copy_(new.update.manifold.random())
        elif kind == "folded":
            new = lrm.fold(LowRankLinear.from_dense(dense, 4))
        elif kind == "factorized":
            continue
        setattr(block, where, new)
    return lrm.factorize(model, rank=4, include=f"*.{where}") if kind == "factorized" else model


@pytest.mark.parametrize("where", ["linear1", "linear2"])
@pytest.mark.parametrize("kind", ["adapter", "folded", "factorized"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:enable_nested")
def test_transformers_compute_the_same_in_train_and_eval(where, kind, masked):
    model = encoder(where, kind)
    x, mask = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    options = {"src_key_padding_mask": mask} if masked else {}
    keep = ~mask if masked else torch.ones_like(mask)
    expected = model.train()(x, **options).detach()
    model.eval()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x, **options)[keep], expected[keep], rtol=0, atol=2e-6)


def test_an_adapted_output_projection_of_attention_acts_and_learns():
    attention = nn.MultiheadAttention(16, 2, batch_first=True).double()
    x = torch.randn(2, 5, 16).double()
    before = attention(x, x, x)[0]
    adapter = LowRankAdapter(attention.out_proj, 4)
    attention.out_proj = adapter
    torch.testing.assert_close(attention(x, x, x)[0], before, rtol=0, atol=0)
    with torch.no_grad():
        adapter.update.weight.copy_(adapter.update.manifold.random(dtype=torch.float64))
    moved = attention(x, x, x)[0]
    assert float((moved - before).detach().abs().max()) > 1e-2
    moved.square().sum().backward()
    assert float(adapter.update.weight.grad.abs().max()) > 0
    assert adapter.base_weight.grad is None
    attention.out_proj = adapter.merge()
    torch.testing.assert_close(attention(x, x, x)[0], moved, **EXACT)


@pytest.mark.parametrize("gradient", ["factors", "probe"])
def test_the_weight_of_an_adapter_is_differentiable_as_its_output_is(gradient):
    adapter = LowRankAdapter(low_rank_dense(), 3, gradient=gradient)
    with torch.no_grad():
        adapter.update.weight.copy_(adapter.update.manifold.random(dtype=torch.float64))
    x = torch.randn(7, 10).double()
    assert adapter.weight.shape == (12, 10)
    wanted = list(adapter.update.parameters())
    one = torch.nn.functional.linear(x, adapter.weight, adapter.bias)
    torch.testing.assert_close(one, adapter(x), **EXACT)
    grads = [torch.autograd.grad(y.square().sum(), wanted)[0] for y in (one, adapter(x))]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "layer",
    [
        LowRankLinear(10, 12, 3, dtype=torch.float64),
        LowRankConv2d(4, 6, 3, 2, 2, 1, 1, 2, dtype=torch.float64),
    ],
    ids=["linear", "grouped convolution"],
)
def test_folded_layers_answer_for_the_dense_layer(layer):
    folded, dense = lrm.fold(layer), layer.to_dense()
    torch.testing.assert_close(folded.weight, dense.weight, **EXACT)
    assert folded.bias is layer.bias
    for name in ("in_features", "out_features", "in_channels", "kernel_size", "stride", "groups"):
        assert getattr(folded, name, None) == getattr(dense, name, None)
    folded.weight.sum().backward()
    assert all(part.weight.grad is not None for part in folded)
    plain = nn.Sequential(*copy.deepcopy(list(folded)))
    plain.load_state_dict(folded.state_dict())


class Windows(nn.Module):
    """Reads a projection's weight in a method that its forward calls, as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"proj": nn.Linear(10, 10)})
        self.qkv, self.other, self.start = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10)

    def reset(self) -> None:
        nn.init.zeros_(self.start.weight)  # no forward pass comes here

    def attend(self, x):
        return nn.functional.linear(x, self.qkv.weight) + self.start(x)

    def forward(self, x):
        if isinstance(self.other.weight, torch.Tensor) and self.other.weight.dtype != torch.int8:
            x = x.to(self.other.weight.dtype)  # as in T5
        return self.attend(x) + self.other(x)


def test_weights_that_a_forward_pass_reads_stay_dense():
    plan = plan_of(Windows())
    assert plan["qkv"] == "Windows reads its weight directly"
    assert plan["start"] == plan["other"] == plan["inner.proj"] == ""


def test_weights_that_a_hook_reads_stay_dense():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * module.weight.norm(),))
    model[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert plan_of(model) == {"0": "a hook reads its weight directly", "1": ""}


class Normed(nn.Module):
    """Divides by the norm of a weight; where it reads that, the classes below say."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.other = nn.Linear(10, 10), nn.Linear(10, 10)
        self.steps = nn.ModuleList([nn.Linear(10, 10), nn.Linear(10, 10)])

    def forward(self, x):
        return self.other(self.proj(x)) / self.proj.weight.norm()


class BySuper(Normed):
    def forward(self, x):
        return 2 * super().forward(x)


class ByTheClass(Normed):
    def forward(self, x):
        return 2 * Normed.forward(self, x)


class InnerFunction(Normed):
    def forward(self, x):
        def scale():
            return self.proj.weight.norm()

        return self.other(self.proj(x)) / scale()


class CapturedSelf(Normed):
    def forward(self, x):
        scale = self.proj.weight.norm()
        return (lambda y: self.other(y))(x) / scale


class Generator(Normed):
    def forward(self, x):
        return self.other(x) / sum(self.proj.weight[i].norm() for i in range(10))


class Property(Normed):
    @property
    def scale(self):
        return self.proj.weight.norm()

    def forward(self, x):
        return self.other(self.proj(x)) / self.scale


class CachedProperty(Normed):
    @functools.cached_property
    def scale(self):
        return self.proj.weight.norm()

    def forward(self, x):
        return self.other(self.proj(x)) / self.scale


class LocalName(Normed):
    def forward(self, x):
        layer = self.proj
        return self.other(x) / layer.weight.norm()


class Call(Normed):
    forward = None

    def __call__(self, x):
        return self.other(x) / self.proj.weight.norm()


@pytest.mark.parametrize(
    "kind",
    [
        BySuper,
        ByTheClass,
        InnerFunction,
        CapturedSelf,
        Generator,
        Property,
        CachedProperty,
        LocalName,
        Call,
    ],
)
def test_weights_are_found_wherever_a_forward_pass_comes_by(kind):
    plan = plan_of(kind())
    assert plan["proj"].endswith(" reads its weight directly")
    assert plan["other"] == ""


class Overridden(Normed):
    def forward(self, x):
        return self.other(self.proj(x))


def test_a_method_that_is_never_called_reads_nothing():
    assert plan_of(Overridden())["proj"] == ""


class ByIndex(Normed):
    def forward(self, x):
        return self.steps[1](self.steps[0](x)) / self.steps[-1].weight.norm()


def test_a_weight_read_from_a_numbered_layer_stays_dense():
    plan = plan_of(ByIndex())
    assert plan["steps.1"] == "ByIndex reads its weight directly"
    assert plan["steps.0"] == ""


class MethodOfAPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"windows": Windows()})

    def forward(self, x):
        return self.inner["windows"].attend(x)


class Inert(Windows):
    def forward(self, x):
        return x


def test_a_method_of_another_module_is_followed():
    model = MethodOfAPart()
    model.inner["windows"] = Inert()
    plan = plan_of(model)
    assert plan["inner.windows.qkv"] == "Inert reads its weight directly"
    assert plan["inner.windows.start"] == ""


# -- hooks that reach other layers


def clip_first(module, args):
    module[0].weight.data.clamp_(-0.5, 0.5)


def clip_all(module, args):
    for layer in module:
        layer.weight.data.clamp_(-0.5, 0.5)


def clip(layer, module, args):
    layer.weight.data.clamp_(-0.5, 0.5)


class Clipper:
    def __init__(self, model) -> None:
        self.model = model

    def __call__(self, module, args):
        self.model[0].weight.data.clamp_(-0.5, 0.5)

    def hook(self, module, args):
        self(module, self.model[0].weight)


READS = "a hook reads its weight directly"


@pytest.mark.parametrize(
    ("make", "stays"),
    [
        (lambda model: clip_first, ["0"]),
        (lambda model: lambda module, args: clip_first(model, model[0].weight), ["0"]),
        (lambda model: functools.partial(clip, model[0]), ["0"]),
        (lambda model: Clipper(model), ["0"]),
        (lambda model: Clipper(model).hook, ["0"]),
        (lambda model: clip_all, ["0", "1"]),
        (lambda model: lambda module, args: None, []),
    ],
    ids=["child", "closure", "partial", "callable", "method", "loop", "nothing"],
)
def test_hooks_keep_the_layers_dense_whose_weights_they_write(make, stays):
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    model.register_forward_pre_hook(make(model))
    plan = plan_of(model)
    assert [name for name, reason in plan.items() if reason == READS] == stays


class OwnHook(nn.Module):
    """Registers a method of its own on a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.other = nn.Linear(10, 10), nn.Linear(10, 10)
        self.proj.register_forward_hook(self.scaled)

    def scaled(self, module, args, output):
        return output * self.norm()

    def norm(self):
        return self.other.weight.norm()

    def forward(self, x):
        return self.other(self.proj(x))


def test_a_hook_that_is_a_method_of_a_module_is_followed():
    assert plan_of(OwnHook()) == {"proj": "", "other": "OwnHook reads its weight directly"}


# -- readers of what only a low-rank layer has


class Orthogonal(nn.Module):
    """x V Vᵀ, with what only low-rank layers have."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.low = name, LowRankLinear(12, 12, 3, tau=0.0)

    def forward(self, x):
        return self.low(x)


class OfFactors(Orthogonal):
    def forward(self, x):
        return self.low(x) + self.low.factors.U.sum()


class OfV(Orthogonal):
    def forward(self, x):
        return x @ self.low.V @ self.low.V.mT


class OfSigma(Orthogonal):
    def forward(self, x):
        return self.low(x) / self.low.sigma_max()


class OfAlpha(Orthogonal):
    def forward(self, x):
        return self.low(x) / self.low.alpha


class OfTheMatrix(Orthogonal):
    def forward(self, x):
        return x @ self.low.dense_weight()


class OfTheManifold(Orthogonal):
    def forward(self, x):
        return self.low(x) * self.low.manifold.rank


class ByAHook(Orthogonal):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.low.register_forward_hook(lambda module, args, y: y / module.sigma_max())


READERS = {
    OfFactors: "factors",
    OfV: "V",
    OfSigma: "sigma_max",
    OfAlpha: "alpha",
    OfTheMatrix: "dense_weight",
    OfTheManifold: "manifold",
    ByAHook: "sigma_max",
}


@pytest.mark.parametrize("back", [lrm.densify, lrm.fold])
@pytest.mark.parametrize("kind", list(READERS))
def test_low_rank_layers_whose_factors_are_read_stay_and_are_named(kind, back):
    model = nn.Sequential(kind("low"), LowRankLinear(12, 12, 3))
    x = torch.randn(4, 12)
    expected = model(x)
    with pytest.warns(UserWarning, match=rf"left alone 0\.low: .* reads its {READERS[kind]} dir"):
        back(model)
    assert not isinstance(model[1], LowRankLinear)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("back", [lrm.densify, lrm.fold])
def test_a_convex_potential_goes_on_to_compute(back):
    model = nn.Sequential(lrm.nn.ConvexPotential(12, 3), LowRankLinear(12, 12, 3))
    x = torch.randn(4, 12)
    expected = model(x)
    with pytest.warns(UserWarning, match=r"left alone 0\.layer: ConvexPotential reads its factors"):
        back(model)
    torch.testing.assert_close(model(x), expected)
    assert not isinstance(model[1], LowRankLinear)


class OfTheProjection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = lrm.nn.LowRankMultiheadAttention(16, 2, 3, batch_first=True)

    def forward(self, x):
        return self.attention.q_proj(x)


def test_an_attention_whose_projection_is_called_keeps_it():
    model = OfTheProjection()
    x = torch.randn(2, 5, 16)
    expected = model(x)
    lrm.densify(model)
    assert not any(isinstance(m, LowRankLinear) for m in model.modules())
    torch.testing.assert_close(model(x), expected)
