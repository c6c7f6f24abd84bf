"""The worst case of many attacks, against pyautoattack itself."""

from __future__ import annotations

import builtins
import math

import pytest
import torch
from attacked_nets import labelled, network
from torch import nn

from lrmanifold.robustness import _autoattack, check_masking, worst_case

pyautoattack = pytest.importorskip("pyautoattack")

FAST = {"steps": 10, "queries": 60}
OURS = ("pgd",)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.12)])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "fab-t", "square"])
def test_each_attack_is_that_of_the_package(name, norm, eps, device):
    net = network(device)
    x, y = labelled(net, device)
    spread = net(x).amax(1) - net(x).amin(1)
    assert 8 < spread.median() < 64  # ordinary: no factor
    found = worst_case(net, (x, y), eps, norm=norm, attacks=(name,), **FAST)
    model, whole = net, x
    if name == "square":  # its squares never reach the last row and column
        model = nn.Sequential(nn.ZeroPad2d((0, -1, 0, -1)), net)
        whole = nn.functional.pad(x, (0, 1, 0, 1), value=0.5)
    theirs = pyautoattack.AutoAttack(
        model, attacks=[name], version="custom", eps=eps, seed=0, device=device,
        norm={"linf": "Linf", "l2": "L2"}[norm],
    )  # fmt: skip
    for attack in (theirs.apgd, theirs.apgd_targeted, theirs.fab):
        attack.n_iter, attack.n_restarts = FAST["steps"], 1
    for attack in (theirs.apgd, theirs.apgd_targeted):
        attack.n_iter_2, attack.n_iter_min, attack.size_decr = 2, 1, 1
    theirs.apgd_targeted.n_target_classes = theirs.fab.n_target_classes = 4
    theirs.square.n_queries = FAST["queries"]
    theirs.square.rescale_schedule = True
    z, _ = theirs.run_standard_evaluation(whole, y)
    expected = model(z).argmax(1) == y
    assert torch.equal(found.robust, expected.cpu())
    assert found.clean == pytest.approx(0.9)
    assert (net(x).argmax(1) == y).sum() - expected.sum() > 0


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.025), ("l2", 0.1)])
def test_a_sample_is_robust_only_if_every_attack_fails(norm, eps, device):
    net = network(device)
    x, y = labelled(net, device)
    found = worst_case(net, (x, y), eps, norm=norm, individually=True, **FAST)
    names = list(found.after)
    assert names == ["pgd", "apgd-ce", "apgd-t", "fab-t", "square"]
    single = {n: worst_case(net, (x, y), eps, norm=norm, attacks=(n,), **FAST) for n in names}
    expected = torch.stack([s.robust for s in single.values()]).all(0)
    assert torch.equal(found.robust, expected)
    assert found.alone == {n: s.accuracy for n, s in single.items()}
    assert found.accuracy == pytest.approx(float(expected.double().mean()))
    assert 0 < found.accuracy <= min(found.alone.values()) < found.clean
    left = [found.clean, *found.after.values()]
    assert left == sorted(left, reverse=True)
    assert left[-1] == found.accuracy
    assert [name == "" for name in found.fooled_by] == found.robust.tolist()
    assert found.fooled_by[:6] == ("clean",) * 6
    assert "worst" in str(found)


def test_a_sample_that_only_one_attack_fools_does_not_count_as_robust(device):
    """No gradient anywhere: only Square, which needs none, can fool this model."""
    net = network(device)
    x, y = labelled(net, device, wrong=0)

    def steps(z):
        return net((50 * z).round() / 50)

    found = worst_case(steps, (x, y), 0.06, **FAST | {"queries": 300})
    assert found.after["fab-t"] > found.accuracy + 0.2
    assert set(found.fooled_by) >= {"square"}


