"""Published methods as choices of parts: integrator, constraint or penalty, truncation."""

from __future__ import annotations

from typing import Any

from .dlrt import DLRT


def robust_dlrt(
    params: Any, lr: float, *, tol: float, beta: float, s_steps: int = 10, **options: Any
) -> DLRT:
    """RobustDLRT: augmented BUG, truncation to `tol`, and the penalty β R(S) in `s_steps` S steps.

    For layers without a bound (``factorize(..., tau=None)``). The penalty pulls the core towards a
    multiple of an orthogonal matrix; no bound on its condition number is certified.

    Parameters
    ----------
    params, lr, **options
        As in :class:`DLRT`.
    tol : float
        Relative truncation tolerance ϑ.
    beta : float
        Weight of the regulariser.
    s_steps : int
        Coefficient steps s* between two basis updates.

    References
    ----------
    S. Schotthöfer, H. L. Yang, S. Schnake, arXiv 2505.08022, algorithm 1.
    """
    return DLRT(params, lr, tol=tol, penalty=beta, s_steps=s_steps, **options)


def capped_dlrt(params: Any, lr: float, *, tol: float, s_steps: int = 10, **options: Any) -> DLRT:
    """The hard-capped sibling: the same integrator, cond <= 1 + τ certified at every rank.

    For layers with a bound (``factorize(..., tau=0.5)``): the projection after truncation takes the
    place of the penalty.

    Parameters
    ----------
    params, lr, tol, s_steps, **options
        As in :func:`robust_dlrt`.
    """
    return DLRT(params, lr, tol=tol, s_steps=s_steps, **options)
