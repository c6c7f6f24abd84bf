"""The public harness accepts what is right and rejects, by name, each kind of wrongness."""

from __future__ import annotations

import math
import subprocess
import sys

import geoopt
import pytest
import torch

import lrmanifold as lrm
from lrmanifold.testing import (
    STATEMENTS,
    CheckError,
    check_manifold,
    check_retraction,
    random_tangent,
)

OURS = {
    "Stiefel polar": (lrm.Stiefel("polar"), (8, 3)),
    "Stiefel qr": (lrm.Stiefel("qr"), (8, 3)),
    "Stiefel cayley": (lrm.Stiefel("cayley"), (8, 3)),
    "Stiefel square": (lrm.Stiefel(), (4, 4)),
    "Stiefel sphere": (lrm.Stiefel(), (5, 1)),
    "WellConditioned tau = 0": (lrm.WellConditioned(7, 5, 3, tau=0.0), None),
    "WellConditioned tau = 0.1": (lrm.WellConditioned(7, 5, 3, tau=0.1), None),
    "WellConditioned tau = 1, svd": (
        lrm.WellConditioned(5, 7, 5, tau=1.0, retraction="svd"), None),
    "WellConditioned rank 1": (lrm.WellConditioned(6, 6, 1, tau=0.1), None),
    "FixedRank probe": (lrm.FixedRank(7, 5, 3, gradient="probe"), None),
}  # fmt: skip
OURS |= {
    f"FixedRank {shape} {name}": (lrm.FixedRank(*shape, retraction=name), None)
    for shape in ((7, 5, 3), (4, 6, 4), (6, 6, 1))
    for name in lrm.retractions.available()
}
OURS |= {
    f"WellConditioned {shape} tau = {tau}, scale = {scale}": (
        lrm.WellConditioned(*shape, tau=tau, scale=scale), None)
    for shape in ((7, 5, 3), (4, 4, 4), (3, 5, 1))
    for tau, scale in ((0.0, 1.0), (0.1, 1.0), (0.1, 100.0), (1.0, 1e-3))
}  # fmt: skip
GEOOPT = {
    "EuclideanStiefel": (geoopt.EuclideanStiefel(), (8, 3)),
    "EuclideanStiefelExact": (geoopt.EuclideanStiefelExact(), (8, 3)),
    "Sphere": (geoopt.Sphere(), (5,)),
    "Euclidean": (geoopt.Euclidean(ndim=1), (5,)),
    "SymmetricPositiveDefinite": (geoopt.SymmetricPositiveDefinite(), (4, 4)),
}


# -- accepts what is right


@pytest.mark.parametrize("name", OURS)
def test_our_manifolds_obey_all_statements(name, device):
    manifold, size = OURS[name]
    report = check_manifold(manifold, size=size, device=device)
    report.raise_if_failed()
    assert {r.status for r in report.results} == {"ok"}


@pytest.mark.parametrize(
    "name", ["Stiefel polar", "WellConditioned tau = 0.1", "FixedRank (7, 5, 3) svd"]
)
def test_our_manifolds_obey_all_statements_in_float32(name, device):
    manifold, size = OURS[name]
    check_manifold(manifold, size=size, dtype=torch.float32, device=device).raise_if_failed()


@pytest.mark.parametrize("scale", ["free", 1.0])
@pytest.mark.parametrize("tau", [1e-1, 1e-4, 1e-6])
def test_sets_with_hardly_an_inside_are_accepted_in_float32(tau, scale, device):
    manifold = lrm.WellConditioned(7, 5, 3, tau=tau, scale=scale)
    check_manifold(manifold, dtype=torch.float32, device=device).raise_if_failed()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("check", [check_manifold, check_retraction])
def test_half_precision_is_refused_as_its_rounding_hides_every_formula(check, dtype):
    with pytest.raises(TypeError, match=r"dtype must be one of torch.float64, torch.float32, got"):
        check(lrm.Stiefel(), dtype=dtype)


@pytest.mark.parametrize("name", GEOOPT)
def test_manifolds_of_geoopt_that_are_right_are_accepted(name):
    manifold, size = GEOOPT[name]
    check_manifold(manifold, size=size).raise_if_failed()


# -- rejects what is wrong, by the name of what is wrong


