"""Certificates against attacks: no input inside the radius may change the class.

And the other way round: bounds that are wrong on purpose must be caught by the same attacks.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from certify_attacks import margin, strongest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lrmanifold as lrm
from lrmanifold import certify
from lrmanifold.certify import bounds as registry
from lrmanifold.nn import ConvexPotential, LowRankConv2d, LowRankLinear, MaxMin, Patchify, Residual


def fresh(layer, size: float = 1.0):
    """A random point instead of the start, and not too small."""
    with torch.no_grad():
        M = layer.manifold
        layer.weight.copy_(M.random(*layer.weight.shape, dtype=layer.weight.dtype))
        if M.__dict__.get("scale", "free") == "free":
            M.unpack(layer.weight).S.mul_(size)
    return layer


@st.composite
def dense_networks(draw):
    torch.manual_seed(draw(st.integers(0, 10_000)))
    n = draw(st.integers(2, 6))
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(draw(st.integers(1, 4))):
        m = draw(st.integers(2, 8))
        kind = draw(st.sampled_from(("low", "low", "dense", "residual", "potential", "norm")))
        tau = draw(st.sampled_from((0.0, 0.1, 1.0)))
        rank = draw(st.integers(1, min(m, n)))
        if kind == "low":
            layers += [fresh(LowRankLinear(n, m, rank, tau=tau), 2.0)]
            n = m
        elif kind == "dense":
            layers += [nn.Linear(n, m)]
            n = m
        elif kind == "residual":
            layers += [Residual(nn.Linear(n, n), nn.Tanh())]
        elif kind == "potential":
            layer = ConvexPotential(n, draw(st.integers(1, n)), tau=tau)
            fresh(layer.layer)
            layers += [layer]
        else:
            norm = nn.BatchNorm1d(n)
            norm.running_var.uniform_(0.2, 3.0)
            norm.running_mean.normal_()
            layers += [fresh(LowRankLinear(n, n, draw(st.integers(1, n)), tau=tau)), norm]
        layers += [
            draw(st.sampled_from((MaxMin, nn.ReLU, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Softplus)))()
        ]
    layers += [nn.Linear(n, draw(st.integers(2, 4)))]
    return nn.Sequential(*layers).eval()


@st.composite
def image_networks(draw):
    torch.manual_seed(draw(st.integers(0, 10_000)))
    c, side = draw(st.integers(1, 3)), draw(st.sampled_from((6, 8)))
    shape = (c, side, side)
    layers: list[nn.Module] = []
    if draw(st.booleans()):
        layers += [Patchify(2)]
        c, side = 4 * c, side // 2
    for _ in range(draw(st.integers(1, 2))):
        m = draw(st.integers(2, 6))
        k = draw(st.integers(1, 3))
        mode = draw(st.sampled_from(("zeros", "circular", "reflect", "replicate")))
        stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, 1)) if k > 1 else 0
        options = {"stride": stride, "padding": padding, "padding_mode": mode}
        if draw(st.booleans()):
            rank = draw(st.integers(1, min(m, c * k * k)))
            layer = fresh(LowRankConv2d(c, m, k, rank, tau=draw(st.sampled_from((0.0, 0.5)))), 2.0)
            layer = LowRankConv2d(c, m, k, rank, **options, tau=layer.tau)
            layers += [fresh(layer, 2.0)]
        else:
            layers += [nn.Conv2d(c, m, k, **options)]
        if draw(st.booleans()):
            norm = nn.BatchNorm2d(m)
            norm.running_var.uniform_(0.2, 3.0)
            layers += [norm]
        side, c = (side + 2 * padding - k) // stride + 1, m
        layers += [draw(st.sampled_from((nn.ReLU, MaxMin)))()]
        if side >= 3 and draw(st.booleans()):
            pools = (
                (nn.MaxPool2d(3, 1), side - 2),
                (nn.AvgPool2d(2, 1), side - 1),
                (nn.MaxPool2d(2), side // 2),
            )
            pool, side = draw(st.sampled_from(pools))
            layers += [pool]
        if side < 3:
            break
    layers += [nn.Flatten(), nn.Linear(c * side * side, 3)]
    return nn.Sequential(*layers).eval(), shape


def nothing_breaks(model, x):
    """The certificate of each sample against a strong attack on its own ball, in float64."""
    r = certify.radius(model, x)
    twin = certify.lipschitz(model, x.shape[1:]).network.graph
    x = x.double()
    y = twin(x).argmax(1)
    assert bool((r >= 0).all())
    found = strongest(twin, x, y, r * (1 - 1e-12), steps=30)
    assert bool(((found < 0) | (r == 0)).all())


@given(dense_networks(), st.integers(0, 100))
def test_no_attack_enters_the_radius_of_a_dense_network(model, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, _features(model), generator=generator)
    nothing_breaks(model, x)


def _features(model) -> int:
    for module in model.modules():
        if isinstance(module, (nn.Linear, LowRankLinear)):
            return module.in_features
    raise AssertionError


@given(
    dense_networks(),
    st.integers(0, 100),
    st.sampled_from((None, 0.5, 20.0)),
    st.sampled_from(("active", "merged", "resting")),
)
@settings(max_examples=6)
def test_no_attack_enters_the_radius_of_a_network_with_adapters(model, seed, alpha, state):
    torch.manual_seed(seed)
    last = str(len(model) - 1)
    lrm.nn.adapt(model, 1, alpha=alpha, include=["*", last])
    layers = [m for m in model.modules() if isinstance(m, lrm.nn.AdaptedLayer)]
    assert isinstance(model[-1], lrm.nn.AdaptedLayer)
    for layer in layers:
        fresh(layer.changes["default"].update, 2.0)
    dense = [m for m in layers if type(m.base_layer) is nn.Linear]
    if state == "merged" and len(dense) == len(layers):
        lrm.nn.merge(model)
    elif state == "resting":
        lrm.nn.set_adapter(model, None)
    x = torch.randn(4, layers[0].in_features)
    nothing_breaks(model, x)
    if any(isinstance(m, ConvexPotential) for m in model.modules()):
        return  # is no longer one with a dense layer
    total = certify.lipschitz(model, x.shape[1:]).total
    plain = certify.lipschitz(lrm.densify(model), x.shape[1:]).total
    assert plain * (1 - 1e-5) <= total <= plain * (1 + 1e-4)


@given(image_networks(), st.integers(0, 100))
@settings(max_examples=15)
def test_no_attack_enters_the_radius_of_a_convolutional_network(case, seed):
    model, shape = case
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))
    nothing_breaks(model, x)


@given(st.integers(0, 1000))
@settings(max_examples=8)
def test_no_point_of_a_dense_grid_inside_the_radius_has_another_class(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(
        fresh(LowRankLinear(2, 4, 2, tau=0.0), 2.0), MaxMin(), nn.Linear(4, 4), nn.ReLU(),
        nn.Linear(4, 3),
    )  # fmt: skip
    x = torch.randn(3, 2)
    r = certify.radius(model, x)
    twin = certify.lipschitz(model, (2,)).network.graph
    y = twin(x.double()).argmax(1)
    angles = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)[:-1]
    for share in torch.linspace(0.02, 1.0 - 1e-9, 40, dtype=torch.float64):
        for i in range(3):
            ring = x[i].double() + r[i] * share * torch.stack((angles.cos(), angles.sin()), 1)
            assert bool((twin(ring).argmax(1) == y[i]).all())


def test_the_radius_of_a_linear_model_is_the_distance_to_the_boundary(device):
    torch.manual_seed(0)
    model = nn.Linear(5, 3).to(device)
    x = torch.randn(6, 5).to(device)  # the same points everywhere
    W, b = model.weight.detach().double(), model.bias.detach().double()
    z = x.double() @ W.T + b
    y = z.argmax(1)
    exact = torch.stack(
        [
            min(
                float((z[i, y[i]] - z[i, j]) / (W[y[i]] - W[j]).norm())
                for j in range(3)
                if j != y[i]
            )
            * torch.ones((), dtype=torch.float64)
            for i in range(6)
        ]
    ).to(device)
    r = certify.radius(model, x)
    assert bool((r <= exact).all())
    assert torch.allclose(r, exact, rtol=1e-9)
    # the attack that the other tests rely on finds the boundary a little further out
    found = strongest(model.double(), x.double(), y, 1.001 * exact)
    assert bool((found > 0).all())


def test_radii_grow_no_larger_by_a_layer_of_norm_one():
    torch.manual_seed(0)
    head = nn.Linear(6, 3)
    plain = nn.Sequential(nn.Flatten(), head)
    turned = nn.Sequential(nn.Flatten(), LowRankLinear(6, 6, 6, tau=0.0, scale=1.0), head)
    x = torch.randn(5, 6)
    with torch.no_grad():
        turned[1].bias.zero_()
    Q = turned[1].dense_weight().detach()
    assert torch.allclose(
        certify.radius(turned, torch.linalg.solve(Q, x.T).T), certify.radius(plain, x), rtol=1e-4
    )


# ------------------------------------------------------------- bounds that are wrong on purpose


@pytest.fixture
def planted():
    """Registers a wrong bound for one test."""
    before = dict(registry._REGISTRY)
    yield certify.register_bound
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)


def attacked(model, x, y, eps):
    """What a user calls to check a certificate."""
    return certify.verified_accuracy(
        model, (x, y), eps, attack=lrm.robustness.pgd, norm="l2", steps=40, restarts=4, clip=None,
        loss=margin, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def convolution_case():
    """A kernel of norm 1 whose map has norm nearly 3."""
    conv = nn.Conv2d(1, 1, 3, padding=1)
    head = nn.Linear(64, 2)
    with torch.no_grad():
        conv.weight.fill_(1 / 3)
        conv.bias.zero_()
        head.weight[0], head.weight[1] = 0.1, -0.1
        head.bias.zero_()
    model = nn.Sequential(conv, nn.Flatten(), head)
    return model, torch.full((2, 1, 8, 8), 0.05), torch.zeros(2, dtype=torch.long)


def test_the_norm_of_the_kernel_in_place_of_the_map_is_caught(planted):
    model, x, y = convolution_case()
    right = float(certify.radius(model, x, y)[0])
    attacked(model, x, y, 0.99 * right)
    planted(nn.Conv2d, lambda m, context: torch.linalg.matrix_norm(m.weight.flatten(1), 2))
    wrong = float(certify.radius(model, x, y)[0])
    assert wrong > 2.5 * right
    with pytest.raises(certify.CertificationError, match="certified samples were broken"):
        attacked(model, x, y, 0.99 * wrong)


def pooling_case():
    """Windows of 3 x 3 at stride 1: one pixel raises nine of them."""
    head = nn.Linear(36, 2)
    with torch.no_grad():
        head.weight[0], head.weight[1] = -1.0, 1.0
        head.bias[0], head.bias[1] = 3.0, -3.0
    model = nn.Sequential(nn.MaxPool2d(3, 1), nn.Flatten(), head)
    x = torch.zeros(2, 1, 8, 8)
    x[:, :, 2::3, 2::3] = 0.01  # no ties: the gradient knows where to go
    return model, x, torch.zeros(2, dtype=torch.long)


def test_a_forgotten_overlap_of_pooling_windows_is_caught(planted):
    model, x, y = pooling_case()
    right = float(certify.radius(model, x, y)[0])
    attacked(model, x, y, 0.99 * right)
    planted(nn.MaxPool2d, lambda m, context: 1.0)
    wrong = float(certify.radius(model, x, y)[0])
    assert wrong == pytest.approx(3 * right, rel=1e-6)
    with pytest.raises(certify.CertificationError, match="some bound is wrong"):
        attacked(model, x, y, 0.99 * wrong)


def truncated_case():
    """A core that has lost half of its values; the mean of squares is that of four, not of two."""
    layer = LowRankLinear(6, 6, 4, bias=False, tau=0.0)
    head = nn.Linear(6, 2)
    with torch.no_grad():
        U, S, _ = layer.manifold.unpack(layer.weight)
        S.copy_(torch.diag(torch.tensor([2.0, 2.0, 1e-3, 1e-3])))
        head.weight[0], head.weight[1] = U[:, 0], -U[:, 0]
        head.bias[0], head.bias[1] = 1.0, -1.0
    model = nn.Sequential(layer, head)
    return model, torch.zeros(2, 6), torch.zeros(2, dtype=torch.long)


def test_alpha_from_the_mean_of_squares_of_a_truncated_core_is_caught(planted):
    model, x, y = truncated_case()
    right = float(certify.radius(model, x, y)[0])
    attacked(model, x, y, 0.99 * right)
    planted(LowRankLinear, lambda m, context: m.factors.S.norm() / math.sqrt(m.rank))
    wrong = float(certify.radius(model, x, y)[0])
    assert wrong > 1.4 * right
    with pytest.raises(certify.CertificationError):
        attacked(model, x, y, 0.99 * wrong)


def test_a_frame_that_is_too_long_is_measured():
    # within what the float32 check of a layer accepts, so nobody else notices
    layer = LowRankLinear(8, 8, 3, bias=False, tau=0.0)
    with torch.no_grad():
        layer.manifold.unpack(layer.weight).U.mul_(1.0 + 4e-5)
        layer.manifold.unpack(layer.weight).V.mul_(1.0 + 4e-5)
    true = float(torch.linalg.matrix_norm(layer.manifold.to_dense(layer.weight.double()), 2))
    alpha = float(layer.alpha)
    assert true > alpha * (1.0 + 5e-5)
    bound = certify.lipschitz(nn.Sequential(layer), (8,)).total
    assert true <= bound <= true * (1.0 + 1e-5) * (1.0 + 4e-5)


@given(st.integers(0, 200), st.sampled_from((0.0, 0.1)), st.booleans())
def test_reports_are_above_the_dense_product(seed, tau, half):
    torch.manual_seed(seed)
    layers = [fresh(LowRankLinear(6, 5, 3, tau=tau), 2.0), fresh(LowRankLinear(5, 4, 2, tau=tau))]
    if half:
        layers = [layer.bfloat16() for layer in layers]
    model = nn.Sequential(*layers)
    W = [layer.manifold.to_dense(layer.weight.detach().double()) for layer in layers]
    norms = [float(torch.linalg.matrix_norm(w, 2)) for w in W]
    report = certify.lipschitz(model, (6,))
    for row, norm in zip(report.rows, norms, strict=True):
        assert norm * (1 - 1e-14) <= row.bound
        if not half:
            assert row.bound <= norm * (1 + 3e-6)
    assert report.total >= float(torch.linalg.matrix_norm(W[1] @ W[0], 2))


def test_a_batch_norm_is_folded_into_the_layer_before_it():
    torch.manual_seed(0)
    for layer, norm, shape in (
        (nn.Linear(6, 6), nn.BatchNorm1d(6), (6,)),
        (fresh(LowRankLinear(6, 6, 3, tau=0.0)), nn.BatchNorm1d(6), (6,)),
        (nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), (2, 5, 5)),
        (fresh(LowRankConv2d(2, 6, 3, 4, padding=1, tau=0.1)), nn.BatchNorm2d(6), (2, 5, 5)),
    ):
        norm.running_var.uniform_(0.05, 5.0)
        model = nn.Sequential(layer, norm).eval()
        after = (6,) if len(shape) == 1 else (6, 5, 5)
        apart = certify.lipschitz(layer, shape).total * certify.lipschitz(norm, after).total
        report = certify.lipschitz(model, shape)
        x = torch.zeros(math.prod(shape), dtype=torch.float64)
        graph = report.network.graph
        J = torch.func.jacrev(lambda v, g=graph, s=shape: g(v.view(1, *s)).flatten())(x)
        true = float(torch.linalg.matrix_norm(J, 2))
        assert true <= report.total <= apart * (1 + 1e-12)
        assert report.total <= 1.35 * true


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.3), nn.LeakyReLU(-1.7), nn.Tanh(), nn.Sigmoid(),
    nn.Hardtanh(), nn.Hardsigmoid(), nn.Hardswish(), nn.ELU(), nn.ELU(2.0), nn.SELU(),
    nn.CELU(0.5), nn.SiLU(), nn.Mish(), nn.GELU(), nn.GELU("tanh"), nn.Softplus(),
    nn.Softplus(3.0), nn.LogSigmoid(), nn.Softsign(), nn.Tanhshrink(), nn.Softshrink(),
    nn.PReLU(init=1.8), nn.RReLU(), MaxMin(),
]  # fmt: skip


@pytest.mark.parametrize("act", ACTIVATIONS, ids=repr)
def test_constants_of_activations_are_their_largest_slopes(act):
    x = torch.linspace(-12, 12, 400_001, dtype=torch.float64).requires_grad_()
    act = act.double().eval()
    if isinstance(act, MaxMin):
        slope = torch.ones(())
    else:
        slope = torch.autograd.grad(act(x).sum(), x)[0].abs().amax()
        secants = (act(x)[1:] - act(x)[:-1]).abs() / (x[1] - x[0]).detach()
        slope = torch.maximum(slope, secants.amax())
    bound = certify.lipschitz(act, (4,)).total
    assert float(slope) * (1 - 1e-10) <= bound <= float(slope) * 1.0005


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2), nn.AvgPool2d(3, 2), nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.AvgPool2d(2, divisor_override=1),
        nn.AdaptiveAvgPool2d(3), nn.AdaptiveAvgPool2d((1, None)), nn.ReflectionPad2d((2, 1, 0, 3)),
        nn.ReplicationPad2d(2), nn.CircularPad2d((1, 2, 3, 0)), nn.ZeroPad2d(1),
        nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=1.3),
        nn.ConvTranspose2d(2, 3, 3, 2, 1),
        nn.ConvTranspose2d(2, 4, 2, 2, groups=2), nn.PixelUnshuffle(1), nn.Flatten(),
    ],
    ids=repr,
)  # fmt: skip
def test_linear_maps_on_images_are_bounded_and_closely(pool):
    pool = pool.double()
    zero = torch.zeros(1, 2, 7, 6, dtype=torch.float64)
    J = torch.func.jacrev(lambda v: pool(v.view_as(zero)).flatten())(zero.flatten())
    true = float(torch.linalg.matrix_norm(J, 2))
    bound = certify.lipschitz(pool, (2, 7, 6)).total
    assert true * (1 - 1e-12) <= bound <= true * 1.6


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 1), nn.MaxPool2d(3, 2, 1),
                                  nn.MaxPool2d(2, 2, dilation=2), nn.MaxPool2d(2, 1, dilation=2),
                                  nn.AdaptiveMaxPool2d(3)], ids=repr)  # fmt: skip
def test_maximum_pooling_counts_overlaps(pool):
    bound = certify.lipschitz(pool, (1, 7, 7)).total
    # one pixel far above the others: it alone decides every window that holds it
    stretch = 0.0
    for i, j in itertools.product(range(7), range(7)):
        x = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
        x[0, 0, i, j] = 1.0
        stretch = max(stretch, float(pool(x).norm()))
    assert stretch * (1 - 1e-12) <= bound <= stretch * (1 + 1e-9)
    x, y = torch.randn(2, 200, 1, 7, 7)
    change = (pool(x) - pool(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert float(change.max()) <= bound


def test_a_jump_of_softplus_is_counted():
    # torch's Softplus is x above its threshold: at 14 it falls by 8e-7
    act, head = nn.Softplus(threshold=14.0).double(), nn.Linear(1, 2, dtype=torch.float64)
    between = 14.0 + 4e-7
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        head.bias.copy_(torch.tensor([-between, between], dtype=torch.float64))
    model = nn.Sequential(act, head)
    x = torch.tensor([[14.0 - 1e-9], [16.0]], dtype=torch.float64)
    assert model(x)[0].argmax() == 0
    assert model(x + 2e-9)[0].argmax() == 1
    r = certify.radius(model, x)
    assert float(r[0]) == 0.0
    assert 0.5 < float(r[1]) < 2.0
    assert "jump" in certify.lipschitz(model, (1,)).rows[0].how


@pytest.mark.parametrize("threshold", [1.0, 0.0, -800.0])
def test_softplus_with_a_jump_that_can_be_seen_is_refused(threshold):
    with pytest.raises(certify.BoundError, match="jumps by"):
        certify.lipschitz(nn.Sequential(nn.Softplus(threshold=threshold)), (1,))


def test_rounding_of_the_forward_is_subtracted():
    # a bias so large that float64 rounds x to multiples of 16
    first, head = nn.Linear(1, 1), nn.Linear(1, 2)
    with torch.no_grad():
        first.weight.fill_(1.0)
        first.bias.fill_(1e17)
        head.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        head.bias.copy_(torch.tensor([-1e17, 1e17]))
    model = nn.Sequential(first, head)
    x = torch.tensor([[-8.5], [-1e4]])
    exact = x.double().abs()[:, 0]  # the classes meet at 0
    computed = certify.lipschitz(model, (1,)).network.graph(x.double())
    assert float(computed[0, 1] - computed[0, 0]) > 3 * float(exact[0])
    r = certify.radius(model, x)
    assert bool((r <= exact).all())
    assert float(r[1]) > 0.5 * float(exact[1])
