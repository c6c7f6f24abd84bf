"""Error of U_p in float32 by the solve with S and by probes, as cond(S) grows.

python -m benchmarks.probe_error
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lrmanifold.nn import LowRankLinear

from ._record import record

CONDS = (1e2, 1e3, 1e4, 1e5, 1e6)


def probe_error(
    conds: Sequence[float] = CONDS, *, m: int = 256, n: int = 192, r: int = 16, trials: int = 5
) -> list[dict[str, Any]]:
    """Median relative errors of (U_p, V_p), for each condition number and route.

    A linear layer in float32 whose core has singular values from 1 to 1/cond on a logarithmic
    scale; batch 128; the reference is (I - UUᵀ) GV and (I - VVᵀ) GᵀU in float64 at the same point.

    Returns
    -------
    list of dict
        Keys ``cond``, ``solve``, ``probe``.
    """
    rows = []
    for cond in conds:
        errors: dict[str, list[float]] = {"factors": [], "probe": []}
        for seed in range(trials):
            torch.manual_seed(seed)
            P, Q = (torch.linalg.qr(torch.randn(r, r, dtype=torch.float64)).Q for _ in range(2))
            S = (P * torch.logspace(0, -torch.tensor(cond).log10().item(), r).double()) @ Q.mT
            x, y = torch.randn(128, n), torch.randn(128, m)
            layers: dict[str, LowRankLinear] = {
                key: LowRankLinear(n, m, r, bias=False, tau=None, gradient=key)  # type: ignore[arg-type]
                for key in errors
            }
            X = layers["probe"].weight.detach()
            X[m : m + r] = S.float()
            for key, layer in layers.items():
                with torch.no_grad():
                    layer.weight.copy_(X)
                (layer(x) * y).sum().backward()
                M, grad = layer.manifold, layer.weight.grad
                assert grad is not None
                xi = M.unpack(M.egrad2rgrad(layer.weight.detach(), grad).double())
                U, _, V = M.unpack(X.double())
                G = y.double().mT @ x.double()
                U_p, V_p = G @ V - U @ (U.mT @ G @ V), G.mT @ U - V @ (V.mT @ G.mT @ U)
                off = (xi.U - U_p).square().sum() + (xi.V - V_p).square().sum()
                size = U_p.square().sum() + V_p.square().sum()
                errors[key].append(float((off / size).sqrt()))
        medians = {key: sorted(e)[len(e) // 2] for key, e in errors.items()}
        rows.append({"cond": cond, "solve": medians["factors"], "probe": medians["probe"]})
    return rows


def main() -> None:
    """Print the table and write the results."""
    torch.set_num_threads(1)
    rows = probe_error()
    print(f"{'cond(S)':>8}{'solve':>10}{'probe':>10}")
    for row in rows:
        print(f"{row['cond']:8.0e}{row['solve']:10.1e}{row['probe']:10.1e}")
    record("probe_error", rows)


if __name__ == "__main__":
    main()