class OffTheManifold(lrm.FixedRank):
    """A retraction that only adds: right to first order, but not a point."""

    def retr(self, x, u):
        U, S, V = self.unpack(x)
        U_p, M, V_p = self.unpack(u)
        inverse = torch.linalg.inv(S)
        return self.pack(U + U_p @ inverse, S + M, V + V_p @ inverse.mT)


class WrongDirection(geoopt.EuclideanStiefel):
    """A retraction that goes half as far as it should."""

    def retr(self, x, u):
        return super().retr(x, 0.5 * u)


class NotAProjection(geoopt.EuclideanStiefel):
    """The whole of X sym(Xᵀu) is not removed: neither idempotent nor onto the tangent space."""

    def proju(self, x, u):
        return u - 0.5 * (x @ (x.mT @ u + u.mT @ x)) * 0.9


class ObliqueProjection(lrm.FixedRank):
    """Onto the tangent space and idempotent, but along a slanted direction."""

    def proju(self, x, u):
        U, _, V = self.unpack(x)
        U_p, M, V_p = self.unpack(u)
        return self.pack(U_p - U @ (U.mT @ U_p), M + U.mT @ U_p, V_p - V @ (V.mT @ V_p))


class WrongGradient(lrm.FixedRank):
    """The metric of the factors forgotten: U_p without S⁻ᵀ, V_p without S⁻¹."""

    def egrad2rgrad(self, x, u):
        return self.proju(x, u)


class GradientNotTangent(lrm.Stiefel):
    def egrad2rgrad(self, x, u):
        return u


class WrongTransport(lrm.FixedRank):
    """The vector is left as it is: tangent at x, not at y."""

    def transp(self, x, y, v):
        return v


class CurvedTransport(lrm.Stiefel):
    """Lands in the tangent space, and keeps v at x itself, but is not linear."""

    def transp(self, x, y, v):
        return super().transp(x, y, v) * (1 + (x - y).norm() * v.norm())


class BlindCheck(lrm.FixedRank):
    def _check_point_on_manifold(self, x, *, atol=1e-5, rtol=1e-5):
        return True, None


class SilentCheck(lrm.Stiefel):
    def _check_point_on_manifold(self, x, *, atol=1e-5, rtol=1e-5):
        return super()._check_point_on_manifold(x, atol=atol, rtol=rtol)[0], None


class IndefiniteMetric(geoopt.EuclideanStiefel):
    def inner(self, x, u, v=None, *, keepdim=False):
        v = u if v is None else v
        return (u * v).sum((-2, -1), keepdim=keepdim) - 2 * (u[..., :1, :] * v[..., :1, :]).sum(
            (-2, -1), keepdim=keepdim
        ) - 1e3  # fmt: skip


class ElementwiseComponents(lrm.FixedRank):
    """What breaks adaptive optimizers: u/√component_inner is no longer tangent."""

    def component_inner(self, x, u, v=None):
        return u * (u if v is None else v)


class MixedBatch(lrm.Stiefel):
    """One scale for the whole batch."""

    def proju(self, x, u):
        return super().proju(x, u) * u.abs().max() / u.abs().max().clamp_min(3.0)


class LosesPrecision(lrm.Stiefel):
    def retr(self, x, u):
        return super().retr(x, u).float()


class MovesPoints(lrm.FixedRank):
    def projx(self, x):
        U, S, V = self.unpack(super().projx(x))
        return self.pack(U, 1.01 * S, V)


class InconsistentPair(lrm.Stiefel):
    def retr_transp(self, x, u, v):
        return self.retr(x, 1.1 * u), self.transp(x, self.retr(x, 1.1 * u), v)


class BadOrigin(lrm.Stiefel):
    def origin(self, *size, dtype=None, device=None, seed=42):
        return geoopt.ManifoldTensor(torch.ones(*size, dtype=dtype, device=device), manifold=self)


class FixedPoint(lrm.Stiefel):
    def random(self, *size, dtype=None, device=None):
        return self.origin(*size, dtype=dtype, device=device)


class WrongNorm(lrm.Stiefel):
    def norm(self, x, u, *, keepdim=False):
        return self.inner(x, u, keepdim=keepdim)


class BatchedTransport(lrm.Stiefel):
    """Right for one point; in a batch the elements are scaled apart."""

    def transp(self, x, y, v):
        v = super().transp(x, y, v)
        return v * torch.arange(1.0, 1.0 + len(v)).view(-1, 1, 1).to(v) if v.ndim > 2 else v

    def retr_transp(self, x, u, v):
        y = self.retr(x, u)
        return y, self.proju(y, v)


