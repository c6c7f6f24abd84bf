"""What a number of passed samples is worth."""

from __future__ import annotations

import math

CONFIDENCE = 0.95
#: Below this many independent problems the bound on the violation rate stays above 5 %.
ENOUGH = 60


def violation_bound(violations: int, problems: int, confidence: float = CONFIDENCE) -> float:
    """Upper Clopper-Pearson bound on the rate of violations among problems drawn alike.

    The largest p for which as few violations as these still have probability 1 - confidence:
    P(Bin(problems, p) <= violations) = 1 - confidence. One-sided. For no violation it is
    1 - (1 - confidence)^(1/problems), about 3/problems.

    Parameters
    ----------
    violations, problems : int
        Of independent problems: the time points of one trajectory are one.

    Returns
    -------
    float
        1 without problems, or if all violate.

    Raises
    ------
    ValueError
        For counts that cannot be.
    """
    if not 0 <= violations <= problems:
        raise ValueError(f"violations must be in 0..problems = {problems}, got {violations}")
    if violations == problems:
        return 1.0
    low, high = violations / problems, 1.0
    for _ in range(60):
        p = 0.5 * (low + high)
        low, high = (p, high) if _at_most(violations, problems, p) > 1.0 - confidence else (low, p)
    return high


def _at_most(k: int, n: int, p: float) -> float:
    """P(Bin(n, p) <= k)."""
    if p <= 0.0:
        return 1.0
    if p >= 1.0:
        return float(k >= n)
    log_p, log_q, start = math.log(p), math.log1p(-p), math.lgamma(n + 1)
    return math.fsum(
        math.exp(start - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log_p + (n - i) * log_q)
        for i in range(k + 1)
    )