def test_the_scale_of_the_logits_does_not_matter(device):
    net = network(device)
    x, y = labelled(net, device)
    found = [
        worst_case(lambda z, c=c: c * net(z), (x, y), 0.03, **FAST).robust
        for c in (2.0**-10, 2.0**-5, 2.0**10, 2.0**20)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert (found[0] != found[2]).float().mean() < 0.05


def test_the_cross_entropy_of_the_package_does_not_saturate(device):
    net = network(device)
    x, y = labelled(net, device)
    large, ordinary = (
        worst_case(lambda z, c=c: c * net(z), (x, y), 0.03, attacks=("apgd-ce",), **FAST)
        for c in (2.0**20, 1.0)
    )
    assert abs(large.accuracy - ordinary.accuracy) < 0.1 < ordinary.clean - ordinary.accuracy


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.12)])
def test_the_range_of_the_images_is_only_a_unit(norm, eps, device):
    net = network(device)
    x, y = labelled(net, device)
    names = ("apgd-ce", "apgd-t", "fab-t", "square")
    unit = worst_case(net, (x, y), eps, norm=norm, attacks=names, individually=True, **FAST)
    other = worst_case(
        lambda z: net((z + 1) / 4), (4 * x - 1, y), 4 * eps, norm=norm, attacks=names,
        individually=True, clip=(-1, 3), **FAST,
    )  # fmt: skip
    for name in names:  # roundings may decide a sample
        assert abs(unit.alone[name] - other.alone[name]) <= 2 / 60
    assert (unit.robust != other.robust).sum() <= 2


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_image_outside_the_ball_or_with_nan_fools_nobody(norm, monkeypatch, device):
    """The package is not believed: what it returns is projected and tried again."""
    net = network(device)
    x, y = labelled(net, device)
    for bad in (lambda u: 1 - u, lambda u: u * math.nan):
        monkeypatch.setattr(_autoattack, "_attack", lambda *_, bad=bad: lambda u, labels: bad(u))
        found = worst_case(net, (x, y), 1e-6, norm=norm, attacks=("square",))
        assert found.accuracy == found.clean


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 3, 3), (2, 2, 2, 2), (1, 6, 9)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_inputs_of_every_shape_dtype_and_range(shape, norm, device):
    for dtype in (torch.float64, torch.bfloat16):
        net = network(device, shape=shape, dtype=dtype)
        low, high = -1.0, 3.0
        x, _ = labelled(net, device, count=20, shape=shape, dtype=dtype)
        x = low + (high - low) * x
        y = net(x).argmax(1)
        eps = 0.5
        seen = []

        def watched(z, net=net, seen=seen, low=low, high=high):
            seen.append((z.dtype, z.shape[1:], float(z.min()) >= low, float(z.max()) <= high))
            return net(z)

        found = worst_case(watched, (x, y), eps, norm=norm, clip=(low, high), **FAST)
        assert found.clean == 1
        assert found.accuracy < 1
        assert {(kind, part) for kind, part, _, _ in seen} == {(dtype, x.shape[1:])}
        assert all(above and below for _, _, above, below in seen)


@pytest.mark.parametrize(("classes", "skipped"), [(2, ("apgd-t",)), (3, ("apgd-t",)), (4, ())])
def test_few_classes_skip_what_is_not_defined_for_them(classes, skipped, device):
    net = network(device, classes)
    x, y = labelled(net, device)
    found = worst_case(net, (x, y), 0.05, **FAST)
    assert found.skipped == skipped
    assert not set(skipped) & set(found.after)
    assert found.accuracy < found.clean


def test_where_no_attack_is_defined_clean_accuracy_is_not_the_worst_case(device):
    net = network(device, 3)
    with pytest.raises(ValueError, match=r"attacks: none of \['apgd-t'\] .* classes as 3"):
        worst_case(net, labelled(net, device), 0.05, attacks=("apgd-t",))


