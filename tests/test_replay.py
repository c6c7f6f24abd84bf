"""Replayed steps against steps as they are; on CUDA, with a rate and a radius that change."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from benchmarks.certified import plan
from benchmarks.certified.training import train
from lrmanifold import certify
from lrmanifold.experiments import methods, models
from lrmanifold.experiments.adversarial import Adversarial, AdversarialLoss
from lrmanifold.experiments.data import load
from lrmanifold.experiments.replay import CaptureError, Replay, check_rates
from lrmanifold.experiments.training import Settings, fit
from lrmanifold.nn import LowRankLinear, MaxMin
from lrmanifold.optim import CondLRAdam

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", [torch.device("cpu"), "cpu"])
def test_on_the_cpu_it_is_the_function(device):
    total = torch.zeros(())

    def add(x):
        total.add_(x.sum())
        return total

    replay = Replay(add, device)
    for size in (1, 2, 3, 4, 5):
        assert replay(torch.ones(size)) is total
    assert float(total) == 15
    assert not replay.captured


def test_what_is_unlike_the_capture_is_not_replayed(monkeypatch):
    """The graph of these calls is a stand-in: copies in, and nothing computed."""
    replay = Replay(torch.sum, torch.device("cpu"))
    replay.stream, replay.inputs, replay.output = object(), [torch.zeros(2)], torch.zeros(())
    replay.graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(replay, "_aside", lambda stream, *inputs: "aside")
    assert replay(torch.ones(2)) is replay.output
    assert replay.inputs[0].tolist() == [1.0, 1.0]
    assert replay(torch.zeros(3)) == replay(torch.zeros(2, dtype=torch.float64)) == "aside"
    assert replay.inputs[0].tolist() == [1.0, 1.0]


def test_a_rate_that_a_graph_would_keep_is_refused():
    p = torch.nn.Parameter(torch.ones(2))
    cpu, there = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(ValueError, match="capturable=True"):
        check_rates(torch.optim.SGD([p], lr=0.1), there)
    with pytest.raises(ValueError, match="capturable=True"):
        check_rates(torch.optim.Adam([p], lr=torch.tensor(0.1), capturable=True), there)
    check_rates(torch.optim.Adam([p], lr=torch.tensor(0.1), capturable=True), cpu)


@cuda
def test_the_loop_refuses_an_optimizer_whose_rate_is_a_number():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).cuda()
    with pytest.raises(ValueError, match="capturable=True"):
        fit(model, torch.optim.SGD(model.parameters(), lr=0.1), load("digits"), Settings(),
            replay=True)  # fmt: skip


@pytest.mark.parametrize("how", [None, Adversarial(0.3, steps=3), Adversarial(0.5, "l2")])
def test_on_the_cpu_the_loop_is_the_same_to_the_bit(how):
    data, settings, found = load("digits"), Settings(1, 128, 0.1), []
    for replay in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        objective = None if how is None else AdversarialLoss(how, settings.steps(data))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fit(model, optimizer, data, settings, objective=objective, replay=replay)
        found.append(model[1].weight.detach())
    assert torch.equal(*found)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        LowRankLinear(20, 16, 6, tau=0.0), MaxMin(), LowRankLinear(16, 12, 5, tau=0.0, scale=1.0),
        MaxMin(), torch.nn.Linear(12, 4),
    )  # fmt: skip


@cuda
@pytest.mark.parametrize("kind", ["emma", "cross_entropy", "trades"])
def test_a_captured_training_step_does_what_the_step_does(kind):
    device = torch.device("cuda")
    models = [network().to(device)]
    models.append(copy.deepcopy(models[0]))
    losses: list[list[torch.Tensor]] = [[], []]
    steps = []
    for i, model in enumerate(models):
        optimizer = CondLRAdam(model.parameters(), lr=0.01, capturable=True)
        bound = certify.LipschitzBound(model, (20,))
        loss = certify.CertifiedLoss(0.3, 8, kind).to(device)

        def step(x, y, model=model, optimizer=optimizer, bound=bound, loss=loss):
            with torch.autocast("cuda", torch.bfloat16):
                z = model(x)
            value = loss(bound, z.float(), y)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.step()
            return value.detach()

        steps.append((Replay(step, device, enabled=i == 0), optimizer))
    generator = torch.Generator(device).manual_seed(0)
    for k in range(12):
        size = 32 if k != 9 else 7  # one batch is ragged
        x = torch.randn(size, 20, generator=generator, device=device)
        y = torch.randint(0, 4, (size,), generator=generator, device=device)
        for found, (replay, optimizer) in zip(losses, steps, strict=True):
            optimizer.param_groups[0]["lr"].fill_(0.01 / (1 + k))
            found.append(replay(x, y).clone())
    assert steps[0][0].captured
    assert not steps[1][0].captured
    torch.testing.assert_close(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-4, atol=1e-5)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        M = getattr(p, "manifold", None)
        a, b = (p, q) if M is None else (M.to_dense(p), M.to_dense(q))
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-3, atol=1e-4)


@cuda
def test_what_waits_cannot_be_captured_and_says_so():
    replay = Replay(lambda x: x * float(x.sum()), torch.device("cuda"), warm_up=1)
    x = torch.ones(2, device="cuda")
    assert replay(x).tolist() == [2.0, 2.0]
    with pytest.raises(CaptureError):
        replay(x)
    assert (x + 1).tolist() == [2.0, 2.0]  # the device goes on
    assert torch.randn(3, device="cuda").isfinite().all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_trainings_with_and_without_graphs_agree(device):
    run = dataclasses.replace(
        plan.long_run(0), widths=(16, 16), rank=8, epochs=3, batch=256, kind="emma"
    )
    digits = load("digits")
    there = {k: getattr(digits, k).to(device) for k in ("train_x", "train_y", "test_x", "test_y")}
    data = dataclasses.replace(digits, **there)
    (_, first, _), (_, second, _) = (train(run, data, graphs=g) for g in (True, False))
    assert first == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize(
    "how", [None, Adversarial(0.05, steps=2), Adversarial(0.3, "l2", "trades")]
)
@pytest.mark.parametrize("kind", ["dense", "finetuned", "orthogonal", "condlr"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_the_loop_of_all_comparisons_agrees_with_and_without_graphs(device, kind, how):
    """Also where a graph is asked for and the step is not captured: on the CPU, orthogonal."""
    data = load("digits")
    settings = Settings(2, 128, 0.05, optimizer="adam" if kind == "condlr" else "sgd", warmup=0.2)
    found = [
        methods.train(
            methods.Method(kind, kind, 0.1 if kind == "condlr" else None),
            lambda: models.mlp(64, 10, (24, 24)),
            data, 6, settings, exclude="fc3", device=device, adversarial=how, replay=replay,
        ).history.loss
        for replay in (False, True)
    ]  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=1e-2 if device == "cuda" else 1e-9)
