"""Dynamical low-rank training: the K, L and S steps with gradients of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import geoopt
import torch
from torch import Tensor

from .. import linalg
from ..factors import pack, unpack
from ..manifolds import Factors, FixedRank
from ..parameter import manifold_of, replace_data
from ._base import GeometricOptimizer, Ok, _mark, commit
from ._rank import augment, nearest_rank, rank_for_tolerance, resize, truncate

Integrator = Literal["bug", "augmented_bug", "ksl"]
_INTEGRATORS = ("bug", "augmented_bug", "ksl")


class DLRT(GeometricOptimizer):
    r"""Multi-pass integrators of the gradient flow: K, L and S steps with fresh gradients.

    Each substep is an explicit Euler step of size `lr` (mathematics 7, F = -∇L):

    ``"bug"``
        K and L from the old point, then S in the new bases: 3 evaluations of the closure.
    ``"augmented_bug"``
        The same in the bases [U₀, K₁], [V₀, L₁] of twice the rank, then truncation: to the old
        rank, or to the relative tolerance `tol`, which makes the rank adaptive. 2 + `s_steps`
        evaluations. Above half of min(m, n) there is no room for both: [K₁, U₀], as far as it goes.
    ``"ksl"``
        K, S backwards, L, one after the other: 3 evaluations.

    No substep divides by S: they work for any conditioning, rank-deficient starts included. Layers
    with ``gradient="probe"`` share one evaluation for K and L. After truncation the core is
    projected onto the manifold's set, so weights on :class:`~lrmanifold.WellConditioned` satisfy
    their bound after every step, at every rank. Ordinary parameters take a gradient step with the
    gradient of the last evaluation.

    For one evaluation a step use :class:`CondLR`.

    Parameters
    ----------
    params : iterable
    lr : float
    integrator : {"bug", "augmented_bug", "ksl"}
    tol : float, optional
        In [0, 1), for "augmented_bug": keep the smallest rank with truncation error at most
        tol ‖S‖. On :class:`~lrmanifold.WellConditioned` a smaller one, if its set is nearer. None
        keeps the rank.
    min_rank, max_rank : int, optional
        Bounds for the adaptive rank.
    s_steps : int
        Number of S steps in the bases of one update (for "bug" and "augmented_bug").
    weight_decay, penalty, penalty_squared
        As in :class:`CondLR`, applied in the S steps (for "ksl" once, at the end).
    maximize : bool
    skip_nonfinite : bool
        If any gradient of the step holds NaN or Inf, nothing at all moves; counted.

    Raises
    ------
    ValueError
        For options out of range.

    References
    ----------
    S. Schotthöfer et al., *Low-rank lottery tickets: finding efficient low-rank neural networks via
    matrix differential equations*, 2022; G. Ceruti, J. Kusch, C. Lubich, *A rank-adaptive robust
    integrator for dynamical low-rank approximation*, 2022.
    """

    _non_negative = ("lr", "weight_decay", "penalty")

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        integrator: Integrator = "augmented_bug",
        tol: float | None = None,
        min_rank: int = 1,
        max_rank: int | None = None,
        s_steps: int = 1,
        weight_decay: float = 0.0,
        penalty: float = 0.0,
        penalty_squared: bool = False,
        maximize: bool = False,
        skip_nonfinite: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "integrator": integrator,
            "tol": tol,
            "min_rank": min_rank,
            "max_rank": max_rank,
            "s_steps": s_steps,
            "weight_decay": weight_decay,
            "penalty": penalty,
            "penalty_squared": penalty_squared,
            "maximize": maximize,
            "skip_nonfinite": skip_nonfinite,
        }
        super().__init__(params, defaults)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        if group["integrator"] not in _INTEGRATORS:
            raise ValueError(
                f"integrator must be one of {_INTEGRATORS}, got {group['integrator']!r}"
            )
        if any(g["integrator"] != group["integrator"] for g in self.param_groups):
            raise ValueError("integrator must be the same for all groups: they step together")
        tol = group["tol"]
        if tol is not None and not 0.0 <= tol < 1.0:
            raise ValueError(f"tol must be in [0, 1), got {tol!r}")
        if tol is not None and group["integrator"] != "augmented_bug":
            raise ValueError(f"tol needs integrator='augmented_bug', got {group['integrator']!r}")
        low, high = group["min_rank"], group["max_rank"]
        if low < 1 or (high is not None and high < low):
            raise ValueError(f"min_rank, max_rank must be 1 <= min <= max, got {low}, {high}")
        if tol is None and (low > 1 or high is not None):
            raise ValueError(f"min_rank and max_rank need tol, got {low}, {high} and tol=None")
        if group["s_steps"] < 1:
            raise ValueError(f"s_steps must be at least 1, got {group['s_steps']}")
        if group["s_steps"] > 1 and group["integrator"] == "ksl":
            raise ValueError(f"s_steps must be 1 for integrator='ksl', got {group['s_steps']}")
        for p in group["params"]:
            manifold = getattr(p, "manifold", None)
            if manifold is not None and not isinstance(manifold, (FixedRank, geoopt.Euclidean)):
                raise ValueError(f"DLRT moves low-rank weights only, got one on {manifold.name}")
        owners = [manifold_of(p) for g in self.param_groups for p in g["params"]]
        owners = [id(M) for M in owners if M is not None]
        if tol is not None and len(set(owners)) < len(owners):
            raise ValueError("with tol each weight needs a manifold of its own: it holds the rank")

    # -- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the integrator on all parameters together.

        Parameters
        ----------
        closure : callable
            Clears the gradients, evaluates the loss, calls ``backward`` and returns the loss. On
            the same data at each call for the integrator of mathematics 7; a closure that draws
            the next mini-batch each time is its stochastic form, at the price of plain SGD per
            batch.

        Returns
        -------
        The loss at the start of the step.
        """
        if closure is None:
            raise ValueError("DLRT.step needs a closure: it evaluates the gradient several times")
        entries = list(self._parameters())
        low = [(g, p, M) for g, p, M, _ in entries if isinstance(M, FixedRank) and p.requires_grad]
        for _, p, M, label in entries:
            state = self.state[p]
            if "skipped" not in state:
                state["skipped"] = torch.zeros((), dtype=torch.int64, device=p.device)
                state["step"] = torch.zeros((), dtype=torch.int64, device=p.device)
            if M is not None:
                self._ensure_on_manifold(p, M, state, label)
        start = {p: (M.rank, p.data.clone()) for _, p, M in low}
        self._losses: list[Any] = []
        self._used: set[Tensor] = set()
        try:
            integrate = self._ksl if self.param_groups[0]["integrator"] == "ksl" else self._bug
            integrate(closure, low, [p for _, p, _, _ in entries])
        except _NonFiniteError as error:
            self._restore(low, start)
            if not all(group["skip_nonfinite"] for group in self.param_groups):
                label = next(label for _, p, _, label in entries if p is error.parameter)
                raise FloatingPointError(f"the gradient of {label} holds NaN or Inf") from None
            for _, p, _, _ in entries:
                self.state[p]["skipped"] += 1
            return self._losses[0]
        except BaseException:
            # Also when the closure itself fails: nothing is left half-moved.
            self._restore(low, start)
            raise
        # A weight that no evaluation used is to stay as it is, whatever decay and truncation say.
        self._restore([entry for entry in low if entry[1] not in self._used], start)
        for group, p, M, _ in entries:
            self.state[p]["step"] += int(p in self._used)
            if M is None and p.grad is not None:
                sign = -1.0 if group["maximize"] else 1.0
                step = sign * p.grad + group["weight_decay"] * p
                commit(p, p - group["lr"] * step, True)
            if M is not None:
                self._marks[p] = _mark(p)
        return self._losses[0]

    def _update(self, p, grad, manifold, group, state, ok: Ok) -> Ok:
        raise AssertionError("DLRT moves all parameters together, in step")

    @staticmethod
    def _restore(low: list, start: dict) -> None:
        for _, p, M in low:
            rank, data = start[p]
            M.set_rank_(rank)
            replace_data(p, data)

    def _evaluate(self, closure: Callable[[], Any], params: list[Tensor]) -> None:
        with torch.enable_grad():
            self._losses.append(closure())
        for p in params:
            if p.grad is not None:
                self._used.add(p)
                if not bool(torch.isfinite(p.grad).all()):
                    raise _NonFiniteError(p)

    @staticmethod
    def _gradient(group: dict[str, Any], p: Tensor, M: FixedRank) -> Factors:
        """Blocks of the gradient at the present point; zero for a weight that was not used."""
        grad = torch.zeros_like(p) if p.grad is None else p.grad.to(linalg.compute_dtype(p.dtype))
        return unpack(-grad if group["maximize"] else grad, M.m, M.n)

    @staticmethod
    def _place(p: Tensor, M: FixedRank, U: Tensor, S: Tensor | None, V: Tensor) -> None:
        """Put U S Vᵀ in place for an evaluation (S = I if None); any rank, any factors."""
        if S is None:
            S = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
            S = S.expand(*U.shape[:-2], -1, -1)
        M.set_rank_(U.shape[-1])
        replace_data(p, pack(U, S, V).to(p.dtype))

    def _kl_gradients(self, closure, low, params) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """GV and GᵀU at the start, without dividing by S."""
        points = {p: _factors(p, M) for _, p, M in low}
        if all(M.gradient == "probe" for _, _, M in low):
            self._evaluate(closure, params)
            blocks = {p: self._gradient(g, p, M) for g, p, M in low}
            return {p: (b.U, b.V) for p, b in blocks.items()}
        # With the weight written as K I Vᵀ, its gradient with respect to the first factor is GV.
        for _, p, M in low:
            U, S, V = points[p]
            self._place(p, M, U @ S, None, V)
        self._evaluate(closure, params)
        GV = {p: self._gradient(g, p, M).U.clone() for g, p, M in low}
        for _, p, M in low:
            U, S, V = points[p]
            self._place(p, M, U, None, V @ S.mT)
        self._evaluate(closure, params)
        return {p: (GV[p], self._gradient(g, p, M).V.clone()) for g, p, M in low}

    def _bug(self, closure, low, params) -> None:
        """BUG, augmented or not."""
        points = {p: _factors(p, M) for _, p, M in low}
        gradients = self._kl_gradients(closure, low, params)
        cores: dict[Tensor, Factors] = {}
        for group, p, M in low:
            U, S, V = points[p]
            GV, GtU = gradients[p]
            K, L = U @ S - group["lr"] * GV, V @ S.mT - group["lr"] * GtU
            r, augmented = S.shape[-1], group["integrator"] == "augmented_bug"
            if augmented and 2 * r <= min(M.m, M.n):
                cores[p] = augment(points[p], K, L, r)
                continue
            U1, V1 = (linalg.qr(A, rank_deficient=True)[0] for A in (K, L))
            if augmented:
                # No room for both bases: the new ones go first, or at full rank none could turn.
                wide = augment(Factors(U1, S, V1), U, V, min(M.m, M.n) - r)
                U1, V1 = wide.U, wide.V
            cores[p] = Factors(U1, (U1.mT @ U) @ S @ (V.mT @ V1), V1)
        for i in range(max((g["s_steps"] for g, _, _ in low), default=1)):
            for _, p, M in low:
                self._place(p, M, *cores[p])
            self._evaluate(closure, params)
            for group, p, M in low:
                if i < group["s_steps"]:
                    U, S, V = cores[p]
                    slope = self._gradient(group, p, M).S + self._core_force(group, S)
                    cores[p] = Factors(U, S - group["lr"] * slope, V)
        for group, p, M in low:
            self._settle(group, p, M, cores[p], points[p].S.shape[-1])

    def _ksl(self, closure, low, params) -> None:
        """Projector splitting: every substep at the point that the one before has reached."""
        points = {p: _factors(p, M) for _, p, M in low}
        for _, p, M in low:
            U, S, V = points[p]
            self._place(p, M, U @ S, None, V)
        self._evaluate(closure, params)
        for group, p, M in low:
            U, S, V = points[p]
            K = U @ S - group["lr"] * self._gradient(group, p, M).U
            U, S = linalg.qr(K, rank_deficient=True)
            points[p] = Factors(U, S, V)
            self._place(p, M, U, S, V)
        self._evaluate(closure, params)
        for group, p, M in low:
            U, S, V = points[p]
            S = S + group["lr"] * self._gradient(group, p, M).S
            points[p] = Factors(U, S, V)
            self._place(p, M, U, None, V @ S.mT)
        self._evaluate(closure, params)
        for group, p, M in low:
            U, S, V = points[p]
            L = V @ S.mT - group["lr"] * self._gradient(group, p, M).V
            V, R = linalg.qr(L, rank_deficient=True)
            S = R.mT - group["lr"] * self._core_force(group, R.mT)
            self._settle(group, p, M, Factors(U, S, V), S.shape[-1])

    @staticmethod
    def _core_force(group: dict[str, Any], S: Tensor) -> Tensor:
        force = group["weight_decay"] * S
        if group["penalty"]:
            slope = linalg.conditioning_penalty_grad(S, squared=group["penalty_squared"])
            force = force + group["penalty"] * slope
        return force

    def _settle(
        self, group: dict[str, Any], p: Tensor, M: FixedRank, X: Factors, rank: int
    ) -> None:
        """Truncate, project the core onto the set, and store the point."""
        if not bool(torch.isfinite(X.S).all()):
            raise FloatingPointError("the step left the finite numbers: lower lr")
        if group["tol"] is not None:
            s = linalg.svdvals(X.S)
            high = min(X.S.shape[-1], group["max_rank"] or math.inf)
            low = min(group["min_rank"], high)
            rank = min(max(rank_for_tolerance(s, group["tol"]), low), high)
            rank = nearest_rank(M, s, low, rank)
        if rank < X.S.shape[-1]:
            X = truncate(X, rank)
        resize(p, Factors(X.U, M.project_core(X.S), X.V))


class _NonFiniteError(Exception):
    """The gradient of a parameter holds NaN or Inf."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter


def _factors(p: Tensor, M: FixedRank) -> Factors:
    return Factors(*(b.clone() for b in unpack(p.data.to(linalg.compute_dtype(p.dtype)), M.m, M.n)))
