"""The methods compared differ in nothing but the method."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold.experiments import demo
from lrmanifold.experiments.data import Dataset, batches
from lrmanifold.experiments.factors import TwoFactors, spectrum, two_factors
from lrmanifold.experiments.methods import Method, comparison, train
from lrmanifold.experiments.models import mlp
from lrmanifold.experiments.orthogonal import orthogonalize
from lrmanifold.experiments.stream import Stream, crop_and_flip
from lrmanifold.experiments.training import History, Normalized, Settings, fit

SETTINGS = Settings(epochs=2, batch_size=16, lr=0.1, momentum=0.3, seed=3)


@pytest.fixture(scope="module")
def blobs() -> Dataset:
    """Three classes of noisy 1 x 4 x 4 images, easily told apart."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(96) % 3
    centres = torch.rand(3, 1, 4, 4, generator=g)
    x = (centres[y] + 0.1 * torch.randn(96, 1, 4, 4, generator=g)).clamp(0, 1)
    names = ("a", "b", "c")
    return Dataset("blobs", x[:72], y[:72], x[72:], y[72:], 3, names, (0.5,), (0.25,))


build = functools.partial(mlp, 16, 3, (20, 20))


def run(method: Method, data: Dataset, settings: Settings = SETTINGS, **options):
    options = {"exclude": "fc3", **options}
    return train(method, build, data, 5, settings, **options)


def dense_start(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def matrix(module: nn.Module) -> torch.Tensor:
    """The m x n matrix by which a layer, low-rank or not, multiplies."""
    if isinstance(module, TwoFactors):
        return module[1].weight.flatten(1) @ module[0].weight.flatten(1)
    return module.dense_weight() if isinstance(module, lrm.nn.LowRankLayer) else module.weight


def test_comparison_has_the_six_methods():
    kinds = [(m.kind, m.tau) for m in comparison()]
    assert kinds == [
        ("dense", None), ("svd", None), ("factors", None),
        ("condlr", 0.0), ("condlr", 0.1), ("condlr", 0.5),
    ]  # fmt: skip


@pytest.mark.parametrize("method", comparison(), ids=lambda m: m.name)
def test_every_method_starts_from_the_same_dense_network(method, blobs, monkeypatch):
    """What is trained is the dense network of the seed, or what its truncated SVD makes of it."""
    seen = []

    def spy(model, optimizer, data, settings, **options):
        seen.append((copy.deepcopy(model.network), settings))
        return fit(model, optimizer, data, settings, **options)

    monkeypatch.setattr("lrmanifold.experiments.methods.fit", spy)
    run(method, blobs)
    (network, settings), start = seen[0], dense_start(SETTINGS.seed)
    assert len(seen) == 1
    assert settings == SETTINGS
    for name in ("fc1", "fc2", "fc3"):
        layer, dense = network.get_submodule(name), start.get_submodule(name)
        bias = layer[1].bias if isinstance(layer, TwoFactors) else layer.bias
        assert torch.equal(bias, dense.bias)
        want = dense.weight
        if method.kind in ("factors", "condlr") and name != "fc3":
            tau = method.tau if method.kind == "condlr" else None
            want = lrm.nn.LowRankLinear.from_dense(dense, 5, tau=tau).dense_weight()
        torch.testing.assert_close(matrix(layer), want, atol=1e-6, rtol=1e-5)


def test_batches_come_in_the_same_order_for_every_method(blobs, monkeypatch):
    orders = []

    def spy(x, y, size, **options):
        found = list(batches(x, y, size, **options))
        orders.append(torch.cat([labels for _, labels in found]))
        return iter(found)

    monkeypatch.setattr("lrmanifold.experiments.stream.batches", spy)
    for method in comparison():
        if method.kind != "svd":
            run(method, blobs)
    first, second = orders[0], orders[1]
    assert not torch.equal(first, second)  # epochs differ
    assert all(torch.equal(o, (first, second)[i % 2]) for i, o in enumerate(orders))


def test_svd_truncates_the_trained_dense_network(blobs):
    dense = run(Method("dense", "dense"), blobs)
    before = copy.deepcopy(dense.model.state_dict())
    cut = run(Method("svd", "svd"), blobs, dense=dense)
    assert all(torch.equal(before[k], v) for k, v in dense.model.state_dict().items())
    for name in ("fc1", "fc2"):
        U, s, Vh = torch.linalg.svd(dense.model.network.get_submodule(name).weight.double())
        best = (U[:, :5] * s[:5]) @ Vh[:5]
        weight = cut.model.network.get_submodule(name).weight.double()
        torch.testing.assert_close(weight, best, atol=1e-6, rtol=0)
    assert torch.equal(cut.model.network.fc3.weight, dense.model.network.fc3.weight)
    alone = run(Method("svd", "svd"), blobs)  # trains its own dense network
    x = blobs.test_x
    torch.testing.assert_close(alone.model(x), cut.model(x))


@pytest.mark.parametrize(
    "dense",
    [
        nn.Linear(12, 9),
        nn.Linear(12, 9, bias=False),
        nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=2, padding_mode="reflect"),
        nn.Conv1d(3, 8, 5, padding="same", bias=False),
    ],
    ids=["linear", "no bias", "conv2d", "conv1d"],
)
def test_two_factors_equal_the_truncated_svd_at_the_start(dense):
    model = nn.Sequential(copy.deepcopy(dense)).double()
    U, s, Vh = torch.linalg.svd(model[0].weight.flatten(1))
    best = nn.Sequential(copy.deepcopy(model[0]))
    with torch.no_grad():
        best[0].weight.copy_(((U[:, :4] * s[:4]) @ Vh[:4]).reshape(dense.weight.shape))
    two_factors(model, 4, keep_larger=True)
    assert isinstance(model[0], TwoFactors)
    shape = (2, 12) if isinstance(dense, nn.Linear) else (2, 3, *[11] * (dense.weight.ndim - 2))
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(model(x), best(x))
    torch.testing.assert_close(model[0].svdvals(), s[:4])
    A, Bt = model[0][1].weight.flatten(1), model[0][0].weight.flatten(1)
    torch.testing.assert_close(A.mT @ A, Bt @ Bt.mT)  # balanced


