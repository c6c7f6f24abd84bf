"""Errors of the library's own."""

from __future__ import annotations


class GeometryError(RuntimeError):
    """A parameter is not on its manifold, or lost it.

    Raised instead of treating such a parameter as an ordinary tensor: a low-rank weight trained as
    if it were Euclidean looks healthy and silently loses orthonormality, rank and robustness.
    """
