"""The SVD that does not give up: real matrices on which LAPACK fails, and failures on purpose."""

from __future__ import annotations

import pytest
import torch
from oracles import orthonormality, relative
from strategies import gaussian, matrix, spectrum

from lrmanifold import linalg


@pytest.fixture
def failing_svd(monkeypatch):
    """Let torch.linalg.svd and svdvals fail, in the first `attempts` calls or for bad matrices."""

    def install(attempts: int = 10**9, bad=lambda A: True):
        real, real_values, calls = torch.linalg.svd, torch.linalg.svdvals, [0]

        def refuse(A, function, *args, **kwargs):
            if bad(A) and calls[0] < attempts:
                calls[0] += 1
                raise torch.linalg.LinAlgError("failed to converge because the input matrix ...")
            return function(A, *args, **kwargs)

        monkeypatch.setattr(
            torch.linalg, "svd", lambda A, *args, **kw: refuse(A, real, *args, **kw)
        )
        monkeypatch.setattr(torch.linalg, "svdvals", lambda A: refuse(A, real_values))
        return calls

    return install


def assert_is_svd(A, factors, tol=1e-5):
    U, s, Vh = factors
    assert orthonormality(U) <= tol
    assert orthonormality(Vh.mT) <= tol
    assert bool((s.diff(dim=-1) <= 0).all())
    assert relative((U * s[..., None, :]) @ Vh, A) <= tol


@pytest.mark.parametrize("attempts", [1, 2, 4, 8])
def test_svd_recovers_from_any_number_of_failures_below_nine(failing_svd, attempts):
    A = matrix(spectrum("clustered", 12, 1.1, 0), 12, 0).float()
    calls = failing_svd(attempts)
    assert_is_svd(A, linalg.svd(A))
    assert calls[0] == attempts


def test_svd_of_a_batch_is_redone_matrix_by_matrix(failing_svd):
    A = gaussian(2, 3, 6, 4, seed=0, dtype=torch.float32)
    poison = A[1, 1]
    failing_svd(bad=lambda B: B.ndim > 2 or torch.equal(B, poison))
    U, s, Vh = linalg.svd(A)
    assert_is_svd(A, (U, s, Vh))
    assert (U.shape, s.shape, Vh.shape) == ((2, 3, 6, 4), (2, 3, 4), (2, 3, 4, 4))


def test_svd_gives_up_in_words_after_finitely_many_attempts(failing_svd):
    calls = failing_svd()
    with pytest.raises(torch.linalg.LinAlgError, match="no SVD converged in 9 attempts"):
        linalg.svd(torch.eye(3))
    assert calls[0] == 10


@pytest.mark.parametrize("threads", [1, 2])
def test_all_that_takes_the_svd_of_a_core_survives_its_failure(failing_svd, threads):
    S = torch.stack([matrix(spectrum("clustered", 9, 3.0, k), 9, k) for k in range(3)]).float()
    exact = torch.linalg.svdvals(S.double())
    failing_svd(bad=lambda A: A.dtype == torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert relative(linalg.svdvals(S)[..., None], exact[..., None]) <= 1e-6
        assert float((linalg.condition_number(S) - exact[:, 0] / exact[:, -1]).abs().max()) <= 1e-4
        clipped = linalg.spectral_clip(S, 0.1)
        assert float(torch.linalg.cond(clipped.double()).max()) <= 1.1 * (1 + 1e-6)
        assert orthonormality(linalg.polar(S)) <= 4e-6
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("size", "threads"), [(128, 1), (128, 2), (250, 1), (256, 1)])
def test_real_clustered_cores_are_projected(data_dir, size, threads):
    """float32 cores from real training on which torch.linalg.svd does not converge."""
    file = data_dir / f"clustered_core_{size}.pt"
    if not file.exists():
        pytest.skip(f"{file.name} is not in {data_dir}")
    S = torch.load(file, weights_only=True).detach()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        factors = linalg.svd(S)
        C = linalg.spectral_clip(S, 1e-3)
    finally:
        torch.set_num_threads(before)
    assert_is_svd(S, factors)
    assert float(torch.linalg.cond(C.double())) <= 1.001 * (1 + 1e-5)
    for tau in (0.0, 0.1):
        C = linalg.spectral_clip(S, tau)
        assert float(torch.linalg.cond(C.double())) <= (1 + tau) * (1 + 1e-5)
        assert relative(linalg.spectral_clip(C, tau), C) <= 1e-6


def test_nan_from_lapack_without_an_error_is_done_again(monkeypatch):
    real, calls = torch.linalg.svd, []

    def once_wrong(A, **options):
        calls.append(A)
        U, s, Vh = real(A, **options)
        return (U * float("nan"), s, Vh) if len(calls) == 1 else (U, s, Vh)

    monkeypatch.setattr(torch.linalg, "svd", once_wrong)
    A = torch.randn(6, 6)
    U, s, Vh = linalg.svd(A)
    assert len(calls) == 2
    assert ((U * s) @ Vh - A).abs().max() <= 1e-5
