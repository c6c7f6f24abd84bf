"""Subclasses of known layers and layers whose weight is computed: what they do, not what they hold.

Each test is a network that once got a bound or a radius too large to be true.
"""

from __future__ import annotations

import pytest
import torch
from certify_attacks import strongest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import lrmanifold as lrm
from lrmanifold import certify
from lrmanifold.certify import bounds as registry
from lrmanifold.nn import ConvexPotential, LowRankLinear

D = torch.float64


class Times(nn.Linear):
    """Its weight does not say what it computes."""

    factor = 10.0

    def forward(self, x):
        return self.factor * super().forward(x)


def norm(layer):
    return float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2)) * (1 + 1e-9)


@pytest.fixture
def own(monkeypatch):
    """A right bound for Times, as a user would register it, for one test."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    certify.register_bound(Times, lambda layer, context: layer.factor * norm(layer))


def attacked(model, x):
    """Whether an attack in each sample's own ball finds another class."""
    r = certify.radius(model, x)
    twin = certify.lipschitz(model, x.shape[1:]).network.graph
    y = twin(x.double()).argmax(1)
    found = strongest(twin, x.double(), y, r * (1 - 1e-12), steps=20)
    return bool(((found >= 0) & (r > 0)).any())


def test_a_last_layer_of_ones_own_type_counts_with_its_own_bound(own):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Times(4, 3))
    x = torch.randn(5, 4)
    assert not attacked(model, x)
    same = nn.Sequential(model[0], nn.Linear(4, 3))
    same[1].load_state_dict(model[1].state_dict())
    # logits ten times as large are as far from the boundary
    with torch.no_grad():
        model[1].bias.zero_()
        same[1].bias.zero_()
    assert bool((certify.radius(model, x) <= 1.5 * certify.radius(same, x)).all())


def test_a_batch_norm_is_not_folded_into_a_layer_of_ones_own_type(own):
    torch.manual_seed(0)
    model = nn.Sequential(Times(4, 4), nn.BatchNorm1d(4)).eval()
    assert certify.lipschitz(model, (4,)).total >= 9.999 * norm(model[0])


def test_a_batch_norm_of_ones_own_type_is_not_folded(monkeypatch):
    class Louder(nn.BatchNorm1d):
        def forward(self, x):
            return 10 * super().forward(x)

    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    certify.register_bound(Louder, lambda layer, context: 10.0)
    model = nn.Sequential(nn.Linear(4, 4), Louder(4)).eval()
    assert certify.lipschitz(model, (4,)).total >= 9.999 * norm(model[0])


@pytest.mark.parametrize("state", ["active", "merged", "resting"])
def test_an_adapter_on_a_layer_with_its_own_forward_has_no_bound(state):
    model = lrm.nn.adapt(nn.Sequential(nn.Linear(4, 4), Times(4, 3)), 2, include=["*", "1"])
    if state == "merged":
        model[1].merged = "default"
    elif state == "resting":
        lrm.nn.set_adapter(model, None)
    with pytest.raises(certify.BoundError, match=r"1\.base_layer .Times."):
        certify.lipschitz(model, (4,))


def test_a_resting_adapter_on_a_layer_of_ones_own_type_counts_with_its_own_bound(own):
    torch.manual_seed(0)
    model = lrm.nn.adapt(nn.Sequential(nn.Linear(4, 4), Times(4, 3)), 2, include=["*", "1"])
    with pytest.raises(certify.BoundError, match="only the function of a Linear"):
        certify.lipschitz(model, (4,))
    lrm.nn.set_adapter(model, None)
    assert certify.lipschitz(model[1], (4,)).total >= 9.999 * norm(model[1].base_layer)
    assert not attacked(model, torch.randn(5, 4))


def test_a_replaced_property_is_another_function():
    class Louder(LowRankLinear):
        @property
        def factors(self):
            found = super().factors
            return found._replace(S=5 * found.S)

    for model in (nn.Sequential(Louder(4, 4, 2)), nn.Sequential(ConvexPotential(4, 2))):
        if isinstance(model[0], ConvexPotential):
            model[0].layer = Louder(4, 4, 2)
        with pytest.raises(certify.BoundError):
            certify.lipschitz(model, (4,))


@given(st.integers(0, 1000), st.booleans())
@settings(max_examples=10, deadline=None)
def test_a_computed_weight_of_the_last_layer_is_that_of_evaluation(seed, training):
    """In training spectral_norm iterates at each look at the weight, and gives another one."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), parametrizations.spectral_norm(nn.Linear(4, 3)))
    with torch.no_grad():  # far from the vectors that it remembers
        model[1].parametrizations.weight.original.normal_()
    x = torch.randn(4, 4)
    wanted = certify.radius(model.eval(), x)
    model.train(training)
    report = certify.lipschitz(model, (4,))
    for _ in range(2):
        assert torch.equal(certify.radius(model, x, bound=report), wanted)
    bound = certify.LipschitzBound(model, (4,))
    assert torch.equal(bound.evaluate()[2], model.eval()[1].weight)


def test_an_adapter_whose_change_computes_otherwise_has_no_bound():
    """It was taken for what its weight says, 87 times too small."""

    class Louder(lrm.nn.Change):
        def forward(self, x):
            return 100 * super().forward(x)

    def adapted():
        return lrm.nn.adapt(nn.Sequential(nn.Linear(4, 4).double()), rank=2, include="0")

    by_class, by_object = adapted(), adapted()
    by_class[0].changes["default"].__class__ = Louder
    by_object[0].changes["default"].forward = lambda x: 100 * x
    certify.lipschitz(adapted(), (4,))
    for model in (by_class, by_object):
        with pytest.raises(certify.BoundError):
            certify.lipschitz(model, (4,))


def test_a_negative_scale_of_an_adapter_does_not_take_rounding_away():
    torch.manual_seed(1)
    layer = nn.Linear(64, 64, bias=False, dtype=D)
    nn.init.eye_(layer.weight)
    model = lrm.nn.adapt(nn.Sequential(layer), rank=32, include="0", tau=None)
    change = model[0].changes["default"]
    with torch.no_grad():
        change.update.factors.S.copy_(1e9 * torch.randn(32, 32, dtype=D))
        change.start.copy_(change.update.weight)
    bounds = []
    for scale in (1.0, -1.0):
        change.change_scale = scale
        bounds.append(certify.lipschitz(model, (64,)).total)
    assert bounds[0] == bounds[1] >= 1.0  # the map is the identity
