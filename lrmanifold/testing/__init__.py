"""Checks for any geoopt manifold: does it obey the geometry that it promises?

>>> from lrmanifold.testing import check_manifold, check_retraction
>>> print(check_manifold(manifold, size=(7, 3)))                # doctest: +SKIP
>>> check_retraction(manifold, order=2).raise_if_failed()       # doctest: +SKIP

:data:`STATEMENTS` says by name what each check states. Where a manifold has ``to_dense`` and
``tangent_to_dense``, as :class:`~lrmanifold.FixedRank` has, points and vectors are compared by
their dense matrices: packed factors are defined only up to a gauge. Nothing here needs pytest.
"""

from ._checks import STATEMENTS
from ._common import CheckError, random_tangent
from ._manifold import CheckResult, Report, check_manifold
from ._retraction import RetractionReport, check_retraction

__all__ = [
    "STATEMENTS",
    "CheckError",
    "CheckResult",
    "Report",
    "RetractionReport",
    "check_manifold",
    "check_retraction",
    "random_tangent",
]
