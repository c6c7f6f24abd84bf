"""Tall-skinny and r x r kernels: pure functions on batched tensors, on the CPU and on CUDA.

Every function takes leading batch dimensions and computes float16 and bfloat16 in float32, also
within autocast; matrices are cast back, an SVD, singular values and condition numbers stay in
float32. (:func:`clip_by_products`, :func:`inverse_grams`, :func:`polar_pair` and
:func:`inverse_square_root` take float32 and float64 only, outside of autocast.) On the CPU a wrong
input (NaN, Inf, a rank-deficient matrix) raises. On an accelerator raising would make the host wait
for the device, so the usual path never looks: a matrix with NaN or Inf comes back as NaN, a
rank-deficient one as NaN or with an arbitrary completion of its basis, and the others of the batch
are untouched.
"""

from ..precision import compute_dtype, without_autocast
from ._certificate import condition_bound
from ._common import all_finite
from ._conditioning import (
    Centre,
    clip_values,
    condition_number,
    conditioning_penalty,
    conditioning_penalty_grad,
    spectral_clip,
)
from ._convolution_norms import (
    convolution_norm,
    convolution_norm_estimate,
    convolution_singular_range,
    overlaps,
)
from ._damped import damped_polar
from ._newton_schulz import inverse_square_root
from ._orthonormal import gram as _gram
from ._orthonormal import (
    inverse,
    orthonormalize,
    polar,
    polar_decomposition,
    polar_with_root,
    qr,
    solve_right,
)
from ._products import (
    SERIES_LIMIT,
    clip_by_products,
    constant,
    damped_polar_by_products,
    inverse_grams,
    polar_pair,
)
from ._spectral_bound import (
    gram_norm,
    orthonormality_defect_bound,
    rounding_of_products,
    spectral_norm_bound,
)
from ._svd import SVD, svd, svdvals

gram = without_autocast(_gram)  # inside of this package its callers see to that

__all__ = [
    "SERIES_LIMIT",
    "SVD",
    "Centre",
    "all_finite",
    "clip_by_products",
    "clip_values",
    "compute_dtype",
    "condition_bound",
    "condition_number",
    "conditioning_penalty",
    "conditioning_penalty_grad",
    "constant",
    "convolution_norm",
    "convolution_norm_estimate",
    "convolution_singular_range",
    "damped_polar",
    "damped_polar_by_products",
    "gram",
    "gram_norm",
    "inverse",
    "inverse_grams",
    "inverse_square_root",
    "orthonormality_defect_bound",
    "orthonormalize",
    "overlaps",
    "polar",
    "polar_decomposition",
    "polar_pair",
    "polar_with_root",
    "qr",
    "rounding_of_products",
    "solve_right",
    "spectral_clip",
    "spectral_norm_bound",
    "svd",
    "svdvals",
]
