"""What a forward does is followed or refused; nothing is left out in silence."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import lrmanifold as lrm
from lrmanifold import certify
from lrmanifold.certify import bounds as registry
from lrmanifold.certify._trace import float64_copy
from lrmanifold.experiments.training import Normalized
from lrmanifold.nn import LowRankAdapter, LowRankLinear, MaxMin, Residual


class Doubles(nn.Module):
    """Calls a function after its layer; the tree of modules does not show it."""

    def __init__(self, times=2.0):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.times = times

    def forward(self, x):
        return self.times * self.layer(x)


def total(model, shape=(4,)):
    return certify.lipschitz(model, shape).total


def jacobian_norm(model, shape=(4,)):
    model = copy.deepcopy(model).double().eval()
    x = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    J = torch.func.jacrev(lambda v: model(v).flatten())(x)
    return float(torch.linalg.matrix_norm(J.flatten(1), 2))


def test_functions_around_modules_are_counted():
    torch.manual_seed(0)
    model = Doubles()
    assert total(model) == pytest.approx(jacobian_norm(model), rel=1e-6)
    before, model.times = total(model), -5.0
    assert total(model) == pytest.approx(2.5 * before, rel=1e-9)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.a(x) + self.b(x)
        z = torch.cat((y, x), dim=1)
        return z.reshape(z.size(0), -1) - 1.0


def test_sums_and_joined_values_are_counted():
    torch.manual_seed(0)
    model = Sum()
    a, b = (float(torch.linalg.matrix_norm(m.weight.detach(), 2)) for m in (model.a, model.b))
    assert total(model) == pytest.approx(((a + b) ** 2 + 1) ** 0.5, rel=1e-6)
    assert total(model) >= jacobian_norm(model)


def test_functional_activations_and_pooling_are_those_of_the_modules():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, padding=1)
            self.fc = nn.Linear(12, 5)

        def forward(self, x):
            x = F.max_pool2d(F.leaky_relu(self.conv(x), 0.2), 3, stride=2)
            x = F.dropout(F.gelu(x), 0.3, self.training)
            x = F.adaptive_avg_pool2d(x, 2)
            return torch.tanh(self.fc(torch.flatten(x, 1)))

    torch.manual_seed(0)
    a = Functional()
    b = nn.Sequential(
        a.conv, nn.LeakyReLU(0.2), nn.MaxPool2d(3, 2), nn.GELU(), nn.Dropout(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), a.fc, nn.Tanh(),
    )  # fmt: skip
    assert total(a, (1, 9, 9)) == pytest.approx(total(b, (1, 9, 9)), rel=1e-12)


def test_normalisation_counts_in_the_unit_of_the_images(device):
    class Data:
        mean, std = (0.5,), (0.25,)

    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    model = Normalized(network, Data).to(device)
    x = torch.rand(3, 1, 2, 2, device=device)
    report = certify.lipschitz(model, (1, 2, 2))
    assert report.total == pytest.approx(4 * total(network.cpu(), (1, 2, 2)), rel=1e-6)
    model.to(device)
    inside = certify.radius(network.to(device), (x - 0.5) / 0.25)
    assert torch.allclose(certify.radius(model, x, bound=report), inside / 4, rtol=1e-4)


def hidden_branch(x):
    return x.sum() > 0


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if hidden_branch(x) else 9 * self.fc(x)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        h = self.fc(x)
        h.add_(100 * x)  # changes h, though nothing reads what add_ returns
        return h


class InPlaceThroughAView(nn.Module):
    def forward(self, x):
        h = 2 * x
        h.view(h.size(0), -1).mul_(50)
        return h


class MixesSamples(nn.Module):
    def forward(self, x):
        return x + x.flip(0)


class TwoAtATime(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)


class Random(nn.Module):
    def forward(self, x):
        return x + torch.randn(4)


class FromTheBatch(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1)


class ShapeAsNumber(nn.Module):
    def forward(self, x):
        return x * x.shape[1]


class Product(nn.Module):
    def forward(self, x):
        return x * x


class ReadsAWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(x, self.fc.weight)


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x, 2 * x


class Repeats(nn.Module):
    """A constant that broadcasts makes many of one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(5, 4))

    def forward(self, x):
        return x.unsqueeze(1) + self.shift


class OtherLinear(nn.Linear):
    def forward(self, x):
        return 7 * super().forward(x)


