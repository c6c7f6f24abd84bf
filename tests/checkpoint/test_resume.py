"""A run that is killed at any moment goes on and ends as if nothing had happened."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold._sealed import write_torch
from lrmanifold.checkpoint import CheckpointError
from lrmanifold.experiments.adversarial import Adversarial, AdversarialLoss
from lrmanifold.experiments.data import Dataset
from lrmanifold.experiments.methods import KINDS, Method, train
from lrmanifold.experiments.training import Normalized, Settings, fit

SETTINGS = Settings(epochs=4, batch_size=16, lr=0.1, momentum=0.5, seed=3)
STEPS = 4 * 7


def few_images() -> Dataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(100, 1, 4, 4, generator=generator)
    y = (x.mean((1, 2, 3)) > 0.5).long()
    return Dataset("few", x, y, x[:10], y[:10], 2, ("dark", "light"), (0.5,), (0.3,))


def network() -> nn.Module:
    # Dropout draws from torch's global generator, which has to be taken up too.
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 24), nn.Dropout(0.2), nn.ReLU(), nn.Linear(24, 2)
    )


def build(rank: int = 3, tau: float = 0.1):
    torch.manual_seed(7)
    model = Normalized(lrm.factorize(network(), rank=rank, tau=tau, exclude="4"), few_images())
    optimizer = lrm.optim.CondLR(model.parameters(), SETTINGS.lr, momentum=SETTINGS.momentum)
    return model, optimizer


def squared(model, x, y, step):
    return (model(x) - nn.functional.one_hot(y, 2)).square().mean()


def run(path, settings=SETTINGS, result=None, **options):
    torch.set_num_threads(1)
    model, optimizer = build()
    history = fit(model, optimizer, few_images(), settings, checkpoint=path, **options)
    if result is not None:
        torch.save([model.state_dict(), optimizer.state_dict(), vars(history)], result)
    return model, optimizer, history


def assert_same(one, other) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "result.pt"
    run(None, result=path)
    return torch.load(path, weights_only=True)


def test_a_run_killed_at_20_random_moments_ends_like_the_uninterrupted_one(tmp_path, uninterrupted):
    path, result = tmp_path / "checkpoint.pt", tmp_path / "result.pt"
    context = multiprocessing.get_context("fork")  # torch is there at once: the moments are in fit
    rng, kills, hit, done, compared = random.Random(0), 0, set(), 0, 0

    def progress() -> int:
        if not path.exists():
            return 0
        saved = torch.load(path, weights_only=True)["extra"]["position"]
        return saved["epoch"] * 7 + saved["batch"]

    while kills < 20 or not compared:
        process = context.Process(target=run, args=(path, SETTINGS, result))
        process.start()
        wanted = done + rng.choice((0, 0, 1, 2)) if kills < 20 else STEPS
        while process.is_alive() and progress() < wanted:
            time.sleep(0.001)
        if kills < 20:
            time.sleep(rng.random() * 0.03)  # within the step, or while the file is written
            process.kill()  # SIGKILL; nothing if it has ended
        process.join(120)
        before, done = done, progress()
        # Nothing but the current step is lost: the file never goes back, and is always whole.
        assert done >= before
        if process.exitcode == -signal.SIGKILL:
            kills, compared = kills + 1, 0
            hit.add(done)
            continue
        assert process.exitcode == 0  # at its end; on a slow day before the signal: once more
        assert_same(torch.load(result, weights_only=True), uninterrupted)
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # no leftovers
        compared, done = compared + 1, 0
        result.unlink()
        path.unlink()
    assert kills == 20
    assert len(hit) > 5  # the kills fell on many steps


@pytest.mark.parametrize("save_every", [1, 3, 5, 1000])
def test_a_run_cut_off_by_an_error_goes_on_from_any_step(tmp_path, uninterrupted, save_every):
    class CutOffError(Exception):
        pass

    for stop in (1, 6, 7, 8, 15, STEPS):
        path, result = tmp_path / f"{stop}.pt", tmp_path / f"{stop}.result"
        done = 0

        def count(stop=stop):
            nonlocal done
            done += 1
            if done == stop:
                raise CutOffError

        with pytest.raises(CutOffError):
            run(path, on_step=count, save_every=save_every)
        assert path.exists() == (stop > save_every or stop == save_every)
        done = -1000
        run(path, result=result, on_step=count, save_every=save_every)
        assert done == STEPS - 1000  # the steps that were done before count for progress bars
        assert_same(torch.load(result, weights_only=True), uninterrupted)


def test_a_run_that_is_complete_is_not_trained_again(tmp_path):
    path = tmp_path / "checkpoint.pt"
    first, _, history = run(path)
    again, _, same = run(path, on_step=None)
    assert_same(vars(same), vars(history))
    assert_same(dict(again.state_dict()), dict(first.state_dict()))


def test_the_file_of_another_run_is_refused_and_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    run(path)
    model, optimizer = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for change in ({"lr": 0.2}, {"seed": 4}):
        key, value = next(iter(change.items()))
        words = rf"belongs to another run, with {key} \S+ instead of {value}"
        settings = dataclasses.replace(SETTINGS, **change)
        with pytest.raises(CheckpointError, match=words):
            fit(model, optimizer, few_images(), settings, checkpoint=path)
    wide, wide_optimizer = build(rank=4)
    words = r"with network \.\.\..*rank=3.* instead of .*rank=4"
    with pytest.raises(CheckpointError, match=words):
        fit(wide, wide_optimizer, few_images(), SETTINGS, checkpoint=path)
    with pytest.raises(CheckpointError, match="objective cross entropy instead of certified"):
        fit(model, optimizer, few_images(), SETTINGS, checkpoint=path, about="certified")
    with pytest.raises(CheckpointError, match=r"objective cross entropy instead of .*squared"):
        fit(model, optimizer, few_images(), SETTINGS, checkpoint=path, objective=squared)
    other = lrm.optim.CondLR(model.parameters(), SETTINGS.lr, momentum=0.25)
    with pytest.raises(CheckpointError, match=r"options of the optimizer .*0\.5.* instead .*0\.25"):
        fit(model, other, few_images(), SETTINGS, checkpoint=path)
    other = lrm.optim.CondLR(model.parameters(), 1e-6, momentum=SETTINGS.momentum)
    with pytest.raises(
        CheckpointError, match=r"rates of the optimizer \[0\.1\] instead of \[1e-06\]"
    ):
        fit(model, other, few_images(), SETTINGS, checkpoint=path)
    lrm.checkpoint.save(path, model)
    with pytest.raises(CheckpointError, match="is not the checkpoint of a training run"):
        fit(model, optimizer, few_images(), SETTINGS, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged"):
        fit(model, optimizer, few_images(), SETTINGS, checkpoint=path)
    assert_same(dict(model.state_dict()), before)
    with pytest.raises(ValueError, match="save_every must be an integer >= 1, got 0"):
        fit(model, optimizer, few_images(), SETTINGS, checkpoint=path, save_every=0)


def test_an_objective_with_other_settings_is_another_run(tmp_path):
    path = tmp_path / "checkpoint.pt"
    options = {"steps": STEPS, "seed": 1}
    losses = [AdversarialLoss(Adversarial(eps, steps=1), **options) for eps in (0.1, 0.1, 0.3)]
    *_, history = run(path, objective=losses[0])
    assert_same(vars(run(path, objective=losses[1])[2]), vars(history))
    with pytest.raises(CheckpointError, match=r"objective .*0\.1.* instead of .*0\.3"):
        run(path, objective=losses[2])
    options["seed"] = 2
    with pytest.raises(CheckpointError, match=r"objective .*seed=1.* instead of .*seed=2"):
        run(path, objective=AdversarialLoss(losses[0].how, **options))


def test_a_file_from_before_rates_were_noted_is_taken_up(tmp_path):
    path = tmp_path / "checkpoint.pt"
    *_, history = run(path)
    saved = torch.load(path, weights_only=True)
    del saved["extra"]["identity"]["largest rates of the optimizer"]
    write_torch(path, saved)
    assert_same(vars(run(path)[2]), vars(history))


@pytest.mark.parametrize("stop", [10, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_goes_on(tmp_path, kind, stop):
    class CutOffError(Exception):
        pass

    tol = 0.1 if kind == "robust_dlrt" else None
    method = Method(kind, kind, 0.1 if kind == "condlr" else None, tol=tol)
    common = {"data": few_images(), "rank": 3, "settings": SETTINGS, "exclude": "4"}
    path, done = tmp_path / "checkpoint.pt", 0

    def count():
        nonlocal done
        done += 1
        if done == stop:
            raise CutOffError

    with pytest.raises(CutOffError):
        train(method, network, **common, checkpoint=path, save_every=2, on_step=count)
    again = train(method, network, **common, checkpoint=path, save_every=2)
    whole = train(method, network, **common)
    assert_same(dict(again.model.state_dict()), dict(whole.model.state_dict()))
    assert_same(vars(again.history), vars(whole.history))


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "adam", "weight_decay": 0.1},
        {"augment": "crop-flip", "schedule": "linear", "warmup": 0.3},
        {"bfloat16": True, "nesterov": True},
    ],
    ids=lambda change: "-".join(change),
)
def test_every_option_goes_on(tmp_path, change):
    class CutOffError(Exception):
        pass

    method = Method("CondLR", "condlr", 0.1)
    settings = dataclasses.replace(SETTINGS, **change)
    common = {"data": few_images(), "rank": 3, "settings": settings, "exclude": "4"}
    path, done = tmp_path / "checkpoint.pt", 0

    def count():
        nonlocal done
        done += 1
        if done == 10:
            raise CutOffError

    with pytest.raises(CutOffError):
        train(method, network, **common, checkpoint=path, on_step=count)
    again = train(method, network, **common, checkpoint=path)
    whole = train(method, network, **common)
    assert_same(dict(again.model.state_dict()), dict(whole.model.state_dict()))
    assert_same(vars(again.history), vars(whole.history))


def test_steps_of_several_batches_go_on(tmp_path):
    """A step that begins in one epoch and ends in the next is taken up too."""

    class CutOffError(Exception):
        pass

    def start():
        torch.manual_seed(7)
        low = lrm.factorize(network(), rank=3, tau=None, exclude="4", gradient="probe")
        model = Normalized(low, few_images())
        return model, lrm.optim.DLRT(model.parameters(), 0.1, s_steps=2)

    whole, optimizer = start()
    history = fit(whole, optimizer, few_images(), SETTINGS, closure=True)
    for stop in (5, 8, 20):
        path, done = tmp_path / f"{stop}.pt", 0

        def count(stop=stop):
            nonlocal done
            done += 1
            if done == stop:
                raise CutOffError

        options = {"closure": True, "checkpoint": path}
        with pytest.raises(CutOffError):
            fit(*start(), few_images(), SETTINGS, on_step=count, **options)
        model, optimizer = start()
        assert_same(vars(fit(model, optimizer, few_images(), SETTINGS, **options)), vars(history))
        assert_same(dict(model.state_dict()), dict(whole.state_dict()))


@pytest.mark.slow
def test_the_command_killed_by_the_system_goes_on(tmp_path):
    pytest.importorskip("typer")
    pytest.importorskip("sklearn")

    def command(folder):
        options = ["--epochs", "4", "--rank", "5", "--save-every", "1", "--out", str(folder)]
        return [sys.executable, "-m", "lrmanifold.cli", "train", *options]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), check=True, env=environment)
    folder, rng = tmp_path / "cut", random.Random(1)
    for kill in range(4):
        process = subprocess.Popen(command(folder), env=environment)
        while not (folder / "checkpoint.pt").exists():
            time.sleep(0.01)
            assert process.poll() is None
        time.sleep(rng.random() * 2 if kill else 0.05)
        process.kill()
        process.wait()
    subprocess.run(command(folder), check=True, env=environment)
    assert not (folder / "checkpoint.pt").exists()
    one, other = (torch.load(x / "model.pt") for x in (tmp_path / "whole", folder))
    assert_same(one, other)
