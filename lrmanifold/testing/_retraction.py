"""Measure the order of a retraction by the slopes of its errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import geoopt
import torch
from torch import Tensor

from .. import retractions
from .._arguments import check_integer
from ._common import (
    CheckError,
    check_options,
    dense,
    dense_vector,
    plain,
    point_size,
    random_tangent,
    where_smooth,
)

LABELS = {
    "tangent": "‖R(tξ) − (W + tξ)‖",
    "geodesic": "‖R(tξ) − Exp(tξ)‖",
}


def _fit(t: Tensor, error: Tensor, floor: float) -> float:
    """Least squares slope of log error against log t over the errors above roundoff.

    Infinite if all are roundoff: the curve is exact. NaN if too few are above it to tell, or if
    some are no numbers: they would fail every comparison with the floor and look like roundoff.
    """
    if not bool(torch.isfinite(error).all()):
        return math.nan
    above = error > floor
    if not bool(above.any()):
        return math.inf
    if int(above.sum()) < 4:
        return math.nan
    x, y = t[above].log(), error[above].log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


@dataclass(frozen=True)
class RetractionReport:
    """Outcome of :func:`check_retraction`.

    Attributes
    ----------
    name : str
    order : int
        The order that was promised.
    t : Tensor, shape (k,)
        Steps, in units of σ_r where the points are matrices of fixed rank.
    errors : dict of str to Tensor, shape (k,)
        "tangent" is ‖R(tξ) − (W + tξ)‖ and "geodesic" ‖R(tξ) − Exp(tξ)‖; no "geodesic" where
        the manifold has no ``expmap``.
    slopes : dict of str to float
        Fitted to the errors above roundoff; ``inf`` where R agrees to roundoff for all t, NaN where
        an error is NaN or Inf, or too few are above roundoff.
    floor : float
        The roundoff.
    refused : str
        Why R(tξ) is no point, with the first such t; empty if it always is.
    """

    name: str
    order: int
    t: Tensor
    errors: dict[str, Tensor]
    slopes: dict[str, float]
    floor: float
    slack: float = 0.1
    refused: str = ""

    @property
    def expected(self) -> dict[str, int]:
        """The slopes of a retraction of the promised order: 2 and order + 1."""
        return {"tangent": 2, "geodesic": self.order + 1}

    @property
    def ok(self) -> bool:
        """Whether every slope is at least the expected one, and the order could be verified."""
        return not self.complaints

    @property
    def complaints(self) -> tuple[str, ...]:
        """What is wrong, in words."""
        found = []
        for key, want in self.expected.items():
            slope = self.slopes.get(key)
            if slope is None and self.order > 1:
                found.append(f"order {self.order} cannot be verified: no expmap")
            elif slope is not None and not bool(torch.isfinite(self.errors[key]).all()):
                where = self.t[~torch.isfinite(self.errors[key])].tolist()
                found.append(
                    f"{LABELS[key]} is NaN or Inf at {len(where)} of {len(self.t)} steps, "
                    f"the first at t = {where[0]:.1e}"
                )
            elif slope is not None and math.isnan(slope):
                found.append(f"{LABELS[key]}: too few errors above roundoff to fit a slope")
            elif slope is not None and slope < want - self.slack:
                found.append(f"{LABELS[key]} has slope {slope:.2f} in t, expected {want}")
        return (*found, self.refused) if self.refused else tuple(found)

    def raise_if_failed(self) -> None:
        """Raise :class:`CheckError` with the complaints unless :attr:`ok`."""
        if not self.ok:
            raise CheckError(str(self))

    def __str__(self) -> str:
        lines = [f"{self.name}: order {self.order} {'confirmed' if self.ok else 'NOT confirmed'}"]
        for key, slope in self.slopes.items():
            text = "exact to roundoff" if slope == math.inf else f"slope {slope:.2f}"
            lines.append(f"  {LABELS[key]:<22}{text:<20}(expected {self.expected[key]})")
        return "\n".join([*lines, *(f"  {c}" for c in self.complaints)])

    def plot(self, ax: Any = None) -> Any:
        """Draw the errors over t on logarithmic axes; needs matplotlib. Returns the axes."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        t = self.t.tolist()
        for key, error in self.errors.items():
            slope = self.slopes[key]
            text = "exact to roundoff" if slope == math.inf else f"slope {slope:.2f}"
            ax.loglog(t, error.clamp_min(1e-18).tolist(), "o-", label=f"{LABELS[key]}, {text}")
        ax.axhline(self.floor, linestyle=":", color="grey", label="roundoff")
        ax.set_xlabel("step length t")
        ax.set_ylabel("error (Frobenius norm)")
        ax.set_title(f"{self.name}, promised order {self.order}")
        ax.legend()
        return ax


