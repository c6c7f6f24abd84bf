"""Theorems T1 and T2 along a training run: a bound on the distance to the dense twin."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .. import linalg
from .._worst import worst
from .._wrappers import parameters_without_wrappers
from ..factors import perp
from ..nn import LowRankLayer
from ._cone import normal_core

Point = dict[str, Tensor]

# The set is taken this much smaller (relative to eps of float32), so that weights which the
# optimizer left at the bound up to rounding are at the bound of the smaller set exactly.
_SHRINK = 64.0
#: The terms of the bound; the sums of what they added to E² are reported.
TERMS = ("loss", "curvature", "gradient", "companion", "step", "square", "clip")


@dataclass(frozen=True)
class Triplets:
    """A point of rank r as singular triplets in float64, inside of cond <= κ."""

    U: Tensor
    s: Tensor
    V: Tensor

    @property
    def dense(self) -> Tensor:
        return (self.U * self.s[..., None, :]) @ self.V.mT

    def normal(self, Z: Tensor) -> Tensor:
        """(I - UUᵀ) Z (I - VVᵀ)."""
        return perp(self.V, perp(self.U, Z).mT).mT

    def core(self, Z: Tensor) -> Tensor:
        return self.U.mT @ Z @ self.V

    def lifted(self, C: Tensor) -> Tensor:
        return self.U @ C @ self.V.mT


@dataclass(frozen=True)
class State:
    """Weights of the twin (W), of the model (Y), and of the best companion X of W in the set."""

    W: Point
    Y: Point
    X: Point
    y: dict[str, Triplets]
    x: dict[str, Triplets]
    off: float  # distance of the stored weights from Y: rounding

    @property
    def ranks(self) -> list[int]:
        return [t.s.shape[-1] for t in self.y.values()]


@dataclass
class _Sums:
    """What is reported between two states."""

    rate: float = 0.0
    gradient: float = 0.0
    companion: float = 0.0
    step: float = 0.0
    turning: float = 0.0
    bends: dict[str, float] = field(default_factory=dict)


class FlowCertificate:
    """T1 (``theory/training/discrete.py``), with T2 for layers whose condition number is bounded.

    With X the nearest point to W in the set of Y, h the step, F_k the gradient field of the batch
    of step k, N_X normal to the set at X, N₁ to that at the next Y⁺ and within the row and column
    spaces of Y⁺, and E >= e = ‖Y - X‖:

        (1 - 2q) E⁺² = max(0, 1 + 2h(λ_k + κ_k)) E² + 2hcE + h²(G + ‖d‖ + ‖ρ‖)² - h²‖N₁‖²,

    q = max h‖N₁⁻‖₂/(2σ_r(Y⁺)). Layers without a bound have N₁ = 0 and q = 0. The bound holds for
    every h > 0, any retraction and any way in which both move; terms that do not belong to a plain
    gradient step (momentum, decay, rounding) are in ρ and d, which are measured.
    """

    def __init__(
        self,
        layers: Mapping[str, LowRankLayer],
        model: nn.Module,
        reference: nn.Module,
        loss: Callable[[nn.Module], Tensor],
    ) -> None:
        self._layers = {f"{name}.weight" if name else "weight": x for name, x in layers.items()}
        self._model, self._reference, self._loss = model, reference, loss
        _check_twins(self._layers, model, reference)
        self.time, self.holds, self._sums = 0.0, True, _Sums()
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begin at the weights as they are: E = ‖Y - X‖."""
        self.state = self._state()
        self.E = _distance(self.state.Y, self.state.X)
        self.parts = dict.fromkeys(TERMS, 0.0) | {"start": self.E**2}

    @torch.no_grad()
    def advance(self, h: float) -> None:
        """Carry the bound over one step of length h, which both models have just made."""
        self.time += h
        points = (_named(self._model), _named(self._reference))
        if not all(bool(p.isfinite().all()) for point in points for p in point.values()):
            self.E, self.holds = math.inf, False
            return
        before, after = self.state, self._state()
        if after.ranks != before.ranks:
            # The theorem is about a fixed rank: a change is a new start, from what is measured.
            self.state = after
            self.E = _distance(after.Y, after.X)
            self.parts = dict.fromkeys(TERMS, 0.0) | {"start": self.E**2}
            return
        self._carry(before, after, max(h, 1e-12))
        self.state = after
        # A latch: what was lost once does not come back.
        self.holds = self.holds and math.isfinite(self.E)

    def is_current(self) -> bool:
        """Whether the weights are still those of the last step."""
        now, then = self._state(), self.state
        pairs = ((now.W, then.W), (now.Y, then.Y))
        return all(torch.equal(new[key], old[key]) for new, old in pairs for key in old)

    def numbers(self) -> dict[str, float]:
        """The bound after the last step; see ``lrmanifold.monitor``."""
        at, q = self.state, self._sums
        eps, e = _distance(at.W, at.X), _distance(at.Y, at.X)
        names = {key: key.removesuffix("weight").rstrip(".") or "model" for key in self._layers}
        return {
            "flow/time": self.time,
            "flow/distance": _distance(at.Y, at.W),
            "flow/best": eps,
            "flow/error": e,
            "flow/certificate": self.E,
            "flow/bound": self.E + eps + at.off,
            "flow/rate": q.rate,
            "flow/gradient": q.gradient,
            "flow/companion": q.companion,
            "flow/step": q.step,
            "flow/turning": q.turning,
            "flow/holds": int(self.holds),
            **{f"flow/part/{key}": x for key, x in self.parts.items()},
            **{f"flow/kappa/{names[key]}": q.bends.get(key, 0.0) for key in self._layers},
        }

    def _carry(self, old: State, new: State, h: float) -> None:
        forces = self._forces(old.W, old.X, old.Y)
        if not all(bool(f.isfinite().all()) for point in forces for f in point.values()):
            self.E = math.inf
            return
        F_W, F_X, F_Y = forces
        moved_Y = {key: (new.Y[key] - y) / h for key, y in old.Y.items()}
        moved_X = {key: (new.X[key] - x) / h for key, x in old.X.items()}
        # Dense parameters have no normal vectors: their directions are the gradients.
        go_Y, go_X = dict(F_Y), dict(F_W)
        clipped, quotients, bends = {}, [0.0], {}
        for key in self._layers:
            y, x, y_next = old.y[key], old.x[key], new.y[key]
            kappa = self._kappa(key)
            n_Y, n_X = y.normal(F_Y[key]), x.normal(F_W[key])
            go_Y[key], go_X[key] = F_Y[key] - n_Y, F_W[key] - n_X
            inward_X = torch.zeros_like(x.s[..., -1])
            if kappa is not None:
                N, inward_X = normal_core(x.core(go_X[key] - moved_X[key]), x.s, kappa)
                go_X[key] = go_X[key] - x.lifted(N)
                N, inward = normal_core(y_next.core(go_Y[key] - moved_Y[key]), y_next.s, kappa)
                clipped[key] = y_next.lifted(N)
                quotients.append(h * float((inward / y_next.s[..., -1]).max()))
            size_Y, size_X = _spectral_norm(n_Y), _spectral_norm(n_X)
            curved = size_Y / y.s[..., -1] + (size_X + inward_X) / x.s[..., -1]
            bends[key] = 0.5 * float(curved.max())
        rho = _norm({k: moved_Y[k] + clipped.get(k, 0.0) - go_Y[k] for k in go_Y})
        d = _norm({k: moved_X[k] - go_X[k] for k in go_X})
        e, reached = _distance(old.Y, old.X), self.E**2
        one_sided = _inner(old.Y, old.X, F_Y, F_X) / (e * e) if e else 0.0
        gradient, turning = _distance(F_X, F_W), _distance(go_Y, go_X)
        bend = worst(bends.values())
        self._sums = _Sums(one_sided + bend, gradient, d, rho, turning, bends)
        E = self.E
        grown: dict[str, float] = {
            # Where the growth factor is negative, 0 takes its place.
            "loss": worst((-(E**2) * (1.0 + 2.0 * h * bend), 2.0 * h * one_sided * E**2)),
            "curvature": 2.0 * h * bend * E**2,
            "gradient": 2.0 * h * gradient * E,
            "companion": 2.0 * h * d * E,
            "step": 2.0 * h * rho * E,
            "square": (h * (turning + d + rho)) ** 2,
        }
        reached += sum(grown.values())
        self.E = _clipped(reached, h * _norm(clipped), worst(quotients))
        grown["clip"] = self.E**2 - reached
        for key, gain in grown.items():
            self.parts[key] += gain

    def _kappa(self, key: str) -> float | None:
        tau = self._layers[key].tau
        if tau is None:
            return None
        return max(1.0, (1.0 + tau) * (1.0 - _SHRINK * torch.finfo(torch.float32).eps))

    def _inside(self, key: str, U: Tensor, s: Tensor, V: Tensor) -> Triplets:
        """The nearest point of the set to U diag(s) Vᵀ (L4.2)."""
        kappa = self._kappa(key)
        return Triplets(U, s if kappa is None else linalg.clip_values(s, kappa - 1.0), V)

    def _state(self) -> State:
        W = self._matricised(_named(self._reference))
        Y = {k: p.detach().double().cpu().clone() for k, p in _named(self._model).items()}
        X, y, x, off = dict(W), {}, {}, 0.0
        for key, layer in self._layers.items():
            U, S, V = (f.detach().double().cpu() for f in layer.factors)
            # Frames are orthonormal up to rounding of their dtype: here they are exactly.
            (U, R), (V, T) = torch.linalg.qr(U), torch.linalg.qr(V)
            P, s, Qh = linalg.svd(R @ S @ T.mT)
            stored = (U @ P * s[..., None, :]) @ (V @ Qh.mT).mT
            y[key] = self._inside(key, U @ P, s, V @ Qh.mT)
            Y[key] = y[key].dense
            off += float((Y[key] - stored).square().sum())
            x[key] = self._inside(key, *_leading(W[key], layer.rank))
            X[key] = x[key].dense
        return State(W, Y, X, y, x, math.sqrt(off))

    def _matricised(self, point: Mapping[str, Tensor]) -> Point:
        """Dense parameters in float64 on the CPU, those of our layers as matrices."""
        return {
            key: (self._layers[key].matricised(p) if key in self._layers else p)
            .detach().double().cpu().clone()  # steps write into parameters
            for key, p in point.items()
        }  # fmt: skip

    def _forces(self, *points: Point) -> list[Point]:
        """-∇L at some points, with the loss of the present batch."""
        stage = copy.deepcopy(self._reference)
        parameters = _named(stage)
        forces = []
        for point in points:
            for key, p in parameters.items():
                layer = self._layers.get(key)
                value = point[key] if layer is None else layer.as_weight(point[key])
                p.requires_grad_(True).copy_(value)
            with torch.enable_grad():
                loss = self._loss(stage)
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            force = {
                key: torch.zeros_like(p) if g is None else -g
                for (key, p), g in zip(parameters.items(), grads, strict=True)
            }
            forces.append(self._matricised(force))
        return forces


