"""Adversarial training: what the loss is, that it resumes, and that it makes networks robust."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lrmanifold as lrm
from lrmanifold.experiments import runs
from lrmanifold.experiments.adversarial import KINDS, NORMS, Adversarial, AdversarialLoss
from lrmanifold.experiments.data import Dataset
from lrmanifold.experiments.methods import Method, train
from lrmanifold.experiments.models import mlp, plain
from lrmanifold.experiments.stream import crop_and_flip
from lrmanifold.experiments.training import Normalized, Settings
from lrmanifold.robustness import accuracy_under_attack, pgd

METHOD = Method("CondLR", "condlr", 0.1)


@pytest.fixture(scope="module")
def stripes() -> Dataset:
    """Two classes told apart by one strong pixel, and by many weak ones that an attack reverses."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 2
    sign = (2.0 * y - 1)[:, None]
    x = 0.5 + 0.04 * sign + 0.04 * torch.randn(400, 64, generator=g)
    x[:, :1] = 0.5 + 0.25 * sign + 0.12 * torch.randn(400, 1, generator=g)
    x = x.clamp(0, 1).view(-1, 1, 8, 8)
    return Dataset("stripes", x[:300], y[:300], x[300:], y[300:], 2, ("a", "b"), (0.5,), (0.1,))


build = functools.partial(mlp, 64, 2, (24, 24))


def fitted(data, how, method=METHOD, **options):
    settings = Settings(epochs=12, batch_size=30, lr=0.1, momentum=0.5, seed=1)
    return train(method, build, data, 8, settings, exclude="fc3", adversarial=how, **options)


def affine(w: torch.Tensor) -> nn.Module:
    layer = nn.Linear(len(w), 2)
    with torch.no_grad():
        layer.weight.copy_(torch.stack((-w / 2, w / 2)))
        layer.bias.zero_()
    return nn.Sequential(nn.Flatten(), layer)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["pgd", "single"])
def test_on_an_affine_network_the_loss_is_the_exact_worst_case(norm, kind):
    """Logits +-w.x/2: the worst image is x - y eps w/|w| in the dual norm, in closed form."""
    torch.manual_seed(0)
    w, x = torch.randn(12), 0.5 + 0.05 * torch.randn(40, 1, 3, 4)
    y = torch.arange(40) % 2
    model, eps = affine(w), 0.1
    how = Adversarial(eps, norm, kind, steps=20, ramp=0.0)
    found = AdversarialLoss(how, 10)(model, x, y, 5)
    dual = w.abs().sum() if norm == "linf" else w.norm()
    margins = (2 * y - 1) * (x.flatten(1) @ w) - eps * dual
    exact = F.softplus(-margins).mean()
    if kind == "single":  # a step of 1.25 eps from a random start reaches most of the ball
        assert 0.75 * exact < found <= exact * (1 + 1e-5)
    else:
        assert found.item() == pytest.approx(exact.item(), rel=3e-3)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_images_stay_in_the_ball_and_in_range(norm, kind, device):
    torch.manual_seed(0)
    model = plain(3, 5, (8, 8)).to(device).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.rand(6, 3, 8, 8, device=device), torch.arange(6, device=device) % 5
    loss = AdversarialLoss(Adversarial(0.3, norm, kind), 10)
    z = loss.attacked(model, x, y, 0.3, loss.start(x, 2))
    size = (z - x).flatten(1)
    size = size.abs().amax(1) if norm == "linf" else size.norm(dim=1)
    assert (size <= 0.3 * (1 + 1e-5)).all()
    assert (size > 0.05).all()
    assert z.min() >= 0
    assert z.max() <= 1
    # no gradient and no average of batch norm comes from the attack
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())


def test_trades_is_the_published_formula():
    """CE(x) + beta KL(p(x) || p(x')) with the mean over images, written out."""
    torch.manual_seed(0)
    model = mlp(16, 3, (10,))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 3
    loss = AdversarialLoss(Adversarial(0.4, kind="trades", beta=4.0, ramp=0.0), 10)
    z = loss.attacked(model, x, y, 0.4, loss.start(x, 3))
    p, q = model(x).softmax(1), model(z).softmax(1)
    want = -p[range(8), y].log().mean() + 4.0 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(loss(model, x, y, 3), want)
    start = x + 0.4 * (2 * torch.rand(x.shape) - 1)
    random = model(start).softmax(1)
    assert (p * (p / q).log()).sum() > 2 * (p * (p / random).log()).sum()