@pytest.mark.parametrize("call", [worst_case, check_masking])
def test_the_model_its_gradients_and_the_random_numbers_are_left_as_found(call, device):
    net = network(device)
    x, y = labelled(net, device)
    net.train()
    net[1].weight.grad = torch.ones_like(net[1].weight)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    # the masking check takes long, and shares what switches the gradients on
    contexts = (torch.enable_grad, torch.no_grad, torch.inference_mode)
    for context in contexts if call is worst_case else contexts[-1:]:
        with context():
            # 0.9 as in evaluation mode: dropout is off
            options = FAST if call is worst_case else {"steps": 10, "queries": 1000}
            result = call(net.forward, (x, y), 0.03, **options)
    assert call is check_masking or result.clean == pytest.approx(0.9)
    assert torch.equal(state, torch.get_rng_state())
    assert all(m.training for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert torch.equal(net[1].weight.grad, torch.ones_like(net[1].weight))
    assert net[5].weight.grad is None


def test_without_the_package_the_error_says_what_to_install(monkeypatch, device):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("pyautoattack"):
            raise ImportError(name)
        return real(name, *rest)

    net = network(device)
    data = labelled(net, device)
    monkeypatch.setattr(builtins, "__import__", missing)
    for call in (worst_case, check_masking):
        with pytest.raises(ImportError, match=r"pip install 'lrmanifold\[attacks\]'"):
            call(net, data, 0.03)
    assert worst_case(net, data, 0.03, attacks=OURS, steps=5).accuracy < 0.9


def test_strength_zero_is_clean_accuracy(device):
    net = network(device)
    found = worst_case(net, labelled(net, device), 0.0, **FAST)
    assert found.accuracy == found.clean == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"eps": -1.0}, ValueError, "eps must be"),
        ({"norm": "l1"}, ValueError, "norm must be"),
        ({"clip": None}, ValueError, r"clip must be \(low, high\), got None"),
        ({"attacks": ("fab",)}, ValueError, "attacks must be"),
        ({"attacks": ()}, ValueError, "attacks must be different names"),
        ({"attacks": ("pgd", "pgd")}, ValueError, "attacks must be different names"),
        ({"attacks": "pgd"}, TypeError, "attacks must be"),
        ({"steps": 0}, ValueError, "steps must be"),
        ({"queries": 0}, ValueError, "queries must be"),
        ({"individually": "yes"}, TypeError, "individually must be"),
        ({"data": []}, ValueError, "0 samples"),
        ({"model": lambda x: (x,)}, TypeError, "model must return a tensor of logits"),
    ],
)
def test_wrong_arguments_are_named(change, kind, message, device):
    net = network(device)
    arguments = {"model": net, "data": labelled(net, device), "eps": 0.1} | change
    with pytest.raises(kind, match=message):
        worst_case(**arguments)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda x: x.expand(len(x), -1, -1, -1)[:, :, :, ::1].mT.contiguous().mT,
    ],
)
def test_images_of_every_layout_give_the_same(layout, norm, device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)).to(device)
    x = torch.rand(12, 3, 8, 8, device=device)
    y = net(x).argmax(1)
    other = layout(x)
    assert not other.is_contiguous()
    expected = worst_case(net, (x, y), 0.05, norm=norm, **FAST)
    assert worst_case(net, (other, y), 0.05, norm=norm, **FAST) == expected


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_torchs_default_dtype_does_not_matter(norm, device):
    net = network(device)
    x, y = labelled(net, device)
    expected = worst_case(net, (x, y), 0.05, norm=norm, **FAST)
    torch.set_default_dtype(torch.float64)
    try:
        assert worst_case(net, (x, y), 0.05, norm=norm, **FAST) == expected
        # what the model makes itself is of the default that its user chose
        made = worst_case(
            lambda z: net(z).double() @ torch.eye(5, device=device), (x, y), 0.05, norm=norm, **FAST
        )
        assert abs(made.accuracy - expected.accuracy) <= 0.05
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_torchs_default_dtype_does_not_matter_to_the_check_of_masking(device):
    net = network(device)
    data = labelled(net, device)
    expected = check_masking(net, data, 0.05, steps=10, queries=1000)
    torch.set_default_dtype(torch.float64)
    try:
        assert check_masking(net, data, 0.05, steps=10, queries=1000) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_packages_messages_point_to_what_is_here(caplog):
    _autoattack._log.warning("there are 16 points! See flags_doc.md for details.")
    assert "flags_doc" not in caplog.text
    assert "See lrmanifold.robustness.check_masking" in caplog.text


def test_square_goes_on_where_two_logits_are_equal(device):
    """Rounded logits are often equal: as many images are fooled as where class 0 gives way."""
    net = network(device, classes=2)
    x, y = labelled(net, device, wrong=0)

    def rounded(z):
        return net(z).round()

    y = rounded(x).argmax(1)
    options = {"attacks": ["square"], "queries": 60}
    found = worst_case(rounded, (x, y), 0.03, **options).accuracy
    expected = worst_case(
        lambda z: rounded(z) - 0.25 * torch.arange(2, device=device), (x, y), 0.03, **options
    )
    assert expected.clean - expected.accuracy > 0.05
    assert found == expected.accuracy
