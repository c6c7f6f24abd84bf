"""structure and restructure: the same low-rank layers in another dense model, without a plan."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankAdapter, LowRankLinear, restructure, structure
from lrmanifold.nn.attention import PROJECTIONS


class Net(nn.Module):
    """A layer of each kind, a tied head, and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True, dropout=0.0)
        self.conv, self.up = nn.Conv1d(16, 16, 3, groups=2), nn.ConvTranspose1d(16, 16, 3)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.encoder(self.embed(ids)).mT
        return self.head(self.up(self.conv(x).relu()).mT)


def factorized(**how) -> nn.Module:
    return lrm.factorize(Net(), 3, include=["*", "embed"], exclude="*.k_proj", **how)


@pytest.mark.parametrize("how", [{}, {"tau": None}, {"tau": 0.0, "scale": 2.0}])
def test_a_state_dict_loads_into_the_rebuilt_model(how):
    net = factorized(**how)
    ids = torch.randint(40, (2, 7))
    text = json.dumps(structure(net), allow_nan=False)
    again = restructure(Net(), json.loads(text))
    assert structure(again) == structure(net)
    assert [type(m) for m in again.modules()] == [type(m) for m in net.modules()]
    assert again.head.weight is again.embed.weight
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again.eval()(ids), net.eval()(ids))
    for a, b in zip(again.modules(), net.modules(), strict=True):
        if isinstance(a, lrm.nn.LowRankLayer):
            assert repr(a.manifold) == repr(b.manifold)


def test_a_single_layer_and_a_dense_model():
    layer = LowRankLinear(9, 8, 2, tau=0.3)
    again = restructure(nn.Linear(9, 8), structure(layer))
    assert isinstance(again, LowRankLinear)
    assert (again.rank, again.tau) == (2, 0.3)
    dense = nn.Sequential(nn.Linear(3, 3))
    assert restructure(dense, structure(dense)) is dense
    assert type(dense[0]) is nn.Linear


def test_what_does_not_fit_is_refused_and_nothing_is_changed():
    found = structure(factorized())
    other = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match="'embed' is not there"):
        restructure(other, found)
    assert type(other[0]) is nn.Linear
    worse = copy.deepcopy(found)
    worse["layers"]["up"]["rank"] = 99
    net = Net()
    with pytest.raises(ValueError, match="layer 'up' cannot be made: rank must be"):
        restructure(net, worse)
    assert type(net.embed) is nn.Embedding
    for bad in ({}, {"version": 2, "layers": {}}, {"version": 1}):
        with pytest.raises(ValueError, match="must be what structure"):
            restructure(Net(), bad)
    with pytest.raises(TypeError, match="found must be"):
        restructure(Net(), [])
    with pytest.raises(ValueError, match="no adapter, got one at '0'"):
        structure(nn.Sequential(LowRankAdapter(nn.Linear(4, 4), 2)))


@pytest.mark.parametrize("first", ["q_proj", "v_proj"])
def test_each_projection_of_an_attention_keeps_its_own_geometry(first):
    def net() -> nn.Module:
        return nn.ModuleDict({"a": nn.MultiheadAttention(32, 4)})

    rest = [f"a.{name}" for name in PROJECTIONS if name not in (first, "out_proj")]
    model = lrm.factorize(net(), 8, tau=None, gradient="probe", include=f"a.{first}")
    lrm.factorize(model, 6, tau=0.1, retraction="orthographic", include=rest)
    again = restructure(net(), structure(model))
    assert type(again["a"].out_proj) is nn.Linear
    assert getattr(again["a"], first).tau is None
    for name in PROJECTIONS[:3]:
        theirs, ours = (getattr(x["a"], name).manifold for x in (model, again))
        assert (repr(theirs), theirs.gradient) == (repr(ours), ours.gradient)
        assert theirs.retraction == ours.retraction
    again.load_state_dict(model.state_dict())
    x = torch.randn(5, 2, 32)
    torch.testing.assert_close(again["a"](x, x, x), model["a"](x, x, x))
    worse = structure(model)
    worse["layers"][rest[0]]["rank"] = 99
    with pytest.raises(ValueError, match=f"layer '{rest[0]}' cannot be made: rank must be"):
        restructure(net(), worse)


def test_names_are_those_without_compiled_wrappers():
    net = factorized()
    found = structure(net)
    assert structure(torch.compile(net)) == found
    net.conv = torch.compile(net.conv)
    assert structure(net) == found


def test_retractions_are_written_by_name():
    def mine(manifold, X, xi):
        return lrm.retractions.get("svd")(manifold, X, xi)

    layer = LowRankLinear(9, 8, 2, retraction=lrm.retractions.get("ksl"))
    found = json.loads(json.dumps(structure(layer)))
    assert found["layers"][""]["retraction"] == "ksl"
    assert restructure(nn.Linear(9, 8), found).manifold.retraction == "ksl"
    net = nn.Sequential(LowRankLinear(9, 8, 2, retraction=mine))
    with pytest.raises(
        ValueError, match=r"retraction of layer '0' must have a name to be written, got .*register"
    ):
        structure(net)


def test_layers_without_a_whole_geometry_are_refused():
    whole = structure(nn.Sequential(LowRankLinear(9, 8, 2)))
    for how in (4, "rank", None):
        bad = {**whole, "layers": {"0": how}}
        with pytest.raises(TypeError, match=r"found\['layers'\]\['0'\] must be a dict with rank"):
            restructure(nn.Sequential(nn.Linear(9, 8)), bad)
    for key in whole["layers"]["0"]:
        bad = copy.deepcopy(whole)
        del bad["layers"]["0"][key]
        with pytest.raises(ValueError, match="must have rank, tau, gradient, retraction, scale"):
            restructure(nn.Sequential(nn.Linear(9, 8)), bad)
    whole["layers"]["0"]["seed"] = 1
    with pytest.raises(ValueError, match=r"must have rank, .*, got .*seed"):
        restructure(nn.Sequential(nn.Linear(9, 8)), whole)


class Active(LowRankLinear):
    def forward(self, x):
        return super().forward(x).relu()


def test_a_subclass_of_a_low_rank_layer_is_not_written_as_what_it_is_derived_from():
    with pytest.raises(ValueError, match=r"no subclass.*Active at '1'"):
        structure(nn.Sequential(LowRankLinear(6, 5, 2), Active(5, 5, 2)))
