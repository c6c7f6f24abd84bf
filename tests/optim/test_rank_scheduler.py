"""RankScheduler: what a change of rank keeps, the ranks found, the certificate on the way."""

from __future__ import annotations

import copy

import geoopt
import pytest
import torch
from adaptive import (
    Regression,
    assert_certified,
    assert_same,
    classes,
    classify,
    mlp,
    snapshot,
    target,
)
from torch import Tensor, nn

from lrmanifold.manifolds import Factors
from lrmanifold.nn import LowRankConv2d, LowRankLinear
from lrmanifold.optim import CondLR, CondLRAdam, RankScheduler, resize

OPTIMIZERS = {
    "CondLR": lambda p: CondLR(p, 0.3, momentum=0.5),
    "CondLRAdam": lambda p: CondLRAdam(p, 0.02),
}


def train(problem: Regression, optimizer, scheduler, steps: int, *, certified: bool = True) -> None:
    for _ in range(steps):
        problem.closure()
        optimizer.step()
        scheduler.step(problem.closure)
        if certified:
            assert_certified(problem.model)


@pytest.mark.parametrize("name", ["RiemannianSGD", "RiemannianAdam", "RiemannianAdam, amsgrad"])
def test_optimizers_of_geoopt_go_on_after_a_change_of_rank(name):
    kind, _, amsgrad = name.partition(", ")
    options = {"momentum": 0.5} if kind == "RiemannianSGD" else {"amsgrad": bool(amsgrad)}
    problem = Regression(target(rank=3), 2, tau=None)
    optimizer = getattr(geoopt.optim, kind)(problem.model.parameters(), lr=0.05, **options)
    scheduler = RankScheduler(problem.model, optimizer, tol=0.05, every=50)
    train(problem, optimizer, scheduler, 300)
    assert problem.error() < 0.1


# -- what one adaptation keeps


def test_an_adaptation_keeps_the_function_but_for_the_truncation():
    torch.manual_seed(0)
    model = nn.Sequential(
        LowRankConv2d(4, 8, 3, 2, groups=2, tau=None, gradient="probe"), nn.Flatten(),
        LowRankLinear(8 * 16, 10, 3, tau=None, gradient="probe"),
    )  # fmt: skip
    optimizer = CondLR(model.parameters(), 0.01, momentum=0.9)
    scheduler = RankScheduler(model, optimizer, tol=0.0)
    x = torch.randn(6, 4, 6, 6)
    for ranks in ({"0": 4, "2": 6}, {"0": 4, "2": 10}, {"0": 4, "2": 10}):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        before = model(x).detach()
        scheduler.step()
        assert scheduler.ranks == ranks
        after = model(x).detach()
        assert float((after - before).norm()) <= 1e-6 * float(before.norm())


def test_rank_one_full_rank_and_an_unchanged_rank_work():
    for start, low, high in ((1, 1, 1), (40, 40, None), (8, 8, 8)):
        problem = Regression(target(), start, tau=None)
        optimizer = CondLR(problem.model.parameters(), 0.3, momentum=0.3)
        options = {"tol": 0.01, "min_rank": low, "max_rank": high}
        train(problem, optimizer, RankScheduler(problem.model, optimizer, **options), 20)
        assert problem.layer.rank == start
    problem = Regression(target()[:1], 1, tau=0.1)  # min(m, n) = 1
    optimizer = CondLRAdam(problem.model.parameters(), 0.05)
    train(problem, optimizer, RankScheduler(problem.model, optimizer, tol=0.1), 20)
    assert problem.layer.rank == 1


# -- ranks that are found