def _named(model: nn.Module) -> Point:
    """Parameters by their names without wrappers, each once."""
    found: Point = {}
    for key, p in parameters_without_wrappers(model).items():
        if all(p is not other for other in found.values()):
            found[key] = p
    return found


def _clipped(squared: float, normal: float, quotient: float) -> float:
    """E⁺ from ‖Z - X⁺‖² <= squared, ‖Z - Y⁺‖ = normal and 2q = quotient."""
    if math.isnan(squared):
        return math.inf
    apart = math.sqrt(max(squared, 0.0)) + normal  # the triangle inequality: always true
    if not quotient < 1.0:  # NaN is here, too
        return apart
    return min(apart, math.sqrt(max(squared - normal**2, 0.0) / (1.0 - quotient)))


def _leading(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r leading singular triplets; from the smaller Gram matrix, four times faster than an SVD.

    The frames are orthonormal to rounding. How near X is to the best point does not matter for the
    bound, which measures it.
    """
    if W.shape[-2] > W.shape[-1]:
        V, s, U = _leading(W.mT, r)
        return U, s, V
    U = torch.linalg.eigh(W @ W.mT).eigenvectors[..., -r:]
    V, R = torch.linalg.qr(W.mT @ U)
    P, s, Qh = linalg.svd(R.mT)
    return U @ P, s, V @ Qh.mT


def _spectral_norm(N: Tensor) -> Tensor:
    gram = N @ N.mT if N.shape[-2] <= N.shape[-1] else N.mT @ N
    return torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0.0).sqrt()


def _norm(A: Point) -> float:
    return math.sqrt(sum(float(x.square().sum()) for x in A.values()))


def _distance(A: Point, B: Point) -> float:
    return math.sqrt(sum(float((A[key] - B[key]).square().sum()) for key in A))


def _inner(A: Point, B: Point, C: Point, D: Point) -> float:
    """⟨A - B, C - D⟩."""
    return sum(float(((A[key] - B[key]) * (C[key] - D[key])).sum()) for key in A)


def _check_twins(
    layers: Mapping[str, LowRankLayer], model: nn.Module, reference: nn.Module
) -> None:
    theirs = {key: tuple(p.shape) for key, p in _named(reference).items()}
    ours = {
        key: tuple(layers[key].dense_weight().shape if key in layers else p.shape)
        for key, p in _named(model).items()
    }
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                "reference must be the dense twin of model, with parameters of the same names and "
                f"shapes, but {key} has shape {theirs.get(key)} there and {ours.get(key)} here"
            )