class BatchedComponents(lrm.Stiefel):
    """One adaptive rate for the whole batch."""

    def component_inner(self, x, u, v=None):
        product = super().component_inner(x, u, v)
        return product.sum(0, keepdim=True).expand_as(product) if u.ndim > 2 else product


class SinglePrecisionOrigin(lrm.Stiefel):
    def origin(self, *size, dtype=None, device=None, seed=42):
        return super().origin(*size, device=device, seed=seed)


class OriginOfAnotherSize(lrm.Stiefel):
    def origin(self, *size, dtype=None, device=None, seed=42):
        return super().origin(5, 2, dtype=dtype, device=device, seed=seed)


class Breaks(lrm.Stiefel):
    def projx(self, x):
        raise KeyError("forgotten")


LOW_RANK, FRAMES = (7, 5, 3), (8, 3)
WRONG = [
    (OffTheManifold(*LOW_RANK), "retr", "retr(x, 0.01u) is refused (factor U is not orthonormal"),
    (WrongDirection(), "retr", "d/dt R(x, tξ) and ξ differ, relative to ‖ξ‖: 5.00e-01"),
    (NotAProjection(), "proju", "proju(a) is refused"),
    (ObliqueProjection(*LOW_RANK), "proju", "<proju(a), b> and <a, proju(b)> differ"),
    (WrongGradient(*LOW_RANK), "egrad2rgrad", "<g, ξ> and d/dt f(R(x, tξ)) differ"),
    (GradientNotTangent(), "egrad2rgrad", "normalised, is refused (Xᵀu is not skew"),
    (WrongTransport(*LOW_RANK), "transp", "transp(x, y, v) is refused (block"),
    (CurvedTransport(), "transp", "transp(2u - 3v) and 2 transp(u) - 3 transp(v) differ"),
    (BlindCheck(*LOW_RANK), "invalid", "is accepted"),
    (SilentCheck(), "invalid", "is refused (without a reason)"),
    (IndefiniteMetric(), "inner", "<u, u> is not positive"),
    (ElementwiseComponents(*LOW_RANK), "component_inner", "u/√component_inner is refused"),
    (MixedBatch(), "batch", "of a batch and of its elements differ"),
    (LosesPrecision(), "dtype", "retr gives torch.float32 on cpu for torch.float64 on cpu"),
    (MovesPoints(*LOW_RANK), "projx", "projx(projx(z)) and projx(z) differ"),
    (InconsistentPair(), "retr_transp", "the point of retr_transp and retr(x, u) differ"),
    (BadOrigin(), "origin", "origin() is refused (columns are not orthonormal"),
    (FixedPoint(), "random", "random() gives one point again and again"),
    (WrongNorm(), "norm", "‖u‖² and <u, u> differ"),
    (BatchedTransport(), "batch", "transp of a batch and of its elements differ"),
    (BatchedComponents(), "batch", "component_inner of a batch and of its elements differ"),
    (SinglePrecisionOrigin(), "dtype", "origin gives torch.float32 on cpu for torch.float64"),
    (OriginOfAnotherSize(), "origin", "origin(8, 3) has shape (5, 2)"),
    (Breaks(), "projx", "KeyError raised: 'forgotten'"),
]


@pytest.mark.parametrize(
    ("manifold", "check", "message"), WRONG, ids=[type(w[0]).__name__ for w in WRONG]
)
def test_each_kind_of_wrongness_is_rejected_by_the_check_that_states_it(manifold, check, message):
    report = check_manifold(manifold, size=getattr(manifold, "point_shape", FRAMES))
    assert not report.ok
    assert check in report.failed
    assert message in report[check].message
    assert report[check].message in str(report)
    with pytest.raises(CheckError, match="FAILED"):
        report.raise_if_failed()


def test_every_check_is_proved_able_to_fail():
    assert {check for _, check, _ in WRONG} == set(STATEMENTS)