def test_two_factors_choose_the_layers_that_factorize_chooses():
    ranks = {"fc1": 5, "fc2": 0.25}
    ours, plain = lrm.factorize(build(), rank=ranks), two_factors(build(), ranks)
    for name in ("fc1", "fc2", "fc3"):
        a, b = spectrum(ours.get_submodule(name)), spectrum(plain.get_submodule(name))
        assert (a is None) == (b is None)
        assert a is None or a.shape == b.shape


def test_two_factors_keep_dtype_and_device(device):
    model = two_factors(build().double().to(device), 5)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float64, device.type)}


@pytest.mark.parametrize("kind", ["dense", "factors", "condlr"])
def test_training_is_deterministic_for_a_seed(kind, blobs):
    method = Method(kind, kind, 0.1 if kind == "condlr" else None)
    a, b = run(method, blobs), run(method, blobs)
    assert a.history == b.history
    assert all(
        torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True)
    )
    other = run(method, blobs, Settings(epochs=2, batch_size=16, seed=4))
    assert other.history.loss != a.history.loss


def test_finetuned_is_half_dense_then_the_truncated_factors(blobs):
    """The halves done by hand: the dense network of half of the epochs, cut, trained on."""
    settings = dataclasses.replace(SETTINGS, epochs=3, weight_decay=0.01)
    found = run(Method("cut", "finetuned", finetune=0.5), blobs, settings)
    first = run(Method("dense", "dense"), blobs, dataclasses.replace(settings, epochs=2))
    model = Normalized(two_factors(first.model.network, 5, exclude="fc3"), blobs)
    groups = lrm.optim.param_groups(model, weight_decay=0.01)
    optimizer = lrm.optim.CondLR(groups, 0.05, momentum=0.3)
    second = dataclasses.replace(settings, epochs=1, lr=0.05)
    history = fit(model, optimizer, blobs, second, done=2)
    assert found.history.loss == first.history.loss + history.loss
    for p, q in zip(found.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match=r"finetuned needs settings\.epochs >= 2, got 1"):
        run(Method("cut", "finetuned"), blobs, Settings(epochs=1))


