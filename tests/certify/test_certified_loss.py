"""Training for certificates: worst-case logits, losses, and what they do to a network."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import ForbidHostSynchronisation
from torch import nn
from torch.nn import functional as F

import lrmanifold as lrm
from lrmanifold import certify
from lrmanifold.nn import ConvexPotential, LowRankConv2d, LowRankLinear, MaxMin, Patchify


def network(tau=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), LowRankLinear(16, 8, 4, tau=tau), MaxMin(), nn.Linear(8, 6), nn.ReLU(),
        nn.Linear(6, 3),
    )  # fmt: skip


def test_worst_case_logits_keep_the_class_exactly_where_a_sample_is_certified(device):
    model = network().to(device)
    x = torch.randn(200, 1, 4, 4, device=device)
    z = model(x)
    y = z.argmax(1)
    bound = certify.LipschitzBound(model, (1, 4, 4))
    r = certify.radius(model, x, y)
    for eps in (0.05, 0.2, 0.5):
        worst = certify.worst_case_logits(bound, z, y, eps)
        safe = worst.argmax(1) == y
        clear = (r - eps).abs() > 1e-4 * eps  # float32 and a few power iterations
        assert torch.equal(safe[clear], (r > eps)[clear])
    assert torch.equal(certify.worst_case_logits(bound, z, y, 0.0), z)
    own = torch.arange(len(y), device=device)
    assert torch.equal(certify.worst_case_logits(model, z, y, 1.0)[own, y], z[own, y])


@pytest.mark.parametrize("tau", [0.0, 0.1])
def test_the_bound_is_differentiated_against_finite_differences(tau):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), LowRankLinear(6, 5, 3, tau=tau), MaxMin(), ConvexPotential(5, 2, tau=tau),
        nn.Linear(5, 3),
    ).double()  # fmt: skip
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.randint(0, 3, (7,))
    bound = certify.LipschitzBound(model, (6,))
    loss = certify.CertifiedLoss(0.3)

    def value():
        return loss(bound, model(x), y)

    value().backward()
    generator = torch.Generator().manual_seed(1)
    for p in (model[4].weight, model[4].bias):
        step = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            p.add_(1e-6 * step)
            up = value()
            p.sub_(2e-6 * step)
            down = value()
            p.add_(1e-6 * step)
        slope = float((up - down) / 2e-6)
        assert float((p.grad * step).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    # along the size of the core, which is what the bound is about
    layer = model[1]
    along = (
        layer.manifold.unpack(layer.weight.grad).S * layer.manifold.unpack(layer.weight).S
    ).sum()
    values = []
    for size in (1 + 1e-6, (1 - 1e-6) / (1 + 1e-6)):
        with torch.no_grad():
            layer.manifold.unpack(layer.weight).S.mul_(size)
        values.append(float(value().detach()))
    assert float(along) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


@pytest.mark.parametrize("kind", ["cross_entropy", "trades", "emma"])
def test_losses_fall_between_the_plain_and_the_worst_case(kind):
    model = network()
    x, y = torch.randn(64, 16), torch.randint(0, 3, (64,))
    bound = certify.LipschitzBound(model, (16,))
    z = model(x)
    plain = F.cross_entropy(z, y)
    assert float(certify.CertifiedLoss(0.0, kind=kind)(bound, z, y)) == pytest.approx(
        float(plain), rel=1e-6
    )
    found = certify.CertifiedLoss(0.5, kind=kind)(bound, z, y)
    worst = F.cross_entropy(certify.worst_case_logits(bound, z, y, 0.5), y)
    assert float(plain) < float(found)
    if kind == "cross_entropy":
        assert float(found) == pytest.approx(float(worst), rel=1e-6)
    if kind == "emma":
        assert float(found) <= float(worst)
        # nowhere does a rival get more than makes it win
        with torch.no_grad():
            slack = certify.worst_case_logits(bound, z, y, 1.0) - z
            room = (z.gather(1, y[:, None]) - z) / slack.clamp_min(1e-30)
            raised = z + room.clamp(0, 0.5) * slack
        assert float(found) == pytest.approx(float(F.cross_entropy(raised, y)), rel=1e-5)
    found.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_schedules_ramp_and_are_saved():
    loss = certify.CertifiedLoss(0.4, 4)
    seen = []
    for _ in range(6):
        seen.append(loss.current_eps)
        loss.step()
    assert seen == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])
    other = certify.CertifiedLoss(0.4, 4)
    other.load_state_dict(loss.state_dict())
    assert other.current_eps == 0.4
    half = certify.CertifiedLoss(0.4, lambda step: 0.5)
    assert half.current_eps == 0.2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"eps": -1.0}, "eps"), ({"eps": math.nan}, "eps"),
        ({"eps": 1.0, "schedule": 0}, "schedule"),
        ({"eps": 1.0, "schedule": 2.5}, "schedule"), ({"eps": 1.0, "kind": "hinge"}, "kind"),
        ({"eps": 1.0, "weight": 0.0}, "weight"), ({"eps": 1.0, "temperature": -1.0}, "temperature"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_a_loss_are_named(arguments, words):
    kind = TypeError if arguments.get("schedule") == 2.5 else ValueError
    with pytest.raises(kind, match=words):
        certify.CertifiedLoss(**arguments)


def test_logits_of_another_shape_are_named():
    with pytest.raises(ValueError, match="logits"):
        certify.worst_case_logits(network(), torch.zeros(3), torch.zeros(3, dtype=torch.long), 0.1)


def test_training_raises_the_verified_accuracy():
    torch.manual_seed(0)
    x = torch.randn(256, 1, 4, 4)
    y = (x.flatten(1)[:, 0] > 0).long() + 2 * (x.flatten(1)[:, 1] > 0).long()
    model = nn.Sequential(
        Patchify(2), LowRankConv2d(4, 12, 1, 4, tau=0.0), MaxMin(), nn.Flatten(),
        LowRankLinear(48, 16, 8, tau=0.0), MaxMin(), nn.Linear(16, 4),
    )  # fmt: skip
    bound = certify.LipschitzBound(model, (1, 4, 4))
    loss = certify.CertifiedLoss(0.1, 60)
    optimizer = lrm.optim.CondLRAdam(lrm.optim.param_groups(model), lr=0.02)
    before = certify.verified_accuracy(model, (x, y), 0.05)["verified"][0.05]
    for _ in range(120):
        optimizer.zero_grad()
        loss(bound, model(x), y).backward()
        optimizer.step()
        loss.step()
    found = certify.verified_accuracy(
        model, (x, y), (0.0, 0.05, 0.2), attack=lrm.robustness.pgd, norm="l2", steps=10, clip=None,
        batch_size=100, progress=(seen := []).append,
    )  # fmt: skip
    assert seen == [100, 200, 256]
    assert found["verified"][0.05] > before + 0.3
    assert found["count"] == 256
    for eps in (0.0, 0.05, 0.2):
        assert found["verified"][eps] <= found["attacked"][eps] <= found["clean"]
    assert found["verified"][0.2] <= found["verified"][0.05]


def test_wrong_arguments_of_verified_accuracy_are_named():
    model, x, y = network(), torch.randn(4, 16), torch.zeros(4, dtype=torch.long)
    for eps in (-0.1, (), math.inf):
        with pytest.raises(ValueError, match="eps"):
            certify.verified_accuracy(model, (x, y), eps)
    with pytest.raises(TypeError, match="attack"):
        certify.verified_accuracy(model, (x, y), 0.1, steps=3)
    with pytest.raises(ValueError, match="equally long"):
        certify.verified_accuracy(model, (x, y[:3]), 0.1)
    with pytest.raises(ValueError, match="no samples"):
        certify.verified_accuracy(model, [], 0.1)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        certify.radius(model, x, y + 3)
    with pytest.raises(ValueError, match="integer classes"):
        certify.radius(model, x, y.float())
    with pytest.raises(ValueError, match="finite"):
        certify.radius(model, x * math.nan)
    with pytest.raises(ValueError, match="floating point"):
        certify.radius(model, y)
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    parts = [(torch.randn(2, 1, n, n), torch.zeros(2, dtype=torch.long)) for n in (5, 6)]
    with pytest.raises(ValueError, match="one shape"):
        certify.verified_accuracy(conv, parts, 0.1)


@pytest.mark.parametrize("kind", ["cross_entropy", "trades", "emma"])
def test_on_an_accelerator_the_radius_is_a_tensor_and_the_loss_the_same(kind, monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    x, y = torch.randn(7, 6), torch.randint(0, 3, (7,))
    loss = certify.CertifiedLoss(0.3, 4, kind)
    bound = certify.LipschitzBound(model, (6,))
    for _ in range(7):
        bound.forget()
        expected = loss(bound, model(x), y)
        bound.forget()
        with monkeypatch.context() as patch:
            patch.setattr(certify.CertifiedLoss, "_radius", lambda self, _: self._radius_there(4))
            torch.testing.assert_close(loss(bound, model(x), y), expected)
        assert float(loss._radius_there(4)) == pytest.approx(loss.current_eps)
        loss.step()


def test_warm_starts_stay_at_their_place():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    bound = certify.LipschitzBound(model, (6,))
    before = {name: v.data_ptr() for name, v in bound._memory.items()}
    assert before
    first, second = bound.evaluate()[0], bound.evaluate()[0]
    (first + second).backward()
    assert before == {name: v.data_ptr() for name, v in bound._memory.items()}


@pytest.mark.parametrize("kind", ["cross_entropy", "trades", "emma"])
def test_in_training_an_accelerator_is_not_waited_for(kind):
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.ReLU(),
        LowRankLinear(5, 4, 2, tau=0.0), torch.nn.Linear(4, 3),
    )  # fmt: skip
    bound = certify.LipschitzBound(model, (6,))
    model.to("meta")  # warm starts of before are on the CPU
    loss = certify.CertifiedLoss(0.3, 4, kind).to("meta")
    x, y = torch.empty(7, 6, device="meta"), torch.empty(7, dtype=torch.long, device="meta")
    loss(bound, model(x), y)  # the first call draws the starts of power iterations on the host
    with ForbidHostSynchronisation():
        loss(bound, model(x), y).backward()
        loss.step()


def test_a_batch_norm_is_folded_in_training_as_in_the_certificate():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5)).eval()
    model[1].running_var.uniform_(0.2, 5.0)
    bound = certify.LipschitzBound(model, (6,))
    plain = bound.evaluate()[0]
    assert float(plain) == pytest.approx(certify.lipschitz(model, (6,)).total, rel=1e-3)


def test_a_graph_would_keep_a_radius_that_the_host_computes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    there = torch.device("cuda")
    for schedule in (4, lambda step: 1.0):
        with pytest.raises(RuntimeError, match="move the loss"):
            certify.CertifiedLoss(0.3, schedule)._radius(there)
    assert certify.CertifiedLoss(0.3)._radius(there) == 0.3
    assert certify.CertifiedLoss(0.3, 4)._radius(torch.device("cpu")) == 0.0


def test_wrong_labels_radii_and_logits_are_named():
    model = nn.Sequential(nn.Linear(2, 3))
    body = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    z, y = torch.zeros(2, 3), torch.tensor([0, 1])
    for net in (model, body):
        for bad in (torch.tensor([0, -1]), torch.tensor([0, 3])):
            with pytest.raises(ValueError, match=r"y must be in 0\.\.2"):
                certify.worst_case_logits(net, z, bad, 0.1)
        with pytest.raises(ValueError, match="y must hold 2 integer classes"):
            certify.worst_case_logits(net, z, y.float(), 0.1)
        for eps in (-1.0, float("nan")):
            with pytest.raises(ValueError, match="eps must be at least 0"):
                certify.worst_case_logits(net, z, y, torch.tensor(eps))
    with pytest.raises(ValueError, match="the network's 3 classes"):
        certify.worst_case_logits(model, torch.zeros(2, 5), y, 0.1)
    with pytest.raises(TypeError, match="for y"):
        certify.verified_accuracy(model, (torch.rand(2, 2), [0, 1]), 0.1)
    with pytest.raises(ValueError, match="data holds no samples"):
        certify.verified_accuracy(model, (torch.rand(0, 2), torch.zeros(0).long()), 0.1)
    with pytest.raises(ValueError, match="input_shape must be positive integers"):
        certify.lipschitz(model, (True,))
