"""One tensor for U, S, V, and the products of packed tensors that every method needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """Views of a packed tensor: of a point ``U S Vᵀ``, or of a tangent vector (U_p, M, V_p)."""

    U: Tensor
    S: Tensor
    V: Tensor


def joined(*blocks: Tensor, dim: int) -> Tensor:
    """``torch.cat`` of matrices along one of their two dimensions; batches are broadcast."""
    lead = {block.shape[:-2] for block in blocks}
    if len(lead) > 1:
        whole = torch.broadcast_shapes(*lead)
        blocks = tuple(block.expand(*whole, *block.shape[-2:]) for block in blocks)
    return torch.cat(blocks, dim)


def pack(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """Stack the rows of U (m), S (r), V (n) into one tensor of shape (..., m + r + n, r)."""
    return joined(U, S, V, dim=-2)


def unpack(X: Tensor, m: int, n: int) -> Factors:
    """Slices of a packed tensor; no copy, and one concatenation in the backward pass."""
    return Factors(*X.split([m, X.shape[-1], n], dim=-2))


def perp(Q: Tensor, Z: Tensor, overlap: Tensor | None = None) -> Tensor:
    """(I - QQᵀ) Z for orthonormal Q, by thin products; `overlap` is QᵀZ if it is known."""
    if Q.shape[-2] == Q.shape[-1]:
        # Nothing is orthogonal to a full basis. Roundoff here would be blown up to unit size by
        # optimizers that divide each block by its own norm.
        return torch.zeros_like(Z)
    return Z - Q @ (Q.mT @ Z if overlap is None else overlap)


def frobenius(A: Tensor, *, keepdim: bool = False) -> Tensor:
    """‖A‖ of each matrix, by squares in float64: those of 1e-23 and of 1e20 are beyond float32."""
    return torch.linalg.matrix_norm(A, keepdim=keepdim, dtype=torch.float64).to(A.dtype)


def change_of_base(X: Factors, xi: Factors, Y: Factors) -> Factors:
    """Project the tangent vector `xi` at `X` onto the tangent space at `Y`.

    With Z = U M Vᵀ + U_p Vᵀ + U V_pᵀ the blocks are U_yᵀ Z V_y, and Z V_y and Zᵀ U_y projected,
    from r x r overlaps of the frames, 10 (m+n) r² flops.
    """
    a, c = Y.U.mT @ X.U, Y.U.mT @ xi.U
    b, d = X.V.mT @ Y.V, xi.V.mT @ Y.V
    inner = xi.S @ b + d
    ZV = X.U @ inner + xi.U @ b
    ZtU = X.V @ (a @ xi.S + c).mT + xi.V @ a.mT
    M = a @ inner + c @ b
    return Factors(perp(Y.U, ZV, M), M, perp(Y.V, ZtU, M.mT))
