"""The CondLR step in velocities of the factors: thin products only, written in place.

The same step as :func:`lrmanifold.optim.condlr_update` makes with the retraction "factored", in
coordinates that save the rest: momentum is kept as the velocity (U̇, Ṡ, V̇) of the factors instead of
the tangent vector (U_p, M, V_p) = (U̇ S, Ṡ, V̇ Sᵀ), so that neither gradient, momentum nor point is
multiplied by S. With A = (SSᵀ)⁻¹ and a gradient g of U,

    U̇ ← μ U̇ + g A - U (UᵀgA + μ C),   Y = U - lr U̇,   U ← Y K,   K = (YᵀY)^(-1/2)

are four products of 2 m r² flops, three with the scalar metric. Two more are avoided:

- UᵀU̇ has to vanish. UᵀgA needs no product: loss functions of W are invariant under U → UQ, S → QᵀS,
  hence Uᵀg = g_S Sᵀ (mathematics 1). That holds for autograd's gradient and all its multiples, not
  for one that was edited entry by entry: two matrix-vector products with a fixed random vector tell
  (Freivalds' check).
- Transport of U̇ to the new point is the projection U̇ - U (UᵀU̇) there. It is left to the next step,
  where it costs nothing: C, the overlap UᵀU̇, is remembered. It follows from the Gram matrix that
  the retraction has formed, C = K YᵀU̇ = K (I - YᵀY)/lr, as Y = U - lr U̇ and UᵀU̇ = 0.

The Gram matrix is that of Y itself, never I + lr² U̇ᵀU̇: under that one drift grows (mathematics 2).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import geoopt
import torch
from torch import Tensor

from .. import linalg, retractions
from ..factors import pack, perp, unpack
from ..manifolds import Factors, FixedRank, WellConditioned

Metric = Literal["exact", "scalar"]

# Above this defect of YᵀY the series for its root needs more products than a factorisation.
_NEAR = 0.5
# Gauge identities of rounded gradients hold to about this; what is off by less does no harm.
_GAUGE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
# Tensors of memory: four for each shape of weights.
_MOST_KEPT = 256
# Rows times r² from where two matrix-vector products are cheaper than one of matrices.
_WORTH_A_CHECK = 200_000


def is_factored(manifold: geoopt.Manifold | None) -> bool:
    """Whether a parameter on `manifold` takes the step of this file."""
    return isinstance(manifold, FixedRank) and manifold._retract is retractions.factored


def factored_transport(manifold: FixedRank, X: Tensor, Y: Tensor, xi: Tensor) -> Tensor:
    """The transport of this file for a packed tangent vector `xi` at `X`, as a reference.

    (U̇, Ṡ, V̇) keeps its coordinates, but for the parts of U̇ and V̇ within the new bases, which are
    motions of the gauge. `Y` must be the retraction's own result, whose bases belong to those of
    `X`. Does not depend on the gauge; 8 (m+n) r² flops.
    """
    Xf, Yf, v = manifold.unpack(X), manifold.unpack(Y), manifold.unpack(xi)
    U_dot = perp(Yf.U, linalg.solve_right(v.U, Xf.S))
    V_dot = perp(Yf.V, linalg.solve_right(v.V, Xf.S.mT))
    return pack(U_dot @ Yf.S, v.S, V_dot @ Yf.S.mT)


# Where an optimizer's state keeps the fields of Momentum.
MOMENTUM_STATE = ("momentum_buffer", "momentum_overlap", "momentum_drift")


class Momentum(NamedTuple):
    """What is remembered of a low-rank weight between two steps."""

    velocity: Tensor  # packed (U̇, Ṡ, V̇), not yet transported
    overlap: Tensor  # (..., 2, r, r): UᵀU̇ and VᵀV̇ at the present point
    drift: Tensor | None = None  # (..., 2, r, r): UᵀU - I and VᵀV - I, where retraction has waited


def tangent_momentum(manifold: FixedRank, X: Tensor, momentum: Momentum) -> Tensor:
    """The momentum as a packed tangent vector (U_p, M, V_p) at the packed point `X`."""
    dtype, wide = X.dtype, linalg.compute_dtype(X.dtype)
    U, S, V = manifold.unpack(X.to(wide))
    velocity = manifold.unpack(momentum.velocity.to(wide))
    return pack(perp(U, velocity.U) @ S, velocity.S, perp(V, velocity.V) @ S.mT).to(dtype)


def momentum_from_tangent(X: Factors, xi: Factors) -> Momentum:
    """The inverse of :func:`tangent_momentum`, for cores that may be singular."""
    inverse = torch.linalg.pinv(X.S)
    velocity = pack(xi.U @ inverse, xi.S, xi.V @ inverse.mT)
    overlap = torch.zeros_like(X.S)
    return Momentum(velocity, torch.stack((overlap, overlap), -3))


class Options(NamedTuple):
    """The numbers of one step; see :class:`lrmanifold.optim.CondLR`."""

    lr: float | Tensor
    momentum: float
    nesterov: bool
    weight_decay: float
    penalty: float
    penalty_squared: bool
    metric: Metric
    clip_margin: float
    orthonormality_tol: float


class Workspace:
    """Memory for what a step computes before it is written, one tensor a shape and purpose.

    Fresh memory of megabytes costs as much as a product: the system clears its pages.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple, Tensor] = {}

    def take(self, purpose: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor to be written over, of the dtype and device of `like`."""
        key = (purpose, shape, like.dtype, like.device)
        if key not in self._kept:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()  # of shapes that ranks have left
            self._kept[key] = like.new_empty(shape)
        return self._kept[key]

    def swap(self, purpose: str, new: Tensor, old: Tensor | None) -> None:
        """`new`, taken from here, is kept by the caller from now on, who gives back `old`."""
        key = (purpose, tuple(new.shape), new.dtype, new.device)
        if old is not None and old.dtype == new.dtype and old.shape == new.shape:
            self._kept[key] = old
        else:
            self._kept.pop(key, None)


class Side(NamedTuple):
    """One basis after a step: the new one is ``Y @ K`` (Y itself if K is None)."""

    Y: Tensor
    K: Tensor | None
    overlap: Tensor
    drift: Tensor | None = None


class Step(NamedTuple):
    """A step that is computed but not written."""

    U: Side
    S: Tensor
    V: Side
    momentum: Momentum | None

    def write_(self, X: Factors) -> None:
        """Overwrite the point; `X` are views of the parameter, in its dtype."""
        for Q, side in ((X.U, self.U), (X.V, self.V)):
            if side.K is None or Q.dtype != side.Y.dtype:
                Q.copy_(side.Y if side.K is None else side.Y @ side.K)
            else:
                torch.matmul(side.Y, side.K, out=Q)
        X.S.copy_(self.S)

    def packed(self) -> Tensor:
        """The new point as one tensor."""
        U, V = (s.Y if s.K is None else s.Y @ s.K for s in (self.U, self.V))
        return pack(U, self.S, V)


def factored_step(
    manifold: FixedRank,
    X: Factors,
    G: Factors,
    momentum: Momentum | None,
    options: Options,
    workspace: Workspace,
    cores: linalg.ClipMemory | None = None,
) -> Step:
    """Compute one step; nothing is written.

    Parameters
    ----------
    manifold : FixedRank
        With the retraction "factored".
    X, G : Factors
        Point and Euclidean gradient, (..., m, r), (..., r, r), (..., n, r), in a compute dtype.
    momentum : Momentum or None
        In the same dtype; None before the first step.
    options : Options
    workspace : Workspace
    cores : ClipMemory, optional
        Of this weight.

    Raises
    ------
    ValueError, torch.linalg.LinAlgError
        On the CPU, if the step is too long to be made.
    """
    metric, within = _metric_and_overlaps(manifold, X, G, options.metric)
    mu = options.momentum if momentum is not None else 0.0
    shape = (*X.S.shape[:-2], *manifold.point_shape)
    velocity = workspace.take("velocity", shape, X.S)
    new = unpack(velocity, manifold.m, manifold.n)
    goal = unpack(workspace.take("point", shape, X.S), manifold.m, manifold.n)
    old = unpack(momentum.velocity, manifold.m, manifold.n) if momentum is not None else None

    M = G.S + options.weight_decay * X.S if options.weight_decay else G.S
    new.S.copy_(M if old is None else M + mu * old.S)
    force = M + options.momentum * new.S if options.nesterov else new.S
    if options.penalty:
        slope = linalg.conditioning_penalty_grad(X.S, squared=options.penalty_squared)
        force = force + options.penalty * slope
    S = project_core(manifold, X.S - options.lr * force, options.clip_margin, cores)

    moved = []
    for i, (Q, g, w, Y) in enumerate(((X.U, G.U, new.U, goal.U), (X.V, G.V, new.V, goal.V))):
        if Q.shape[-2] == Q.shape[-1]:
            w.zero_()  # a square basis has nowhere to go
            moved.append(Y.copy_(Q))
            continue
        B = within[i]
        last = overlap = None
        if momentum is not None and old is not None:
            last, overlap = (old.U, old.V)[i], momentum.overlap[..., i, :, :]
            B = B + mu * overlap
        _velocity(Q, B, g, metric[i], last, mu, w)
        direction = w
        if options.nesterov:
            # ξ + μ b with ξ = b - μ (old b, transported)
            direction = (1.0 + options.momentum) * w
            if last is not None and overlap is not None:
                direction = direction - mu * (last - Q @ overlap)
        moved.append(_along(Q, direction, options.lr, Y))
    drift = momentum.drift if momentum is not None else None
    U, V = _retracted(moved, (new.U, new.V), drift, options)
    if not options.momentum:
        return Step(U, S, V, None)
    overlap = torch.stack((U.overlap, V.overlap), -3)
    if U.drift is None and V.drift is None:
        return Step(U, S, V, Momentum(velocity, overlap))
    none = torch.zeros_like(S)
    drift = torch.stack([none if x.drift is None else x.drift for x in (U, V)], -3)
    return Step(U, S, V, Momentum(velocity, overlap, drift))


def project_core(
    manifold: FixedRank, S: Tensor, margin: float, cores: linalg.ClipMemory | None
) -> Tensor:
    free = isinstance(manifold, WellConditioned) and manifold.scale == "free"
    if isinstance(manifold, WellConditioned) and free and (margin or cores is not None):
        clip = linalg.spectral_clip if cores is None else cores.clip
        return clip(S, manifold.tau, centre=manifold.centre, margin=margin)
    return manifold.project_core(S)


def _metric_and_overlaps(
    manifold: FixedRank,
    X: Factors,
    G: Factors,
    metric: Metric,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What gradients of U and V are multiplied by, A, to give velocities; and UᵀgA of both."""
    probe, S = manifold.gradient == "probe", X.S
    if metric == "scalar":
        # r/‖S‖² for (SSᵀ)⁻¹: equal to it for multiples of orthogonal cores.
        c = S.shape[-1] / S.square().sum((-2, -1), keepdim=True)
        A = (c * S.mT, c * S) if probe else (c, c)
    else:
        inverse = linalg.inverse(S)
        A = (inverse, inverse.mT)
        if not probe:
            A = (linalg.gram(inverse), linalg.gram(inverse.mT))
    if not gauge_holds(manifold, X, G):
        return A, (_times(X.U.mT @ G.U, A[0]), _times(X.V.mT @ G.V, A[1]))
    if metric == "scalar":
        return A, (c * (G.S @ S.mT), c * (G.S.mT @ S))
    return A, (G.S @ inverse, G.S.mT @ inverse.mT)


def gauge_holds(manifold: FixedRank, X: Factors, G: Factors) -> bool:
    """Whether Uᵀg = g_S Sᵀ and VᵀG_V = g_Sᵀ S (for probe gradients g_S and g_Sᵀ), as they should.

    False where to find out would cost more than to form them.
    """
    r, device = X.S.shape[-1], X.S.device
    tall = max(X.U.shape[-2], X.V.shape[-2]) * r * r
    single = X.S.ndim == 2 and device.type == "cpu"
    if not (single and tall >= _WORTH_A_CHECK and X.S.dtype in _GAUGE_TOLERANCE):
        return False
    z, probe = _probe_vector(r, X.S.dtype), manifold.gradient == "probe"
    sizes = []
    for Q, g, g_S, S in ((X.U, G.U, G.S, X.S), (X.V, G.V, G.S.mT, X.S.mT)):
        image = torch.mv(g, z)
        gap = torch.mv(Q.mT, image) - torch.mv(g_S, z if probe else torch.mv(S.mT, z))
        sizes += [torch.dot(image, image), torch.dot(gap, gap)]
    a, da, b, db = torch.stack(sizes).tolist()
    tolerance = _GAUGE_TOLERANCE[X.S.dtype] ** 2
    return da <= tolerance * a and db <= tolerance * b


_PROBES: dict[tuple[int, torch.dtype], Tensor] = {}


def _probe_vector(r: int, dtype: torch.dtype) -> Tensor:
    """A fixed Gaussian vector, the same in every run."""
    if (r, dtype) not in _PROBES:
        generator = torch.Generator().manual_seed(r)
        _PROBES[r, dtype] = torch.randn(r, dtype=torch.float64, generator=generator).to(dtype)
    return _PROBES[r, dtype]


def _times(a: Tensor, A: Tensor) -> Tensor:
    """a A, for an A of size 1 that stands for a multiple of the identity too."""
    return a * A if A.shape[-1] == 1 else a @ A


def _velocity(
    Q: Tensor, B: Tensor, g: Tensor, A: Tensor, last: Tensor | None, mu: float, out: Tensor
) -> None:
    """out = mu last + g A - Q B, with as few passes over memory as BLAS allows."""
    if Q.ndim > 2 or Q.device.type != "cpu":
        # Many small ones, or a number that the host would have to wait for.
        torch.sub(_times(g, A), Q @ B, out=out)
        if last is not None:
            out.add_(last, alpha=mu)
    elif A.shape[-1] == 1:
        # A multiple of g: it rides on the product with Q.
        if last is None:
            torch.addmm(g, Q, B, beta=float(A), alpha=-1.0, out=out)
        else:
            torch.addmm(last, Q, B, beta=mu, alpha=-1.0, out=out)
            out.add_(g, alpha=float(A))
    else:
        if last is None:
            torch.mm(g, A, out=out)
        else:
            torch.addmm(last, g, A, beta=mu, out=out)
        out.addmm_(Q, B, alpha=-1.0)


def _along(Q: Tensor, direction: Tensor, lr: float | Tensor, out: Tensor) -> Tensor:
    """Q - lr direction; a rate in a tensor may be on an accelerator."""
    if isinstance(lr, Tensor):
        return torch.sub(Q, lr * direction, out=out)
    return torch.sub(Q, direction, alpha=lr, out=out)


def _retracted(
    moved: list[Tensor], velocities: tuple[Tensor, Tensor], drift: Tensor | None, options: Options
) -> tuple[Side, Side]:
    """Polar factors of the moved bases, and what their velocities overlap them."""
    if moved[0].device.type != "cpu":
        # No decision by size, which the host would have to wait for.
        bases = [linalg.polar(Y) for Y in moved]
        U, V = (Side(Q, None, Q.mT @ w) for Q, w in zip(bases, velocities, strict=True))
        return U, V
    defects = [linalg.gram(Y) for Y in moved]
    for E in defects:
        E.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    sizes = [float(torch.linalg.vector_norm(E, dim=(-2, -1)).max()) for E in defects]
    drifts = (None, None) if drift is None else drift.unbind(-3)
    U, V = (
        _retracted_side(*x, options)
        for x in zip(moved, velocities, defects, sizes, drifts, strict=True)
    )
    return U, V


def _retracted_side(
    Y: Tensor, w: Tensor, E: Tensor, size: float, drift: Tensor | None, options: Options
) -> Side:
    if not size <= _NEAR:
        Q = linalg.polar(Y)
        return Side(Q, None, Q.mT @ w)
    waits = size <= options.orthonormality_tol
    K, image = (None, E) if waits else linalg.inverse_square_root_and_image(E, size)
    if not options.momentum:
        return Side(Y, K, E, E if waits else None)  # the overlap is of no use
    if options.nesterov:
        overlap = Y.mT @ w if K is None else K @ (Y.mT @ w)
    elif size <= 32 * E.shape[-1] ** 0.5 * torch.finfo(E.dtype).eps or not options.lr:
        # All rounding: the overlap, lr U̇ᵀU̇, is too small to matter or to be measured.
        overlap = torch.zeros_like(E)
    else:
        if drift is not None:
            image = image - (drift if K is None else K @ drift)
        overlap = image * (-1.0 / options.lr)
    return Side(Y, K, overlap, E if waits else None)
