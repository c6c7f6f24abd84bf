"""Independent answers: dense linear algebra in float64, and what an operation does to the host."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def split(X: Tensor, m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of a packed tensor in float64, by slicing."""
    r = X.shape[-1]
    X = X.detach().as_subclass(torch.Tensor).double()
    return X[..., :m, :], X[..., m : m + r, :], X[..., m + r :, :]


def dense(X: Tensor, m: int, n: int) -> Tensor:
    """U S Vᵀ."""
    U, S, V = split(X, m, n)
    return U @ S @ V.mT


def dense_tangent(X: Tensor, xi: Tensor, m: int, n: int) -> Tensor:
    """U M Vᵀ + U_p Vᵀ + U V_pᵀ."""
    (U, _, V), (U_p, M, V_p) = split(X, m, n), split(xi, m, n)
    return U @ M @ V.mT + U_p @ V.mT + U @ V_p.mT


def project(X: Tensor, Z: Tensor, m: int, n: int) -> Tensor:
    """P_W Z from the m x m and n x n projectors of the dense matrix (not from its factors)."""
    W = dense(X, m, n)
    r = X.shape[-1]
    U, _, Vh = torch.linalg.svd(W)
    left = U[..., :r] @ U[..., :r].mT
    right = Vh[..., :r, :].mT @ Vh[..., :r, :]
    return left @ Z + Z @ right - left @ Z @ right


def best_approximation(W: Tensor, r: int) -> Tensor:
    """Truncated SVD of the dense matrix."""
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[..., :r] * s[..., None, :r]) @ Vh[..., :r, :]


def orthonormality(Q: Tensor) -> float:
    """max |QᵀQ - I|, measured in float64."""
    Q = Q.detach().double()
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return float((Q.mT @ Q - eye).abs().max()) if Q.numel() else 0.0


def relative(a: Tensor, b: Tensor) -> float:
    """max over the batch of ‖a - b‖/‖b‖, in float64; 0 for empty batches."""
    a, b = a.detach().double(), b.detach().double()
    if not b.numel():
        return 0.0
    error = torch.linalg.vector_norm(a - b, dim=(-2, -1))
    return float((error / torch.linalg.vector_norm(b, dim=(-2, -1)).clamp_min(1e-300)).max())


class ForbidHostSynchronisation(TorchDispatchMode):
    """Raise at any operation that makes the host wait for the device, or moves data to it.

    Meant for tensors on the "meta" device, which run every kernel's shape logic without a GPU:
    ``.item()`` and ``bool()`` raise there by themselves. In addition the decompositions that report
    convergence to the host, error checks, and copies between host and device are refused.
    """

    FORBIDDEN = (
        "_local_scalar_dense", "nonzero", "_linalg_check_errors", "_linalg_svd", "_linalg_eigh",
        "linalg_eig", "masked_select", "is_nonzero", "equal",
    )  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.FORBIDDEN:
            raise AssertionError(f"aten.{name} makes the host wait for the device")
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.ndim > 0:
                raise AssertionError(f"aten.{name} works on a host tensor of {tuple(tensor.shape)}")
        return out


class CountFlops(TorchDispatchMode):
    """Adds up the flops of products, of Householder QR with explicit Q, and of solves."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.flops += 2.0 * args[0].numel() * args[1].shape[-1]
        elif name == "linalg_qr":
            m, k = args[0].shape[-2:]
            self.flops += 4.0 * m * k**2 - 4.0 / 3.0 * k**3
        elif name in ("linalg_solve_triangular", "_linalg_solve_ex"):
            each = 1.0 if name == "linalg_solve_triangular" else 2.0
            shapes = [a.shape for a in args[:2]]
            self.flops += each * shapes[0][-1] * shapes[1].numel()
        elif name in ("addmm", "baddbmm", "linalg_lu_solve"):
            raise NotImplementedError(f"count the flops of {name}")
        return func(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out