def test_the_second_part_of_a_training_sees_what_the_first_did_not():
    """Orders and crops go on behind those of the first part, as in a training that is whole."""
    x = torch.rand(40, 1, 6, 6)
    data = Dataset(
        "x", x, torch.arange(40) % 2, x[:2], torch.arange(2), 2, ("a", "b"), (0.5,), (1.0,)
    )
    settings = Settings(epochs=4, batch_size=16, seed=3, augment="crop-flip")
    whole, second = (Stream(data, settings, x.device, done) for done in (0, 2))
    seen = [next(whole)[0] for _ in range(4 * 3)]
    rest = [next(second)[0] for _ in range(2 * 3)]
    assert all(torch.equal(a, b) for a, b in zip(seen[6:], rest, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seen[:6], rest, strict=True))


def test_orthogonal_keeps_all_matrices_but_the_last_orthogonal(blobs):
    """Decay too: it acts on the last layer alone."""
    small = dataclasses.replace(SETTINGS, weight_decay=0.5)
    plain = run(Method("orthogonal", "orthogonal"), blobs).model.network
    decayed = run(Method("orthogonal", "orthogonal"), blobs, small).model.network
    for network in (plain, decayed):
        for layer in (network.fc1, network.fc2):
            s = torch.linalg.svdvals(layer.weight.detach())
            torch.testing.assert_close(s, torch.ones_like(s))
    assert decayed.fc3.weight.norm() < 0.8 * plain.fc3.weight.norm()
    conv = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(32, 2))
    start = conv[0].weight.detach().flatten(1)
    orthogonalize(conv)
    x = torch.randn(2, 3, 4, 4)
    U, _, Vh = torch.linalg.svd(start.double(), full_matrices=False)
    kernel = (U @ Vh).float().view(8, 3, 3, 3)
    want = nn.functional.conv2d(x, kernel, conv[0].bias, stride=2, padding=1)
    torch.testing.assert_close(conv[0](x), want, atol=1e-5, rtol=1e-5)


def test_the_penalty_pulls_the_cores_together(blobs):
    plain, pulled = (
        run(Method("penalty", "condlr", penalty=b), blobs).history.cond[-1] for b in (0.0, 0.3)
    )
    assert pulled < 0.8 * plain


def test_methods_of_several_evaluations_see_the_same_number_of_batches(blobs):
    for kind, options in (("dlrt", {}), ("robust_dlrt", {"tol": 0.1, "penalty": 0.05})):
        taken = []
        run(Method(kind, kind, **options), blobs, on_step=lambda t=taken: t.append(1))
        assert 10 <= len(taken) < 10 + 15


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
def test_condlr_stays_in_the_set_after_every_step(tau, blobs, device):
    conds = []

    def watch() -> None:
        for layer in layers:
            X = layer.weight.detach()
            conds.append(layer.manifold.cond(X).item())
            assert layer.manifold.drift(X).item() <= 1e-5

    torch.manual_seed(0)
    network = lrm.factorize(build(), rank=5, tau=tau, exclude="fc3")
    model = Normalized(network, blobs).to(device)
    layers = [m for m in model.modules() if isinstance(m, lrm.nn.LowRankLayer)]
    fit(
        model,
        lrm.optim.CondLR(model.parameters(), 0.3, momentum=0.3),
        blobs,
        SETTINGS,
        on_step=watch,
    )
    assert len(conds) == 2 * SETTINGS.epochs * 5
    assert max(conds) <= (1 + tau) * (1 + 1e-5)


