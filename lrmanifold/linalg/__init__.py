"""Tall-skinny and r x r kernels: pure functions on batched tensors, on any device.

Every function takes leading batch dimensions and computes float16 and bfloat16 in float32; matrices
are cast back, an SVD, singular values and condition numbers stay in float32. On the CPU a wrong
input (NaN, Inf, a rank-deficient matrix) raises. On an accelerator raising would make the host wait
for the device, so the usual path never looks: a matrix with NaN or Inf comes back as NaN, a
rank-deficient one as NaN or with an arbitrary completion of its basis, and the others of the batch
are untouched.
"""

from ..precision import compute_dtype
from ._certificate import condition_bound
from ._clip_memory import ClipMemory
from ._common import all_finite
from ._conditioning import (
    Centre,
    clip_values,
    condition_number,
    conditioning_penalty,
    conditioning_penalty_grad,
    spectral_clip,
)
from ._newton_schulz import inverse_square_root, inverse_square_root_and_image
from ._orthonormal import gram, inverse, orthonormalize, polar, qr, solve_right
from ._svd import SVD, svd, svdvals

__all__ = [
    "SVD",
    "Centre",
    "ClipMemory",
    "all_finite",
    "clip_values",
    "compute_dtype",
    "condition_bound",
    "condition_number",
    "conditioning_penalty",
    "conditioning_penalty_grad",
    "gram",
    "inverse",
    "inverse_square_root",
    "inverse_square_root_and_image",
    "orthonormalize",
    "polar",
    "qr",
    "solve_right",
    "spectral_clip",
    "svd",
    "svdvals",
]
