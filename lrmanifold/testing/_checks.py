"""What :func:`check_manifold` states, one function a statement.

A check is given a :class:`Case` and yields findings: what is compared, the size of the defect, and
the largest that is allowed. Its docstring is the statement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import geoopt
import torch
from torch import Tensor

from ._common import (
    dense,
    dense_vector,
    euclidean_gradient,
    plain,
    random_tangent,
    where_smooth,
)

Finding = tuple[str, float, float]


def _found(what: str, wrong: bool) -> Finding:
    """A finding that is either wrong or right."""
    return what, math.inf if wrong else 0.0, 1.0


class Case:
    """One manifold with a random point `x`, tangent vectors `u`, `v` at it, and comparisons."""

    def __init__(
        self,
        manifold: geoopt.Manifold,
        size: tuple[int, ...],
        options: dict[str, Any],
        tol: float,
        invalid_points: Sequence[Tensor],
    ) -> None:
        self.manifold, self.size, self.options, self.tol = manifold, size, options, tol
        self.invalid_points = invalid_points
        self.x = self.point()
        self.u, self.v = (random_tangent(manifold, self.x) for _ in range(2))
        self.noise = torch.randn_like(self.x)
        self.normal = self.noise - manifold.proju(self.x, self.noise)

    def point(self, *lead: int) -> Tensor:
        """Random points of the dtype and on the device asked for."""
        return plain(self.manifold.random(*lead, *self.size, **self.options))

    def origin(self) -> Tensor:
        """The origin of the dtype and on the device asked for."""
        return plain(self.manifold.origin(*self.size, **self.options))

    @property
    def is_open(self) -> bool:
        """Whether every tensor is a tangent vector; then all tensors nearby are points."""
        return float(self.normal.norm()) <= self.tol * float(self.noise.norm())

    def difference(self, x: Tensor, xi: Tensor) -> tuple[float, float]:
        """Step h of a central difference along `xi`, and the relative error allowed for it.

        The truncation error, about h², balances the rounding of W, about eps ‖W‖/(h ‖ξ‖).
        """
        sizes = dense(self.manifold, x).norm(), dense_vector(self.manifold, x, xi).norm()
        ratio = max(1.0, float(sizes[0] / sizes[1]))
        h = min(0.03, (torch.finfo(x.dtype).eps * ratio) ** (1 / 3))
        return h, min(0.1, 1000.0 * h * h)

    def small(self, what: str, defect: Tensor, scale: Tensor) -> Finding:
        """The largest entry of `defect` is roundoff beside 1 and the largest of `scale`."""
        size = float(torch.nan_to_num(defect.abs(), nan=math.inf).max())
        return what, size, self.tol * (1.0 + float(scale.abs().max()))

    def same(self, what: str, a: Tensor, b: Tensor) -> Finding:
        return self.small(f"{what} differ", a - b, b)

    def same_points(self, what: str, a: Tensor, b: Tensor) -> Finding:
        return self.same(what, dense(self.manifold, a), dense(self.manifold, b))

    def is_point(self, what: str, x: Tensor, want: bool = True) -> Finding:
        tol = {"atol": self.tol, "rtol": self.tol}
        ok, reason = self.manifold.check_point_on_manifold(x, explain=True, **tol)
        return self._says(what, want, ok, reason)

    def is_tangent(self, what: str, x: Tensor, u: Tensor, want: bool = True) -> Finding:
        tol = {"atol": self.tol, "rtol": self.tol}
        ok, reason = self.manifold.check_vector_on_tangent(x, u, ok_point=True, explain=True, **tol)
        return self._says(what, want, ok, reason)

    @staticmethod
    def _says(what: str, want: bool, ok: bool, reason: str | None) -> Finding:
        verdict = "accepted" if ok else f"refused ({reason or 'without a reason'})"
        return _found(f"{what} is {verdict}", bool(ok) != want or not (ok or reason))


def _random(c: Case) -> Iterator[Finding]:
    """random() gives points of the size asked for, not the same one each time"""
    other = c.point()
    yield c.is_point("random()", c.x)
    yield _found(f"random{c.size} has shape {tuple(other.shape)}", tuple(other.shape) != c.size)
    yield _found("random() gives one point again and again", torch.equal(other, c.x))


def _origin(c: Case) -> Iterator[Finding]:
    """origin() is a point of the size asked for, the same one each time"""
    first, second = c.origin(), c.origin()
    yield c.is_point("origin()", first)
    yield _found(f"origin{c.size} has shape {tuple(first.shape)}", tuple(first.shape) != c.size)
    yield c.same("two calls of origin()", second, first)


def _invalid(c: Case) -> Iterator[Finding]:
    """tensors off the manifold, vectors off the tangent space and NaN are refused with a reason"""
    for k, z in enumerate(c.invalid_points):
        yield c.is_point(f"invalid point {k}", z, want=False)
    if c.is_open:
        return
    off = (0.05 / float(c.normal.norm())) * c.normal
    nan = torch.where(c.noise == c.noise.max(), torch.nan, c.x)
    yield c.is_point("a point moved by 0.05 off its tangent space", c.x + off, want=False)
    yield c.is_point("a point with noise of 0.1 in each entry", c.x + 0.1 * c.noise, want=False)
    yield c.is_point("a point with one NaN", nan, want=False)
    yield c.is_tangent("a vector moved by 0.05 off the tangent space", c.x, c.u + off, want=False)


def _projx(c: Case) -> Iterator[Finding]:
    """projx(z) is a point, projx(projx(z)) = projx(z), and projx(x) = x for points x"""
    p = c.manifold.projx(c.x + 0.05 * c.noise)
    yield c.is_point("projx(z)", p)
    yield c.same_points("projx(projx(z)) and projx(z)", c.manifold.projx(p), p)
    yield c.same_points("projx(x) and the point x", c.manifold.projx(c.x), c.x)


def _proju(c: Case) -> Iterator[Finding]:
    """P = proju(x, .) is linear onto the tangent space, PP = P, and P = Pᵀ in a Euclidean metric"""
    M, a, b = c.manifold, c.noise, torch.randn_like(c.noise)
    Pa, Pb, linear = (M.proju(c.x, z) for z in (a, b, 2 * a - 3 * b))
    yield c.is_tangent("proju(a)", c.x, Pa)
    yield c.same("proju(proju(a)) and proju(a)", M.proju(c.x, Pa), Pa)
    yield c.same("proju(2a - 3b) and 2 proju(a) - 3 proju(b)", linear, 2 * Pa - 3 * Pb)
    dot, size = (c.u * c.v).sum(), c.u.norm() * c.v.norm()
    if float((M.inner(c.x, c.u, c.v).sum() - dot).abs()) <= c.tol * (1.0 + float(size)):
        defect = (Pa * b).sum() - (a * Pb).sum()
        yield c.small("<proju(a), b> and <a, proju(b)> differ", defect, a.norm() * b.norm())


def _egrad2rgrad(c: Case) -> Iterator[Finding]:
    """g = egrad2rgrad(x, ∇f) is tangent, and <g, ξ>_x = d/dt f(R(x, tξ)) at t = 0 for a smooth f"""
    M, (x, xi) = c.manifold, where_smooth(c.manifold, c.x, c.u)
    weights = torch.randn_like(dense(M, x))
    # In units of the point: of tiny ones the differences would drown in the rounding of f.
    unit = dense(M, x).abs().max().clamp_min(torch.finfo(x.dtype).tiny)

    def f(W: Tensor) -> Tensor:
        return (weights * torch.sin(W / unit + weights)).sum()

    rgrad = M.egrad2rgrad(x, euclidean_gradient(M, f, x))
    size = M.norm(x, rgrad).sum()
    yield c.is_tangent("egrad2rgrad(x, ∇f), normalised,", x, rgrad / size)
    h, allowed = c.difference(x, xi)
    slope = (f(dense(M, M.retr(x, h * xi))) - f(dense(M, M.retr(x, -h * xi)))) / (2 * h)
    defect = (M.inner(x, rgrad, xi).sum() - slope) / (size * M.norm(x, xi).sum())
    yield "<g, ξ> and d/dt f(R(x, tξ)) differ, relative to ‖g‖‖ξ‖", abs(float(defect)), allowed


def _inner(c: Case) -> Iterator[Finding]:
    """<u, v> is bilinear, symmetric, positive, and inner(x, u) = <u, u>"""
    M, x, u, v = c.manifold, c.x, c.u, c.v
    uu, uv, vv = M.inner(x, u, u), M.inner(x, u, v), M.inner(x, v, v)
    linear = M.inner(x, 2 * u - 3 * v, v) - (2 * uv - 3 * vv)
    yield c.small("<u, v> and <v, u> differ", uv - M.inner(x, v, u), uu + vv)
    yield c.small("<2u - 3v, v> and 2<u, v> - 3<v, v> differ", linear, uu + vv)
    yield c.small("inner(x, u) and <u, u> differ", M.inner(x, u) - uu, uu)
    yield _found("<u, u> is not positive", not bool((uu > 0).all()))


def _component_inner(c: Case) -> Iterator[Finding]:
    """component_inner(x, u) >= 0, and u/√component_inner, an adaptive step, is tangent"""
    product = c.manifold.component_inner(c.x, c.u)
    yield _found("component_inner(x, u) is negative", not bool((product >= 0).all()))
    yield c.is_tangent("u/√component_inner", c.x, c.u / (product.sqrt() + 1e-8))


def _norm(c: Case) -> Iterator[Finding]:
    """‖u‖² = <u, u> and ‖-2u‖ = 2‖u‖"""
    norm, inner = c.manifold.norm(c.x, c.u), c.manifold.inner(c.x, c.u)
    yield c.small("‖u‖² and <u, u> differ", norm**2 - inner, inner)
    yield c.small("‖-2u‖ and 2‖u‖ differ", c.manifold.norm(c.x, -2 * c.u) - 2 * norm, norm)


def _retr(c: Case) -> Iterator[Finding]:
    """R(x, 0) = x, R(x, u) is a point for steps of any size, and d/dt R(x, tξ) = ξ at t = 0"""
    M, (x, xi) = c.manifold, where_smooth(c.manifold, c.x, c.u)
    yield c.same_points("retr(x, 0) and x", M.retr(c.x, 0 * c.u), c.x)
    for t in (0.01, 0.3, 2.0):
        yield c.is_point(f"retr(x, {t}u)", M.retr(c.x, t * c.u))
    h, allowed = c.difference(x, xi)
    forward, backward = (dense(M, M.retr(x, t * xi)) for t in (h, -h))
    exact = dense_vector(M, x, xi)
    defect = ((forward - backward) / (2 * h) - exact).norm() / exact.norm()
    yield "d/dt R(x, tξ) and ξ differ, relative to ‖ξ‖", float(defect), allowed


def _transp(c: Case) -> Iterator[Finding]:
    """T = transp(x, y, .) maps to tangent vectors at y and is linear; transp(x, x, v) = v"""
    M, x, u, v = c.manifold, c.x, c.u, c.v
    y = M.retr(x, 0.1 * u)
    Tu, Tv, linear = (M.transp(x, y, w) for w in (u, v, 2 * u - 3 * v))
    yield c.is_tangent("transp(x, y, v)", y, Tv)
    yield c.same("transp(2u - 3v) and 2 transp(u) - 3 transp(v)", linear, 2 * Tu - 3 * Tv)
    yield c.same("transp(x, x, v) and v", M.transp(x, x, v), v)


def _retr_transp(c: Case) -> Iterator[Finding]:
    """retr_transp(x, u, v) = (retr(x, u), transp_follow_retr(x, u, v))"""
    M, x, u, v = c.manifold, c.x, 0.1 * c.u, c.v
    y, w = M.retr_transp(x, u, v)
    yield c.same_points("the point of retr_transp and retr(x, u)", y, M.retr(x, u))
    yield c.is_tangent("the vector of retr_transp", y, w)
    other = dense_vector(M, M.retr(x, u), M.transp_follow_retr(x, u, v))
    yield c.same("the vector of retr_transp and its reference", dense_vector(M, y, w), other)


def _calls(c: Case, x: Tensor, z: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Methods that take a batch, ready to be called at points `x` with tensors `z`."""
    M = c.manifold
    u = M.proju(x, z)

    def transp() -> Tensor:
        y = M.retr(x, 0.1 * u)
        return dense_vector(M, y, M.transp(x, y, u))

    return {
        "projx": lambda: dense(M, M.projx(x)),
        "proju": lambda: u,
        "egrad2rgrad": lambda: M.egrad2rgrad(x, z),
        "inner": lambda: M.inner(x, u),
        "component_inner": lambda: M.component_inner(x, u),
        "norm": lambda: M.norm(x, u),
        "retr": lambda: dense(M, M.retr(x, 0.1 * u)),
        "transp": transp,
        "retr_transp": lambda: dense_vector(M, *M.retr_transp(x, 0.1 * u, u)),
    }


