"""Masked gradients: networks on which attacks fail that are not robust are noticed."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from attacked_nets import labelled, network

from lrmanifold.robustness import _autoattack, check_masking, pgd, worst_case
from lrmanifold.robustness._climb import climb
from lrmanifold.robustness._loss import margin

pyautoattack = pytest.importorskip("pyautoattack")

FAST = {"steps": 10, "queries": 60}
OURS = ("pgd",)
# Square comes to rest within as many; in l2 it is weak whatever its budget.
QUERIES = {"linf": 2000, "l2": 1000}


def plain(net):
    return net


def rounded(net):
    """Gradients are zero: the classical shattered gradient."""
    return lambda z: net((50 * z).round() / 50)


class Scaled(torch.autograd.Function):
    """The identity, with a gradient multiplied by `factor`."""

    @staticmethod
    def forward(ctx, z, factor):
        ctx.save_for_backward(factor)
        return z.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0], None


def backwards(net):
    """Gradients point the wrong way."""
    return lambda z: net(Scaled.apply(z, -z.new_ones(())))


def fifth(z):
    """About a fifth of the pixels, the same for all images."""
    draw = torch.rand(z.shape[1:], generator=torch.Generator().manual_seed(2))
    return (draw < 0.2).to(z.device)


def backwards_in_part(net):
    """Gradients point the wrong way in a fifth of the pixels."""
    return lambda z: net(Scaled.apply(z, torch.where(fifth(z), -1.0, 1.0).to(z)))


def missing_in_part(net):
    """A fifth of the pixels has no gradient."""
    return lambda z: net(Scaled.apply(z, (~fifth(z)).to(z)))


def oscillating(net):
    """The gradient is right, and of a ripple that says nothing about the ball."""
    return lambda z: net(z + 0.01 * torch.sin(400 * z))


@pytest.mark.parametrize(
    ("mask", "norm"),
    [
        (plain, "linf"),
        pytest.param(plain, "l2", marks=pytest.mark.slow),
        (rounded, "linf"),
        pytest.param(rounded, "l2", marks=pytest.mark.slow),
        *(pytest.param(backwards, norm, marks=pytest.mark.slow) for norm in ("linf", "l2")),
    ],
)
def test_masked_gradients_are_noticed_and_sound_ones_pass(mask, norm, device):
    net = network(device)
    x, y = labelled(net, device)
    eps = 0.03 if norm == "linf" else 0.1
    found = check_masking(mask(net), (x, y), eps, norm=norm, steps=40, queries=QUERIES[norm])
    failed = {name for name, ok in found.verdicts.items() if not ok}
    if mask is plain:
        assert failed == set(), str(found)
        assert found.unlimited == 0
        assert found.path[-1] > found.path[0]
        assert len(found.path) == 41
        z = pgd(net, x, y, eps, norm=norm, steps=40, generator=torch.Generator().manual_seed(0))
        assert found.many_steps <= float((net(z).argmax(1) == y).float().mean()) + 0.02
    else:
        assert failed >= {"the loss rises along the path", "without a limit all are fooled"}
        assert "no search improves on many steps" in failed
        if norm == "linf":  # in l2 Square is weak
            assert "the black box is not stronger" in failed
    if mask is rounded:
        assert "gradients do not vanish" in failed
    assert found.passed == (mask is plain)
    assert ("NO" in str(found)) == (mask is not plain)


@pytest.mark.parametrize(
    ("mask", "norm", "eps"),
    [
        (backwards_in_part, "linf", 0.02),
        pytest.param(backwards_in_part, "l2", 0.1, marks=pytest.mark.slow),
        # in l2 it costs PGD one sample
        pytest.param(missing_in_part, "linf", 0.02, marks=pytest.mark.slow),
        (oscillating, "linf", 0.02),
        pytest.param(oscillating, "l2", 0.1, marks=pytest.mark.slow),
    ],
)
def test_what_only_a_search_without_gradients_can_notice(mask, norm, eps, device):
    """The first is a counterexample to an older check, which stopped on a plateau of Square."""
    net = network(device)
    x, y = labelled(net, device)
    found = check_masking(mask(net), (x, y), eps, norm=norm, steps=40, queries=QUERIES[norm])
    failed = {name for name, ok in found.verdicts.items() if not ok}
    assert "no search improves on many steps" in failed
    if mask is backwards_in_part:
        assert failed <= {"no search improves on many steps", "the black box is not stronger"}
        truth = worst_case(net, (x, y), eps, norm=norm, attacks=OURS, steps=40).accuracy
        assert found.many_steps > truth + 0.1
        assert abs(found.climbed - truth) < 0.05
    if norm == "linf":
        assert "the black box is not stronger" in failed


def test_the_budget_of_the_black_box_doubles_until_two_doublings_change_nothing(device):
    net = network(device)
    x, y = labelled(net, device)
    found = check_masking(net, (x, y), 0.03, steps=10, tolerance=0.05)
    budgets = list(found.black_box)
    assert len(budgets) > 3  # or the last check but one would be about nothing
    assert budgets == [250 * 2**k for k in range(len(budgets))]
    values = list(found.black_box.values())
    assert values[-3] - values[-1] <= found.tolerance
    assert all(a - c > found.tolerance for a, c in zip(values, values[2:-1], strict=False))
    assert all(a >= b for a, b in itertools.pairwise(values))


@pytest.fixture(scope="module")
def measured(device):
    """What was measured once, for verdicts about other numbers in its place."""
    net = network(device)
    return check_masking(net, labelled(net, device), 0.02, steps=10, queries=1000)


def test_a_plateau_of_two_budgets_is_no_convergence(measured):
    for box, converged in (
        ({250: 0.8, 500: 0.8}, False),
        ({250: 0.9, 500: 0.8, 1000: 0.8}, False),
        ({250: 0.9, 500: 0.8, 1000: 0.8, 2000: 0.79}, True),
    ):
        other = dataclasses.replace(measured, black_box=box)
        assert other.verdicts["the black box has converged"] == converged


def test_as_many_samples_as_are_tolerated_pass_whatever_their_difference_rounds_to(measured):
    for many in range(10, 100):
        for lost in (2, 3):
            other = dataclasses.replace(
                measured, many_steps=many / 100, climbed=(many - lost) / 100, tolerance=0.02
            )
            assert other.verdicts["no search improves on many steps"] == (lost == 2)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(1, 6, 6), (2, 8, 6), (7,)])
def test_squares_reach_every_pixel(norm, shape, device):
    seen = torch.zeros(shape, dtype=torch.bool, device=device)
    x = torch.full((1, *shape), 0.5, device=device)
    last = x.clone()

    def watched(z):
        nonlocal last
        if len(z):
            # against the image before: in linf the start alone moves all pixels
            seen.logical_or_((z != last).any(0))
            last = z.clone()
        return torch.stack((z.flatten(1).square().sum(1) + 9, 0 * z.flatten(1)[:, 0]), 1)

    y = torch.zeros(1, dtype=torch.long, device=device)
    options = {"steps": 1, "queries": 300, "seed": 0}
    _autoattack.run("square", watched, x, y, 0.1, norm, (0.0, 1.0), **options)
    assert seen.all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 6, 6), (1, 1, 9), (7,), (2, 2, 2, 2)])
def test_the_climb_stays_in_the_ball_and_never_lowers_the_margin(shape, dtype, norm, device):
    net = network(device, shape=shape, dtype=dtype)
    x, y = labelled(net, device, count=20, shape=shape, dtype=dtype, wrong=0)
    asked = []

    def watched(z):
        asked.append(len(z))
        return net(z)

    z = climb(
        watched, x, x, y, 0.05, norm, (0.0, 1.0), 200, torch.Generator().manual_seed(0)
    )  # fmt: skip
    change = (z - x).flatten(1).double()
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert size.max() <= 0.05 + 4 * torch.finfo(dtype).eps
    assert 0 <= z.min() <= z.max() <= 1
    assert len(asked) <= 201
    before, after = margin(net(x), y), margin(net(z), y)
    assert (after >= before - 1e-4 * before.abs()).all()
    assert (after > before).double().mean() > 0.9


def test_nothing_right_is_nothing_to_measure(device):
    net = network(device)
    x, y = labelled(net, device, wrong=60)
    with pytest.raises(ValueError, match="none classified rightly"):
        check_masking(net, (x, y), 0.03)
    with pytest.raises(ValueError, match="eps must be"):
        check_masking(net, (x, y), 0.0)
