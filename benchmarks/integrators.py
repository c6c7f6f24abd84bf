"""One table of the retractions: order, cost, and error as the smallest singular value falls.

Order: log-log slopes of ‖R(tξ) − (W + tξ)‖ and ‖R(tξ) − Exp(tξ)‖ (2 and order + 1), float64.

Cost: one retraction in float32 on one thread, as a ratio to ``factored``; medians of rounds in
which every retraction runs once, so that other load on the machine hits all alike.

Error: the path A(t) = e^{tΩ} U diag(s) Vᵀ e^{tΨ}ᵀ, 0 <= t <= 1, of 60 x 50 matrices of rank 8 with
singular values s from 1 down to σ_r (geometric) and ‖Ω‖₂ = ‖Ψ‖₂ = 1, is followed by
Y ← R_Y(P_Y(A(t + h) − A(t))), h = 1/32, from Y(0) = A(0); ‖Y(1) − A(1)‖ / ‖A(1)‖ in float64. The
exact solution is A itself, whatever σ_r.

    python -m benchmarks.integrators [--rounds 51]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

import lrmanifold as lrm
from lrmanifold import retractions
from lrmanifold.testing import check_retraction

from ._record import record

SHAPES = ((512, 512, 64), (1024, 256, 32))
SIGMAS = (1e-1, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12)
PROMISED = {name: 1 if name == "factored" else 2 for name in retractions.available()}


def orders() -> dict[str, dict[str, float]]:
    """Slopes of each retraction."""
    M = lrm.FixedRank(12, 10, 3)
    return {k: check_retraction(M, k, order=v).slopes for k, v in PROMISED.items()}


def costs(rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of one retraction relative to ``factored`` for each shape, and those of factored."""
    table: dict[str, dict[str, float]] = {name: {} for name in PROMISED}
    for m, n, r in SHAPES:
        torch.manual_seed(0)
        M = lrm.WellConditioned(m, n, r, tau=0.5)
        X = M.random().as_subclass(Tensor)
        free = lrm.FixedRank(m, n, r)
        xi = free.proju(X, torch.randn_like(X))
        xi = xi * (0.05 * float(free.svdvals(X)[-1]) / xi.norm())
        seconds: dict[str, list[float]] = {name: [] for name in PROMISED}
        for i in range(rounds + 2):
            for name in PROMISED:
                step = retractions.get(name)
                begin = time.perf_counter()
                step(free, X, xi)
                if i >= 2:
                    seconds[name].append(time.perf_counter() - begin)
        base = statistics.median(seconds["factored"])
        for name, values in seconds.items():
            table[name][f"{m}x{n} r {r}"] = statistics.median(values) / base
        table["factored"][f"{m}x{n} r {r}, seconds"] = base
    return table


def path_error(name: str, sigma: float, steps: int = 32) -> float:
    """The error of the module's docstring; infinite where a step cannot be made."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    m, n, r = 60, 50, 8
    M = lrm.FixedRank(m, n, r)
    turns = []
    for k in (m, n):
        Z = gaussian(k, k)
        skew = Z - Z.mT
        turns.append(skew / torch.linalg.matrix_norm(skew, 2))
    U, V = (torch.linalg.qr(gaussian(k, r)).Q for k in (m, n))
    s = torch.logspace(0.0, float(torch.tensor(sigma).log10()), r, dtype=torch.float64)

    def A(t: float) -> Tensor:
        left, right = (torch.linalg.matrix_exp(t * turn) for turn in turns)
        return (left @ U * s) @ (right @ V).mT

    Y, step = M.pack(U, torch.diag(s), V), retractions.get(name)
    try:
        for k in range(steps):
            xi = M.project_ambient(Y, A((k + 1) / steps) - A(k / steps))
            Y = step(M, Y, xi)
    except (ValueError, torch.linalg.LinAlgError):
        return float("inf")
    return float((M.to_dense(Y) - A(1.0)).norm() / A(1.0).norm())


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=51)
    options = parser.parse_args()
    torch.set_num_threads(1)
    slopes, ratios = orders(), costs(options.rounds)
    rows: list[dict[str, Any]] = []
    shapes = [f"{m}x{n} r {r}" for m, n, r in SHAPES]
    print(
        f"{'':15}{'slopes':^12}  {'cost / factored':^28}  error at σ_r =\n"
        f"{'':15}{'W+tξ':>6}{'Exp':>6}  {shapes[0]:>13} {shapes[1]:>14}"
        + "".join(f"{s:9.0e}" for s in SIGMAS)
    )
    for name in PROMISED:
        errors = {f"{s:.0e}": path_error(name, s) for s in SIGMAS}
        rows.append(
            {"name": name, "slopes": slopes[name], "cost": ratios[name], "path_error": errors}
        )
        print(
            f"{name:15}{slopes[name]['tangent']:6.2f}{slopes[name]['geodesic']:6.2f}"
            f"  {ratios[name][shapes[0]]:13.2f} {ratios[name][shapes[1]]:14.2f}"
            + "".join(f"{e:9.1e}" for e in errors.values()),
            flush=True,
        )
    record("integrators", {"rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
