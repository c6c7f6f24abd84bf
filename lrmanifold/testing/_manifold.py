"""Run the checks on a manifold and tell the outcome in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import geoopt
import torch
from torch import Tensor

from .._arguments import check_number, check_patterns
from ._checks import CHECKS, STATEMENTS, Case
from ._common import CheckError, check_options, point_size


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check. `worst` is its largest defect in units of what is allowed."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    worst: float
    message: str


@dataclass(frozen=True)
class Report:
    """Outcome of :func:`check_manifold`. Prints as a table; ``report["retr"]`` is one line."""

    manifold: str
    results: tuple[CheckResult, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(r.name for r in self.results if r.status == "failed")

    @property
    def ok(self) -> bool:
        """Whether no check failed; skipped ones (a method not implemented) do not count."""
        return not self.failed

    def __getitem__(self, name: str) -> CheckResult:
        return {r.name: r for r in self.results}[name]

    def raise_if_failed(self) -> None:
        """Raise :class:`CheckError` with the whole table unless :attr:`ok`."""
        if not self.ok:
            raise CheckError(str(self))

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"FAILED ({', '.join(self.failed)})"
        lines = [f"{self.manifold}: {verdict}"]
        lines.append(f"{'check':<17}{'result':<9}{'worst':<9}statement, or what is wrong")
        for r in self.results:
            worst = "" if r.status == "skipped" else f"{r.worst:.1e}"
            told = STATEMENTS[r.name] if r.status == "ok" else r.message
            lines.append(f"{r.name:<17}{r.status:<9}{worst:<9}{told}")
        return "\n".join(lines)


def _told(error: Exception) -> str:
    return f"{type(error).__name__} raised: {error}"


def _run(name: str, seeds: Iterable[int], case: dict[str, Any]) -> CheckResult:
    """One check on one random case a seed; the worst finding decides."""
    worst, message = 0.0, STATEMENTS[name]
    for seed in seeds:
        torch.manual_seed(seed)
        try:
            found = CHECKS[name](Case(**case))
        except Exception as error:  # without points nothing can be checked
            text = f"no points, or no tangent vectors, to check: {_told(error)}"
            return CheckResult(name, "failed", math.inf, text)
        try:
            for what, defect, allowed in found:
                ratio = defect / allowed if math.isfinite(defect) else math.inf
                if ratio > worst:
                    size = f": {defect:.2e}, allowed {allowed:.1e}" if math.isfinite(defect) else ""
                    worst, message = ratio, what + size
        except NotImplementedError as missing:
            if worst > 1.0:  # what was found before stands
                break
            return CheckResult(name, "skipped", 0.0, f"not implemented: {missing}".rstrip(": "))
        except Exception as error:  # a manifold's own error is a finding, whatever its type
            if worst <= 1.0:  # else it is only what followed from an earlier finding
                worst, message = math.inf, _told(error)
            break
    return CheckResult(name, "failed" if worst > 1.0 else "ok", worst, message)


def check_manifold(
    manifold: geoopt.Manifold,
    *,
    size: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    trials: int = 3,
    checks: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    invalid_points: Sequence[Tensor] = (),
    tol: float | None = None,
) -> Report:
    """Put a geoopt manifold to the statements of :data:`STATEMENTS` at random points.

    It finds a method that breaks its contract at generic points. It does not find one that fails
    only at special points, and says nothing about speed, distributions or distances.

    Parameters
    ----------
    manifold : geoopt.Manifold
    size : sequence of int, optional
        Shape of one point. By default ``manifold.point_shape`` or, lacking that, (7, 3) for
        manifolds of matrices and (7,) for those of vectors.
    dtype, device
        Of the points. Use float64 for a verdict on formulas, float32 for one on rounding. Half
        precision is refused: the differences that are measured would be roundoff.
    seed : int
        The global random state is left as it was.
    trials : int
        Random cases for each check.
    checks, skip : iterables of str
        Names of the checks to run (all), and of those to leave out.
    invalid_points : sequence of Tensor
        Tensors that ``check_point_on_manifold`` must refuse, beside those generated here: points
        moved off their tangent space, points with noise and with a NaN.
    tol : float, optional
        Largest relative roundoff; eps^0.6 (4e-10 in float64, 7e-5 in float32) by default. Central
        differences of step h, between 6e-6 and 0.03, are allowed 1000 h²,
        but not more than 0.1.

    Returns
    -------
    Report
    """
    check_options(manifold, dtype, device, seed, trials)
    asked, skipped = check_patterns("checks", checks), check_patterns("skip", skip) or ()
    chosen, left_out = list(CHECKS if asked is None else asked), set(skipped)
    if tol is not None:
        tol = check_number("tol", tol, low=0)
    unknown = sorted((set(chosen) | left_out) - set(CHECKS))
    if unknown:
        raise ValueError(f"checks and skip must be among {tuple(CHECKS)}, got {unknown}")
    case = {
        "manifold": manifold,
        "size": point_size(manifold, size),
        "options": {"dtype": dtype, "device": torch.empty(0, device=device).device},
        "tol": torch.finfo(dtype).eps ** 0.6 if tol is None else tol,
        "invalid_points": tuple(invalid_points),
    }
    cuda = [case["options"]["device"]] if case["options"]["device"].type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        seeds = range(seed, seed + trials)
        results = [_run(name, seeds, case) for name in chosen if name not in left_out]
    return Report(str(manifold), tuple(results))