def test_the_radius_grows():
    model, x = affine(torch.ones(12)), torch.full((4, 1, 3, 4), 0.5)
    y = torch.zeros(4, dtype=torch.long)
    loss = AdversarialLoss(Adversarial(0.2, ramp=0.5), 20)
    values = [loss(model, x, y, step).item() for step in (0, 4, 9, 19)]
    exact = [float(F.softplus(torch.tensor(6 + 12 * 0.2 * share))) for share in (0.1, 0.5, 1, 1)]
    assert values == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_training_makes_the_network_harder_to_fool(kind, stripes):
    def robust(trained):
        found = accuracy_under_attack(
            trained.model.eval(), (stripes.test_x, stripes.test_y), pgd, (0.06,), restarts=1
        )
        return found[0.06]

    ordinary, hardened = fitted(stripes, None), fitted(stripes, Adversarial(0.06, kind=kind))
    assert robust(hardened) > robust(ordinary) + 0.3
    assert max(hardened.history.cond) <= 1.1 * (1 + 1e-5)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k == "trades" else k for k in KINDS]
)
def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(kind, stripes, tmp_path):
    class CutOffError(Exception):
        pass

    done = 0

    def count():
        nonlocal done
        done += 1
        if done == 43:
            raise CutOffError

    how, path = Adversarial(0.05, kind=kind, steps=3), tmp_path / "run.pt"
    whole = fitted(stripes, how)
    with pytest.raises(CutOffError):
        fitted(stripes, how, checkpoint=path, on_step=count)
    again = fitted(stripes, how, checkpoint=path)
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(lrm.checkpoint.CheckpointError, match="objective"):
        fitted(stripes, Adversarial(0.06, kind=kind, steps=3), checkpoint=path)


@pytest.mark.parametrize("kind", ["svd", "finetuned", "factors", "dense"])
def test_every_method_trains_against_the_attack(kind, stripes):
    trained = fitted(stripes, Adversarial(0.05, steps=2), Method(kind, kind))
    ordinary = fitted(stripes, None, Method(kind, kind))
    assert trained.history.loss != ordinary.history.loss


def test_a_truncated_network_sees_the_radius_grow_once(stripes, monkeypatch):
    """As in the other methods, over the whole training; and starts that its first half had not."""
    seen = []

    def loss(self, model, x, y, eps, start):
        seen.append((eps, float(start.sum())))
        return nn.functional.cross_entropy(model(x), y)

    monkeypatch.setattr(AdversarialLoss, "loss", loss)
    for ramp in (0.3, 0.9):
        seen.clear()
        how = Adversarial(0.05, ramp=ramp)
        fitted(stripes, how)
        whole = [*seen]
        seen.clear()
        fitted(stripes, how, Method("cut", "finetuned"))
        assert seen == whole


def test_a_truncated_network_sees_the_certified_radius_grow_once(stripes, monkeypatch):
    seen = []

    class Loss(lrm.certify.CertifiedLoss):
        def forward(self, bound, logits, y):
            seen.append(self.schedule(0))
            return nn.functional.cross_entropy(logits, y)

    monkeypatch.setattr(lrm.certify, "CertifiedLoss", Loss)
    for method in (METHOD, Method("cut", "finetuned")):
        fitted(stripes, None, method, certified=0.1)
    half = len(seen) // 2
    assert seen[:half] == seen[half:]
    assert seen[half - 1] == 1.0


