"""Dynamical low-rank training: the K, L and S steps with gradients of their own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import linalg
from .._arguments import check_choice, check_integer, check_number
from .._stack import stack_level
from ..factors import Factors, pack, unpack
from ..manifolds import FixedRank
from ..parameter import manifold_of, replace_data
from .arithmetic import PlainArithmetic
from .geometry import check_apart
from .items import Rule
from .optimizer import GeometricOptimizer
from .rank import augment, factors_of, nearest_rank, rank_for_tolerance, resize, truncate
from .step import core_force, sgd

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

    No substep divides by S: they work for any conditioning. Rank-deficient starts need
    ``gradient="probe"``, where singular cores are points; other weights are refused with one, as
    their layers and checkpoints do. Layers with ``gradient="probe"`` share one evaluation for K
    and L, too. After truncation the core is
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

    # Ordinary parameters move by it; low-rank ones have several gradients a step.
    rule = Rule(sgd, sgd)

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
            "lr": lr, "integrator": integrator, "tol": tol, "min_rank": min_rank,
            "max_rank": max_rank, "s_steps": s_steps, "weight_decay": weight_decay,
            "penalty": penalty, "penalty_squared": penalty_squared, "maximize": maximize,
            "skip_nonfinite": skip_nonfinite,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        check_choice("integrator", group["integrator"], _INTEGRATORS)
        tol, low, high = group["tol"], group["min_rank"], group["max_rank"]
        if tol is not None:
            tol = check_number("tol", tol, low=0.0, high=1.0, open_high=True)
        if tol is not None and group["integrator"] != "augmented_bug":
            raise ValueError(f"tol needs integrator='augmented_bug', got {group['integrator']!r}")
        low = check_integer("min_rank", low, low=1)
        if high is not None:
            high = check_integer("max_rank", high, low=low, hint=f"min_rank is {low}")
        if tol is None and (low > 1 or high is not None):
            raise ValueError(f"min_rank and max_rank need tol, got {low}, {high} and tol=None")
        check_integer("s_steps", group["s_steps"], low=1)
        if group["s_steps"] > 1 and group["integrator"] == "ksl":
            raise ValueError(f"s_steps must be 1 for integrator='ksl', got {group['s_steps']}")
        for M in map(manifold_of, group["params"]):
            if M is not None and not isinstance(M, FixedRank):
                raise ValueError(f"DLRT moves low-rank weights only, got one on {M.name}")
        all_of_them = (manifold_of(p) for g in self.param_groups for p in g["params"])
        owners = [id(M) for M in all_of_them if M is not None]
        if tol is not None and len(set(owners)) < len(owners):
            raise ValueError("with tol each weight needs a manifold of its own: it holds the rank")

    def _check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        names = sorted({g["integrator"] for g in groups})
        if len(names) > 1:
            raise ValueError(
                f"integrator must be the same for all groups, which step together, got {names}"
            )

    # -- the step

    def _advance(self, closure: Callable[[], Any] | None, arithmetic: PlainArithmetic) -> Any:
        """One step of the integrator on all parameters together.

        The closure clears the gradients, evaluates the loss, calls ``backward`` and returns the
        loss. On the same data at each call for the integrator of mathematics 7; a closure that
        draws the next mini-batch each time is its stochastic form, at the price of plain SGD per
        batch. The loss at the start of the step is returned.
        """
        if closure is None:
            raise ValueError("DLRT.step needs a closure: it evaluates the gradient several times")
        entries = list(self._memory.entries(self.param_groups))
        check_apart((p, label) for _, p, _, label in entries if p.requires_grad)
        low = [(g, p, M) for g, p, M, _ in entries if isinstance(M, FixedRank) and p.requires_grad]
        for _, p, M, label in entries:
            state = self._state_of(p)
            if M is not None:
                self._memory.ensure_on_manifold(p, p.detach(), M, state["step"], label)
        start = {p: (M.rank, p.data.clone()) for _, p, M in low}
        run = Evaluations(closure, arithmetic, [p for _, p, _, _ in entries])
        try:
            (self._ksl if self.param_groups[0]["integrator"] == "ksl" else self._bug)(run, low)
            dense = [item for item in self._items() if item.manifold is None]
            commits = self._engine.compute(dense)
        except _NonFiniteError as error:
            self._restore(low, start)
            if not all(group["skip_nonfinite"] for group in self.param_groups):
                label = next(label for _, p, _, label in entries if p is error.args[0])
                raise FloatingPointError(f"the gradient of {label} holds NaN or Inf") from None
            for _, p, _, _ in entries:
                self.state[p]["skipped"] += 1
            return run.losses[0]
        except BaseException:
            # Also when the closure itself fails: nothing is left half-moved.
            self._restore(low, start)
            raise
        if not run.used:
            warnings.warn(
                "DLRT has moved nothing: the closure left no gradient. Does it call backward()?",
                stacklevel=stack_level(),
            )
        for commit in commits:
            commit()
        # Weights without a gradient do not move, not even by decay.
        self._restore([entry for entry in low if entry[1] not in run.used], start)
        for _, p, M, _ in entries:
            if M is not None:
                self.state[p]["step"] += int(p in run.used)
                self._memory.settle(p, p.detach())
        return run.losses[0]

    @staticmethod
    def _restore(low: list, start: dict) -> None:
        for _, p, M in low:
            rank, data = start[p]
            M.set_rank_(rank)
            replace_data(p, data)

    def _gradients_at(self, run: Evaluations, low: list, points: dict) -> dict[Tensor, Factors]:
        """Blocks of the gradients at points U S Vᵀ (S = I if None), until the next evaluation."""
        for _, p, M in low:
            U, S, V = points[p]
            if S is None:
                S = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
                S = S.expand(*U.shape[:-2], -1, -1)
            M.set_rank_(U.shape[-1])
            replace_data(p, pack(U, S, V).to(p.dtype))
        run.evaluate()
        found = {}
        for group, p, M in low:
            wide = linalg.compute_dtype(p.dtype)
            grad = torch.zeros_like(p) if p.grad is None else p.grad.to(wide)
            found[p] = unpack(-grad if group["maximize"] else grad, M.m, M.n)
        return found

    def _kl_gradients(self, run: Evaluations, low: list, points: dict) -> dict[Tensor, tuple]:
        """GV and GᵀU at the start, without dividing by S."""
        if all(M.gradient == "probe" for _, _, M in low):
            return {p: (b.U, b.V) for p, b in self._gradients_at(run, low, points).items()}
        # With the weight written as K I Vᵀ, its gradient with respect to the first factor is GV.
        GV = {p: b.U.clone() for p, b in self._gradients_at(run, low, _as_k(points)).items()}
        blocks = self._gradients_at(run, low, _as_l(points))
        return {p: (GV[p], b.V.clone()) for p, b in blocks.items()}

    def _bug(self, run: Evaluations, low: list) -> None:
        """BUG, augmented or not."""
        points = {p: factors_of(p) for _, p, _ in low}
        gradients = self._kl_gradients(run, low, points)
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
            blocks = self._gradients_at(run, low, cores)
            for group, p, _ in low:
                if i < group["s_steps"]:
                    slope = _forced(blocks[p].S, cores[p], group)
                    cores[p] = cores[p]._replace(S=cores[p].S - group["lr"] * slope)
        for group, p, M in low:
            self._settle(group, p, M, cores[p], points[p].S.shape[-1])

    def _ksl(self, run: Evaluations, low: list) -> None:
        """Projector splitting: every substep at the point that the one before has reached."""
        points = {p: factors_of(p) for _, p, _ in low}
        blocks = self._gradients_at(run, low, _as_k(points))
        for group, p, _ in low:
            U, S, V = points[p]
            U, S = linalg.qr(U @ S - group["lr"] * blocks[p].U, rank_deficient=True)
            points[p] = Factors(U, S, V)
        blocks = self._gradients_at(run, low, points)
        for group, p, _ in low:
            points[p] = points[p]._replace(S=points[p].S + group["lr"] * blocks[p].S)
        blocks = self._gradients_at(run, low, _as_l(points))
        for group, p, M in low:
            U, S, V = points[p]
            V, R = linalg.qr(V @ S.mT - group["lr"] * blocks[p].V, rank_deficient=True)
            X = Factors(U, R.mT, V)
            S = R.mT - group["lr"] * _forced(torch.zeros_like(R), X, group)
            self._settle(group, p, M, Factors(U, S, V), S.shape[-1])

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


class Evaluations:
    """The evaluations of a closure in one step."""

    def __init__(
        self, closure: Callable[[], Any], arithmetic: PlainArithmetic, params: list[Tensor]
    ) -> None:
        self._closure, self._arithmetic, self._params = closure, arithmetic, params
        self.losses: list[Any] = []
        self.used: set[Tensor] = set()

    def evaluate(self) -> None:
        """Call the closure; note which weights it used, and that their gradients are finite."""
        self.losses.append(self._arithmetic.evaluate(self._closure))
        for p in self._params:
            if p.grad is not None:
                self.used.add(p)
                if not bool(torch.isfinite(p.grad).all()):
                    raise _NonFiniteError(p)


class _NonFiniteError(Exception):
    """The gradient of the parameter given holds NaN or Inf."""


def _as_k(points: dict[Tensor, Factors]) -> dict[Tensor, tuple]:
    """The weights U S Vᵀ as K I Vᵀ."""
    return {p: (U @ S, None, V) for p, (U, S, V) in points.items()}


def _as_l(points: dict[Tensor, Factors]) -> dict[Tensor, tuple]:
    """The weights U S Vᵀ as U I Lᵀ."""
    return {p: (U, None, V @ S.mT) for p, (U, S, V) in points.items()}


def _forced(slope: Tensor, X: Factors, group: dict[str, Any]) -> Tensor:
    """The slope of the core with decay and penalty."""
    force = core_force(X, group)
    return slope if force is None else slope + force
