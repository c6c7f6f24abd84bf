"""Theorem A along a training run: how far the low-rank model may be from the full one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import linalg
from .factors import perp
from .nn import LowRankLayer
from .optim import CondLR

Point = dict[str, Tensor]

# Options of CondLR under which its steps do not follow the flow, or leave the bound unseen.
_NOT_THE_FLOW = (
    "momentum", "weight_decay", "penalty", "clip_margin", "maximize"
)  # fmt: skip
# A condition number within this of its bound counts as held there by the constraint.
_AT_THE_BOUND = 1e-3


class _Measured(NamedTuple):
    distance: float  # ‖Y - W‖
    eps: float  # ‖W - X‖
    e: float  # ‖Y - X‖
    rate: float  # λ + κ
    source: float  # ℓε + δ
    holds: bool
    bends: dict[str, float]  # κ of each layer


class FlowCertificate:
    """The a-posteriori certificate of mathematics 4.1 for a model and its dense twin.

    With W the weights of the twin, Y those of the low-rank model, X the best approximation of W at
    the ranks of Y, all in the product metric of all parameters: E' = (λ + κ) E + ℓε + δ from
    E(0) = ‖Y - X‖, integrated from one measurement to the next with the means of λ + κ and ℓε + δ.
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
        self._bound = math.nan
        self._ranks: list[int] = []
        self._last: tuple[float, _Measured] | None = None
        _check_twins(self._layers, model, reference)

    def measure(self, time: float) -> dict[str, float]:
        """The certificate at `time`, the sum of the rates since the start; see ``monitor``."""
        now, ranks = self._measured(), [layer.rank for layer in self._layers.values()]
        if self._last is None or ranks != self._ranks:
            # The theorem is about a fixed rank: a change is a new start.
            self._bound, self._ranks = now.e, ranks
        else:
            before, then = self._last
            rate, source = 0.5 * (then.rate + now.rate), 0.5 * (then.source + now.source)
            self._bound = _grown(self._bound, rate, source, time - before)
        self._last = time, now
        return {
            "flow/time": time,
            "flow/distance": now.distance,
            "flow/best": now.eps,
            "flow/error": now.e,
            "flow/certificate": self._bound,
            "flow/rate": now.rate,
            "flow/source": now.source,
            "flow/holds": int(now.holds),
            **{f"flow/kappa/{key}": x for key, x in now.bends.items()},
        }

    def _measured(self) -> _Measured:
        W = self._matricised(dict(self._reference.named_parameters()))
        Y = self._low_rank_point()
        svds = {key: linalg.svd(W[key]) for key in self._layers}
        X, bends, deltas, holds = dict(W), {}, [0.0], True
        for key, layer in self._layers.items():
            P, s, Qh = svds[key]
            r = layer.rank
            X[key] = (P[..., :r] * s[..., None, :r]) @ Qh[..., :r, :]
        F_W, F_X, F_Y = (self._force(Z) for Z in (W, X, Y))
        eps, e = _distance(W, X), _distance(Y, X)
        for key, layer in self._layers.items():
            P, s, Qh = svds[key]
            r = layer.rank
            U, S, V = (f.detach().double() for f in layer.factors)
            t = linalg.svdvals(S)
            s_W, s_Y = s[..., r - 1], t[..., -1]
            tail = s[..., r] if s.shape[-1] > r else torch.zeros_like(s_W)
            best_U, best_V = P[..., :r], Qh[..., :r, :].mT
            bend = _normal(U, V, F_Y[key]) / s_Y + _normal(best_U, best_V, F_W[key]) / s_W
            bends[key.removesuffix("weight").rstrip(".") or "model"] = 0.5 * float(bend.max())
            U_p = perp(best_U, F_W[key] @ best_V)
            V_p = perp(best_V, F_W[key].mT @ best_U)
            size = U_p.square().sum((-2, -1)) + V_p.square().sum((-2, -1))
            gap = bool((s_W > tail).all())
            delta = ((tail / (s_W - tail)).square() * size).sum() if gap else math.inf
            deltas.append(float(delta))
            holds &= gap and eps < min(float(s_W.min()), float(s_Y.min()))
            if layer.tau is not None and r > 1:
                bound = (1.0 + layer.tau) * (1.0 - _AT_THE_BOUND)
                holds &= bool((t[..., 0] < bound * s_Y).all())
        one_sided = _inner(Y, X, F_Y, F_X) / (e * e) if e else 0.0
        return _Measured(
            distance=_distance(Y, W),
            eps=eps,
            e=e,
            rate=one_sided + max(bends.values()),
            source=_distance(F_X, F_W) + math.sqrt(sum(deltas)),
            holds=holds,
            bends=bends,
        )

    def _matricised(self, point: Mapping[str, Tensor]) -> Point:
        """Dense parameters in float64, those of our layers as matrices."""
        return {
            key: (self._layers[key].matricised(x) if key in self._layers else x).detach().double()
            for key, x in point.items()
        }

    def _low_rank_point(self) -> Point:
        """The same of the low-rank model."""
        return {
            key: self._layers[key].manifold.to_dense(p.detach().double())
            if key in self._layers
            else p.detach().double()
            for key, p in self._model.named_parameters()
        }

    def _force(self, point: Point) -> Point:
        """-∇L at a point."""
        stage = copy.deepcopy(self._reference)
        parameters = dict(stage.named_parameters())
        with torch.no_grad():
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
        return self._matricised(force)


def _normal(U: Tensor, V: Tensor, Z: Tensor) -> Tensor:
    """‖(I - UUᵀ) Z (I - VVᵀ)‖₂."""
    return linalg.svdvals(perp(V, perp(U, Z).mT))[..., 0]


def _distance(A: Point, B: Point) -> float:
    return math.sqrt(sum(float((A[key] - B[key]).square().sum()) for key in A))


def _inner(A: Point, B: Point, C: Point, D: Point) -> float:
    """⟨A - B, C - D⟩."""
    return sum(float(((A[key] - B[key]) * (C[key] - D[key])).sum()) for key in A)


def _grown(E: float, rate: float, source: float, time: float) -> float:
    """The solution of E' = rate E + source after `time`; infinite where it overflows."""
    try:
        growth = math.expm1(rate * time)
    except OverflowError:
        return math.inf
    return E * (1.0 + growth) + source * (growth / rate if rate else time)


def _check_twins(
    layers: Mapping[str, LowRankLayer], model: nn.Module, reference: nn.Module
) -> None:
    theirs = {key: tuple(p.shape) for key, p in reference.named_parameters()}
    ours = {
        key: tuple(layers[key].dense_weight().shape if key in layers else p.shape)
        for key, p in model.named_parameters()
    }
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                "reference must be the dense twin of model, with parameters of the same names and "
                f"shapes, but {key} has shape {theirs.get(key)} there and {ours.get(key)} here"
            )


def check_flow(optimizer: torch.optim.Optimizer | None) -> None:
    """Raise unless the optimizer follows the gradient flow that theorem A is about."""
    if not isinstance(optimizer, CondLR):
        raise TypeError(f"a certificate needs optimizer=CondLR, got {type(optimizer).__name__}")
    for group in optimizer.param_groups:
        for option in _NOT_THE_FLOW:
            if group[option]:
                raise ValueError(
                    f"a certificate needs plain gradient steps, without {option}, got "
                    f"{group[option]!r}"
                )
        if group["metric"] != "exact":
            raise ValueError(f"a certificate needs metric='exact', got {group['metric']!r}")
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) > 1:
        raise ValueError(f"a certificate needs one lr for all groups, got {sorted(rates)}")
