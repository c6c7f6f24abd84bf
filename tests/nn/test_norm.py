"""MeanOnlyBatchNorm: what it computes, what it promises of the layer before it, the conversion."""

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn import MeanOnlyBatchNorm

SHAPES = [(6, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_batch_norm_with_the_scale_undone(shape, device):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, device=device) * 3 + 1
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2]
    dense = kind(3, eps=1e-15, device=device, dtype=torch.float64)
    ours = MeanOnlyBatchNorm(3, device=device, dtype=torch.float64)
    with torch.no_grad():
        for norm in (dense, ours):
            norm.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    axes = [0, *range(2, x.ndim)]
    scale = x.var(axes, correction=0).sqrt().reshape(-1, *(1,) * (x.ndim - 2))
    bias = ours.bias.detach().reshape(scale.shape)
    torch.testing.assert_close((ours(x) - bias) / scale + bias, dense(x))
    torch.testing.assert_close(ours.running_mean, dense.running_mean)
    # in evaluation mode a shift by what was kept
    ours.eval()
    shift = (ours.bias - ours.running_mean).detach().reshape(scale.shape)
    torch.testing.assert_close(ours(x), x + shift)


def test_gradients_by_finite_differences(device):
    norm = MeanOnlyBatchNorm(3, device=device, dtype=torch.float64)
    x = torch.randn(4, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    norm(x).pow(2).sum().backward()
    assert norm.bias.grad is not None


@given(
    st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 1.0]), st.integers(2, 8), st.integers(2, 8)
)
def test_the_bound_on_a_kernel_is_one_on_the_layer_with_its_norm(seed, tau, m, n):
    """The Jacobian of layer and norm together, as numpy sees it; batch norm's is another."""
    torch.manual_seed(seed)
    rank = min(m, n) - 1
    layer = lrm.nn.LowRankLinear(n, m, rank, tau=tau, dtype=torch.float64)
    norm = MeanOnlyBatchNorm(m, dtype=torch.float64)
    model = nn.Sequential(layer, norm)
    model(torch.randn(16, n, dtype=torch.float64) * torch.linspace(0.1, 9.0, n).double())
    model.eval()
    J = torch.autograd.functional.jacobian(lambda x: model(x[None])[0], torch.zeros(n).double())
    s = np.linalg.svd(J.numpy(), compute_uv=False)[:rank]
    assert s[0] <= (1.0 + tau) * s[-1] * (1.0 + 1e-9)
    assert lrm.certify.lipschitz(model).total >= s[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_its_mean_in_float32(dtype, device):
    x = torch.full((4096, 2), 100.0, dtype=dtype, device=device)
    x[:, 1] = torch.arange(4096, device=device) % 2
    norm = MeanOnlyBatchNorm(2, momentum=1.0, device=device)
    y = norm(x)
    assert y.dtype == dtype
    assert norm.running_mean.dtype == torch.float32
    assert norm.running_mean.tolist() == [100.0, 0.5]  # sums of 4e5 overflow float16
    assert float(y[:, 0].detach().abs().max()) == 0.0


def test_no_bias_reset_and_persistence():
    norm = MeanOnlyBatchNorm(3, bias=False)
    assert norm.bias is None
    assert [*norm.state_dict()] == ["running_mean"]
    norm(torch.randn(5, 3) + 4)
    other = MeanOnlyBatchNorm(3, bias=False)
    file = io.BytesIO()
    torch.save(norm.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 3)
    assert torch.equal(copy.deepcopy(norm).eval()(x), other.eval()(x))
    norm.reset_parameters()
    assert not norm.running_mean.any()
    assert "momentum=0.1, bias=False" in repr(norm)


@pytest.mark.parametrize(
    ("shape", "word"), [((4,), "shape"), ((4, 2), "shape"), ((1, 3), "one value"), ((0, 3), "one")]
)
def test_inputs_without_a_mean_are_refused(shape, word):
    norm = MeanOnlyBatchNorm(3)
    with pytest.raises(ValueError, match=word):
        norm(torch.zeros(shape))
    assert not norm.running_mean.any()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_features": 0}, "num_features"),
        ({"momentum": 0.0}, "momentum"),
        ({"momentum": 2.0}, "momentum"),
        ({"bias": 1}, "bias"),
    ],
)
def test_arguments_that_make_no_sense(options, word):
    with pytest.raises((ValueError, TypeError), match=word):
        MeanOnlyBatchNorm(**{"num_features": 3, **options})


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6, momentum=0.3)),
    )  # fmt: skip


def test_convert_then_factorize_trains_and_is_certified(device):
    model = net().to(device)
    bias = model[1].bias
    converted = MeanOnlyBatchNorm.convert(model)
    assert converted is model
    assert model[1].bias is bias
    assert model[3][2].momentum == 0.3
    assert model[1].running_mean.device == model[0].weight.device
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules())
    lrm.factorize(model, rank=4, tau=0.0)
    optimizer = lrm.optim.CondLRAdam(lrm.optim.param_groups(model), lr=1e-2)
    x, y = torch.randn(16, 3, 3, 3, device=device), torch.arange(16, device=device) % 6
    before = float(nn.functional.cross_entropy(model(x), y))
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert float(loss) < before
    report = lrm.certify.lipschitz(model, input_shape=(3, 3, 3))
    assert {row.name: row.bound for row in report.rows}["1"] == 1.0


def test_convert_alone_and_a_norm_used_twice():
    norm = nn.BatchNorm1d(4)
    assert isinstance(MeanOnlyBatchNorm.convert(norm), MeanOnlyBatchNorm)
    shared = nn.ModuleDict({"a": norm, "b": norm})
    MeanOnlyBatchNorm.convert(shared)
    assert shared["a"] is shared["b"]
    plain = nn.Linear(2, 2)
    assert MeanOnlyBatchNorm.convert(plain) is plain


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def trained(model):
    model(torch.randn(4, 3, 3, 3) + 1)


def scaled(model):
    nn.init.zeros_(model[1].weight)


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        (trained, ValueError, "statistics of a training"),
        (scaled, ValueError, "scales"),
        (lambda m: m[1].register_forward_hook(lambda *a: None), ValueError, "hooks"),
        (lambda m: m.append(nn.BatchNorm1d(6, track_running_stats=False)), ValueError, "track"),
        (lambda m: m.append(nn.BatchNorm1d(6, momentum=None)), ValueError, "momentum"),
        (lambda m: m.append(OwnNorm(6)), TypeError, "OwnNorm"),
        (lambda m: m.append(nn.SyncBatchNorm(6)), TypeError, "SyncBatchNorm"),
    ],
)
def test_what_a_norm_without_scale_would_lose_is_refused_and_nothing_changes(change, error, word):
    model = net()
    change(model)
    before = [*model.modules()]
    with pytest.raises(error, match=word):
        MeanOnlyBatchNorm.convert(model)
    assert [*map(id, model.modules())] == [*map(id, before)]
    with pytest.raises(TypeError, match="model"):
        MeanOnlyBatchNorm.convert("net")
