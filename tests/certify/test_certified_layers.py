"""Activations and blocks that a certified network is built with, and a weight of fixed size."""

from __future__ import annotations

import contextlib
import math

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn import ConvexPotential, LowRankConv2d, LowRankLinear, MaxMin, Patchify, Residual
from lrmanifold.optim.accelerator import force_accelerator


def test_maxmin_sorts_pairs_and_keeps_lengths(device):
    x = torch.tensor([[1.0, 5.0, 3.0, 2.0, 7.0]], device=device)
    assert MaxMin()(x).tolist() == [[3.0, 5.0, 1.0, 2.0, 7.0]]
    images = torch.randn(3, 6, 4, 4, device=device)
    y = MaxMin()(images)
    assert torch.allclose(y.flatten(1).sort(1).values, images.flatten(1).sort(1).values)
    assert torch.equal(MaxMin(-1)(images), MaxMin(3)(images))
    with pytest.raises(ValueError, match="dim"):
        MaxMin(0)


@given(channels=st.integers(2, 7), seed=st.integers(0, 2**16))
def test_maxmin_has_the_derivative_of_maximum_and_minimum(channels, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, channels, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    g = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    half = channels // 2
    a, b, rest = x.split([half, half, channels % 2], 1)
    plain = torch.cat([torch.maximum(a, b), torch.minimum(a, b), rest], 1)
    (wanted,) = torch.autograd.grad(plain, x, g)
    assert torch.equal(MaxMin()(x), plain)
    (found,) = torch.autograd.grad(MaxMin()(x), x, g)
    assert torch.allclose(found, wanted, atol=1e-14)
    forward = torch.func.jvp(MaxMin(), (x.detach(),), (g,))[1]
    assert torch.allclose(forward, torch.func.jvp(lambda x: torch.cat([
        torch.maximum(*x[:, : 2 * half].split(half, 1)),
        torch.minimum(*x[:, : 2 * half].split(half, 1)), x[:, 2 * half :]], 1),
        (x.detach(),), (g,))[1], atol=1e-14)  # fmt: skip
    assert torch.autograd.gradcheck(MaxMin(), x, check_forward_ad=True, check_batched_grad=True)


def test_maxmin_is_a_permutation_where_entries_are_equal():
    J = torch.func.jacrev(lambda v: MaxMin()(v[None])[0])(torch.zeros(5))
    assert torch.equal(J @ J.mT, torch.eye(5))
    compiled = torch.compile(MaxMin(), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, requires_grad=True)
    compiled(x).square().sum().backward()
    assert torch.allclose(x.grad, 2 * x)


def test_patchify_is_a_permutation_of_entries(device):
    x = torch.arange(48.0, device=device).view(1, 3, 4, 4)
    y = Patchify(2)(x)
    assert y.shape == (1, 12, 2, 2)
    assert torch.equal(y.flatten().sort().values, x.flatten())
    # in float64: convolutions of float32 are TF32 on an accelerator
    kernel = torch.randn(5, 3, 2, 2, device=device, dtype=torch.float64)
    ones = nn.functional.conv2d(y.double(), kernel.flatten(1)[:, :, None, None])
    assert torch.allclose(ones, nn.functional.conv2d(x.double(), kernel, stride=2))
    with pytest.raises(ValueError, match="multiples of 3"):
        Patchify(3)(x)


def test_residual_adds_and_refuses_another_shape():
    block = Residual(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(2, 4)
    assert torch.equal(block(x), x + block.block(x))
    with pytest.raises(ValueError, match="keep the shape"):
        Residual(nn.Linear(4, 1))(x)
    with pytest.raises(ValueError, match="at least one"):
        Residual()


@given(st.integers(0, 500), st.integers(1, 8), st.sampled_from((0.0, 0.1, 2.0)))
def test_a_convex_potential_never_stretches(seed, rank, tau):
    torch.manual_seed(seed)
    layer = ConvexPotential(8, rank, tau=tau).double()
    with torch.no_grad():
        layer.layer.weight.copy_(layer.layer.manifold.random(dtype=torch.float64))
    x, y = torch.randn(2, 50, 8, dtype=torch.float64)
    # near pairs too: there the derivative decides
    y = torch.cat((y, x + 1e-4 * y))
    x = torch.cat((x, x))
    stretch = (layer(x) - layer(y)).norm(dim=1) / (x - y).norm(dim=1)
    assert float(stretch.max()) <= 1.0 + 1e-9
    J = torch.func.jacrev(layer)(x[0])
    assert float(torch.linalg.matrix_norm(J, 2)) <= 1.0 + 1e-9


@pytest.mark.parametrize("tau", [0.0, 0.1, None])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_sigma_max_is_the_spectral_norm_and_its_gradient(tau, kind, device):
    torch.manual_seed(1)
    if kind == "linear":
        layer = LowRankLinear(9, 7, 3, tau=tau, dtype=torch.float64)
    else:
        layer = LowRankConv2d(4, 6, 3, 2, groups=2, tau=tau, dtype=torch.float64)
    layer = layer.to(device)
    M = layer.manifold
    with torch.no_grad():
        layer.weight.copy_(M.random(*layer.weight.shape, dtype=torch.float64, device=device))
    dense = torch.linalg.matrix_norm(M.to_dense(layer.weight.detach()), 2)
    found = layer.sigma_max()
    assert found.shape == layer.weight.shape[:-2]
    assert torch.allclose(found.detach(), dense)
    found.sum().backward()
    # against finite differences along a direction of the core
    with torch.no_grad():
        size = 1e-6
        moved = layer.weight.detach().as_subclass(torch.Tensor).clone()
        core = M.unpack(moved).S
        core.mul_(1.0 + size)
        slope = (torch.linalg.matrix_norm(core, 2) - found).sum() / size
        S = M.unpack(layer.weight.detach()).S
        along = (M.unpack(layer.weight.grad).S * S).sum()
    assert float(along) == pytest.approx(float(slope), rel=1e-4)
    if tau == 0.0:
        assert torch.equal(layer.alpha, layer.sigma_max())
    else:
        with pytest.raises(ValueError, match="sigma_max"):
            _ = layer.alpha


@given(
    st.integers(0, 500),
    st.integers(1, 5),
    st.sampled_from((0.0, 0.1, 1.0)),
    st.sampled_from((0.5, 1.0, 3.0)),
)
def test_a_fixed_scale_is_the_nearest_core_in_the_band(seed, r, tau, scale):
    M = lrm.WellConditioned(8, 6, r, tau=tau, scale=scale)
    generator = torch.Generator().manual_seed(seed)
    S = torch.randn(r, r, generator=generator, dtype=torch.float64)
    P = M.project_core(S)
    s = torch.linalg.svdvals(P)
    assert float(s.max()) <= scale * (1 + 1e-12)
    assert float(s.min()) >= scale / (1 + tau) * (1 - 1e-12)
    assert torch.allclose(M.project_core(P), P, atol=1e-10)
    # no point of the set is nearer: a convex box in the spectrum
    for _ in range(5):
        Q = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
        R = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
        inside = torch.rand(r, generator=generator, dtype=torch.float64)
        values = scale / (1 + tau) + inside * (scale - scale / (1 + tau))
        assert (S - P).norm() <= (S - Q * values @ R).norm() + 1e-10


@pytest.mark.parametrize(("tau", "scale"), [(0.0, 1.0), (0.1, 2.0)])
@pytest.mark.parametrize("optimizer", ["CondLR", "CondLRAdam", "CondLRMuon", "geoopt"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_a_fixed_scale_holds_through_training(tau, scale, optimizer, accelerated, device):
    torch.manual_seed(0)
    layer = LowRankLinear(10, 8, 4, tau=tau, scale=scale).to(device)
    assert f"scale={scale:g}" in repr(layer)
    assert float(layer.sigma_max()) == pytest.approx(scale, rel=1e-5)
    kinds = {"geoopt": geoopt.optim.RiemannianSGD}
    make = kinds.get(optimizer) or getattr(lrm.optim, optimizer)
    opt = make(layer.parameters(), lr=0.05)
    for _ in range(12):
        opt.zero_grad()
        layer(torch.randn(16, 10, device=device)).square().sum().backward()
        with force_accelerator() if accelerated else contextlib.nullcontext():
            opt.step()
        s = torch.linalg.svdvals(layer.manifold.to_dense(layer.weight.detach()))[:4]
        assert float(s.max()) <= scale * (1 + 1e-5)
        assert float(s.min()) >= scale / (1 + tau) * (1 - 1e-5)


def test_a_fixed_scale_goes_through_conversion_copies_and_checkpoints(tmp_path):
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12))
    lrm.factorize(model, rank=4, tau=0.0, scale=1.0)
    assert all(float(layer.sigma_max().detach()) == pytest.approx(1.0) for layer in model[::2])
    other = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12))
    lrm.factorize(other, rank=4, tau=0.0, scale=1.0, init="random")
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 20)
    assert torch.equal(model(x), other(x))
    # a weight of another size is off the manifold
    lrm.factorize(free := nn.Sequential(nn.Linear(20, 16)), rank=4, tau=0.0)
    with torch.no_grad():
        free[0].manifold.unpack(free[0].weight).S.mul_(3.0)
    one = LowRankLinear(20, 16, 4, tau=0.0, scale=1.0)
    with pytest.raises(RuntimeError, match="scale"):
        one.load_state_dict(free[0].state_dict())


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan, "one", None, True])
def test_a_wrong_scale_is_named(scale):
    with pytest.raises((ValueError, TypeError), match="scale"):
        lrm.WellConditioned(5, 4, 2, tau=0.0, scale=scale)


