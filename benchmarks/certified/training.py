"""One training for all methods, then the certificate on images that it has not seen."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrmanifold as lrm
from lrmanifold import certify, robustness
from lrmanifold.experiments.data import Dataset, validation_split
from lrmanifold.experiments.replay import Replay

from .._shared import load
from .networks import build, sizes, truncate
from .peers import unit_rows
from .plan import PEER, Run

VALIDATION = 0.1  # of the training images, the same ones for every choice
# The host waits for something in their steps (singular vectors; convolutions' norms), so that no
# graph can be captured, and none is tried: after a capture that broke, a process is of no use.
WAITS = ("low rank tau 0.1", PEER)
# Where a run is cut to the time that is left: to these shares of its epochs.
SHARES = (1.0, 0.8, 0.67, 0.5, 0.4, 0.33, 0.2)
_EVALUATION = 25.0  # seconds that are left for what follows the training
_LOADED: dict[tuple[Any, ...], Dataset] = {}
_PARTS = ("train_x", "train_y", "test_x", "test_y")


def data_of(run: Run, root: str | None, device: torch.device | str = "cpu") -> Dataset:
    """Training and test images on the device; of a choice, both from the training images."""
    key = run.data, root, run.choice, str(device)
    if key not in _LOADED:
        data = load(run.data, root)
        data = validation_split(data, VALIDATION, 0) if run.choice else data
        there = {name: getattr(data, name).to(device) for name in _PARTS}
        _LOADED[key] = dataclasses.replace(data, **there)
    return _LOADED[key]


def draws(n: int, run: Run, generator: torch.Generator) -> list[Tensor]:
    """The random numbers that move n images, on the generator's device."""
    here: dict[str, Any] = {"generator": generator, "device": generator.device}
    found = []
    if run.flip:
        found.append(torch.rand(n, **here))
    if run.crop:
        found.append(torch.randint(0, 2 * run.crop + 1, (2, n, 1), **here))
    if run.shift or run.rotate or run.zoom:
        found.append(torch.rand(4, n, **here))
    return found