class Dropping(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


def hooked():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[0].register_forward_hook(lambda m, args, out: 3 * out)
    return model


def overridden():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: 5 * x
    return nn.Sequential(layer)


def compiled():
    return torch.compile(nn.Linear(4, 4), backend="eager")


REFUSED = [
    (compiled, r"OptimizedModule.*model\._orig_mod"),
    (lambda: nn.DataParallel(nn.Linear(4, 4)), r"DataParallel.*model\.module"),
    (Branches, "cannot be followed"), (InPlace, "overwrites"), (InPlaceThroughAView, "overwrites"),
    (MixesSamples, "flip"), (TwoAtATime, "apart"),
    (Random, "does not give the same"), (FromTheBatch, "batch"),
    (ShapeAsNumber, "shape of its input"), (Product, "product"), (ReadsAWeight, "linear"),
    (TwoInputs, "one input"), (TwoOutputs, "one tensor"), (Repeats, "repeats"),
    (lambda: OtherLinear(4, 4), "linear"),
    (lambda: nn.Sequential(OtherLinear(4, 4)), "register_bound"),
    (Dropping, "dropout"), (hooked, "hooks"), (overridden, "own forward"),
    (lambda: nn.LayerNorm(4), "LayerNorm"), (lambda: nn.GroupNorm(2, 4), "GroupNorm"),
    (lambda: nn.GLU(), "GLU"), (lambda: nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4)), "GRU"),
    (lambda: nn.MultiheadAttention(4, 2), "MultiheadAttention"), (nn.Hardshrink, "jumps"),
    (lambda: nn.BatchNorm1d(4, track_running_stats=False), "track_running_stats"),
    (lambda: nn.Embedding(9, 4), "takes integers.*comes after it"),
    (lambda: nn.Flatten(0), "samples"), (lambda: nn.Softmax(dim=0), "batch"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=lambda v: getattr(v, "__name__", str(v)))
def test_what_has_no_bound_is_refused_by_name(make, words):
    torch.manual_seed(0)
    with pytest.raises(certify.BoundError, match=words):
        certify.lipschitz(make(), (4,))


def test_a_plain_function_is_refused():
    with pytest.raises(TypeError, match="cannot be followed"):
        certify.lipschitz(lambda x: x, (4,))
    with pytest.raises(ValueError, match="norm"):
        certify.lipschitz(nn.Linear(4, 4), norm="linf")


def test_the_message_names_the_module_inside_the_tree():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.LayerNorm(4)))
    with pytest.raises(certify.BoundError, match=r"^1\.1 \(LayerNorm\).*register_bound"):
        certify.lipschitz(model, (4,))


def test_sizes_are_asked_for_where_they_decide():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(2))
    with pytest.raises(certify.BoundError, match="input_shape"):
        certify.lipschitz(model)
    with pytest.raises(certify.BoundError, match="does not fit"):
        certify.lipschitz(nn.Linear(4, 4), (5,))
    with pytest.raises(ValueError, match="positive integers"):
        certify.lipschitz(nn.Linear(4, 4), (0,))
    # without shapes a bound is never smaller
    plain = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten())
    assert certify.lipschitz(plain).total >= total(plain, (2, 6, 6)) * (1 - 1e-12)


@pytest.mark.parametrize(
    "module", [MaxMin(-2), nn.Flatten(-2), nn.Softmax(-2), nn.Unflatten(-2, (1, 1))], ids=repr
)
def test_a_dimension_counted_from_the_end_may_be_the_batch(module):
    with pytest.raises(certify.BoundError, match="input_shape"):
        certify.lipschitz(module)
    with pytest.raises(certify.BoundError, match="is the batch"):
        certify.lipschitz(module, (4,))
    if not isinstance(module, (nn.Flatten, nn.Unflatten)):
        assert certify.lipschitz(module, (4, 3)).total <= 1.0 + 1e-12