def test_a_method_that_is_missing_hides_nothing_that_others_do_wrong():
    class WithoutTransport(lrm.Stiefel):
        def transp(self, x, y, v):
            raise NotImplementedError

        retr_transp = transp

        def projx(self, x):
            y = super().projx(x)
            return y.mean(0, keepdim=True).expand_as(y).float() if y.ndim > 2 else y.float()

    class Half(lrm.Stiefel):
        def norm(self, x, u, *, keepdim=False):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls % 2:
                return 2 * super().norm(x, u, keepdim=keepdim)
            raise NotImplementedError

    report = check_manifold(WithoutTransport(), size=FRAMES)
    assert {r.name for r in report.results if r.status == "skipped"} == {"transp", "retr_transp"}
    assert {"batch", "dtype"} <= set(report.failed)
    assert "projx of a batch" in report["batch"].message
    assert "projx gives torch.float32" in report["dtype"].message
    assert check_manifold(Half(), size=FRAMES, checks=["norm"]).failed == ("norm",)


def test_the_published_mean_clamp_is_not_a_projection_and_the_harness_says_so():
    report = check_manifold(lrm.WellConditioned(7, 5, 3, tau=0.1, centre="mean"))
    assert report.failed == ("projx", "retr")
    assert "projx(x) and the point x differ" in report["projx"].message
    assert "retr(x, 0) and x differ" in report["retr"].message


def test_geoopts_canonical_stiefel_is_found_not_to_project():
    """proju(x, u) = u - x uᵀ x doubles the skew part of a tangent u (geoopt 0.5.1)."""
    report = check_manifold(geoopt.CanonicalStiefel(), size=FRAMES)
    assert "proju" in report.failed
    assert "proju(proju(a)) and proju(a) differ" in report["proju"].message
    assert report["transp"].status == "skipped"


# -- how it is asked and how it answers


def test_invalid_points_of_the_user_must_be_refused_too():
    M = lrm.Stiefel()
    bad, good = torch.ones(8, 3).double(), torch.Tensor(M.random(8, 3, dtype=torch.float64))
    assert check_manifold(M, size=FRAMES, checks=["invalid"], invalid_points=[bad]).ok
    report = check_manifold(M, size=FRAMES, checks=["invalid"], invalid_points=[bad, good])
    assert report["invalid"].message == "invalid point 1 is accepted"


def test_checks_can_be_chosen_and_left_out_and_misspelt_ones_are_errors():
    names = [r.name for r in check_manifold(lrm.Stiefel(), checks=["retr", "norm"]).results]
    assert names == ["retr", "norm"]
    names = [r.name for r in check_manifold(lrm.Stiefel(), skip=["retr"]).results]
    assert names == [name for name in STATEMENTS if name != "retr"]
    with pytest.raises(ValueError, match=r"checks and skip must be among .* got \['retraction'\]"):
        check_manifold(lrm.Stiefel(), skip=["retraction"])
    with pytest.raises(TypeError, match=r"size must be the shape of one point, such as .* got 7"):
        check_manifold(lrm.Stiefel(), size=7)


def test_a_manifold_without_random_points_is_not_passed():
    report = check_manifold(geoopt.Lorentz(), size=(4,))
    assert not report.ok
    assert report["retr"].message == (
        "no points, or no tangent vectors, to check: NotImplementedError raised: "
    )


def test_the_report_prints_every_statement_and_its_verdict():
    report = check_manifold(lrm.Stiefel())
    text = str(report)
    assert text.startswith("Stiefel(retraction='polar') manifold: ok")
    assert all(statement in text for statement in STATEMENTS.values())
    assert all(r.worst <= 1.0 for r in report.results)


def test_the_same_seed_gives_the_same_report_and_the_global_state_is_untouched():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    reports = [check_manifold(lrm.Stiefel(), seed=3) for _ in range(2)]
    check_retraction(lrm.Stiefel())
    assert torch.equal(torch.rand(1), expected)
    assert reports[0] == reports[1]


def test_random_tangent_is_tangent_and_isotropic():
    M = lrm.FixedRank(6, 5, 2)
    X = M.random(dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    xi = random_tangent(M, X.expand(4000, *M.point_shape), generator)
    assert M.check_vector_on_tangent(X.expand(4000, *M.point_shape), xi)
    sizes = M.inner(X, xi)  # chi-squared with dim degrees of freedom
    assert abs(float(sizes.mean()) - M.dim) <= 5 * math.sqrt(2 * M.dim / 4000)


def test_the_library_does_not_import_its_harness_and_the_harness_no_test_tools():
    code = (
        "import sys, lrmanifold; print('lrmanifold.testing' in sys.modules);"
        "import lrmanifold.testing;"
        "print(any(x in sys.modules for x in ('pytest', 'hypothesis', 'matplotlib')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
