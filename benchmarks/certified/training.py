"""One training for all methods, then the certificate on images that it has not seen."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrmanifold as lrm
from lrmanifold import certify, robustness
from lrmanifold.experiments.data import Dataset, batches, load, validation_split

from .networks import build, sizes, truncate
from .peers import unit_rows
from .plan import Run

VALIDATION = 0.1  # of the training images, the same ones for every choice
_LOADED: dict[str, Dataset] = {}


def data_of(run: Run, root: str | None) -> Dataset:
    """Training and test images; of a choice, both from the training images."""
    if run.data not in _LOADED:
        folder = None if run.data == "fashion-mnist" else root
        _LOADED[run.data] = load(run.data, folder)
    data = _LOADED[run.data]
    return validation_split(data, VALIDATION, 0) if run.choice else data


def moved(x: Tensor, run: Run, generator: torch.Generator) -> Tensor:
    """Images moved, turned and scaled at random, as the run asks."""
    n = len(x)

    def uniform() -> Tensor:
        return 2.0 * torch.rand(n, generator=generator) - 1.0

    if run.flip:
        mirrored = (uniform() > 0).view(-1, 1, 1, 1)
        x = torch.where(mirrored, x.flip(-1), x)
    if run.crop:
        c, (h, w) = run.crop, x.shape[-2:]
        row, column = torch.randint(0, 2 * c + 1, (2, n, 1), generator=generator)
        rows, columns = row + torch.arange(h), column + torch.arange(w)
        bordered = F.pad(x, (c, c, c, c), mode="reflect")
        which = torch.arange(n)[:, None, None]
        x = bordered[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if run.shift or run.rotate or run.zoom:
        turn, size = uniform() * run.rotate * math.pi / 180, 1.0 + uniform() * run.zoom
        A = torch.zeros(n, 2, 3)
        A[:, 0, 0], A[:, 0, 1] = size * turn.cos(), -turn.sin()
        A[:, 1, 0], A[:, 1, 1] = turn.sin(), size * turn.cos()
        A[:, :, 2] = torch.stack((uniform(), uniform()), 1) * (2.0 * run.shift / x.shape[-1])
        grid = F.affine_grid(A, list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
    return x


def margin_loss(z: Tensor, y: Tensor) -> Tensor:
    """Largest other logit minus the true one, (B,): does not vanish where the network is sure."""
    own = z.gather(1, y[:, None])[:, 0]
    return z.scatter(1, y[:, None], -torch.inf).logsumexp(1) - own


def train(run: Run, data: Dataset) -> tuple[nn.Sequential, list[float]]:
    """The trained network and the mean loss of each epoch."""
    torch.manual_seed(run.seed)
    model = build(run, data)
    steps = run.epochs * -(-len(data.train_y) // run.batch)
    optimizer = lrm.optim.CondLRAdam(
        lrm.optim.param_groups(model, weight_decay=run.decay), lr=run.lr
    )
    if run.network == "liresnet":
        optimizer.register_step_post_hook(lambda *_: unit_rows(model[-1]))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bound = certify.LipschitzBound(model, data.image_shape)
    kind: Any = run.kind
    loss = certify.CertifiedLoss(run.eps_train, max(1, int(run.ramp * steps)), kind)
    generator = torch.Generator().manual_seed(run.seed)
    losses = []
    for _ in range(run.epochs):
        total = 0.0
        for x, y in batches(data.train_x, data.train_y, run.batch, generator=generator):
            with torch.autocast("cpu", torch.bfloat16, enabled=run.bfloat16):
                logits = model(moved(x, run, generator))
            value = loss(bound, logits.float(), y)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            loss.step()
            total += float(value.detach()) * len(y)
        losses.append(total / len(data.train_y))
        if not math.isfinite(total):
            break
    return model, losses


def measure(run: Run, root: str | None) -> dict[str, Any]:
    """Train and certify; what the tables are made of."""
    data = data_of(run, root)
    began, work = time.perf_counter(), time.process_time()
    model, losses = train(run, data)
    minutes, work = (time.perf_counter() - began) / 60, (time.process_time() - work) / 60
    result: dict[str, Any] = {
        "run": run.to_dict(), "minutes": minutes, "processor_minutes": work, "losses": losses,
    }  # fmt: skip
    if not math.isfinite(losses[-1]):
        return {**result, "diverged": True}
    if run.method == "truncated":
        model = truncate(model, run.rank)
    model.eval()
    report = certify.lipschitz(model, data.image_shape)
    attack: dict[str, Any] = {} if run.choice else {
        "attack": robustness.pgd, "norm": "l2", "steps": 30, "random_start": False,
        "loss": margin_loss,
    }  # fmt: skip
    found = certify.verified_accuracy(
        model, (data.test_x, data.test_y), [run.eps], bound=report, **attack
    )
    result |= {
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
    if not run.choice:
        result["curve"] = curve(model, data, report, run.eps)
        result["local"] = looseness(model, data, report)
    return result


def curve(
    model: nn.Module, data: Dataset, report: certify.LipschitzReport, eps: float
) -> dict[str, float]:
    """Verified accuracy over the radius."""
    radii = [eps * k / 10 for k in range(31)]
    found = certify.verified_accuracy(model, (data.test_x, data.test_y), radii, bound=report)
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