def _batch(c: Case) -> Iterator[Finding]:
    """each method gives for a batch what it gives for the elements of the batch"""
    x = c.point(2)
    z = torch.randn_like(x)
    elements = [_calls(c, x[k], z[k]) for k in range(2)]
    for name, method in _calls(c, x, z).items():
        with suppress(NotImplementedError):  # told by the method's own check
            batch, both = method(), torch.stack([calls[name]() for calls in elements])
            if batch.shape != both.shape:
                shapes = f"{tuple(batch.shape)}, of its elements {tuple(both.shape)}"
                yield _found(f"{name} of a batch has shape {shapes}", True)
            else:
                yield c.same(f"{name} of a batch and of its elements", batch, both)


def _dtype(c: Case) -> Iterator[Finding]:
    """results have the dtype and the device of the arguments"""
    asked = torch.empty(0, **c.options)
    calls = {"random": lambda: c.x, "origin": c.origin, **_calls(c, c.x, c.noise)}
    for name, method in calls.items():
        with suppress(NotImplementedError):  # told by the method's own check
            y = method()
            told = f"{name} gives {y.dtype} on {y.device} for {asked.dtype} on {asked.device}"
            yield _found(told, y.dtype != asked.dtype or y.device != asked.device)


CHECKS: dict[str, Callable[[Case], Iterator[Finding]]] = {
    "random": _random,
    "origin": _origin,
    "invalid": _invalid,
    "projx": _projx,
    "proju": _proju,
    "egrad2rgrad": _egrad2rgrad,
    "inner": _inner,
    "component_inner": _component_inner,
    "norm": _norm,
    "retr": _retr,
    "transp": _transp,
    "retr_transp": _retr_transp,
    "batch": _batch,
    "dtype": _dtype,
}

#: What each check of :func:`check_manifold` states, by its name.
STATEMENTS = {name: check.__doc__ or "" for name, check in CHECKS.items()}