def _step(manifold: geoopt.Manifold, retraction: Any) -> tuple[str, Callable[..., Tensor]]:
    """Name and function ``(x, xi) -> y`` of the retraction to be measured."""
    if retraction is None:
        return str(manifold), manifold.retr
    name = retraction if isinstance(retraction, str) else getattr(retraction, "__name__", "R")
    function = retractions.get(retraction)
    return f"{name} on {manifold}", lambda x, xi: function(manifold, x, xi)


def _times(t: Tensor, xi: Tensor) -> Tensor:
    """The batch of all t ξ, shape (k, ...)."""
    return t.to(xi).view(-1, *(1,) * xi.ndim) * xi


def _norms(batch: Tensor) -> Tensor:
    """Frobenius norm of each element, shape (k,), in float64."""
    return batch.double().flatten(1).norm(dim=1).cpu()


def _refused(manifold: geoopt.Manifold, t: Tensor, points: Tensor, tol: float) -> str:
    """What the manifold says of the first of the points R(tξ) that it does not accept."""
    for s, y in zip(t.tolist(), points, strict=True):
        ok, reason = manifold.check_point_on_manifold(y, explain=True, atol=tol, rtol=tol)
        if not ok:
            return f"R(tξ) is refused as a point at t = {s:.1e} ({reason or 'without a reason'})"
    return ""


def check_retraction(
    manifold: geoopt.Manifold,
    retraction: str | Callable[..., Tensor] | None = None,
    *,
    order: int = 1,
    size: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    trials: int = 4,
) -> RetractionReport:
    """Measure the order of a retraction by log-log slopes, dense-wise.

    A retraction gives points, and ‖R(tξ) − (W + tξ)‖ = O(t²). It is of second order if also
    ‖R(tξ) − Exp(tξ)‖ = O(t³) for the geodesic ``manifold.expmap``, which is O(t²) otherwise
    (mathematics 2). Errors are root mean squares over random points and directions; on
    :class:`~lrmanifold.WellConditioned` the points are inside the set; for 0 < τ < 1e-5 there is
    so little room inside that few errors are above roundoff, or none.

    Parameters
    ----------
    manifold : geoopt.Manifold
    retraction : str or callable, optional
        A name of :func:`lrmanifold.retractions.available` or a function ``(manifold, x, xi) -> y``;
        ``manifold.retr`` by default.
    order : {1, 2}
        What is promised. More is accepted.
    size, dtype, device, seed
        As for :func:`check_manifold`. float32 leaves hardly two decades above roundoff.
    trials : int
        Random points and directions.

    Returns
    -------
    RetractionReport
    """
    check_options(manifold, dtype, device, seed, trials)
    order = check_integer("order", order, low=1, high=2)
    name, step = _step(manifold, retraction)
    eps = torch.finfo(dtype).eps
    t = torch.logspace(math.log10(eps) / 4, -1, 17, dtype=torch.float64)
    where = torch.empty(0, device=device).device
    samples: dict[str, list[Tensor]] = {"tangent": [], "geodesic": []}
    largest, refused = 0.0, ""
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        for _ in range(trials):
            x = plain(manifold.random(*point_size(manifold, size), dtype=dtype, device=where))
            x, xi = where_smooth(manifold, x, random_tangent(manifold, x))
            W, D = dense(manifold, x), dense_vector(manifold, x, xi)
            points = torch.stack([plain(step(x, s * xi)) for s in t.tolist()])
            refused = refused or _refused(manifold, t, points, eps**0.6)
            R = dense(manifold, points)
            samples["tangent"].append(_norms(R - (W + _times(t, D))))
            steps = _times(t, xi)
            try:
                ends = dense(manifold, manifold.expmap(x.expand_as(steps), steps))
                samples["geodesic"].append(_norms(R - ends))
            except NotImplementedError:
                samples.pop("geodesic", None)
            largest = max(largest, float(W.norm()))
    means = {key: torch.stack(rows).square().mean(0) for key, rows in samples.items()}
    errors = {key: value.sqrt() for key, value in means.items()}
    floor = 50.0 * eps * largest
    slopes = {key: _fit(t, error, floor) for key, error in errors.items()}
    return RetractionReport(name, order, t, errors, slopes, floor, refused=refused)
