"""Averages of low-rank weights: torch's leave the manifold, ours stay and are the nearest."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_nets import drift, low_rank_layers
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import lrmanifold as lrm
from lrmanifold.errors import GeometryError
from lrmanifold.optim import average_points, retracting_average


def network(rank=3, tau=0.1) -> nn.Module:
    dense = nn.Sequential(
        nn.Conv2d(2, 8, 3, groups=2), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 12)
    )
    return lrm.factorize(dense, rank=rank, tau=tau, keep_larger=True)


def train(model, steps, *averages, lr=0.1):
    optimizer = lrm.optim.CondLR(model.parameters(), lr=lr, momentum=0.5)
    for _ in range(steps):
        x = torch.randn(16, 2, 4, 4)
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        for average in averages:
            average.update_parameters(model)


def cond(model) -> float:
    return max(float(x.manifold.cond(x.weight.detach()).max()) for x in low_rank_layers(model))


@pytest.mark.parametrize("decay", [None, 0.9])
def test_torchs_average_leaves_the_manifold_and_ours_does_not(decay):
    model = network()
    ours = retracting_average(model, decay)
    rule = None if decay is None else get_ema_multi_avg_fn(decay)
    plain = AveragedModel(model, multi_avg_fn=rule)
    train(model, 30, ours, plain, lr=0.3)
    assert drift(plain) > 1e-2
    assert drift(ours) <= 5e-6  # float32: 10 roundings on some processors
    assert cond(ours) <= 1.1 + 1e-5
    assert low_rank_layers(ours)[0].weight.manifold is low_rank_layers(ours)[0].manifold
    # What is on no manifold is averaged as torch does it.
    torch.testing.assert_close(ours.module[3].bias, plain.module[3].bias)
    assert torch.equal(ours.module[1].running_mean, model[1].running_mean)
    assert int(ours.n_averaged) == 30


shapes = st.tuples(st.integers(3, 12), st.integers(3, 12), st.integers(1, 3), st.integers(1, 3))


@given(shape=shapes, weight=st.floats(0, 1), tau=st.one_of(st.none(), st.floats(0, 3)))
def test_it_is_the_nearest_point_to_the_average_of_the_matrices(shape, weight, tau):
    m, n, r, other = shape

    def manifold(rank):
        if tau is None:
            return lrm.FixedRank(m, n, rank)
        return lrm.WellConditioned(m, n, rank, tau=tau)

    M, N = manifold(r), manifold(other)
    X, Y = N.random(dtype=torch.float64), M.random(dtype=torch.float64)
    Z = average_points(M, X, Y, weight)
    mean = (1 - weight) * N.to_dense(X) + weight * M.to_dense(Y)
    U, s, Vh = torch.linalg.svd(mean)
    core = M.project_core(torch.diag(s[:r]))
    nearest = U[:, :r] @ core @ Vh[:r]
    # To the distance, not to the matrix: where singular values meet, several are nearest.
    one, best = (torch.linalg.matrix_norm(A - mean) for A in (M.to_dense(Z), nearest))
    torch.testing.assert_close(one, best, atol=1e-10, rtol=1e-10)
    assert float(M.drift(Z)) <= 1e-12


def test_two_points_have_no_average_of_more_than_the_sum_of_their_ranks():
    X, Y = (lrm.FixedRank(10, 9, rank).random() for rank in (2, 3))
    assert average_points(lrm.FixedRank(10, 9, 5), X, Y, 0.5).shape == (24, 5)
    with pytest.raises(ValueError, match=r"at most r_X \+ r_Y = 5, got 6"):
        average_points(lrm.FixedRank(10, 9, 6), X, Y, 0.5)


@given(weight=st.floats(0, 1), seed=st.integers(0, 1000))
def test_it_does_not_depend_on_the_gauge(weight, seed):
    torch.manual_seed(seed)
    M = lrm.WellConditioned(9, 7, 3, tau=0.5)
    X, Y = M.random(dtype=torch.float64), M.random(dtype=torch.float64)
    A, B = (torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q for _ in range(2))
    U, S, V = M.unpack(Y)
    turned = M.pack(U @ A, A.mT @ S @ B, V @ B)
    one, other = (M.to_dense(average_points(M, X, Z, weight)) for Z in (Y, turned))
    torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_a_weight_and_itself_in_another_gauge_average_to_itself():
    model = network()
    turned = copy.deepcopy(model)
    with torch.no_grad():
        for layer in low_rank_layers(turned):
            X = layer.manifold.unpack(layer.weight.data)
            X.U.neg_()
            X.S.neg_()
    ours, plain = retracting_average(model), AveragedModel(model)
    for average in (ours, plain):
        average.update_parameters(model)
        average.update_parameters(turned)
    x = torch.randn(3, 2, 4, 4)
    for a in (model, ours.module, plain.module):
        a.eval()
    torch.testing.assert_close(ours(x), model(x))
    assert float((plain(x) - model(x)).detach().abs().max()) > 0.1  # U and S cancelled


@pytest.mark.parametrize("tau", [None, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matrices_that_cancel_have_no_average_but_where_zero_is_a_point(tau, dtype):
    torch.manual_seed(0)
    M = lrm.FixedRank(6, 5, 2) if tau is None else lrm.WellConditioned(6, 5, 2, tau=tau)
    X = M.random(3, *M.point_shape, dtype=dtype).as_subclass(torch.Tensor)
    Y = X.clone()
    M.unpack(Y).S[1].neg_()
    with pytest.raises(ValueError, match=r"must not be 0, got .* that cancel to .* = 0\.5"):
        average_points(M, X, Y, 0.5)
    W = 0.75 * M.to_dense(X[1]) + 0.25 * M.to_dense(Y[1])
    torch.testing.assert_close(M.to_dense(average_points(M, X, Y, 0.25)[1]), W)
    probe = lrm.FixedRank(6, 5, 2, gradient="probe")
    zero = probe.to_dense(average_points(probe, X, Y, 0.5)[1])
    torch.testing.assert_close(zero, torch.zeros_like(zero))


def test_ranks_that_were_adapted_are_followed():
    model = network(rank=3)
    average = retracting_average(model, 0.5)
    average.update_parameters(model)
    model.load_state_dict(network(rank=2).state_dict())
    average.update_parameters(model)
    assert [x.rank for x in low_rank_layers(average)] == [2, 2]
    assert drift(average) <= 5e-6  # float32: 10 roundings on some processors
    average(torch.randn(2, 2, 4, 4)).sum().backward()


def test_other_manifolds_are_projected_to():
    class Orthogonal(nn.Module):
        def __init__(self):
            super().__init__()
            import geoopt

            M = lrm.Stiefel()
            self.Q = geoopt.ManifoldParameter(M.random(6, 3), manifold=M)

    model = Orthogonal()
    average = retracting_average(model, 0.5)
    average.update_parameters(model)
    average.update_parameters(Orthogonal())
    Q = average.module.Q.detach()
    torch.testing.assert_close(Q.mT @ Q, torch.eye(3))


def test_state_dicts_and_copies_work_as_torchs():
    model = network()
    average = retracting_average(model, 0.9)
    train(model, 5, average)
    other = retracting_average(network(), 0.9)
    other.load_state_dict(average.state_dict())
    train(model, 3, average, other)
    for a, b in zip(average.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert drift(copy.deepcopy(average)) <= 5e-6  # float32: 10 roundings on some processors


def test_wrong_arguments_and_lost_manifolds_are_refused():
    model = network()
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"decay must be a finite number in \[0, 1\), got"):
            retracting_average(model, decay)
    M = low_rank_layers(model)[1].manifold
    X = low_rank_layers(model)[1].weight.detach()
    with pytest.raises(ValueError, match=r"weight must be a finite number in \[0, 1\], got 1\.5"):
        average_points(M, X, X, 1.5)
    average = retracting_average(model)
    average.update_parameters(model)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got None"):
        average.update_parameters(None)
    before = copy.deepcopy(dict(average.state_dict()))
    low_rank_layers(model)[1].weight.__class__ = nn.Parameter
    del low_rank_layers(model)[1].weight.manifold
    with pytest.raises(GeometryError, match=r"'3\.weight' has lost its manifold in the model"):
        average.update_parameters(model)
    for key, value in average.state_dict().items():
        assert torch.equal(value, before[key])


def test_an_average_is_computed_in_full_precision_within_autocast():
    model = network()
    inside, outside = (retracting_average(model, 0.9) for _ in range(2))
    for _ in range(5):
        train(model, 1, outside)
        with torch.autocast("cpu", torch.bfloat16):
            inside.update_parameters(model)
    for p, q in zip(inside.parameters(), outside.parameters(), strict=True):
        assert torch.equal(p, q)
    X, Y = (
        layer.weight.detach()[0]
        for layer in (low_rank_layers(model)[0], low_rank_layers(inside)[0])
    )
    M = low_rank_layers(model)[0].manifold
    with torch.autocast("cpu", torch.bfloat16):
        found = average_points(M, X, Y, 0.3)
    assert torch.equal(found, average_points(M, X, Y, 0.3))


def test_an_average_in_float32_of_a_model_in_bfloat16_keeps_small_changes():
    """In bfloat16 each update would be rounded away, and the points be off the manifold."""
    dense = nn.Sequential(nn.Linear(32, 12))
    model = lrm.factorize(dense, rank=3, tau=0.1, keep_larger=True).to(torch.bfloat16)
    average = retracting_average(model, 0.999).float()
    average.update_parameters(model)
    assert drift(average) <= 1e-5
    layer, mean = low_rank_layers(model)[0], low_rank_layers(average)[0]
    start = layer.dense_weight().detach().double()
    with torch.no_grad():
        layer.weight[12:15] *= 2
    for _ in range(100):
        average.update_parameters(model)
    moved = mean.dense_weight().detach().double() - start
    torch.testing.assert_close(moved, (1 - 0.999**100) * start, rtol=0.05, atol=2e-3)
    assert drift(average) <= 1e-5


def test_a_model_of_other_parameters_is_refused():
    """Torch averages by place, so that layers of equal shape would be mixed in silence."""
    layers = {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}
    average = retracting_average(nn.ModuleDict(layers), 0.5)
    more = nn.ModuleDict({**layers, "c": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=r"differs in \['c.bias', 'c.weight'\]"):
        average.update_parameters(more)
    turned = nn.ModuleDict()
    for name in ("b", "a"):
        turned.add_module(name, layers[name])
    with pytest.raises(ValueError, match=r"in the order \['b.weight'"):
        average.update_parameters(turned)
    assert int(average.n_averaged) == 0


def test_a_model_of_other_shapes_is_refused_before_anything_changes():
    """torch fills up by broadcasting, or stops midway with a message about sizes."""

    def dense(outputs, norm=3):
        return nn.ModuleList([nn.Linear(3, outputs), nn.BatchNorm1d(norm)])

    def adapted(rank):
        return lrm.nn.adapt(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), rank=rank)

    for make, other, word in (
        (lambda: dense(3), dense(1), r"'0\.weight' of model .* \(3, 3\), .* got \(1, 3\)"),
        (lambda: dense(3), dense(3, 1), r"'1\.weight' of model"),
        (lambda: dense(3, 0), nn.ModuleList([nn.Linear(3, 3)]), "differs in"),
        (lambda: adapted(2), adapted(3), r"'0\..*start' of model .* \(18, 2\), .* got \(19, 3\)"),
        (network, lrm.factorize(nn.Sequential(nn.Linear(3, 3)), rank=2, keep_larger=True), "model"),
    ):
        model = make()
        average = retracting_average(model, 0.5)
        average.update_parameters(model)
        before = copy.deepcopy(average.state_dict())
        with pytest.raises(ValueError, match=word):
            average.update_parameters(other)
        after = average.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before)


def test_an_average_goes_through_pickle():
    model = network()
    average = retracting_average(model, 0.9)
    train(model, 3, average)
    other = pickle.loads(pickle.dumps(average))
    train(model, 3, average, other)
    for a, b in zip(average.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_with_a_decay_dense_weights_are_averaged_as_by_torch():
    model, decay = nn.Linear(4, 3), 0.9
    ours = retracting_average(model, decay)
    torchs = AveragedModel(model, avg_fn=get_ema_avg_fn(decay))
    for _ in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(3, 4))
        ours.update_parameters(model)
        torchs.update_parameters(model)
    assert torch.equal(ours.module.weight, torchs.module.weight)
