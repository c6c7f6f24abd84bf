"""On an accelerator the usual path never makes the host wait: shown on the meta device.

Tensors on "meta" have shapes and no values, so that ``.item()``, ``bool(tensor)`` and everything
else that needs a value raises; the library takes the path of accelerators for them, as they are not
on the CPU. What would wait inside a kernel is refused by name.
"""

from __future__ import annotations

import geoopt
import pytest
import torch
from oracles import ForbidHostSynchronisation

import lrmanifold as lrm
from lrmanifold import linalg
from lrmanifold.optim import CondLR, CondLRAdam, CondLRMuon

BATCHES = [(), (4,)]
MANIFOLDS = {
    "FixedRank": lambda: lrm.FixedRank(9, 7, 3, retraction="factored"),
    "FixedRank, r = m < n": lambda: lrm.FixedRank(4, 7, 4, retraction="orthographic"),
    "WellConditioned": lambda: lrm.WellConditioned(9, 7, 3, tau=0.1),
    "WellConditioned, tau = 0": lambda: lrm.WellConditioned(9, 7, 3, tau=0.0),
    "WellConditioned, mean": lambda: lrm.WellConditioned(9, 7, 3, tau=0.1, centre="mean"),
    "WellConditioned, rank 1": lambda: lrm.WellConditioned(9, 7, 1, tau=0.1),
}


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: torch.linalg.svd(x),
        lambda x: torch.linalg.cholesky(x),
        lambda x: x[x > 0],
        lambda x: x + torch.ones(3, 3),
    ],
    ids=["item", "bool", "svd", "cholesky with its error check", "mask", "host tensor"],
)
def test_the_guard_notices_what_waits(wait):
    errors = (AssertionError, RuntimeError, NotImplementedError)
    with pytest.raises(errors), ForbidHostSynchronisation():
        wait(meta(3, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", BATCHES)
def test_kernels_do_not_wait(batch, dtype):
    A, S = meta(*batch, 9, 4, dtype=dtype), meta(*batch, 4, 4, dtype=dtype)
    with ForbidHostSynchronisation():
        for result in (linalg.orthonormalize(A), linalg.polar(A), linalg.qr(A)[0]):
            assert result.shape == A.shape
            assert result.dtype == dtype
        for tau in (0.0, 0.1):
            for centre in ("metric", "mean"):
                assert linalg.spectral_clip(S, tau, centre=centre).shape == S.shape
        for squared in (False, True):
            assert linalg.conditioning_penalty(S, squared=squared).shape == batch
            assert linalg.conditioning_penalty_grad(S, squared=squared).shape == S.shape
        if dtype != torch.bfloat16:
            assert linalg.solve_right(A, S).shape == A.shape


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MANIFOLDS)
def test_a_training_step_on_low_rank_manifolds_does_not_wait(name, batch):
    manifold = MANIFOLDS[name]()
    X, G = (meta(*batch, *manifold.point_shape) for _ in range(2))
    with ForbidHostSynchronisation():
        xi = manifold.egrad2rgrad(X, G)
        Y, eta = manifold.retr_transp(X, -0.1 * xi, xi)
        results = [xi, Y, eta, manifold.proju(X, G), manifold.transp(X, Y, xi)]
        results += [manifold.component_inner(X, xi), manifold.projx(X)]
        assert all(result.shape == X.shape for result in results)
        assert manifold.inner(X, xi).shape == manifold.norm(X, xi).shape == batch
        assert manifold.drift(X).shape == batch
        assert manifold.project_ambient(X, manifold.to_dense(X)).shape == X.shape


STEPS = {
    "plain": (CondLR, {"lr": 0.1, "momentum": 0.9}),
    "scalar metric": (CondLR, {"lr": 0.1, "metric": "scalar"}),
    "nesterov": (CondLR, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "decay and penalty": (CondLR, {"lr": 0.1, "weight_decay": 0.1, "penalty": 0.1}),
    "margin": (CondLR, {"lr": 0.1, "clip_margin": 0.5}),
    "not skipping": (CondLR, {"lr": 0.1, "skip_nonfinite": False}),
    "Adam": (CondLRAdam, {"penalty": 0.1, "weight_decay": 0.1}),
    "Muon": (CondLRMuon, {"penalty": 0.1, "weight_decay": 0.1}),
    "Muon, no decay": (CondLRMuon, {}),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    ("retraction", "dtype"),
    [
        ("factored", torch.float32),
        ("factored", torch.bfloat16),
        ("orthographic", torch.float32),
        pytest.param("factored", torch.float64, marks=pytest.mark.slow),
        pytest.param("orthographic", torch.float64, marks=pytest.mark.slow),
        pytest.param("orthographic", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_steps_do_not_wait(name, dtype, retraction):
    """Of weights of several sizes, a batch, a frame, and ordinary parameters."""
    kind, options = STEPS[name]
    sets: list = [
        lrm.FixedRank(9, 7, 3, retraction=retraction),
        lrm.WellConditioned(9, 7, 3, tau=0.1, retraction=retraction),
        lrm.WellConditioned(4, 7, 4, tau=0.0, retraction=retraction),
        lrm.WellConditioned(9, 7, 1, tau=0.1, retraction=retraction, gradient="probe"),
    ]
    shapes = [M.point_shape for M in sets] + [(2, *sets[1].point_shape), (7,), (3, 4)]
    owners = [*sets, sets[1], None, None]
    if not (options.get("weight_decay") or options.get("penalty")):
        shapes, owners = [*shapes, (9, 4)], [*owners, lrm.Stiefel()]
    params = []
    for shape, M in zip(shapes, owners, strict=True):
        x = meta(*shape, dtype=dtype)
        params.append(
            torch.nn.Parameter(x) if M is None else geoopt.ManifoldParameter(x, manifold=M)
        )
    optimizer = kind(params, **options)
    for p in params:
        p.grad = torch.empty_like(p).as_subclass(torch.Tensor)
    optimizer.step()
    with ForbidHostSynchronisation():
        optimizer.step()


@pytest.mark.parametrize("retraction", ["polar", "qr", "cayley"])
def test_a_training_step_on_stiefel_does_not_wait(retraction):
    manifold = lrm.Stiefel(retraction)
    X, G = meta(2, 9, 4), meta(2, 9, 4)
    with ForbidHostSynchronisation():
        xi = manifold.egrad2rgrad(X, G)
        Y, eta = manifold.retr_transp(X, -0.1 * xi, xi)
        assert Y.shape == eta.shape == manifold.projx(X).shape == X.shape


@pytest.mark.parametrize("name", ["factored", "orthographic"])
def test_retractions_of_products_and_solves_do_not_wait(name):
    manifold = lrm.FixedRank(9, 7, 3, retraction=name)
    X = meta(*manifold.point_shape)
    with ForbidHostSynchronisation():
        assert manifold.retr(X, X).shape == X.shape


@pytest.mark.parametrize("name", ["ksl", "strang", "bug"])
def test_integrators_wait_for_nothing_but_householder_qr(name):
    """torch's Householder QR reports nothing to the host either, so these do not wait at all."""
    manifold = lrm.WellConditioned(9, 7, 3, tau=0.1, retraction=name)
    X = meta(*manifold.point_shape)
    with ForbidHostSynchronisation():
        assert manifold.retr(X, X).shape == X.shape


@pytest.mark.parametrize("name", ["svd", "augmented_bug", "parallel_bug"])
def test_retractions_that_truncate_do_wait_for_their_svd(name):
    """Written down so that nobody chooses them for a hot loop on a GPU unknowingly."""
    manifold = lrm.FixedRank(9, 7, 3, retraction=name)
    X = meta(*manifold.point_shape)
    wait = pytest.raises(AssertionError, match="_linalg_svd makes the host wait")
    with wait, ForbidHostSynchronisation():
        manifold.retr(X, X)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", MANIFOLDS)
def test_cuda_itself_sees_no_synchronisation_in_a_step(name):
    manifold = MANIFOLDS[name]()
    X = torch.Tensor(manifold.random(*manifold.point_shape)).cuda()
    G = torch.randn_like(X)
    manifold.retr(X, -0.1 * manifold.egrad2rgrad(X, G))  # libraries load on the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        manifold.retr_transp(X, -0.1 * manifold.egrad2rgrad(X, G), G)
    finally:
        torch.cuda.set_sync_debug_mode("default")