def test_scale_without_a_bound_is_refused():
    with pytest.raises(ValueError, match="tau=None"):
        LowRankLinear(4, 4, 2, tau=None, scale=1.0)


@pytest.mark.parametrize(
    "act", [nn.GELU(), nn.LeakyReLU(1.5), nn.LeakyReLU(-0.1), torch.relu, nn.ELU(2.0)]
)
def test_a_potential_of_another_activation_has_no_certificate(act):
    model = nn.Sequential(ConvexPotential(4, 2, activation=act))
    with pytest.raises(lrm.certify.BoundError, match="activation"):
        lrm.certify.lipschitz(model, (4,))


def test_a_potential_with_a_changed_part_has_no_certificate():
    model = nn.Sequential(ConvexPotential(4, 2))
    model[0].activation.forward = lambda x: 5 * x
    with pytest.raises(lrm.certify.BoundError, match="activation"):
        lrm.certify.lipschitz(model, (4,))
    model = nn.Sequential(ConvexPotential(4, 2))
    model[0].layer.sigma_max = lambda: torch.ones(()) / 9
    with pytest.raises(lrm.certify.BoundError, match="own sigma_max"):
        lrm.certify.lipschitz(model, (4,))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.LeakyReLU(0.2), nn.Tanh(), nn.Sigmoid()])