@pytest.mark.parametrize("start", [2, 32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_bound_training_finds_rank_8(name, start):
    problem = Regression(target(), start, tau=None)
    optimizer = OPTIMIZERS[name](problem.model.parameters())
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    scheduler = RankScheduler(problem.model, optimizer, tol=0.02, every=10)
    for _ in range(300):
        train(problem, optimizer, scheduler, 1)
        rate.step()
    scheduler.truncate()
    assert problem.layer.rank == 8
    assert problem.error() < 2e-3


@pytest.mark.parametrize("start", [2, 32])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("gradient", ["factors", "probe"])
def test_with_a_bound_training_finds_rank_8(name, start, gradient):
    problem = Regression(target(), start, tau=0.5, gradient=gradient)
    optimizer = OPTIMIZERS[name](problem.model.parameters())
    # Adam's rate is not one of plain gradient steps on the core.
    options = {"coefficient_lr": 0.3} if name == "CondLRAdam" else {}
    scheduler = RankScheduler(problem.model, optimizer, tol=0.02, every=10, **options)
    train(problem, optimizer, scheduler, 150)
    assert problem.layer.rank == 8
    assert problem.error() < 0.05


def test_layers_follow_rules_of_their_own():
    torch.manual_seed(0)
    model, (x, y) = mlp(4, None), classes()
    optimizer = CondLR(model.parameters(), 0.1)
    scheduler = RankScheduler(
        model, optimizer, tol={"2": 0.0}, max_rank={"2": 7, "0": 5}, min_rank={"*": 2}
    )
    closure = classify(model, x, y)
    for _ in range(3):
        closure()
        optimizer.step()
        scheduler.step()
    assert scheduler.ranks == {"2": 7}
    assert model[0].rank == 4  # no rule for tol: not adapted


def test_a_budget_is_shared_by_truncated_energy():
    torch.manual_seed(0)
    layers = [LowRankLinear(20, 20, 12, tau=None, gradient="probe") for _ in range(2)]
    model = nn.Sequential(*layers)
    # All energy of the first layer in 3 directions, that of the second spread over 12.
    spectra = torch.full((12,), 1e-2), torch.ones(12)
    spectra[0][:3] = 1.0
    for layer, s in zip(layers, spectra, strict=True):
        with torch.no_grad():
            layer.factors.S.copy_(torch.diag(s))
    optimizer = CondLR(model.parameters(), 0.0)
    scheduler = RankScheduler(model, optimizer, tol=0.0, target_compression=0.45)
    scheduler.truncate()
    kept = sum(layer.weight.numel() for layer in layers) / (2 * 400)
    ranks = [layer.rank for layer in layers]
    assert 0.55 - 53 / 800 < kept <= 0.55  # one more direction would not fit
    assert ranks == [3, 6]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_budget_with_a_dead_group_does_not_depend_on_the_order_of_layers(dead):
    torch.manual_seed(0)
    how = {"groups": 2, "tau": None, "gradient": "probe"}
    layers = [LowRankConv2d(40, 40, 1, 8, **how) for _ in range(2)]
    with torch.no_grad():
        for layer in layers:
            layer.factors.S.copy_(torch.eye(8).expand(2, 8, 8))
        layers[dead].factors.S[1] = 0.0  # half the energy is lost by the same cut
    model = nn.Sequential(*layers)
    scheduler = RankScheduler(
        model, CondLR(model.parameters(), 0.0), tol=0.0, min_rank=2, target_compression=0.5
    )
    scheduler.truncate()
    assert layers[dead].rank == 2
    assert layers[1 - dead].rank > 2


def test_a_budget_that_the_smallest_ranks_exceed_is_refused():
    model = nn.Sequential(LowRankLinear(10, 10, 4, tau=None, gradient="probe"))
    optimizer = CondLR(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="min_rank"):
        RankScheduler(model, optimizer, tol=0.1, min_rank=4, target_compression=0.5)


# -- the certificate


@pytest.mark.parametrize(
    ("tau", "steps"),
    [
        (0.5, 200),
        *(
            pytest.param(t, k, marks=pytest.mark.slow)
            for t, k in ((0.0, 200), (0.0, 500), (0.5, 500))
        ),
    ],
)
def test_the_certificate_holds_at_every_step_of_an_adaptive_run(tau, steps):
    targets = [target(16, 12, rank) for rank in (2, 6, 1, 4)]
    problem, found = Regression(targets[0], 3, tau=tau), []
    optimizer = CondLR(problem.model.parameters(), 0.3, momentum=0.5)
    scheduler = RankScheduler(problem.model, optimizer, tol=0.05, every=20)
    for A in targets:
        problem.A = A
        train(problem, optimizer, scheduler, steps)
        found.append(problem.layer.rank)
    assert found == [2, 6, 1, 4]
    assert scheduler.count == 4 * steps


@pytest.mark.parametrize("how", ["raises", "overflows"])
def test_an_adaptation_that_fails_leaves_weights_ranks_and_state_as_they_were(how):
    problem = Regression(target(), 3, tau=0.5)
    model, good, calls = problem.model, problem.closure, []
    optimizer = CondLR(model.parameters(), 0.1, momentum=0.9)
    rate = 1e5 if how == "overflows" else None
    scheduler = RankScheduler(model, optimizer, tol=0.1, coefficient_lr=rate)
    good()
    optimizer.step()
    before = snapshot(model, optimizer)

    def bad() -> Tensor:
        calls.append(good())
        if len(calls) == 5 and how == "raises":
            raise KeyboardInterrupt
        return calls[-1]

    if how == "raises":
        with pytest.raises(KeyboardInterrupt):
            scheduler.step(bad)
    else:
        with pytest.warns(RuntimeWarning, match="lower coefficient_lr"):
            scheduler.step(bad)
    assert_same(before, snapshot(model, optimizer))
    assert_certified(model)
    good()
    optimizer.step()


def test_an_adaptation_that_was_interrupted_is_made_by_the_next_call():
    problem = Regression(target(), 3, tau=0.5)
    optimizer = CondLR(problem.model.parameters(), 0.1)
    scheduler = RankScheduler(problem.model, optimizer, tol=0.1, every=3)
    calls = []

    def interrupted() -> Tensor:
        raise KeyboardInterrupt

    def closure() -> Tensor:
        calls.append(scheduler.count)
        return problem.closure()

    scheduler.step(closure)
    scheduler.step(closure)
    assert (scheduler.count, calls) == (2, [])
    with pytest.raises(KeyboardInterrupt):
        scheduler.step(interrupted)
    assert scheduler.count == 2
    scheduler.step(closure)
    assert scheduler.count == 3
    assert calls


def test_the_coefficient_steps_climb_where_the_optimizer_maximizes():
    ranks = []
    for sign in (1.0, -1.0):
        problem = Regression(target(), 2, tau=0.5)
        optimizer = CondLR(problem.model.parameters(), 0.3, maximize=sign < 0)
        scheduler = RankScheduler(problem.model, optimizer, tol=0.02, every=5)

        def closure(problem=problem, sign=sign) -> Tensor:
            problem.model.zero_grad()
            loss = sign * problem.loss()
            loss.backward()
            return loss.detach()

        for _ in range(60):
            closure()
            optimizer.step()
            scheduler.step(closure)
        ranks.append(problem.layer.rank)
    assert ranks == [8, 8]


# -- among torch's tools


def test_frozen_layers_stay_and_layers_that_share_a_weight_are_adapted_once():
    torch.manual_seed(0)
    model = nn.Sequential(*(LowRankLinear(12, 12, 3, tau=None, gradient="probe") for _ in range(3)))
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[0].factors.S[0].mul_(1e-9)
    model[2].weight = model[1].weight
    optimizer = CondLR([p for p in model.parameters() if p.requires_grad], 0.01, momentum=0.5)
    scheduler = RankScheduler(model, optimizer, tol=1e-6)
    before = model[0].weight.detach().clone()
    model(torch.randn(8, 12)).square().sum().backward()
    optimizer.step()
    scheduler.step()
    assert torch.equal(model[0].weight, before)
    assert scheduler.ranks == {"0": 3, "1": 6}
    assert model[2].weight is model[1].weight
    assert model[2].rank == 6


def test_a_loss_that_is_kept_across_a_resize_does_no_harm():
    problem = Regression(target(), 3, tau=None)
    optimizer = CondLR(problem.model.parameters(), 0.1, momentum=0.5)
    scheduler, kept = RankScheduler(problem.model, optimizer, tol=0.0), []
    for _ in range(4):
        optimizer.zero_grad()
        kept.append(problem.loss())
        kept[-1].backward(retain_graph=True)
        optimizer.step()
        scheduler.step()
    assert problem.layer.rank == 40
    with pytest.raises(RuntimeError):  # of the old rank: refused, not written
        kept[0].backward()
    problem.closure()
    optimizer.step()
    assert_certified(problem.model)


def test_rate_schedulers_and_rank_schedulers_do_not_disturb_each_other():
    problem = Regression(target(), 2, tau=None)
    optimizer = CondLR(problem.model.parameters(), 0.4)
    rate = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    scheduler, rates = RankScheduler(problem.model, optimizer, tol=0.02, every=2), []
    for _ in range(7):
        train(problem, optimizer, scheduler, 1)
        rate.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.4, 0.4, 0.2, 0.2, 0.2, 0.1, 0.1]
    assert problem.layer.weight is optimizer.param_groups[0]["params"][0]


# -- saving and loading


@pytest.mark.parametrize("tau", [None, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_continues_bit_for_bit_in_a_model_built_with_another_rank(name, tau, tmp_path):
    def parts(rank: int, seed: int):
        torch.manual_seed(seed)
        model = mlp(rank, tau)
        optimizer = OPTIMIZERS[name](model.parameters())
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        scheduler = RankScheduler(model, optimizer, tol=0.1, every=3, coefficient_lr=2.0)
        return model, optimizer, rate, scheduler

    def run(model, optimizer, rate, scheduler, steps: int) -> None:
        closure = classify(model, *classes())
        for _ in range(steps):
            closure()
            optimizer.step()
            rate.step()
            scheduler.step(closure)

    first = parts(2, 0)
    run(*first, 7)
    torch.save([x.state_dict() for x in first], tmp_path / "state.pt")
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    second = parts(5, 1)
    run(*second, 4)
    with pytest.raises(ValueError, match="load the model"):
        second[-1].load_state_dict(states[-1])
    with pytest.raises(ValueError, match="state must have ranks and count"):
        second[-1].load_state_dict({})
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    assert second[-1].ranks == first[-1].ranks
    assert second[-1].count == 7
    for pair in (first, second):
        run(*pair, 8)
    assert first[-1].ranks == second[-1].ranks
    for p, q in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(p, q)
    assert_certified(second[0])


def test_a_copy_of_model_optimizer_and_scheduler_goes_its_own_way():
    problem = Regression(target(), 2, tau=None)
    optimizer = CondLR(problem.model.parameters(), 0.3, momentum=0.5)
    scheduler = RankScheduler(problem.model, optimizer, tol=0.02)
    train(problem, optimizer, scheduler, 2)
    twin, other, third = copy.deepcopy((problem, optimizer, scheduler))
    rank = problem.layer.rank
    train(twin, other, third, 4)
    assert problem.layer.rank == rank
    assert twin.layer.rank != rank


# -- options


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"tol": 1.0}, "tol"), ({"tol": -0.1}, "tol"), ({"tol": {"0": 2.0}}, "tol"),
        ({"tol": {"no such layer": 0.1}}, "tol"), ({"every": 0}, "every"),
        ({"augment": -1}, "augment"), ({"target_compression": 1.0}, "target_compression"),
        ({"coefficient_steps": 0}, "coefficient_steps"), ({"max_rank": 0}, "max_rank"),
        ({"coefficient_lr": 0.0}, "coefficient_lr"), ({"min_rank": -1}, "min_rank"),
        ({"min_rank": 5, "max_rank": {"*": 4}}, "min_rank"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(options, word):
    model = nn.Sequential(LowRankLinear(12, 10, 4))
    optimizer = CondLR(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=word):
        RankScheduler(model, optimizer, **{"tol": 0.1, **options})


def test_what_cannot_be_adapted_is_refused_in_words():
    for model, word in (
        (nn.Sequential(nn.Linear(4, 3)), "low-rank layers"),
        (nn.Sequential(LowRankLinear(4, 3, 2, tau=None)), "probe"),
    ):
        with pytest.raises(ValueError, match=word):
            RankScheduler(model, CondLR(model.parameters(), 0.1), tol=0.1)
    divides = {"tau": None, "gradient": "probe", "retraction": "factored"}
    model = nn.Sequential(LowRankLinear(4, 3, 2, **divides))
    optimizer = CondLR(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"0 has no bound .* retraction 'factored'"):
        RankScheduler(model, optimizer, tol=0.1)
    RankScheduler(model, optimizer, tol=0.1, augment=0).step()  # nothing is added to its core
    model = nn.Sequential(LowRankLinear(4, 3, 2))
    with pytest.raises(ValueError, match="closure"):
        RankScheduler(model, CondLR(model.parameters(), 0.1), tol=0.1, every=5).step()


def test_a_closure_that_is_none_or_leaves_no_gradient_is_named():
    problem = Regression(target(), 4, tau=0.1)
    optimizer = CondLR(problem.model.parameters(), 0.1)
    with pytest.raises(TypeError, match=r"grad_scaler must be a torch\.amp\.Grad"):
        RankScheduler(problem.model, optimizer, tol=0.1, grad_scaler=3)
    scheduler = RankScheduler(problem.model, optimizer, tol=0.1, every=2, coefficient_steps=1)
    with pytest.raises(TypeError, match="closure must be a function that calls backward"):
        scheduler.step(3)
    scheduler.step(problem.loss)  # not called at this step
    with pytest.warns(RuntimeWarning, match="no gradient for 0 and .* call backward") as caught:
        scheduler.step(problem.loss)
    assert caught[0].filename == __file__


def test_an_adaptation_leaves_the_statistics_of_batch_norms_alone():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(10)
    model = nn.Sequential(LowRankLinear(12, 10, 2), norm)
    optimizer = CondLR(model.parameters(), 0.1)
    scheduler = RankScheduler(model, optimizer, tol=0.1, coefficient_lr=1.0)
    x, calls = torch.randn(16, 12), []

    def closure():
        calls.append(None)
        optimizer.zero_grad()
        model(x).cos().mean().backward()

    closure()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    optimizer.step()
    scheduler.step(closure)
    assert len(calls) == 1 + 1 + scheduler.coefficient_steps
    assert all(torch.equal(value, before[name]) for name, value in norm.named_buffers())


def test_factors_without_a_gradient_are_truncated_and_not_augmented():
    problem = Regression(target(), 4, tau=None)
    optimizer = CondLR(problem.model.parameters(), 0.1)
    scheduler = RankScheduler(problem.model, optimizer, tol=1e-6)
    resize(problem.layer.weight, Factors(*(b.clone() for b in problem.layer.factors)))
    scheduler.step()
    assert problem.layer.rank == 4


def test_an_optimizer_of_another_model_is_refused():
    first, second = (nn.Sequential(LowRankLinear(12, 10, 3, tau=0.1)) for _ in range(2))
    with pytest.raises(ValueError, match=r"none of \['0'\]: build it after factorize"):
        RankScheduler(first, CondLR(second.parameters(), lr=0.1), tol=0.1)
