"""Low-rank retractions: orders by log-log slopes, exactness, error bounds, tiny singular values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import CountFlops, best_approximation, dense, dense_tangent, relative
from strategies import gaussian, orthonormal, points

import lrmanifold as lrm
from lrmanifold import retractions
from lrmanifold.testing import check_retraction

ALL = retractions.available()
SECOND_ORDER = tuple(name for name in ALL if name != "factored")
NO_INVERSE = ("svd", "ksl", "strang", "bug", "augmented_bug", "parallel_bug")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
double = st.just(torch.float64)


def step(name, p, xi):
    return retractions.get(name)(p.manifold, p.X, xi)


def ambient(p, xi):
    """W + ξ, dense in float64."""
    M = p.manifold
    return dense(p.X, M.m, M.n) + dense_tangent(p.X, xi, M.m, M.n)


# -- orders


@pytest.mark.parametrize("shape", [(8, 6, 3), (5, 9, 2), (6, 6, 1), (5, 4, 3)])
@pytest.mark.parametrize("name", ALL)
def test_log_log_slopes_are_2_and_for_second_order_retractions_3(name, shape):
    report = check_retraction(lrm.FixedRank(*shape), name, order=2 if name in SECOND_ORDER else 1)
    report.raise_if_failed()
    assert report.slopes["tangent"] == pytest.approx(2.0, abs=0.05)
    expected = 3.0 if name in SECOND_ORDER else 2.0
    assert report.slopes["geodesic"] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("shape", [(4, 7, 4), (7, 4, 4), (5, 5, 5)])
@pytest.mark.parametrize("name", ALL)
def test_at_full_rank_all_but_the_factored_retraction_are_exact(name, shape):
    """All matrices near W have the rank of W: W + tξ is a point, and the geodesic is straight."""
    slopes = check_retraction(lrm.FixedRank(*shape), name).slopes
    square = shape[0] == shape[1]
    expected = 2.0 if name == "factored" and not square else math.inf
    assert slopes["tangent"] == pytest.approx(expected, abs=0.05)
    assert slopes["geodesic"] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("name", "order"), [("factored", 1), ("svd", 2), ("ksl", 2)])
def test_inside_the_well_conditioned_set_the_orders_are_the_same(name, order, tau):
    manifold = lrm.WellConditioned(7, 6, 3, tau=tau, retraction=name)
    report = check_retraction(manifold, order=order)
    report.raise_if_failed()
    assert report.slopes["tangent"] == pytest.approx(2.0, abs=0.05)
    assert report.slopes["geodesic"] == pytest.approx(order + 1, abs=0.05)


# -- identities


@pytest.mark.parametrize("name", ALL)
@given(p=points())
def test_retraction_of_zero_is_the_identity(name, p):
    M = p.manifold
    Y = step(name, p, torch.zeros_like(p.X))
    assert relative(dense(Y, M.m, M.n), dense(p.X, M.m, M.n)) <= TOLERANCE[p.X.dtype]


@pytest.mark.parametrize("name", ALL)
@given(p=points())
def test_retraction_lands_on_the_manifold(name, p):
    M = p.manifold
    for t in (0.1, 1.0, 30.0):
        Y = step(name, p, t * p.xi)
        assert Y.dtype == p.X.dtype
        assert float(M.drift(Y).max()) <= (1e-12 if Y.dtype == torch.float64 else 5e-6)


@given(points(conds=st.sampled_from((1.0, 1e1))))
def test_svd_retraction_is_the_best_approximation_of_w_plus_xi(p):
    M = p.manifold
    expected = best_approximation(ambient(p, p.xi), M.rank)
    assert relative(dense(step("svd", p, p.xi), M.m, M.n), expected) <= 10 * TOLERANCE[p.X.dtype]


@pytest.mark.parametrize("name", ["augmented_bug", "parallel_bug"])
@given(p=points(dtypes=double))
def test_augmented_integrators_of_a_given_increment_are_the_svd_retraction(name, p):
    M = p.manifold
    expected = dense(step("svd", p, p.xi), M.m, M.n)
    assert relative(dense(step(name, p, p.xi), M.m, M.n), expected) <= 1e-8


@given(points(dtypes=double))
def test_orthographic_retraction_is_w_plus_xi_and_a_normal_vector(p):
    """R = (U D + U_p) D⁻¹ (D Vᵀ + V_pᵀ), whose projection onto T_W is W + ξ exactly."""
    M, xi = p.manifold, 0.1 * p.xi
    U, S, V = M.unpack(p.X)
    U_p, core, V_p = M.unpack(xi)
    D = S + core
    expected = (U @ D + U_p) @ torch.linalg.solve(D, D @ V.mT + V_p.mT)
    Y = step("orthographic", p, xi)
    assert relative(dense(Y, M.m, M.n), expected) <= 1e-8
    assert relative(M.inverse_retr(p.X, Y), xi) <= 1e-7
    assert relative(step("orthographic", p, M.inverse_retr(p.X, Y)), Y) <= 1e-6


@given(points(dtypes=double))
def test_inverse_retraction_is_the_projection_of_the_difference(p):
    M, Y = p.manifold, p.another()
    difference = dense(Y, M.m, M.n) - dense(p.X, M.m, M.n)
    exact = M.project_ambient(p.X, difference)
    assert float((M.inverse_retr(p.X, Y) - exact).abs().max()) <= 1e-12
    assert float(M.inverse_retr(p.X, p.X).abs().max()) <= 1e-12


@given(points(dtypes=double))
def test_factored_retraction_is_polar_factors_and_the_moved_core(p):
    M, xi = p.manifold, 0.1 * p.xi
    U, S, V = M.unpack(p.X)
    U_p, core, V_p = M.unpack(xi)

    def polar(A):
        left, _, right = torch.linalg.svd(A, full_matrices=False)
        return left @ right

    new_U, new_V = polar(U + U_p @ torch.linalg.inv(S)), polar(V + V_p @ torch.linalg.inv(S).mT)
    expected = new_U @ (S + core) @ new_V.mT
    assert relative(dense(step("factored", p, xi), M.m, M.n), expected) <= 1e-9


# -- errors and exactness


@pytest.mark.parametrize("name", ["svd", "augmented_bug", "parallel_bug", "orthographic"])
@given(p=points(dtypes=double), t=st.sampled_from((0.01, 0.3, 0.9)))
def test_error_is_at_most_u_p_times_v_p_over_sigma_r_minus_m(name, p, t):
    """‖R(ξ) - (W + ξ)‖ <= ‖U_p‖₂‖V_p‖/(σ_r - ‖M‖₂) <= ‖ξ‖²/(2 (σ_r - ‖M‖₂)) for ‖M‖₂ < σ_r."""
    M = p.manifold
    sigma_r = M.svdvals(p.X)[..., -1]
    core = torch.linalg.matrix_norm(M.unpack(p.xi).S, ord=2)
    xi = p.xi * (t * sigma_r / core.clamp_min(1e-300))[..., None, None]
    U_p, core, V_p = M.unpack(xi)
    room = sigma_r - torch.linalg.matrix_norm(core, ord=2)
    bound = torch.linalg.matrix_norm(U_p) * torch.linalg.matrix_norm(V_p) / room
    assert bool((bound <= M.inner(p.X, xi) / (2 * room) * (1 + 1e-12)).all())
    error = torch.linalg.matrix_norm(dense(step(name, p, xi), M.m, M.n) - ambient(p, xi))
    assert bool((error <= bound * (1 + 1e-6) + 1e-9).all())


@pytest.mark.parametrize("name", NO_INVERSE)
@given(p=points(dtypes=double))
def test_integrators_are_exact_if_w_plus_xi_has_rank_r(name, p):
    """With V_p = 0 all of W + ξ lies in the row space of W."""
    M = p.manifold
    U_p, core, V_p = M.unpack(p.xi)
    xi = M.pack(U_p, core, torch.zeros_like(V_p))
    assert relative(dense(step(name, p, xi), M.m, M.n), ambient(p, xi)) <= 1e-9
    xi = M.pack(torch.zeros_like(U_p), core, V_p)
    assert relative(dense(step(name, p, xi), M.m, M.n), ambient(p, xi)) <= 1e-9


@pytest.mark.parametrize("name", NO_INVERSE)
@pytest.mark.parametrize("sigma", [1e-8, 1e-14, 0.0])
def test_integrators_without_an_inverse_do_not_feel_small_singular_values(name, sigma):
    """The result is near the best approximation of W + ξ even where the core is singular."""
    M = lrm.FixedRank(9, 8, 3)
    core = torch.diag(torch.tensor([1.0, 0.5, sigma], dtype=torch.float64))
    X = M.pack(orthonormal(9, 3, seed=0), core, orthonormal(8, 3, seed=1))
    xi = 0.1 * M.proju(X, gaussian(*X.shape, seed=2))
    W = M.to_dense(X) + M.tangent_to_dense(X, xi)
    Y = retractions.get(name)(M, X, xi)
    assert float(M.drift(Y)) <= 1e-12
    best = float((best_approximation(W, 3) - W).norm())
    error = float((M.to_dense(Y) - W).norm())
    # Galerkin with the new bases loses a small factor against the best approximation, not 1/σ
    assert error <= 5 * best


@pytest.mark.parametrize("name", ["factored", "orthographic"])
def test_retractions_that_divide_by_a_singular_core_say_so(name):
    M = lrm.FixedRank(9, 8, 3)
    X = M.pack(orthonormal(9, 3, seed=0), torch.zeros(3, 3).double(), orthonormal(8, 3, seed=1))
    xi = torch.zeros_like(X)
    M.unpack(xi).U[0] = 1.0
    with pytest.raises((torch.linalg.LinAlgError, ValueError), match=r"singular|full column rank"):
        retractions.get(name)(M, X, xi)


@pytest.mark.parametrize("name", ALL)
@given(p=points(dtypes=double))
def test_a_batch_is_retracted_as_its_elements(name, p):
    M, retract = p.manifold, retractions.get(name)
    X, xi = p.X.reshape(-1, *M.point_shape), p.xi.reshape(-1, *M.point_shape)
    parts = torch.stack([retract(M, x, v) for x, v in zip(X, xi, strict=True)])
    assert relative(dense(retract(M, X, xi), M.m, M.n), dense(parts, M.m, M.n)) <= 1e-9


@pytest.mark.parametrize("name", ALL)
def test_strided_input_and_input_that_requires_gradients_change_nothing(name):
    M = lrm.FixedRank(7, 6, 3)
    X = torch.Tensor(M.random(2, *M.point_shape, dtype=torch.float64))
    xi = 0.1 * M.proju(X, torch.randn_like(X))
    plain = retractions.get(name)(M, X, xi)
    strided = retractions.get(name)(M, X.mT.contiguous().mT, xi.mT.contiguous().mT)
    leaf = X.clone().requires_grad_()
    assert relative(strided, plain) <= 1e-9
    assert relative(retractions.get(name)(M, leaf, xi), plain) <= 1e-9


# -- costs


def cost_of(function, *arguments) -> float:
    """Flops in units of (m + n) r², for m and n so large that r x r work does not count."""
    with CountFlops() as count:
        function(*arguments)
    return count.flops / ((4000 + 3000) * 5**2)


def large_point():
    M = lrm.FixedRank(4000, 3000, 5)
    X = torch.Tensor(M.origin(dtype=torch.float64))
    return M, X, 1e-2 * M.proju(X, gaussian(*X.shape, seed=0))


@pytest.mark.parametrize("name", ALL)
def test_the_cost_in_the_table_of_retractions_is_the_cost(name):
    row = next(line for line in retractions.__doc__.splitlines() if f"``{name}``  " in line)
    order, units = row.split()[1:3]
    assert int(order) == (2 if name in SECOND_ORDER else 1)
    M, X, xi = large_point()
    measured = cost_of(retractions.get(name), M, X, xi)
    assert measured == pytest.approx(float(units), abs=0.5)


def test_the_costs_in_the_docstrings_of_the_manifold_are_the_costs():
    M, X, xi = large_point()
    Y = M.retr(X, xi)
    assert cost_of(M.proju, X, xi) == pytest.approx(4, abs=0.1)
    assert cost_of(M.egrad2rgrad, X, xi) == pytest.approx(6, abs=0.1)
    assert cost_of(M.transp, X, Y, xi) == pytest.approx(10, abs=0.1)
    assert cost_of(M.inverse_retr, X, Y) == pytest.approx(6, abs=0.1)


# -- the registry


def test_every_name_is_listed_documented_and_callable_from_the_manifold():
    assert sorted(ALL) == list(ALL)
    assert {"svd", "orthographic", "factored", "ksl", "bug"} <= set(ALL)
    for name in ALL:
        doc = retractions.get(name).__doc__
        assert "order" in doc or "that of ``svd``" in doc
        assert f"``{name}``" in retractions.__doc__
        M = lrm.FixedRank(6, 5, 2, retraction=name)
        X = torch.Tensor(M.random())
        xi = M.proju(X, torch.randn_like(X))
        assert torch.equal(M.retr(X, 0.1 * xi), retractions.get(name)(M, X, 0.1 * xi))


def test_a_function_serves_as_a_retraction():
    def halved(manifold, X, xi):
        return retractions.get("svd")(manifold, X, 0.5 * xi)

    M = lrm.FixedRank(6, 5, 2, retraction=halved)
    X = torch.Tensor(M.random())
    xi = 0.1 * M.proju(X, torch.randn_like(X))
    assert torch.equal(M.retr(X, xi), lrm.FixedRank(6, 5, 2).retr(X, 0.5 * xi))


def test_new_names_can_be_registered_but_not_taken_twice(monkeypatch):
    monkeypatch.setattr(retractions, "_REGISTRY", dict(retractions._REGISTRY))
    retractions.register("lazy")(lambda manifold, X, xi: X)
    assert "lazy" in retractions.available()
    with pytest.raises(ValueError, match=r"already: .* register\('lazy', overwrite=True\)"):
        retractions.register("lazy")(lambda manifold, X, xi: X)
    before = lrm.FixedRank(6, 5, 2, retraction="lazy")

    @retractions.register("lazy", overwrite=True)
    def lazy(manifold, X, xi):
        return X + 0.0

    assert retractions.get("lazy") is lazy
    assert before.retraction_map is not lazy
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="the library's own retractions, got 'svd'"):
            retractions.register("svd", overwrite=overwrite)(lazy)
    assert retractions.get("svd") is retractions.svd
    with pytest.raises(TypeError, match="overwrite must be True or False"):
        retractions.register("lazy", overwrite="yes")
    with pytest.raises(ValueError, match=r"retraction must be one of .* got 'unknown'"):
        retractions.get("unknown")
