"""The harness measures the order of retractions: right ones are confirmed, wrong ones are not."""

from __future__ import annotations

import math

import geoopt
import pytest
import torch

import lrmanifold as lrm
from lrmanifold.testing import CheckError, check_retraction


class WrongDirection(geoopt.EuclideanStiefel):
    """A retraction that goes half as far as it should."""

    def retr(self, x, u):
        return super().retr(x, 0.5 * u)


@pytest.mark.parametrize("tau", [0.0, 1e-4, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(7, 5, 3), (3, 5, 1)])
@pytest.mark.parametrize(("retraction", "order"), [("svd", 2), ("factored", 1)])
def test_retractions_onto_sets_of_fixed_size_have_their_order(tau, shape, retraction, order):
    manifold = lrm.WellConditioned(*shape, tau=tau, scale=1.0)
    check_retraction(manifold, retraction, order=order).raise_if_failed()


def test_a_sphere_has_a_second_order_retraction_and_an_exact_one():
    assert check_retraction(geoopt.Sphere(), order=2).ok
    assert check_retraction(geoopt.SphereExact(), order=2).slopes["geodesic"] == math.inf


def test_retraction_report_tells_slopes_and_complains_in_words():
    right = check_retraction(lrm.Stiefel(), order=2)
    assert right.ok
    assert "order 2 confirmed" in str(right)
    assert "slope 3.00" in str(right)
    wrong = check_retraction(lrm.FixedRank(7, 5, 3), "factored", order=2)
    assert wrong.complaints == ("‖R(tξ) − Exp(tξ)‖ has slope 2.00 in t, expected 3",)
    assert str(wrong).startswith("factored on FixedRank(m=7, n=5, rank=3")
    with pytest.raises(CheckError, match="order 2 NOT confirmed"):
        wrong.raise_if_failed()
    assert check_retraction(WrongDirection()).slopes["tangent"] == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match=r"order must be an integer in 1\.\.2, got 3"):
        check_retraction(lrm.Stiefel(), order=3)


def test_without_a_geodesic_only_first_order_can_be_confirmed():
    class NoGeodesic(lrm.Stiefel):
        def expmap(self, x, u):
            raise NotImplementedError

    assert check_retraction(NoGeodesic(), order=1).ok
    report = check_retraction(NoGeodesic(), order=2)
    assert report.complaints == ("order 2 cannot be verified: no expmap",)
    assert set(report.errors) == {"tangent"}


def test_a_function_can_be_measured_as_a_retraction():
    def overshoot(manifold, X, xi):
        return lrm.retractions.get("svd")(manifold, X, 1.1 * xi)

    report = check_retraction(lrm.FixedRank(7, 5, 3), overshoot)
    assert report.name.startswith("overshoot on FixedRank")
    assert report.slopes["tangent"] == pytest.approx(1.0, abs=0.1)
    assert not report.ok


def no_retraction(manifold, X, xi):
    return X + xi


def orthonormal_no_more(manifold, X, xi):
    (U, S, V), (U_p, M, V_p) = manifold.unpack(X), manifold.unpack(xi)
    inverse = torch.linalg.inv(S)
    return manifold.pack(U + U_p @ inverse, S + M, V + V_p @ inverse.mT)


@pytest.mark.parametrize(
    ("manifold", "function"),
    [
        (lrm.Stiefel(), no_retraction),
        (geoopt.Sphere(), no_retraction),
        (lrm.FixedRank(7, 5, 3), orthonormal_no_more),
        (lrm.WellConditioned(7, 5, 3, tau=0.0), lambda M, X, xi: lrm.retractions.get("svd")(
            lrm.FixedRank(7, 5, 3), X, xi)),
    ],
)  # fmt: skip
def test_what_leaves_the_manifold_is_no_retraction(manifold, function, device):
    report = check_retraction(manifold, function, order=1, device=device)
    assert report.slopes["tangent"] > 1.9
    assert not report.ok
    (complaint,) = report.complaints
    assert complaint.startswith("R(tξ) is refused as a point at t = ")
    assert complaint in str(report)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("where", "told"),
    [(lambda size: True, "17 of 17 steps"), (lambda size: size < 1e-3, "of 17 steps, the first")],
)
@pytest.mark.parametrize("manifold", [lrm.FixedRank(7, 5, 2), lrm.Stiefel()])
def test_a_retraction_that_returns_no_numbers_is_not_confirmed(manifold, bad, where, told):
    def broken(manifold, X, xi):
        Y = manifold.retr(X, xi)
        return Y * bad if where(float(xi.norm())) else Y

    for order in (1, 2):
        report = check_retraction(manifold, broken, order=order)
        assert not report.ok
        assert "is NaN or Inf at" in report.complaints[0]
        assert told in report.complaints[0]
        assert "order" in str(report)


def test_a_geodesic_that_is_no_number_confirms_nothing():
    class BrokenGeodesic(lrm.Stiefel):
        def expmap(self, x, u):
            return super().expmap(x, u) * math.nan

    report = check_retraction(BrokenGeodesic(), order=2)
    assert report.complaints[0].startswith("‖R(tξ) − Exp(tξ)‖ is NaN or Inf at 17 of 17 steps")


def test_the_plot_has_both_errors_named_axes_and_the_fitted_slopes():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    report = check_retraction(lrm.Stiefel(), order=2)
    assert report.plot(ax) is ax
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[0] == "‖R(tξ) − (W + tξ)‖, slope 2.00"
    assert labels[1] == "‖R(tξ) − Exp(tξ)‖, slope 3.00"
    assert ax.get_xlabel() == "step length t"
    assert ax.get_ylabel() == "error (Frobenius norm)"
    assert ax.get_xscale() == ax.get_yscale() == "log"
    plt.close(figure)
    plt.close(report.plot().figure)
