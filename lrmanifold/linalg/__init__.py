"""Tall-skinny and r x r kernels: pure functions on batched tensors, on any device.

Every function takes leading batch dimensions, computes float16 and bfloat16 in float32 and casts
back. On the CPU a wrong input (NaN, Inf, a rank-deficient matrix) raises. On an accelerator raising
would make the host wait for the device, so the usual path never looks: the matrices concerned come
back as NaN, and the others of the batch are untouched.
"""

from ._common import compute_dtype
from ._conditioning import (
    Centre,
    clip_values,
    condition_number,
    conditioning_penalty,
    conditioning_penalty_grad,
    spectral_clip,
)
from ._orthonormal import orthonormalize, polar, qr, solve_right
from ._svd import SVD, svd, svdvals

__all__ = [
    "SVD",
    "Centre",
    "clip_values",
    "compute_dtype",
    "condition_number",
    "conditioning_penalty",
    "conditioning_penalty_grad",
    "orthonormalize",
    "polar",
    "qr",
    "solve_right",
    "spectral_clip",
    "svd",
    "svdvals",
]