def placed(x: Tensor, run: Run, numbers: list[Tensor]) -> Tensor:
    """Images moved, turned and scaled as the numbers say."""
    n, left = len(x), list(numbers)
    if run.flip:
        mirrored = (left.pop(0) > 0.5).view(-1, 1, 1, 1)
        x = torch.where(mirrored, x.flip(-1), x)
    if run.crop:
        c, (h, w) = run.crop, x.shape[-2:]
        row, column = left.pop(0)
        rows = row + torch.arange(h, device=x.device)
        columns = column + torch.arange(w, device=x.device)
        bordered = F.pad(x, (c, c, c, c), mode="reflect")
        which = torch.arange(n, device=x.device)[:, None, None]
        x = bordered[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if run.shift or run.rotate or run.zoom:
        turn, size, right, down = 2.0 * left.pop(0) - 1.0
        turn, size = turn * run.rotate * math.pi / 180, 1.0 + size * run.zoom
        A = torch.zeros(n, 2, 3, device=x.device)
        A[:, 0, 0], A[:, 0, 1] = size * turn.cos(), -turn.sin()
        A[:, 1, 0], A[:, 1, 1] = turn.sin(), size * turn.cos()
        A[:, :, 2] = torch.stack((right, down), 1) * (2.0 * run.shift / x.shape[-1])
        grid = F.affine_grid(A, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
    return x


def moved(x: Tensor, run: Run, generator: torch.Generator) -> Tensor:
    """Images moved, turned and scaled at random, as the run asks."""
    return placed(x, run, draws(len(x), run, generator))


def margin_loss(z: Tensor, y: Tensor) -> Tensor:
    """Largest other logit minus the true one, (B,): does not vanish where the network is sure."""
    own = z.gather(1, y[:, None])[:, 0]
    return z.scatter(1, y[:, None], -torch.inf).logsumexp(1) - own


Trained = tuple[nn.Sequential, list[float], bool]


def fitting(epochs: int, done: int, each: float, left: float) -> int:
    """How many of some epochs fit into `left` seconds: at first in steps of SHARES, with a margin.

    Later as many as fit, should others take the device.
    """
    if done == 2:
        for share in SHARES:
            some = max(done, round(share * epochs))
            if (some - done) * each * 1.2 <= left:
                return some
    return max(done, min(epochs, done + int(left / each)))


def _optimizer(run: Run, model: Any, device: torch.device) -> lrm.optim.CondLRAdam:
    groups = lrm.optim.param_groups(model, lr=run.lr)
    optimizer = lrm.optim.CondLRAdam(groups, lr=run.lr, capturable=device.type == "cuda")
    if run.network == "liresnet":
        optimizer.register_step_post_hook(lambda *_: unit_rows(model[-1]))
    return optimizer


def train(run: Run, data: Dataset, *, graphs: bool = True, until: float | None = None) -> Trained:
    """The trained network, the mean loss of each epoch, and whether its steps were replayed.

    On CUDA the steps are replayed from a captured graph, but for methods of WAITS. With `until`
    (a time of ``time.monotonic``) there are fewer epochs where those asked for take longer: decided
    after the second epoch (and again whenever it gets slower), and the rate falls accordingly. The
    losses tell how many it were.
    """
    torch.manual_seed(run.seed)
    device, images = data.train_x.device, len(data.train_y)
    model = build(run, data).to(device)
    epochs = run.epochs
    steps = epochs * -(-images // run.batch)
    optimizer = _optimizer(run, model, device)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    bound = certify.LipschitzBound(model, data.image_shape)
    kind: Any = run.kind
    loss = certify.CertifiedLoss(run.eps_train, max(1, int(run.ramp * steps)), kind).to(device)
    generator = torch.Generator(device).manual_seed(run.seed)
    total = torch.zeros((), dtype=torch.float64, device=device)

    def step(index: Tensor, *numbers: Tensor) -> None:
        x, y = placed(data.train_x[index], run, list(numbers)), data.train_y[index]
        with torch.autocast(device.type, torch.bfloat16, enabled=run.bfloat16):
            logits = model(x)
        value = loss(bound, logits.float(), y)
        optimizer.zero_grad()
        value.backward()
        if run.clip:
            nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        optimizer.step()
        loss.step()
        total.add_(value.detach(), alpha=len(y))

    replay = Replay(step, device, enabled=graphs and run.method not in WAITS)
    done, began = 0, 0.0
    losses: list[float] = []
    for epoch in range(run.epochs):
        if epoch == epochs:
            break
        if epoch == 1:  # the first one captures
            began = time.monotonic()
        total.zero_()
        for index in torch.randperm(images, generator=generator, device=device).split(run.batch):
            share = 0.5 * (1.0 + math.cos(math.pi * done / steps))
            _set_rates(optimizer, [share * rate for rate in rates])
            replay(index, *draws(len(index), run, generator))
            done += 1
        losses.append(float(total) / images)
        if not math.isfinite(losses[-1]):
            break
        if until is not None and epoch >= 1:
            now = time.monotonic()
            each = (now - began) / epoch
            epochs = fitting(epochs, epoch + 1, each, until - now - _EVALUATION)
            steps = epochs * -(-images // run.batch)
    return model, losses, replay.captured


def _set_rates(optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
    """In place where they are tensors, as a captured graph reads them."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _wait(device: torch.device) -> float:
    """The time, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(
    run: Run,
    root: str | None,
    device: torch.device | str = "cpu",
    *,
    until: float | None = None,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Train and certify; what the tables are made of.

    Should the certificate fail, weights and all else go to the file `keep`, not to be lost.
    """
    device = torch.device(device)
    data = data_of(run, root, device)
    began, work = _wait(device), time.process_time()
    model, losses, replayed = train(run, data, until=until)
    minutes, work = (_wait(device) - began) / 60, (time.process_time() - work) / 60
    result: dict[str, Any] = {"run": run.to_dict(), "device": device.type, "minutes": minutes}
    if device.type == "cpu":
        result["processor_minutes"] = work
    else:
        result["replayed"] = replayed
    result |= {"epochs": len(losses), "losses": losses}
    if not math.isfinite(losses[-1]):
        return {**result, "diverged": True}
    try:
        return {**result, **certificate(run, model, data)}
    except Exception:
        if keep is not None:
            torch.save({"result": result, "weights": model.state_dict()}, keep)
        raise


def certificate(run: Run, model: nn.Sequential, data: Dataset) -> dict[str, Any]:
    """What is proved of a trained network, and the attack beside it."""
    if run.method == "truncated":
        model = truncate(model, run.rank)
    model.eval()
    report = certify.lipschitz(model, data.image_shape)
    attack: dict[str, Any] = {} if run.choice else {
        "attack": robustness.pgd, "norm": "l2", "steps": 30, "random_start": False,
        "loss": margin_loss,
    }  # fmt: skip
    large = data.test_x.device.type != "cpu"
    few: dict[str, Any] = {"batch_size": 5000 if large else 500, "bound": report}
    found = certify.verified_accuracy(model, (data.test_x, data.test_y), [run.eps], **few, **attack)
    result: dict[str, Any] = {
        **sizes(model),
        "clean": found["clean"],
        "verified": found["verified"][run.eps],
        "attacked": found["attacked"][run.eps] if "attacked" in found else None,
        "radius": found["radius"],
        "bound": report.total,
        "layers": [
            {"name": row.name, "bound": row.bound, "how": row.how}
            for row in report.rows
            if row.bound != 1.0
        ],
    }
    if run.choice:
        seen = data.train_x[:5000], data.train_y[:5000]
        found = certify.verified_accuracy(model, seen, [run.eps], **few)
        result["seen"] = {"clean": found["clean"], "verified": found["verified"][run.eps]}
    else:
        result["curve"] = curve(model, data, run.eps, few)
        result["local"] = looseness(model, data, report)
    return result


def curve(model: nn.Module, data: Dataset, eps: float, options: dict[str, Any]) -> dict[str, float]:
    """Verified accuracy over the radius."""
    radii = [eps * k / 10 for k in range(31)]
    found = certify.verified_accuracy(model, (data.test_x, data.test_y), radii, **options)
    return {f"{e:.4g}": share for e, share in found["verified"].items()}


def looseness(
    model: nn.Module, data: Dataset, report: certify.LipschitzReport, count: int = 64
) -> dict[str, float]:
    """How far the bound is above the local constant, ‖J(x)‖₂, of some test images."""
    x = data.test_x[:: max(1, len(data.test_x) // count)][:count].double()
    graph = report.network.graph
    J = torch.func.vmap(torch.func.jacrev(lambda v: graph(v[None])[0]))(x)
    norms = torch.linalg.matrix_norm(J.flatten(2), 2)
    ratio = report.total / norms
    return {"median": float(ratio.median()), "smallest": float(ratio.min())}