def test_potentials_of_monotone_activations_are_certified_at_one(act):
    model = nn.Sequential(ConvexPotential(4, 2, activation=act))
    assert 1.0 <= lrm.certify.lipschitz(model, (4,)).total <= 1.0 + 1e-5


@given(features=st.integers(2, 9), data=st.data(), seed=st.integers(0, 2**16))
def test_a_potential_with_as_many_rows_as_rank_folds_space_and_stretches_nothing(
    features, data, seed
):
    torch.manual_seed(seed)
    rank = data.draw(st.integers(1, features))
    layer = ConvexPotential(features, rank, rank, dtype=torch.float64)
    with torch.no_grad():
        layer.layer.bias.normal_()
    x = torch.randn(features, dtype=torch.float64)
    J = torch.func.jacrev(layer)(x)
    eye = torch.eye(features, dtype=torch.float64)
    assert torch.allclose(J @ J, eye, atol=1e-10)
    assert torch.allclose(J, J.mT, atol=1e-10)


def test_a_potential_with_more_rows_than_rank_shrinks_some_directions():
    # the control: there the local constant falls below the bound
    torch.manual_seed(0)
    layer = ConvexPotential(6, 3, 12, dtype=torch.float64)
    J = torch.func.jacrev(layer)(torch.randn(6, dtype=torch.float64))
    assert float(torch.linalg.svdvals(J)[-1]) < 0.9
