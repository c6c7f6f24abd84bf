"""The tangent space of FixedRank against dense algebra: gradient, projection, metric, transport."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import dense, dense_tangent, project, relative, split
from strategies import gaussian, points, seeds

import lrmanifold as lrm
from lrmanifold.testing import random_tangent

TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5}
double = st.just(torch.float64)


def smooth_function(shape, seed):
    """f(W) = Σ a sin(W + b) and its dense gradient."""
    a, b = gaussian(*shape, seed=seed + 5), gaussian(*shape, seed=seed + 6)
    return (lambda W: (a * torch.sin(W + b)).sum()), (lambda W: a * torch.cos(W + b))


def euclidean_gradient(p):
    """What autograd returns for the packed tensor, with the dense gradient beside it."""
    M = p.manifold
    f, gradient = smooth_function((*p.X.shape[:-2], M.m, M.n), p.seed)
    X = p.X.clone().requires_grad_()
    (packed,) = torch.autograd.grad(f(M.to_dense(X).double()), X)
    return packed, gradient(dense(p.X, M.m, M.n))


def cond(p) -> float:
    s = p.manifold.svdvals(p.X.double())
    return float((s[..., 0] / s[..., -1]).max())


def test_dimension_is_m_plus_n_minus_r_times_r():
    for m, n, r in ((7, 5, 3), (4, 9, 4), (6, 6, 1)):
        M = lrm.FixedRank(m, n, r)
        assert M.dim == (m + n - r) * r
        X = M.random(dtype=torch.float64)
        basis = torch.eye(m * n, dtype=torch.float64).reshape(m * n, m, n)
        images = M.tangent_to_dense(X, M.project_ambient(X.expand(m * n, *X.shape), basis))
        assert int(torch.linalg.matrix_rank(images.reshape(m * n, -1))) == M.dim


@given(points())
def test_egrad2rgrad_is_the_projection_of_the_dense_gradient(p):
    """Without ever forming it: M = g_S, U_p = (I - UUᵀ) g_U S⁻ᵀ, V_p = (I - VVᵀ) g_V S⁻¹."""
    M = p.manifold
    packed, G = euclidean_gradient(p)
    rgrad = M.egrad2rgrad(p.X, packed)
    expected = project(p.X, G, M.m, M.n)
    assert relative(dense_tangent(p.X, rgrad, M.m, M.n), expected) <= cond(p) * TOLERANCE[p.X.dtype]
    assert rgrad.dtype == p.X.dtype


@given(points(dtypes=double))
def test_gauge_identities_of_the_factor_gradients(p):
    """Uᵀ g_U = g_S Sᵀ and Vᵀ g_V = g_Sᵀ S, as f(U S Vᵀ) does not see the gauge."""
    M = p.manifold
    packed, _ = euclidean_gradient(p)
    (U, S, V), (g_U, g_S, g_V) = split(p.X, M.m, M.n), split(packed, M.m, M.n)
    assert float((U.mT @ g_U - g_S @ S.mT).abs().max()) <= 1e-12
    assert float((V.mT @ g_V - g_S.mT @ S).abs().max()) <= 1e-12


@given(points(gradient="probe"))
def test_probe_gradient_needs_no_inverse_of_the_core(p):
    """From (GV, UᵀGV, GᵀU) the error does not grow with cond(S)."""
    M = p.manifold
    _, G = euclidean_gradient(p)
    U, _, V = split(p.X, M.m, M.n)
    probes = torch.cat((G @ V, U.mT @ G @ V, G.mT @ U), -2).to(p.X.dtype)
    rgrad = dense_tangent(p.X, M.egrad2rgrad(p.X, probes), M.m, M.n)
    assert relative(rgrad, project(p.X, G, M.m, M.n)) <= TOLERANCE[p.X.dtype]


@given(points())
def test_project_ambient_is_the_orthogonal_projection_of_dense_matrices(p):
    M = p.manifold
    Z = gaussian(*p.X.shape[:-2], M.m, M.n, seed=p.seed, dtype=p.X.dtype)
    xi = M.project_ambient(p.X, Z)
    expected = project(p.X, Z.double(), M.m, M.n)
    assert relative(dense_tangent(p.X, xi, M.m, M.n), expected) <= TOLERANCE[p.X.dtype]
    again = M.project_ambient(p.X, M.tangent_to_dense(p.X, xi))
    assert relative(again, xi) <= TOLERANCE[p.X.dtype]


@given(points(), seeds)
def test_proju_is_idempotent_orthogonal_and_fixes_tangent_vectors(p, seed):
    M, tol = p.manifold, TOLERANCE[p.X.dtype]
    a, b = (gaussian(*p.X.shape, seed=seed + k, dtype=p.X.dtype) for k in (0, 1))
    Pa, Pb = M.proju(p.X, a), M.proju(p.X, b)
    (U, _, V), (U_p, core, V_p) = split(p.X, M.m, M.n), split(Pa, M.m, M.n)
    assert float((U.mT @ U_p).abs().max()) <= tol
    assert float((V.mT @ V_p).abs().max()) <= tol
    assert torch.equal(core, split(a, M.m, M.n)[1])
    assert relative(M.proju(p.X, Pa), Pa) <= tol
    assert float(((a - Pa) * Pb).sum((-2, -1)).abs().max()) <= tol * p.X.shape[-2]
    assert relative(M.proju(p.X, p.xi), p.xi) <= tol


@given(points())
def test_inner_is_the_frobenius_product_of_the_dense_vectors(p):
    M, xi, eta = p.manifold, p.xi, p.vector(0)
    A, B = (dense_tangent(p.X, v, M.m, M.n) for v in (xi, eta))
    exact = (A * B).sum((-2, -1))
    scale = TOLERANCE[p.X.dtype] * (1 + A.norm() * B.norm())
    assert bool((M.inner(p.X, xi, eta) - exact).abs().le(scale).all())
    assert bool((M.norm(p.X, xi) - torch.linalg.matrix_norm(A)).abs().le(scale).all())
    assert M.inner(p.X, xi).shape == p.X.shape[:-2]
    assert M.inner(p.X, xi, keepdim=True).shape == (*p.X.shape[:-2], 1, 1)
    assert M.norm(p.X, xi, keepdim=True).shape == (*p.X.shape[:-2], 1, 1)


@given(points(dtypes=double))
def test_component_inner_is_constant_on_blocks_which_add_up_to_inner(p):
    M = p.manifold
    blocks = M.unpack(M.component_inner(p.X, p.xi, p.vector(0)))
    for block in blocks:
        assert torch.equal(block, block[..., :1, :1].expand_as(block))
    total = sum(block[..., 0, 0] for block in blocks)
    assert bool((total - M.inner(p.X, p.xi, p.vector(0))).abs().le(1e-12).all())


@given(points())
def test_transport_is_the_projection_of_the_dense_vector_onto_the_new_tangent_space(p):
    M, Y = p.manifold, p.another()
    moved = M.transp(p.X, Y, p.xi)
    expected = project(Y, dense_tangent(p.X, p.xi, M.m, M.n), M.m, M.n)
    actual = dense_tangent(Y, moved, M.m, M.n)
    assert float((actual - expected).abs().max()) <= TOLERANCE[p.X.dtype]
    assert M.check_vector_on_tangent(Y, moved, explain=True) == (True, None)
    assert relative(M.transp(p.X, p.X, p.xi), p.xi) <= TOLERANCE[p.X.dtype]


@given(points())
def test_transported_vectors_are_not_longer(p):
    M = p.manifold
    moved = M.transp(p.X, p.another(), p.xi)
    assert bool((M.norm(p.X, moved) <= M.norm(p.X, p.xi) * (1 + TOLERANCE[p.X.dtype])).all())


@pytest.mark.parametrize(("m", "n", "r"), [(4, 7, 4), (7, 4, 4), (4, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_normal_to_a_full_basis_are_zero_and_not_roundoff(m, n, r, dtype):
    """An adaptive optimizer divides each block by its norm: roundoff would become a unit step."""
    M = lrm.FixedRank(m, n, r)
    X, Y = (torch.Tensor(M.random(dtype=dtype)) for _ in range(2))
    xi = M.proju(X, torch.randn_like(X))
    vectors = [xi, M.egrad2rgrad(X, torch.randn_like(X)), M.transp(X, Y, xi)]
    vectors.append(M.project_ambient(X, torch.randn(m, n, dtype=dtype)))
    for vector in vectors:
        U_p, _, V_p = M.unpack(vector)
        assert m > r or float(U_p.abs().max()) == 0.0
        assert n > r or float(V_p.abs().max()) == 0.0


@given(points(dtypes=double))
def test_a_batch_is_treated_as_its_elements(p):
    M = p.manifold
    X, xi, Y = (v.reshape(-1, *M.point_shape) for v in (p.X, p.xi, p.another()))
    Z = gaussian(len(X), M.m, M.n, seed=1)
    calls = {
        "proju": lambda k: M.proju(X[k], Y[k]),
        "egrad2rgrad": lambda k: M.egrad2rgrad(X[k], Y[k]),
        "transp": lambda k: M.transp(X[k], Y[k], xi[k]),
        "project_ambient": lambda k: M.project_ambient(X[k], Z[k]),
        "component_inner": lambda k: M.component_inner(X[k], xi[k]),
        "tangent_to_dense": lambda k: M.tangent_to_dense(X[k], xi[k]),
    }
    for name, call in calls.items():
        whole, parts = call(slice(None)), torch.stack([call(k) for k in range(len(X))])
        assert float((whole - parts).abs().max()) <= 1e-11 * (1 + float(parts.abs().max())), name


@given(points(dtypes=double))
def test_strided_input_and_input_that_requires_gradients_change_nothing(p):
    M = p.manifold
    strided = p.X.mT.contiguous().mT
    plain = M.egrad2rgrad(p.X, p.xi)
    assert relative(M.egrad2rgrad(strided, p.xi.mT.contiguous().mT), plain) <= 1e-12
    assert relative(M.egrad2rgrad(p.X.clone().requires_grad_(), p.xi), plain) <= 1e-12


def test_projection_is_differentiable():
    M = lrm.FixedRank(5, 4, 2)
    X, Z = torch.Tensor(M.random(dtype=torch.float64)), gaussian(5, 4, seed=0)
    assert torch.autograd.gradcheck(lambda Z: M.project_ambient(X, Z), Z.requires_grad_())
    xi = random_tangent(M, X)
    assert torch.autograd.gradcheck(lambda xi: M.tangent_to_dense(X, xi), xi.requires_grad_())
    assert torch.autograd.gradcheck(M.to_dense, X.requires_grad_())


def test_a_singular_core_is_an_error_for_the_gradient_on_the_cpu():
    M = lrm.FixedRank(5, 4, 2)
    X = torch.Tensor(M.random())
    M.unpack(X).S.zero_()
    with pytest.raises(torch.linalg.LinAlgError, match="the rank of the point has dropped"):
        M.egrad2rgrad(X, torch.ones_like(X))


HALF = {"FixedRank": lrm.FixedRank(20, 10, 3), "Stiefel": lrm.Stiefel()}


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1.0, 1e3])
def test_sizes_of_half_precision_vectors_are_computed_in_float32(name, dtype, size, device):
    """In float16 squares underflow below 2e-4 and overflow above 256."""
    M = HALF[name]
    X = torch.Tensor(M.random(*getattr(M, "point_shape", (20, 3)), device=device)).to(dtype)
    u = (size * torch.randn(X.shape, device=device)).to(dtype)
    true = float(u.double().norm())
    assert float(M.norm(X, u)) == pytest.approx(true, rel=1e-2)
    assert M.norm(X, u).dtype == M.inner(X, u).dtype == dtype
    wide = M.inner(X.float(), u.float()).to(dtype)
    assert torch.equal(M.inner(X, u), wide)
    if name == "FixedRank":
        wide = M.component_inner(X.float(), u.float()).to(dtype)
        assert torch.equal(M.component_inner(X, u), wide)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tangent_vectors_in_half_precision_are_judged_in_float32(name, dtype):
    M = HALF[name]
    X = torch.Tensor(M.random(*getattr(M, "point_shape", (20, 3)))).to(dtype)
    u = (2e4 * torch.randn(X.shape).clamp(-3, 3)).to(dtype)  # of norm Inf in float16
    options = {"ok_point": True, "explain": True, "atol": 1e-5, "rtol": 1e-5}
    found = M.check_vector_on_tangent(X, u, **options)
    assert not found[0]
    assert found == M.check_vector_on_tangent(X.float(), u.float(), **options)
