"""Argument checks shared by all kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._arguments import shown
from ..precision import check_float64, compute_dtype


def checked(A: Tensor, name: str) -> Tensor:
    """Validate a matrix argument and lift it to its compute dtype."""
    check_matrix(A, name)
    A = A.to(compute_dtype(A.dtype))
    if A.device.type == "cpu" and not all_finite(A):
        raise ValueError(f"{name} must be finite, got NaN or Inf in a tensor of {tuple(A.shape)}")
    return A


def check_matrix(A: Tensor, name: str) -> None:
    """Raise unless `A` is a batch of real floating point matrices."""
    if not isinstance(A, Tensor):
        raise TypeError(f"{name} must be a tensor, got {shown(A)}")
    if A.ndim < 2:
        raise ValueError(f"{name} must have at least 2 dimensions, got shape {tuple(A.shape)}")
    if not A.is_floating_point():
        raise TypeError(f"{name} must be a real floating point tensor, got {A.dtype}")
    check_float64(name, A)


def all_finite(A: Tensor) -> bool:
    """Whether no entry is NaN or Inf; waits for the device.

    By the sum, which a NaN or Inf never leaves and which costs a tenth of ``torch.isfinite``; entry
    by entry only where the sum itself overflows.
    """
    return math.isfinite(A.detach().sum()) or bool(torch.isfinite(A).all())


def differentiated(A: Tensor) -> bool:
    """Whether what is computed from `A` is recorded for a derivative, backwards or forwards."""
    backwards = A.requires_grad and torch.is_grad_enabled()
    return backwards or forward_ad.unpack_dual(A).tangent is not None


def check_square(S: Tensor, name: str) -> None:
    """Raise unless the last two dimensions of `S` agree."""
    if not isinstance(S, Tensor):
        raise TypeError(f"{name} must be a tensor, got {shown(S)}")
    if S.ndim < 2 or S.shape[-1] != S.shape[-2]:
        raise ValueError(f"{name} must be square, got shape {tuple(S.shape)}")
    if not S.is_floating_point():
        raise TypeError(f"{name} must be a real floating point tensor, got {S.dtype}")
