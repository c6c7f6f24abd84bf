"""Checking one claim from Python."""

from __future__ import annotations

import torch

from .catalogue import claims as all_claims
from .catalogue import find, select
from .core import Claim
from .runner import Settings, Verdict, usable
from .runner import verify as run


def verify(
    claim: Claim | str,
    *,
    trials: int | None = None,
    seed: int = 0,
    search: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Verdict:
    """Check a claim on drawn samples, on its extremal examples, and by adversarial search.

    Parameters
    ----------
    claim : Claim or str
        One's own, or the id of one of the collection (``"geometry/curvature"``, or its last part).
    trials : int, optional
        Samples; None: what the claim asks for.
    seed : int
        Sample k has the seed ``100000 * seed + k``.
    search : int
        Steps of an evolution strategy that looks for samples with a large ratio; 0: none. It moves
        the random numbers of :class:`theory.sampling.Draw`; samples drawn otherwise do not move.
    dtype : torch.dtype
    device : torch.device or str

    Returns
    -------
    Verdict
        ``passed``, ``ratio``, ``violation_bound``, ``attained``, ``searched``, ``worst``,
        ``failures``; prints as a table.

    Raises
    ------
    ValueError
        For numbers out of range, a device that is not usable, and an id that is none.

    Examples
    --------
    >>> import theory
    >>> print(theory.verify("geometry/curvature", trials=100, search=200))
    """
    settings = Settings(seed, trials, dtype, usable(device, dtype), search)
    return run(_claim(claim), settings)


def _claim(claim: Claim | str) -> Claim:
    if not isinstance(claim, str):
        return claim
    try:
        return find(claim)
    except KeyError:
        found = select(all_claims(), claim)
    if len(found) != 1:
        raise ValueError(
            f"claim must be a Claim or the id of one, got {claim!r}, which {len(found)} claims "
            "have; python -m theory --list shows them"
        )
    return found[0]