def test_train_condlr_bounds_what_it_returns(blobs):
    trained = run(Method("CondLR", "condlr", 0.1), blobs)
    assert max(trained.history.cond) <= 1.1 * (1 + 1e-5)
    assert trained.history.loss[-1] < trained.history.loss[0]


def test_sizes_kept(blobs):
    size = sum(p.numel() for p in build().parameters())
    rest = 20 + 20 + 3 + 60
    cores, folded = 2 * 25, (20 + 16) * 5 + (20 + 20) * 5
    kept = {m.kind: run(m, blobs) for m in comparison()}
    for kind in ("svd", "condlr"):
        assert kept[kind].weights_kept == pytest.approx((folded + cores + rest) / size)
        assert kept[kind].inference_kept == pytest.approx((folded + rest) / size)
    assert kept["factors"].weights_kept == kept["factors"].inference_kept
    assert kept["factors"].inference_kept == pytest.approx((folded + rest) / size)
    assert kept["dense"].weights_kept == 1.0


def test_history_records_before_training_and_after_each_epoch(blobs):
    for kind in ("factors", "condlr"):
        history = run(Method(kind, kind, 0.5 if kind == "condlr" else None), blobs).history
        assert list(history.spectra) == ["network.fc1", "network.fc2"]
        for values in history.spectra.values():
            assert [len(s) for s in values] == [5] * (SETTINGS.epochs + 1)
            assert all(s == sorted(s, reverse=True) for s in values)
        last = [s[-1] for s in history.spectra.values()]
        assert history.cond[-1] == pytest.approx(max(s[0] / s[-1] for s in last), rel=1e-5)
        assert len(history.loss) == SETTINGS.epochs
    assert run(Method("dense", "dense"), blobs).history.spectra == {}


def test_divergence_is_an_error_that_names_the_rate(blobs):
    for kind in ("dense", "factors"):
        with pytest.raises(FloatingPointError, match="lower lr = 1e"):
            run(Method(kind, kind), blobs, Settings(epochs=3, batch_size=16, lr=1e18))


def test_every_step_is_announced(blobs):
    steps = []
    run(Method("dense", "dense"), blobs, on_step=lambda: steps.append(1))
    assert len(steps) == SETTINGS.epochs * 5  # 72 images in batches of 16


def test_same_start_on_every_device(blobs, device):
    history = run(Method("CondLR", "condlr", 0.1), blobs, device=device).history
    reference = run(Method("CondLR", "condlr", 0.1), blobs).history
    assert history.spectra["network.fc1"][0] == pytest.approx(
        reference.spectra["network.fc1"][0], rel=1e-5
    )
    assert history.loss == pytest.approx(reference.loss, rel=1e-3)


def test_unknown_kind_and_settings_are_refused(blobs):
    with pytest.raises(ValueError, match=r"kind must be one of dense, .*, got 'x'"):
        Method("x", "x")
    for wrong in ({"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"momentum": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**wrong)


@pytest.mark.parametrize("more", [{}, {"certified": 0.1}])
def test_dlrt_has_no_adam_and_says_so(more, blobs):
    settings = dataclasses.replace(SETTINGS, optimizer="sgd" if more else "adam")
    for kind in ("dlrt", "robust_dlrt"):
        with pytest.raises(ValueError, match=rf"{kind} takes optimizer 'sgd' alone, got 'adam'"):
            run(Method(kind, kind, tol=0.1), blobs, settings, **more)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("dense", {"tau": 0.1}),
        ("factors", {"tau": 0.0}),
        ("fixed_rank", {"tau": 0.1}),
        ("finetuned", {"penalty": 0.1}),
        ("dlrt", {"penalty": 0.1}),
        ("condlr", {"tol": 0.1}),
        ("svd", {"finetune": 0.3}),
        ("orthogonal", {"s_steps": 2}),
    ],
)
def test_what_a_method_would_ignore_is_refused(kind, more):
    ((name, value),) = more.items()
    with pytest.raises(ValueError, match=rf"^{name} must be .*'{kind}'.*got {value}: it belongs"):
        Method(kind, kind, **more)


