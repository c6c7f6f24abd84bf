"""The local condition number of a network, by Jacobian products; see :mod:`.robustness`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .._arguments import check_callable, check_flag, check_integer, check_number, check_tensor
from .._evaluation import evaluation_mode

Model = Callable[[Tensor], Tensor]


def condition_number(
    f: Model, x: Tensor, *, batched: bool = True, iters: int = 200, tol: float | None = None
) -> Tensor:
    """Local relative condition number ||J_f(x)||_2 ||x|| / ||f(x)|| of each sample, shape (B,).

    The worst factor by which a small relative change of x is magnified in f(x) (mathematics 6).
    ||J||_2 by Lanczos on JᵀJ with full reorthogonalisation: a Jacobian-vector and a
    vector-Jacobian product a step, all samples at once; J is never formed. At most
    min(inputs, outputs) steps, each keeping one vector of x's size. Convergence is checked twice:
    the residual bounds the distance to some singular value, and runs from two random vectors
    (fixed seed) must agree, since one run bounds ||J||_2 only from below.

    Cannot do: samples that influence each other (batch norm in train mode, in a plain function);
    kinks (ReLU, max pooling), where it is the condition of the branch autograd takes.

    Parameters
    ----------
    f : callable, (B, ...) -> (B, ...)
        Differentiable, also in forward mode. A module is run in evaluation mode.
    x : Tensor, shape (B, ...), float32 or float64
    batched : bool
        False: x is one sample of any shape, f(x) has any shape, and the result has shape ().
    iters, tol : int, float
        Most steps, and relative tolerance of ||J||_2 (None: 1e-8 in float64, 1.2e-5 in float32);
        RuntimeError when `iters` steps do not reach `tol`.
    """
    check_callable("f", f, "a module or a function of x")
    steps = check_integer("iters", iters, low=1)
    check_tensor("x", x, dtypes=(torch.float32, torch.float64))
    floor = max(100 * torch.finfo(x.dtype).eps, 1e-8)
    tol = floor if tol is None else check_number("tol", tol, low=0)
    check_flag("batched", batched)
    if not batched:
        with evaluation_mode(f):
            one = _only_tensors(f)
            return condition_number(lambda z: one(z[0])[None], x[None], iters=iters, tol=tol)[0]
    with torch.inference_mode(False), evaluation_mode(f):
        x = x.detach().clone()
        fx, pull = torch.func.vjp(_only_tensors(f), x)[:2]
        if x.ndim == 0 or fx.shape[:1] != x.shape[:1] or len(x) == 0:
            raise ValueError(
                "f must map (B, ...) to (B, ...), B >= 1, or batched be False; got "
                f"{tuple(x.shape)} -> {tuple(fx.shape)}"
            )
        sizes = [_rows(z.detach()).double().norm(dim=1) for z in (x, fx)]
        for name, size in zip(("x", "f(x)"), sizes, strict=True):
            bad = (~torch.isfinite(size) | (size == 0)).nonzero()[:, 0].tolist()
            if bad:
                raise ValueError(f"{name} must be finite and not zero, fails in samples {bad[:9]}")

        def pulled(u: Tensor) -> Tensor:
            v = _rows(pull(u.view_as(fx))[0].detach())
            if not bool(torch.isfinite(v).all()):
                raise ValueError("the derivative of f is not finite at x")
            return v

        seeded = torch.Generator().manual_seed(0)
        runs: list[Tensor] = []
        for _ in range(4):
            w = torch.randn(fx.shape, generator=seeded, dtype=fx.dtype, device="cpu").to(fx)
            start = pulled(w)  # in the row space: exhausted after rank(J) steps
            # the square of a saturated network's Jacobian would underflow
            scale = start.abs().amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)

            def product(v: Tensor, scale: Tensor = scale) -> Tensor:
                Jv = torch.func.jvp(f, (x,), (v.view_as(x),))[1]
                return pulled(_rows(Jv) / scale) / scale

            root = _root_of_largest_eigenvalue(product, start / scale, steps, tol)
            runs.append(root * scale[:, 0])
            top = torch.stack(runs).sort(0, descending=True).values[:2]
            if len(runs) > 1 and bool((top[0] - top[1] <= 2 * tol * top[0]).all()):
                if not bool(top[0].any()):
                    _check_differentiable(f, x)
                return (top[0] * sizes[0] / sizes[1]).to(x)
    raise RuntimeError(
        f"||J||_2: 4 runs differ by more than tol={tol:g}; is f deterministic, and computed in "
        f"{x.dtype} (no autocast inside)?"
    )


def _rows(z: Tensor) -> Tensor:
    """One row a sample, also where a sample is one number."""
    return z.reshape(len(z), -1)


def _check_differentiable(f: Model, x: Tensor) -> None:
    """A derivative of 0 everywhere is an error where autograd does not reach x."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        fx = f(x)
        reached = fx.requires_grad and torch.autograd.grad(fx.sum(), x, allow_unused=True)[0]
    if not isinstance(reached, Tensor):
        raise ValueError("f does not depend differentiably on x: does it detach?")


def _only_tensors(f: Model) -> Model:
    """f, with an error that names what it returns instead of a tensor."""

    def checked(x: Tensor) -> Tensor:
        fx = f(x)
        if not isinstance(fx, Tensor):
            raise TypeError(
                f"f must return a tensor, got an object of class {type(fx).__name__}: pass a "
                "function that takes the tensor out of it, such as lambda x: f(x)[0]"
            )
        return fx

    return checked


def _root_of_largest_eigenvalue(product: Model, z: Tensor, iters: int, tol: float) -> Tensor:
    """Square roots (B,) of the largest eigenvalues of B semidefinite maps, by Lanczos from z."""
    V, T = list[Tensor](), torch.zeros(len(z), 0, 0, dtype=torch.float64, device="cpu")
    beta, largest = z.norm(dim=1), torch.zeros_like(z[:, 0])
    for k in range(1, iters + 1):
        T = functional.pad(T, (0, 1, 0, 1))
        if V:
            T[:, -1, -2] = T[:, -2, -1] = beta.double().cpu()
        V.append(torch.where(beta[:, None] > 0, z / beta[:, None], 0.0))  # 0: space exhausted
        z = product(V[-1])
        T[:, -1, -1] = (z * V[-1]).sum(1).double().cpu()
        largest = torch.maximum(largest, z.norm(dim=1))
        Q = torch.stack(V, 2)
        for _ in range(2):  # once is not enough, twice is (Kahan, Parlett)
            z = z - (Q @ (Q.mT @ z[..., None]))[..., 0]
        beta = z.norm(dim=1)
        beta = torch.where(beta <= torch.finfo(z.dtype).eps * largest, 0.0, beta)
        if k <= 16 or k % 4 == 0 or k == iters:
            values, P = torch.linalg.eigh(T)
            top = values[:, -1].clamp_min(0)
            if bool((beta.double().cpu() * P[:, -1, -1].abs() <= tol * top).all()):
                return top.sqrt().to(z)
    raise RuntimeError(f"||J||_2 not found to tol={tol:g} in iters={iters} steps: raise either")