def test_wrong_arguments_are_named(stripes):
    for wrong in ({"eps": 0.0}, {"norm": "l1"}, {"kind": "fgsm"}, {"steps": 0}, {"ramp": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Adversarial(**{"eps": 0.1, **wrong})
    with pytest.raises(ValueError, match="give one of them"):
        fitted(stripes, Adversarial(0.1), certified=0.1)
    with pytest.raises(TypeError, match="adversarial"):
        fitted(stripes, 0.1)


def test_the_recipe_for_convolutions_runs(stripes):
    """bfloat16, channels last, crops, warm-up, Nesterov, smoothing, on the network `plain`."""
    x = stripes.train_x[:64].repeat(1, 3, 1, 1)
    data = Dataset(
        "c", x, stripes.train_y[:64], x, stripes.train_y[:64], 2, ("a", "b"), (0.5,) * 3, (0.1,) * 3
    )
    settings = Settings(
        2, 32, 0.05, 0.9, 0, nesterov=True, schedule="linear", warmup=0.2, augment="crop-flip",
        bfloat16=True, channels_last=True, label_smoothing=0.1, weight_decay=5e-4,
    )  # fmt: skip
    for how in (None, Adversarial(0.03, kind="single")):
        trained = train(
            METHOD, functools.partial(plain, 3, 2), data, 0.25, settings,
            exclude=("stem", "head"), adversarial=how,
        )  # fmt: skip
        assert trained.inference_kept < 0.4
        assert trained.history.loss[-1] < trained.history.loss[0]
        plainly = Normalized(trained.model.network, data).eval()
        torch.testing.assert_close(trained.model.eval()(x), plainly(x), atol=1e-4, rtol=1e-4)


def test_plain_starts_as_the_identity_where_it_can():
    torch.manual_seed(0)
    network = plain()
    x = torch.rand(2, 24, 6, 6)
    assert torch.equal(network.conv1a(x)[:, :24], x)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in network.parameters()) == 295_490


# -------------------------------------------------------------------------------- command line


def invoke(*words):
    testing = pytest.importorskip("typer.testing")
    pytest.importorskip("sklearn")
    from lrmanifold.cli._commands import app

    return testing.CliRunner().invoke(app, ["train", *map(str, words)])


def test_the_command_trains_against_the_attack_and_measures_it(tmp_path):
    quick = ("--epochs", 2, "--batch-size", 256, "--rank", 16, "--save-every", 0)
    folder = tmp_path / "a"
    found = invoke(*quick, "--adversarial", "linf-single", "--eps", 0.1, "--out", folder)
    assert found.exit_code == 0, found.output
    results = runs.load_results(folder)
    assert results["settings"]["adversarial"]["kind"] == "single"
    assert results["settings"]["adversarial"]["eps"] == 0.1
    assert list(results["accuracy"]["pgd"]) == ["linf 0.1"]
    assert results["accuracy"]["pgd"]["linf 0.1"] <= results["accuracy"]["fgsm"]["0.1"] + 0.01
    for name in ("pgd", "one_step"):
        assert 0 < results["accuracy"][name]["linf 0.1"] < results["accuracy"]["clean"]
    assert "under one step (linf 0.1)" in found.output
    # the same folder, another radius: another run
    again = invoke(*quick, "--adversarial", "linf-single", "--eps", 0.2, "--out", folder)
    assert again.exit_code == 2
    assert "adversarial" in again.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--adversarial", "l1", "--eps", 0.1), "adversarial must be one of linf, linf-trades"),
        (("--adversarial", "linf"), "adversarial needs one radius, as --eps 0.3, got 0"),
        (("--adversarial", "linf", "--eps", "0.1,0.2"), "needs one radius"),
        (("--adversarial", "l2", "--eps", 0.1, "--certified"), "give one of them"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(words, message, tmp_path):
    found = invoke(*words, "--out", tmp_path / "a")
    assert found.exit_code == 2
    assert message in found.output
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (lambda x: (x - 0.45) / 0.25, r"images in \[0, 1\].*before normalisation"),
        (lambda x: 255 * x, r"numbers in \[0\.\d+, 25\d"),
        (lambda x: x.index_fill(0, torch.tensor([1]), torch.nan), "nan"),
    ],
)
def test_images_that_are_not_in_the_unit_range_are_refused(x, message):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    loss = AdversarialLoss(Adversarial(8 / 255), 10)
    images = torch.rand(50, 3, 8, 8)
    y = torch.zeros(50, dtype=torch.int64)
    assert torch.isfinite(loss(net, images, y, 0))
    with pytest.raises(ValueError, match=message):
        loss(net, x(images), y, 1)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: AdversarialLoss(0.1, 10), TypeError, "how must be an Adversarial"),
        (lambda: AdversarialLoss(Adversarial(0.1), "10"), TypeError, "steps must be an integer"),
        (lambda: AdversarialLoss(Adversarial(0.1), 0), ValueError, "steps must be"),
        (lambda: AdversarialLoss(Adversarial(0.1), 9, seed=0.5), TypeError, "seed must be"),
        (
            lambda: AdversarialLoss(Adversarial(0.1), 9, label_smoothing=2),
            ValueError,
            "label_smoothing must be",
        ),
        (lambda: Adversarial(8), ValueError, r"at most 1 \(linf\).*8/255 = 0.03137 meant"),
    ],
)
def test_wrong_arguments_are_named_at_once(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


class Pair(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x), x


def test_a_step_before_the_first_and_a_model_that_returns_a_pair_are_named():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x, y = torch.rand(5, 1, 3, 4), torch.zeros(5, dtype=torch.int64)
    loss = AdversarialLoss(Adversarial(0.1, kind="trades"), 10)
    with pytest.raises(ValueError, match="step must be"):
        loss(net, x, y, -5)
    with pytest.raises(TypeError, match=r"model must be a module, got.*evaluation mode"):
        loss(lambda z: net(z), x, y, 0)
    with pytest.raises(TypeError, match="x must be a real floating point tensor"):
        loss(net, (255 * x).byte(), y, 0)
    with pytest.raises(TypeError, match=r"got an object of class tuple: wrap it in an nn\.Module"):
        loss(Pair(net), x, y, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_same_in_inference_mode(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x, y = torch.rand(5, 1, 3, 4), torch.zeros(5, dtype=torch.int64)
    loss = AdversarialLoss(Adversarial(0.1, kind=kind), 10)
    expected = loss(net, x, y, 3).detach()
    with torch.inference_mode():
        torch.testing.assert_close(loss(net, x.clone(), y.clone(), 3), expected)


def test_random_starts_and_crops_do_not_depend_on_torchs_default_dtype():
    x = torch.rand(6, 1, 5, 5)
    loss = AdversarialLoss(Adversarial(0.1, "l2"), 10)

    def drawn():
        return loss.start(x, 3), crop_and_flip(x, torch.Generator().manual_seed(0))

    expected = drawn()
    torch.set_default_dtype(torch.float64)
    try:
        found = drawn()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_steps_in_l2_are_not_used_up_by_what_points_out_of_the_images():
    """Black images, 95 % of the components outwards: the gain on a linear model is the exact one.

    Gradients of 1e-25, whose squares are no float32 numbers, make no difference.
    """
    w = torch.rand(400, generator=torch.Generator().manual_seed(0))
    w[:380] *= -1
    x, y = torch.zeros(2, 1, 20, 20), torch.zeros(2, dtype=torch.int64)
    for scale in (1.0, 1e-25):
        model = nn.Sequential(nn.Flatten(), nn.Linear(400, 2, bias=False))
        model[1].weight.data = scale * torch.stack((torch.zeros(400), w))
        for kind in ("pgd", "single"):
            loss = AdversarialLoss(Adversarial(0.1, norm="l2", kind=kind, ramp=0.0), 10)
            z = loss.attacked(model, x, y, 0.1, torch.zeros_like(x))
            gain = (z - x).flatten(1) @ w
            torch.testing.assert_close(gain, (0.1 * w[380:].norm()).expand(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_images_with_a_gradient_and_a_model_that_writes_into_them(kind):
    """Nothing reaches the images: no gradient of what was found, nor what the model writes."""

    class Shifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = mlp(12, 2, (8,))

        def forward(self, x):
            return self.network(x.sub_(0.5))

    torch.manual_seed(0)
    model, y = Shifting(), torch.arange(10) % 2
    loss, x = AdversarialLoss(Adversarial(0.1, kind=kind), 1), torch.rand(10, 1, 3, 4)
    start, before = loss.start(x, 0), x.clone()
    found = loss.attacked(model, x.requires_grad_(), y, 0.1, start)
    assert not found.requires_grad
    assert torch.equal(x, before)
    shifted = Shifting()
    shifted.network = model.network
    shifted.forward = lambda x: model.network(x - 0.5)
    assert torch.equal(found, loss.attacked(shifted, before, y, 0.1, start))
