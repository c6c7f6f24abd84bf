"""Our training and everybody else's, each from the same dense start: a model and its optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import geoopt
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lrmanifold as lrm

from ._factors import Factors, tall_sizes, with_factors, with_pairs
from ._muon import Muon

try:
    import geotorch
except ImportError:
    geotorch = None

LR, MOMENTUM, TAU = 1e-2, 0.9, 0.1

# Options of CondLR that are measured beside one another; the first is the default.
OURS: dict[str, dict[str, Any]] = {
    "CondLR": {},
    "CondLR, clip margin ½": {"clip_margin": 0.5},
    "CondLR, scalar metric, margin ½": {"metric": "scalar", "clip_margin": 0.5},
}

# A peer is left out where one step's n x n work would take longer than this many seconds, at a rate
# of so many flops a second.
PATIENCE = {"cpu": (5.0, 5e10), "cuda": (2.0, 3e13)}


class LeftOutError(Exception):
    """A peer that cannot take part, with the reason."""


@dataclass(frozen=True)
class Start:
    """A dense model, and the same one factorized (so that its SVDs are done once)."""

    dense: nn.Module
    low_rank: nn.Module

    @classmethod
    def of(cls, dense: nn.Module, rank: Any, **options: Any) -> Start:
        """Factorize a copy of `dense`; `options` as in :func:`lrmanifold.factorize`."""
        model = copy.deepcopy(dense)
        return cls(dense, lrm.factorize(model, rank=rank, tau=TAU, **options))


Built = tuple[nn.Module, torch.optim.Optimizer]
Peer = Callable[[Start], Built]


def ours(**options: Any) -> Peer:
    """CondLR with `options` on our layers."""

    def build(start: Start) -> Built:
        model = copy.deepcopy(start.low_rank)
        return model, lrm.optim.CondLR(model.parameters(), LR, momentum=MOMENTUM, **options)

    return build


def our_adam(start: Start) -> Built:
    """CondLRAdam on our layers."""
    model = copy.deepcopy(start.low_rank)
    return model, lrm.optim.CondLRAdam(model.parameters(), 1e-3)


def dense_adam(start: Start) -> Built:
    """torch.optim.AdamW on the dense network."""
    model = copy.deepcopy(start.dense)
    return model, torch.optim.AdamW(model.parameters(), 1e-3)


def dense(start: Start) -> Built:
    """torch.optim.SGD on the dense network."""
    model = copy.deepcopy(start.dense)
    return model, torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)


def muon(start: Start) -> Built:
    """Newton-Schulz of Muon's kind on the dense weights."""
    model = copy.deepcopy(start.dense)
    return model, Muon(model.parameters(), LR, MOMENTUM)


def plain(start: Start) -> Built:
    """Two free factors A Bᵀ by SGD."""
    model = with_pairs(copy.deepcopy(start.low_rank))
    return model, torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)


def stiefel(manifold: Callable[[], geoopt.Manifold], cubic: float) -> Peer:
    """geoopt's RiemannianSGD, U and V on `manifold`, S Euclidean; `cubic` n³ flops a factor."""

    def constrain(layer: Factors) -> None:
        layer.U = geoopt.ManifoldParameter(layer.U.detach(), manifold=manifold())
        layer.V = geoopt.ManifoldParameter(layer.V.detach(), manifold=manifold())

    def build(start: Start) -> Built:
        _affordable(start, cubic)
        model = with_factors(copy.deepcopy(start.low_rank), constrain)
        return model, geoopt.optim.RiemannianSGD(model.parameters(), LR, momentum=MOMENTUM)

    return build


def geoopt_on_ours(start: Start) -> Built:
    """geoopt's RiemannianSGD on our manifold and our layers (clip included)."""
    model = copy.deepcopy(start.low_rank)
    return model, geoopt.optim.RiemannianSGD(model.parameters(), LR, momentum=MOMENTUM)


def by_geotorch(start: Start) -> Built:
    """geotorch.orthogonal on U and V, SGD."""
    if geotorch is None:
        raise LeftOutError("not installed")
    # An exponential of n x n forwards and one of 2n x 2n backwards, some 20 products each.
    _affordable(start, 360.0)

    def constrain(layer: Factors) -> None:
        for name in ("U", "V"):
            value = getattr(layer, name).detach().clone()
            geotorch.orthogonal(layer, name)
            setattr(layer, name, value)

    model = with_factors(copy.deepcopy(start.low_rank), constrain)
    return model, torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)


def by_torch(start: Start) -> Built:
    """torch.nn.utils.parametrizations.orthogonal on U and V (Householder), SGD."""
    # torch's backward pass of a Householder product grows like n³: 148 s a step measured on VGG16.
    _affordable(start, 15.0)

    def constrain(layer: Factors) -> None:
        parametrizations.orthogonal(layer, "U", orthogonal_map="householder")
        parametrizations.orthogonal(layer, "V", orthogonal_map="householder")

    model = with_factors(copy.deepcopy(start.low_rank), constrain)
    return model, torch.optim.SGD(model.parameters(), LR, momentum=MOMENTUM)


def _affordable(start: Start, cubic: float) -> None:
    """Refuse work of `cubic` n³ flops a tall factor (n, r) that takes longer than PATIENCE."""
    patience, rate = PATIENCE[next(start.dense.parameters()).device.type]
    seconds = sum(cubic * n**3 for n, _ in tall_sizes(start.low_rank)) / rate
    if seconds > patience:
        raise LeftOutError(f"n x n work of about {seconds:.0f} s a step")


PEERS: Mapping[str, Peer] = {
    **{name: ours(**options) for name, options in OURS.items()},
    "CondLRAdam": our_adam,
    "dense SGD": dense,
    "dense AdamW": dense_adam,
    "A Bᵀ by SGD": plain,
    "geoopt, Euclidean Stiefel": stiefel(geoopt.EuclideanStiefel, 0.0),
    # One LU factorization of n x n and the product that forms it.
    "geoopt, canonical Stiefel": stiefel(geoopt.CanonicalStiefel, 0.7),
    "geoopt on our manifold": geoopt_on_ours,
    "geotorch": by_geotorch,
    "torch parametrization": by_torch,
    "Muon, dense": muon,
}


# Those whose geometry is in the forward pass: their step alone says nothing.
IN_FORWARD = ("geotorch", "torch parametrization")


def build_all(
    start: Start, *, without: tuple[str, ...] = ()
) -> tuple[dict[str, Built], dict[str, str]]:
    """All peers that can take part, and the reasons of those who cannot.

    None whose name holds a text of `without`.
    """
    found: dict[str, Built] = {}
    missing: dict[str, str] = {}
    for name, peer in PEERS.items():
        if any(text in name for text in without):
            continue
        try:
            found[name] = peer(start)
        except LeftOutError as reason:
            missing[name] = str(reason)
    return found, missing
