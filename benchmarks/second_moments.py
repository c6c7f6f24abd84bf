"""How many second moments CondLRAdam needs: one a block, or one a point.

Completion of 200 x 150 matrices of rank 8 from 30 % of the entries with noise 1e-3, by condition
number; a convex quadratic with a minimum of rank 8, at larger ranks; an MLP on scikit-learn's
digits at 20 % rank, three seeds. The library has one a block with a bound on the condition number
and one a point without; here every problem is solved by every rule (_moments.py). For the
transformer see transformer_adam --rules.

    python -m benchmarks.second_moments
"""

from __future__ import annotations

import math
from typing import Any

import geoopt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import lrmanifold as lrm
from lrmanifold.optim import CondLRAdam

from ._moments import moment_rule
from ._record import record


def completion(lr: float, cond: float, steps: int = 1500) -> float:
    """Relative error after a cosine from `lr` to 0, from the truncated SVD of the data."""
    generator = torch.Generator().manual_seed(0)
    m, n, r = 200, 150, 8
    options = {"generator": generator, "dtype": torch.float64}
    U, V = (torch.linalg.qr(torch.randn(k, r, **options)).Q for k in (m, n))  # type: ignore[call-overload]
    A = (U * torch.logspace(0, -math.log10(cond), r, dtype=torch.float64)) @ V.mT
    A = A / A.std()
    mask = torch.rand(m, n, generator=generator) < 0.3
    B = A + 1e-3 * torch.randn(m, n, **options)  # type: ignore[call-overload]
    M = lrm.FixedRank(m, n, r, retraction="factored")
    p = geoopt.ManifoldParameter(M.from_dense(mask * B / 0.3), manifold=M)
    optimizer = CondLRAdam([p], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    try:
        for _ in range(steps):
            optimizer.zero_grad()
            (0.5 * (mask * (M.to_dense(p) - B)).square().sum()).backward()
            optimizer.step()
            schedule.step()
    except FloatingPointError:
        return math.inf
    return float((M.to_dense(p.detach()) - A).norm() / A.norm())


def quadratic(lr: float, rank: int, retraction: str, steps: int = 400) -> float:
    """Final distance to the minimum of ½ ‖W - A‖², rank A = 8, relative to ‖A‖."""
    torch.manual_seed(0)
    M = lrm.FixedRank(60, 48, rank, retraction=retraction)
    A = torch.randn(60, 8, dtype=torch.float64) @ torch.randn(8, 48, dtype=torch.float64)
    A = A / torch.linalg.matrix_norm(A, 2)
    X = M.random(dtype=torch.float64).as_subclass(Tensor)
    p = geoopt.ManifoldParameter(X, manifold=M)
    optimizer = CondLRAdam([p], lr)
    try:
        for _ in range(steps):
            optimizer.zero_grad()
            (0.5 * (M.to_dense(p) - A).square().sum()).backward()
            optimizer.step()
    except FloatingPointError:
        return math.inf
    return float((M.to_dense(p.detach()) - A).norm() / A.norm())


def digits(lr: float, tau: float | None, seed: int, epochs: int = 15) -> float:
    """Test loss of a 64-128-128-10 network with two low-rank layers at 20 % rank."""
    data = load_digits()
    X, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    training, test = order[:1200], order[1200:]
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    lrm.factorize(model, rank=0.2, tau=tau, exclude="4", init="random")
    optimizer = CondLRAdam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 24)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for part in training[torch.randperm(1200, generator=generator)].split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(X[part]), y[part]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(X[test]), y[test]))


def main() -> None:
    """Measure, print, write the results."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    def note(problem: str, rule: str, values: dict[float, float]) -> None:
        rows.append({"problem": problem, "rule": rule, "by_rate": values})
        cells = "  ".join(f"{lr:g}: {v:.2e}" for lr, v in values.items())
        print(f"{problem:36}{rule:18}{cells}", flush=True)

    for rule in ("block", "point", "block, unlimited"):
        with moment_rule(rule):
            for cond in (1.0, 5.0, 20.0):
                values = {lr: completion(lr, cond) for lr in (0.1, 0.3, 1.0)}
                note(f"completion, cond {cond:g}: error", rule, values)
            for rank in (8, 30):
                for retraction in ("factored", "bug"):
                    values = {lr: quadratic(lr, rank, retraction) for lr in (3e-3, 1e-2, 3e-2)}
                    note(f"quadratic, rank {rank}, {retraction}: error", rule, values)
            for tau in (None, 0.5):
                values = {
                    lr: sum(digits(lr, tau, seed) for seed in range(3)) / 3
                    for lr in (3e-3, 1e-2, 3e-2)
                }
                note(f"digits, tau={tau}: test loss", rule, values)
    record("second_moments", rows)


if __name__ == "__main__":
    main()