def test_a_bound_of_ones_own(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    class Halve(nn.Module):
        def forward(self, x):
            return x / 2 if bool((x == x).all()) else x

    with pytest.raises(certify.BoundError, match="cannot be followed"):
        certify.lipschitz(Halve(), (4,))
    certify.register_bound(Halve, lambda module, context: 0.5)
    assert total(nn.Sequential(Halve(), Halve())) == pytest.approx(0.25)

    class Quiet(Halve):
        extra = 1

    class Loud(Halve):
        def forward(self, x):
            return 8 * x

    assert total(Quiet()) == pytest.approx(0.5)
    # another function, so that bound does not serve it; this one can be followed
    assert total(Loud()) == pytest.approx(8.0)
    for wrong in (-1.0, float("inf"), float("nan")):
        certify.register_bound(Halve, lambda module, context, w=wrong: w)
        with pytest.raises(certify.BoundError, match="finite"):
            certify.lipschitz(Halve(), (4,))
    with pytest.raises(TypeError, match="subclass"):
        certify.register_bound("Halve", lambda m, c: 1.0)
    with pytest.raises(TypeError, match="callable"):
        certify.register_bound(Halve, 1.0)


def test_parametrized_and_shared_modules_are_followed():
    torch.manual_seed(0)
    layer = parametrizations.spectral_norm(nn.Linear(4, 4)).eval()
    assert total(layer) == pytest.approx(jacobian_norm(layer), rel=1e-3)
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert total(model) == pytest.approx(total(shared) ** 2, rel=1e-9)


def test_adapters_count_with_their_update():
    torch.manual_seed(0)
    adapter = LowRankAdapter(nn.Linear(4, 4), 2)
    with torch.no_grad():
        adapter.update.manifold.unpack(adapter.update.weight).S.mul_(4.0)
    true = float(torch.linalg.matrix_norm(adapter.merge().weight.detach(), 2))
    assert true * (1 - 1e-6) <= total(adapter) <= true * (1 + 1e-5)


def test_the_float64_copy_has_the_same_numbers_to_the_bit():
    torch.manual_seed(0)
    layer = LowRankLinear(6, 5, 2, tau=0.0)
    with torch.no_grad():  # a drift that .double() would take out
        layer.manifold.unpack(layer.weight).U.mul_(1 + 3e-5)
    twin = float64_copy(nn.Sequential(layer, MaxMin()))
    assert twin[0].weight.dtype == torch.float64
    assert torch.equal(twin[0].weight.float(), layer.weight)
    assert not torch.equal(copy.deepcopy(layer).double().weight.float(), layer.weight)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    twin = float64_copy(tied)
    assert twin[0].weight is twin[1].weight
    with torch.no_grad():
        tied[0].weight[0, 0] = float("nan")
    with pytest.raises(certify.BoundError, match="NaN"):
        certify.lipschitz(tied, (4,))


def test_a_report_prints_and_is_refused_for_other_weights():
    torch.manual_seed(0)
    model = nn.Sequential(Residual(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 3))
    report = certify.lipschitz(model, (4,))
    text = str(report)
    for words in ("0.block", "Linear", "sum", "l2 Lipschitz constant <=", "before the last layer"):
        assert words in text
    assert report.to_dict()["total"] == report.total
    x = torch.randn(5, 4)
    before = certify.radius(model, x, bound=report)
    assert torch.equal(before, certify.radius(model, x))
    with torch.no_grad():
        model[2].bias.add_(1.0)
    with pytest.raises(ValueError, match="other weights"):
        certify.radius(model, x, bound=report)
    with pytest.raises(ValueError, match="for inputs of shape"):
        certify.radius(model, torch.randn(2, 2, 4), bound=report)
    with pytest.raises(TypeError, match="bound"):
        certify.radius(model, x, bound=1.0)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(6, 4)
    certify.verified_accuracy(model, (x, torch.zeros(6, dtype=torch.long)), 0.1)
    assert model.training
    assert model[1].training
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())


def test_map_cond_is_stated_where_it_is_known():
    model = nn.Sequential(
        lrm.nn.Patchify(2), lrm.nn.LowRankConv2d(4, 8, 1, 3, tau=0.1),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), nn.Conv2d(8, 8, 3, padding=1),
    )  # fmt: skip
    rows = certify.lipschitz(model, (1, 8, 8)).rows
    assert rows[1].map_cond == pytest.approx(1.0, abs=0.1001)
    assert rows[2].map_cond > 1.0
    assert rows[3].map_cond is None


def test_a_shape_with_the_batch_in_it_is_refused_with_an_example():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(certify.BoundError, match=r"got \(1, 3, 8, 8\); .*without the batch"):
        certify.lipschitz(model, (1, 3, 8, 8))
    with pytest.raises(TypeError, match=r"shape of one sample, without the batch.*got 8"):
        certify.lipschitz(model, 8)


def test_adapted_layers_count_with_their_active_change_and_say_what_they_cannot():
    torch.manual_seed(0)
    model = lrm.nn.adapt(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), 2, alpha=6)
    layer = model[0]
    plain = total(layer.base_layer)
    assert total(layer) == pytest.approx(plain, rel=1e-5)
    with torch.no_grad():
        layer.changes["default"].update.manifold.unpack(
            layer.changes["default"].update.weight
        ).S.mul_(4.0)
    true = float(torch.linalg.matrix_norm(layer.to_dense().weight.detach(), 2))
    assert true > 1.5 * plain
    assert true * (1 - 1e-6) <= total(layer) <= true * (1 + 1e-5)
    lrm.nn.merge(model)
    assert true * (1 - 1e-6) <= total(layer) <= true * (1 + 1e-5)
    lrm.nn.unmerge(model)
    layer.activate(None)
    assert total(layer) == pytest.approx(plain, rel=1e-6)
    layer.activate("default")

    class Odd(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.base_layer = Odd(4, 5)
    with pytest.raises(certify.BoundError, match=r"base_layer \(Odd\)"):
        total(model)
    layer.base_layer = nn.Bilinear(4, 4, 5)
    with pytest.raises(certify.BoundError, match="must be a Linear or LowRankLinear"):
        total(model)


@pytest.mark.parametrize("rank", [1, 4])
def test_an_adapter_whose_rank_has_changed_is_bounded_with_the_start_of_its_own_rank(rank):
    model = lrm.nn.adapt(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), 2, tau=None)
    update = model[0].changes["default"].update
    M = update.manifold.set_rank_(rank)
    lrm.parameter.replace_data(update.weight, M.random(*M.point_shape))
    true = float(torch.linalg.matrix_norm(model[0].to_dense().weight.detach(), 2))
    assert true * (1 - 1e-6) <= total(model[0]) <= true * (1 + 1e-5)
