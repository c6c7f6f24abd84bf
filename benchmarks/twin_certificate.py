"""LeNet5 on MNIST beside its dense twin: the certified distance of weights, outputs and classes.

CondLR and SGD make the same steps on the same batches, from weights which are the same function at
the start: at random ones, and after 469 steps of CondLR (one epoch), with τ = 0.1 and without a
bound. ``lrmanifold.monitor`` carries T1 and T2 along; T3 turns the distance of the weights into one
of the logits and, where the twin's margin is above √2 times that, into the same class. Reported
after every few steps, on test images that nothing was chosen by: the error, the certificate and
what each of its terms contributed; the share of images with the same class, measured, certified
from the measured distances of the layers, and certified from T1 and T2 alone.

    LRMANIFOLD_DATA=... python -m benchmarks.twin_certificate [--root DIR] [--steps 100] [--lr 0.01]
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import lrmanifold as lrm
from lrmanifold.experiments import data, models

from ._record import FOLDER, record

RANKS = {"conv1": 4, "conv2": 10, "fc1": 100}
BATCH, IMAGES, SEED = 64, 1000, 0
EPOCH = 469
CASES = (
    ("trained, τ = 0.1", 0.1, EPOCH),
    ("trained, no bound", None, EPOCH),
    ("random, τ = 0.1", 0.1, 0),
)
TERMS = ("start", "loss", "curvature", "gradient", "companion", "step", "square", "clip")


def twins(
    dataset: data.Dataset, tau: float | None, warm: int, seed: int
) -> tuple[nn.Module, nn.Module]:
    """A low-rank LeNet5 after `warm` steps of CondLR, and the dense network with its weights."""
    torch.manual_seed(seed)
    dense = models.build("lenet5", dataset)
    model = lrm.factorize(dense, rank=RANKS, tau=tau, keep_larger=True)
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.1, momentum=0.3)
    for _ in range(warm):
        index = torch.randint(len(dataset.train_x), (128,))
        optimizer.zero_grad()
        functional.cross_entropy(model(dataset.train_x[index]), dataset.train_y[index]).backward()
        optimizer.step()
    return model, lrm.densify(copy.deepcopy(model))


@torch.no_grad()
def classes(monitor: lrm.Monitor, twin: nn.Module, x: Tensor) -> dict[str, float]:
    """Shares of images with the same class: measured, and certified in two ways."""
    z, y = twin(x).double(), monitor.model(x).double()
    top = z.topk(2, dim=1)
    margin = top.values[:, 0] - top.values[:, 1]
    found = {"same class": float((z.argmax(1) == y.argmax(1)).double().mean())}
    found["‖f_Y - f_W‖, median"] = float((z - y).norm(dim=1).median())
    found["margin, median"] = float(margin.median())
    for name, certified in (("layers", False), ("T1-T3", True)):
        bound = monitor.output_bound(x, certified=certified)
        found[f"bound, median ({name})"] = float(bound.median())
        share = (margin > math.sqrt(2.0) * bound).double().mean()
        found[f"certified ({name})"] = float(share)
    return found


def run(
    dataset: data.Dataset, *, tau: float | None, warm: int, lr: float, steps: int, every: int
) -> dict[str, Any]:
    """One training of both, with a row every few steps."""
    model, twin = twins(dataset, tau, warm, SEED)
    optimizer = lrm.optim.CondLR(model.parameters(), lr=lr)
    full = torch.optim.SGD(twin.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(SEED)
    batch: dict[str, Tensor] = {}

    def loss(net: nn.Module) -> Tensor:
        return functional.cross_entropy(net(batch["x"]), batch["y"])

    monitor = lrm.monitor(model, optimizer, every=every, reference=twin, loss=loss)
    images = dataset.test_x[:IMAGES]
    rows = [{**monitor.measure(), **classes(monitor, twin, images)}]
    begin, watched = time.perf_counter(), 0.0
    for _ in range(steps):
        index = torch.randint(len(dataset.train_x), (BATCH,), generator=generator)
        batch["x"], batch["y"] = dataset.train_x[index], dataset.train_y[index]
        for net, rule in ((model, optimizer), (twin, full)):
            rule.zero_grad()
            loss(net).backward()
            rule.step()
        start = time.perf_counter()
        if row := monitor.step():
            rows.append({**row, **classes(monitor, twin, images)})
        watched += time.perf_counter() - start
    with torch.no_grad():
        accuracy = {
            name: float((net(images).argmax(1) == dataset.test_y[:IMAGES]).double().mean())
            for name, net in (("low-rank", model), ("dense", twin))
        }
    return {
        "tau": tau,
        "warm steps": warm,
        "lr": lr,
        "steps": steps,
        "batch": BATCH,
        "ranks": RANKS,
        "test images": IMAGES,
        "accuracy at the end": accuracy,
        "seconds": time.perf_counter() - begin,
        "seconds in the monitor": watched,
        "rows": rows,
    }


def draw(found: dict[str, dict[str, Any]], save: Callable[[Any], None]) -> None:
    """Error and certificate; what each term contributed; shares of certified classes."""
    from theory.plotting import COLOURS, MARKERS, new

    fig, axes = new(3, width=5.0, height=4.6)
    for k, (name, run_) in enumerate(found.items()):
        rows, colour = run_["rows"], COLOURS[k + 1]
        step = [row["step"] for row in rows]
        for key, style, what in (
            ("flow/distance", "-", "‖Y - W‖"),
            ("flow/bound", "--", "bound (T1, T2)"),
            ("flow/best", ":", "ε = ‖W - X‖"),
        ):
            y = [max(row[key], 1e-8) for row in rows]
            axes[0].semilogy(step[1:], y[1:], style, color=colour, label=f"{name}: {what}")
        for key, style in (
            ("same class", "-"), ("certified (layers)", "--"), ("certified (T1-T3)", ":"),
        ):  # fmt: skip
            y = [100.0 * row[key] for row in rows]
            axes[2].plot(step, y, style, color=colour, label=f"{name}: {key}")
    name, run_ = next(iter(found.items()))
    rows = run_["rows"]
    for k, term in enumerate(t for t in TERMS if t != "start"):
        y = [row[f"flow/part/{term}"] for row in rows[1:]]
        if max(y) <= 0.0:
            continue  # lowers the bound
        axes[1].semilogy(
            [row["step"] for row in rows[1:]], y, marker=MARKERS[k], markersize=3, markevery=4,
            color=[*COLOURS[1:], "0.4"][k], label=term,
        )  # fmt: skip
    axes[0].set(xlabel="step", ylabel="Frobenius norm, all parameters")
    axes[0].set(title="Distance of the weights, and its bound", xlim=(0, None))
    axes[1].set(xlabel="step", ylabel="added to E² since the start", xlim=(0, None))
    axes[1].set(title="Where the bound grows")
    axes[2].set(xlabel="step", ylabel="test images, %", ylim=(-2, 102), xlim=(0, None))
    axes[2].set(title="Same class as the dense twin")
    for ax in axes:  # below the axes: curves fill all of them
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=1)
    save(fig)


def _save(fig: Any) -> None:
    fig.savefig(FOLDER / "twin_certificate.png", dpi=150, bbox_inches="tight")


def main() -> None:
    """Train, write the results and the picture, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=None)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.01)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = data.load("mnist", options.root)
    found = {}
    for name, tau, warm in CASES:
        found[name] = run(
            dataset, tau=tau, warm=warm, lr=options.lr, steps=options.steps, every=options.every
        )
        for row in found[name]["rows"][:: max(1, len(found[name]["rows"]) // 8)]:
            print(
                f"{name:18} step {row['step']:4}  ‖Y-W‖ {row['flow/distance']:.2e}  "
                f"bound {row['flow/bound']:.2e}  same {row['same class']:.3f}  certified "
                f"{row['certified (layers)']:.3f} (layers) {row['certified (T1-T3)']:.3f} (T1-T3)"
            )
        # After every case: a run that is stopped keeps what it has.
        record("twin_certificate", found)
        draw(found, _save)


if __name__ == "__main__":
    main()
