"""A device without float64 is refused by name, before torch says something about dtypes."""

from __future__ import annotations

import geoopt
import pytest
import torch

import lrmanifold as lrm
from lrmanifold import linalg

MATCH = r"{} must be on a device that has float64, got mps: train on cpu or cuda"


class OnMps:
    """What Python sees of a tensor on Apple's GPU."""

    device = torch.device("mps")


class Matrix(OnMps, torch.Tensor):
    pass


class Weight(OnMps, geoopt.ManifoldParameter):
    pass


class Bias(OnMps, torch.nn.Parameter):
    pass


def test_weights_are_not_made_there():
    with pytest.raises(TypeError, match=MATCH.format("W")):
        lrm.FixedRank(6, 5, 2).from_dense(torch.randn(6, 5).as_subclass(Matrix))


@pytest.mark.parametrize("name", ["qr", "polar", "svd", "orthonormalize", "condition_number"])
def test_kernels_do_not_run_there(name):
    with pytest.raises(TypeError, match=MATCH.format("[AS]")):
        getattr(linalg, name)(torch.eye(3).as_subclass(Matrix))


@pytest.mark.parametrize("optimizer", [lrm.optim.CondLR, lrm.optim.CondLRAdam])
def test_optimizers_do_not_take_weights_there(optimizer):
    M = lrm.FixedRank(6, 5, 2)
    p = Weight(M.random(dtype=torch.float32), manifold=M)
    with pytest.raises(TypeError, match=MATCH.format("params")):
        optimizer([p], lr=0.1)


def test_parameters_without_a_manifold_may_be_there():
    lrm.optim.CondLR([Bias(torch.ones(2))], lr=0.1)