def test_label_smoothing_that_certified_training_would_ignore_is_refused(blobs):
    settings = dataclasses.replace(SETTINGS, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing of settings must be 0 .*, got 0\.1"):
        run(Method("c", "condlr", 0.0), blobs, settings, certified=0.1)


def test_options_that_came_later_are_written_only_where_they_were_set():
    """So a run or a checkpoint from before such an option is still the same run."""
    plain = Settings(3, 32, 0.2, 0.5, 7).to_dict()
    assert plain == {"epochs": 3, "batch_size": 32, "lr": 0.2, "momentum": 0.5, "seed": 7}
    assert Settings(weight_decay=0.1, optimizer="adam").to_dict() == {
        **Settings().to_dict(), "optimizer": "adam", "weight_decay": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimizer": "lion"}, {"schedule": "step"}, {"augment": "mixup"}, {"weight_decay": -1.0},
        {"label_smoothing": 1.0}, {"warmup": 1.0}, {"optimizer": "adam", "nesterov": True},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_named(wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        Settings(**wrong)


def rates(optimizer, blobs, **options):
    """The rate of every step."""
    found = []
    settings = Settings(epochs=4, batch_size=16, lr=0.2, **options)
    model = Normalized(build(), blobs)
    optimizer = optimizer(model.parameters(), settings.lr)
    optimizer.register_step_pre_hook(lambda o, *_: found.append(o.param_groups[0]["lr"]))
    fit(model, optimizer, blobs, settings)
    return found


@pytest.mark.parametrize("options", [{}, {"warmup": 0.5}, {"schedule": "linear"}], ids=str)
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
def test_a_second_training_begins_with_the_rates_that_the_optimizer_has(options, kind, blobs):
    """Not with what the first schedule, or one that was cut off, had come down to."""
    found = []

    def stop():
        if len(found) == 3:
            raise KeyboardInterrupt

    settings = Settings(epochs=2, batch_size=16, **options)
    model = Normalized(build(), blobs)
    optimizer = torch.optim.SGD(model.parameters(), kind(0.25))
    group = optimizer.param_groups[0]
    optimizer.register_step_pre_hook(lambda *_: found.append(float(group["lr"])))
    with pytest.raises(KeyboardInterrupt):
        fit(model, optimizer, blobs, settings, on_step=stop)
    whole = [fit(model, optimizer, blobs, settings) and found[-10:] for _ in range(2)]
    assert whole[0] == whole[1]
    assert max(whole[0]) == group["lr"] == 0.25
    assert found[:3] == whole[0][:3]
    group["lr"] = kind(0.125)  # what a user sets is what the next one begins with
    fit(model, optimizer, blobs, settings)
    assert max(found[-10:]) == 0.125
    assert "initial_lr" not in group


def test_rates_rise_linearly_and_fall_to_zero(blobs):
    """20 steps, 5 of them rising: lr k / 5, then down by lr / 15 a step; the last one is not 0."""
    linear = rates(torch.optim.SGD, blobs, schedule="linear", warmup=0.25)
    rise = [0.2 * k / 5 for k in range(1, 6)]
    assert linear == pytest.approx([*rise, *(0.2 * (20 - k) / 15 for k in range(5, 20))])
    cosine = rates(torch.optim.SGD, blobs, warmup=0.25)
    assert cosine[:6] == pytest.approx([*rise, 0.2])
    plain = rates(torch.optim.SGD, blobs)
    assert plain == pytest.approx([0.1 * (1 + math.cos(math.pi * k / 20)) for k in range(20)])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_warm_up_that_rounds_to_the_whole_training_ends(schedule, blobs):
    found = rates(torch.optim.SGD, blobs, schedule=schedule, warmup=0.98)
    assert found == pytest.approx([*(0.2 * k / 19 for k in range(1, 20)), 0.2])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_options_reach_the_training_and_equal_torchs(optimizer, blobs):
    """A dense network with decay, smoothing and Nesterov: a plain loop with torch's own classes."""
    nesterov = optimizer == "sgd"
    settings = Settings(
        1, 16, 0.05, 0.6, 3, optimizer, weight_decay=0.1, label_smoothing=0.2, nesterov=nesterov
    )
    found = run(Method("dense", "dense"), blobs, settings).model
    torch.manual_seed(3)
    model = Normalized(build(), blobs)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    free = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
    if optimizer == "sgd":
        rule = torch.optim.SGD(groups, 0.05, momentum=0.6, nesterov=True)
    else:
        rule = torch.optim.AdamW(groups, 0.05)
    generator = torch.Generator().manual_seed(3)
    order = list(batches(blobs.train_x, blobs.train_y, 16, generator=generator))
    for k, (x, y) in enumerate(order):
        for group in rule.param_groups:
            group["lr"] = 0.025 * (1 + math.cos(math.pi * k / len(order)))
        rule.zero_grad()
        nn.functional.cross_entropy(model(x), y, label_smoothing=0.2).backward()
        rule.step()
    for p, q in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_optimizers_with_several_evaluations_a_step_see_as_many_batches(blobs):
    model = Normalized(lrm.factorize(build(), rank=5, tau=None, gradient="probe"), blobs)
    optimizer = lrm.optim.DLRT(model.parameters(), 0.1, s_steps=3)
    steps, taken = [], []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    history = fit(model, optimizer, blobs, SETTINGS, closure=True, on_step=lambda: taken.append(1))
    assert len(steps) < 2 * 5 <= len(taken) < 2 * 5 + 5
    assert len(history.loss) == SETTINGS.epochs
    assert len(history.cond) == SETTINGS.epochs + 1


def test_crops_and_flips_move_images_whole():
    """Each image of a moving gradient is one of the 50 that shifts by 2 pixels and mirrors make."""
    x = torch.arange(2 * 3 * 6 * 7.0).reshape(2, 3, 6, 7).repeat(20, 1, 1, 1)
    moved = crop_and_flip(x, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    seen = set()
    for k, image in enumerate(moved):
        places = [
            (i, j, flip)
            for i in range(5)
            for j in range(5)
            for flip in (False, True)
            if torch.equal(image.flip(-1) if flip else image, padded[k, :, i : i + 6, j : j + 7])
        ]
        assert places
        seen.update(places)
    assert len(seen) > 20


@pytest.mark.parametrize("place", [0, 1])
def test_a_history_and_a_table_show_nan_wherever_it_is(place):
    layers = [lrm.nn.LowRankLinear(6, 6, 2, tau=None) for _ in range(2)]
    with torch.no_grad():
        layers[place].S.zero_()
    history = History()
    history.record(nn.Sequential(*layers))
    assert math.isnan(history.cond[0])
    conds = [1.0, 2.0]
    conds[place] = math.nan
    outcome = demo.Outcome(Method("CondLR", "condlr"), cond=[dict(zip("ab", conds, strict=True))])
    assert math.isnan(outcome.largest_cond)


def test_empty_history_of_a_dense_model():
    history = History()
    history.record(build())
    assert history == History()


def test_the_demo_compares_at_the_strengths_it_was_given():
    dense, *_, ours = (demo.Outcome(method) for method in comparison())
    for outcome, accuracy in ((dense, 0.5), (ours, 0.625)):
        outcome.clean, outcome.fgsm, outcome.pgd = [0.9], {0.1: [accuracy]}, {0.1: [0.5]}
    given = demo.Demo(strengths=(0.1,))
    found = demo.Comparison(given, None, [dense, ours], 0.0)
    assert found.verdicts() == ["CondLR tau=0.5, of 2 attack columns ahead of: dense 1 (+6.2)"]
    found.demo = demo.Demo(strengths=(0.3,))
    assert found.verdicts() == []
    with pytest.raises(ValueError, match="seeds must hold at least one integer"):
        demo.Demo(seeds=())
