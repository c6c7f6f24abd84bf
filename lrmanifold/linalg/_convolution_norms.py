"""Norms of convolutions as maps on images, not of their matricised kernels.

Every convolution is brought to one form first. A stride s is a space-to-depth by s, a permutation
of pixels, followed by a convolution of stride 1 with kernels of ⌈k/s⌉ and s^d times the channels; a
dilation is a kernel with zeros; groups are a batch. A convolution without padding, on an image that
is put into a larger one of zeros, is then a part of a *circulant* one, whose norm is the largest of
its transfer matrices' over the frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._arguments import check_tensor
from ._spectral_bound import gram_norm, rounding_of_products, spectral_norm_bound

Sizes = int | Sequence[int]
PaddingMode = Literal["zeros", "circular", "reflect", "replicate"]
_MODES = ("zeros", "circular", "reflect", "replicate")
# Per dimension: above it a coarser grid with a proved factor costs less than every frequency.
_LARGEST_GRID = 32


class _Form(NamedTuple):
    """A convolution of stride 1 without dilation: kernels (groups, out, in, *kernel_size)."""

    kernel: Tensor
    grid: tuple[int, ...]  # frequencies a dimension
    factor: float  # what the norm on the grid has to be multiplied by
    exact: bool  # whether the map is the whole circulant, so that the bound is attained


def convolution_norm(
    kernel: Tensor,
    *,
    input_size: Sequence[int] | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    iterations: int = 12,
) -> Tensor:
    r"""A proved upper bound of the spectral norm of a convolution, as a map on images.

    The smaller of two. **Frequencies**: the largest norm of the transfer matrices
    :math:`\hat K(\omega) = \sum_t K_t e^{-i \omega t}`, each by Gram iteration with its rounding
    added. For circular padding that fills the image it is the norm itself (up to p^(1/2^(T+1))),
    for zero padding the image is put into one with room for the kernel, and where the size is not
    known, or large, a grid of frequencies with the factor :math:`\prod 1/\cos(\pi (k-1)/(2N))`
    bounds all of them (M. Riesz's inequality). **Patches**: each pixel is in at most
    :math:`\prod\lceil k/s \rceil` of them, so the norm is at most the root of that times the norm
    of the matricised kernel. Where stride = kernel size, and for 1 x 1, both are exact.

    Parameters
    ----------
    kernel : Tensor, shape (out_channels, in_channels / groups, *kernel_size)
        One to three dimensions; any floating point dtype, computed in float64.
    input_size : sequence of int, optional
        Height and width of the images, before padding. Needed for circular padding that is larger
        than the kernel or strided; elsewhere it makes the bound smaller.
    stride, padding, dilation, groups, padding_mode
        As in ``torch.nn.Conv2d``, "same" and "valid" included.
    iterations : int
        T of the Gram iteration: 6 is within 5 % for up to 256 channels, 12 within .1 %.

    Returns
    -------
    Tensor, shape (), float64

    Raises
    ------
    ValueError
        If an argument is out of range, or the size of the images is needed and not given.

    References
    ----------
    H. Sedghi, V. Gupta, P. Long, *The singular values of convolutional layers*, ICLR 2019;
    Delattre et al., ICML 2023 (Gram iteration) and arXiv 2402.00240 (zero padding); mathematics 9.
    """
    kernel = check_tensor("kernel", kernel).detach().double()
    form, patches = _prepare(kernel, input_size, stride, padding, dilation, groups, padding_mode)
    matrices = form.kernel.flatten(2)
    by_patches = patches * (1.0 + 1e-15) * spectral_norm_bound(matrices).amax()
    if math.prod(form.kernel.shape[3:]) == 1:
        return by_patches
    by_frequencies = _norm_on_grid(form, iterations) * form.factor * (1.0 + 1e-14)
    return torch.minimum(by_patches, by_frequencies)


def convolution_norm_estimate(
    kernel: Tensor,
    *,
    input_size: Sequence[int] | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    iterations: int = 4,
) -> Tensor:
    """As :func:`convolution_norm` in exact arithmetic, differentiable and in the kernel's dtype.

    For training: the same bounds without what covers rounding. The certificate is computed anew by
    :func:`convolution_norm`.
    """
    check_tensor("kernel", kernel)
    form, patches = _prepare(kernel, input_size, stride, padding, dilation, groups, padding_mode)
    by_patches = patches * gram_norm(form.kernel.flatten(2), iterations=iterations).amax()
    if math.prod(form.kernel.shape[3:]) == 1:
        return by_patches
    wide = torch.float64 if kernel.dtype == torch.float64 else torch.float32
    transfer = _transfer(form.kernel.to(wide), form.grid)
    by_frequencies = gram_norm(transfer, iterations=iterations).amax() * form.factor
    return torch.minimum(by_patches, by_frequencies.to(by_patches.dtype))


def convolution_singular_range(
    kernel: Tensor,
    *,
    input_size: Sequence[int] | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> tuple[float, float] | None:
    """Smallest and largest singular value of the map on images, where frequencies know them.

    That is where the map is a whole circulant, padded circularly with an output of the size of the
    input over the stride, or acts on patches that do not overlap. The smallest one is taken over
    the first min(out, in, entries of a filter) of each frequency: zero if the map loses more of
    the row space than its shape requires. A measurement in float64, not a proved bound.

    Returns
    -------
    (float, float) or None
        None where only bounds are known, as for zero padding.
    """
    kernel = check_tensor("kernel", kernel).detach().double()
    form, _ = _prepare(kernel, input_size, stride, padding, dilation, groups, padding_mode)
    if not form.exact:
        return None
    s = torch.linalg.svdvals(_transfer(form.kernel, form.grid))
    # a stride beyond the kernel leaves pixels out: so many directions of a patch are seen
    seen = min(s.shape[-1], kernel.shape[0] // groups, kernel[0].numel())
    return float(s[..., seen - 1].min()), float(s[..., 0].max())


# ------------------------------------------------------------------------------------ the form


def _prepare(
    kernel: Tensor,
    input_size: Sequence[int] | None,
    stride: Sizes,
    padding: Sizes | str,
    dilation: Sizes,
    groups: int,
    padding_mode: str,
) -> tuple[_Form, float]:
    """The form of the convolution, and what the matrix's norm is multiplied by for patches."""
    d = kernel.ndim - 2
    if d not in (1, 2, 3):
        raise ValueError(
            f"kernel must have shape (out, in / groups, *kernel_size) with 1 to 3 dimensions, got "
            f"{tuple(kernel.shape)}"
        )
    if padding_mode not in _MODES:
        raise ValueError(f"padding_mode must be one of {_MODES}, got {padding_mode!r}")
    if groups < 1 or kernel.shape[0] % groups:
        raise ValueError(f"groups must divide {kernel.shape[0]} output channels, got {groups}")
    k = tuple(kernel.shape[2:])
    s, spread = _sizes("stride", stride, d, 1), _sizes("dilation", dilation, d, 1)
    reach = tuple(e * (n - 1) + 1 for e, n in zip(spread, k, strict=True))
    pads = _pads(padding, reach, d)
    if input_size is not None:
        input_size = _sizes("input_size", tuple(input_size), d, 1)
    K = _dilated(kernel, spread).unflatten(0, (groups, -1))

    rows, same, whole, touched = 1, list(s), True, 1
    for i in range(d):
        n = None if input_size is None else input_size[i]
        axis = _Axis(n, k[i], s[i], spread[i], pads[i], padding_mode)
        copies, keeps_stride, filled = _padding_facts(axis)
        rows *= copies
        whole &= filled
        touched *= _touched(axis)
        if not keeps_stride:
            same[i] = 1  # rows of the map of stride 1: a bound, where space to depth has no meaning
    patches = math.sqrt(touched)
    K = _space_to_depth(K, tuple(same))
    grid, factor = _grid(K.shape[3:], tuple(same), input_size, pads, padding_mode)
    # every row is a whole patch of its own; or a row for every shift of the circle
    separate = math.prod(K.shape[3:]) == 1 and not any(map(any, pads))
    exact = separate or (whole and padding_mode == "circular" and factor == 1.0)
    return _Form(K, grid, factor * math.sqrt(rows), exact), patches


def _sizes(name: str, value: Sizes, d: int, least: int) -> tuple[int, ...]:
    found = (value,) * d if isinstance(value, int) else tuple(value)
    if len(found) != d or any(not isinstance(v, int) or v < least for v in found):
        raise ValueError(f"{name} must be {d} integers of at least {least}, got {value!r}")
    return found


def _pads(padding: Sizes | str, reach: tuple[int, ...], d: int) -> list[tuple[int, int]]:
    """Pixels before and after, a dimension."""
    if padding == "valid":
        return [(0, 0)] * d
    if padding == "same":  # torch pads more at the end
        return [((n - 1) // 2, n - 1 - (n - 1) // 2) for n in reach]
    if isinstance(padding, str):
        raise ValueError(f"padding must be numbers, 'same' or 'valid', got {padding!r}")
    return [(p, p) for p in _sizes("padding", padding, d, 0)]


class _Axis(NamedTuple):
    """One dimension of a convolution."""

    n: int | None  # pixels, where they are known
    k: int
    stride: int
    dilation: int
    pad: tuple[int, int]
    mode: str

    @property
    def reach(self) -> int:
        return self.dilation * (self.k - 1) + 1


def _padding_facts(axis: _Axis) -> tuple[int, bool, bool]:
    """Square of the factor for what padding repeats (a pixel, or a row of the circulant), whether
    space to depth is right, and whether each row of a circulant occurs once."""
    before, after = axis.pad
    if axis.mode == "zeros" or not before + after:
        # a part of a larger circulant; the whole of it only for kernels of one pixel
        return 1, True, axis.reach == 1 and axis.stride == 1
    if axis.mode == "reflect":
        return 1 + (before > 0) + (after > 0), True, False
    if axis.mode == "replicate":
        return 1 + before + after, True, False
    if axis.n is None:
        if axis.stride == 1 and before + after <= axis.reach - 1:
            return 1, True, False
        raise ValueError(
            "circular padding with a stride, or wider than the kernel, needs input_size"
        )
    outputs = (axis.n + before + after - axis.reach) // axis.stride + 1
    distinct = axis.n // math.gcd(axis.n, axis.stride)
    divides = axis.n % axis.stride == 0
    return max(1, math.ceil(outputs / distinct)), divides, outputs == distinct and divides


def _touched(axis: _Axis) -> int:
    """Largest number of patch entries that one pixel becomes, padding included."""
    before, after = axis.pad
    step = axis.stride
    if axis.n is None:
        own = math.ceil(axis.k * math.gcd(axis.dilation, step) / step)
        if axis.mode == "circular" and before + after:
            return axis.k  # of stride 1, checked before: once for each position of the kernel
        return own * _padding_facts(axis)[0]
    places = torch.arange(axis.n, device="cpu")
    if axis.mode == "zeros" or not before + after:
        places = torch.nn.functional.pad(places, axis.pad, value=-1)
    else:
        line = places.double().view(1, 1, -1)
        places = torch.nn.functional.pad(line, axis.pad, mode=axis.mode).long().flatten()
    if len(places) < axis.reach:
        raise ValueError(
            f"the kernel reaches over {axis.reach} pixels, the padded image has {len(places)}"
        )
    starts = torch.arange(0, len(places) - axis.reach + 1, step, device="cpu")
    kernel = axis.dilation * torch.arange(axis.k, device="cpu")
    seen = places[starts[:, None] + kernel].flatten()
    return max(1, int(torch.bincount(seen[seen >= 0], minlength=1).max()))


def _dilated(kernel: Tensor, dilation: tuple[int, ...]) -> Tensor:
    for i, e in enumerate(dilation):
        n = kernel.shape[2 + i]
        if e > 1 and n > 1:
            shape = list(kernel.shape)
            shape[2 + i] = e * (n - 1) + 1
            places = torch.arange(0, shape[2 + i], e, device=kernel.device)
            kernel = kernel.new_zeros(shape).index_copy(2 + i, places, kernel)
    return kernel


def _space_to_depth(K: Tensor, stride: tuple[int, ...]) -> Tensor:
    """(g, out, in, *k) at stride s to (g, out, in s^d, *⌈k/s⌉) at stride 1."""
    for i, s in enumerate(stride):
        n = K.shape[3 + i]
        if s > 1:
            end = -n % s
            pad = [0, 0] * (K.ndim - 4 - i) + [0, end]
            K = torch.nn.functional.pad(K, pad).unflatten(3 + i, (-1, s)).movedim(4 + i, 3)
            K = K.flatten(2, 3)
    return K


def _grid(
    k: Sequence[int],
    stride: tuple[int, ...],
    input_size: Sequence[int] | None,
    pads: list[tuple[int, int]],
    mode: str,
) -> tuple[tuple[int, ...], float]:
    """Frequencies a dimension, and the factor that makes a bound of what they show."""
    grid, factor = [], 1.0
    for i, n in enumerate(k):
        need: int | None = None
        if n == 1:
            need = 1
        elif input_size is not None:
            size = input_size[i]
            if mode == "circular" and any(pads[i]):
                need = size // stride[i]
            else:
                inside = size if mode == "zeros" else size + pads[i][0] + pads[i][1]
                need = math.ceil((inside + stride[i] - 1) / stride[i]) + n - 1
        coarse = max(_LARGEST_GRID, 8 * n)
        if need is not None and need <= coarse:
            grid.append(need)
        else:
            grid.append(coarse)
            # |f(ω)| >= cos(m |ω - ω*|) max |f| for trigonometric polynomials of degree m
            factor /= math.cos(math.pi * (n - 1) / (2 * coarse))
    return tuple(grid), factor


def _transfer(K: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Transfer matrices (frequencies, g, out, in), complex; half of the frequencies is enough."""
    d = len(grid)
    for i, n in enumerate(grid):
        k = K.shape[3 + i]
        # the kernel is real: the other half is the complex conjugate
        frequencies = torch.arange(n // 2 + 1 if i == d - 1 else n, device=K.device)
        # reduced modulo n as integers: exact angles however large the products
        turns = (frequencies[:, None] * torch.arange(k, device=K.device)) % n
        angle = turns.double() * (-2.0 * math.pi / n)
        wave = torch.polar(torch.ones_like(angle), angle)
        wide = torch.complex128 if K.dtype in (torch.float64, torch.complex128) else torch.complex64
        K = torch.tensordot(K.to(wide), wave.to(wide), dims=([3 + i], [1])).movedim(-1, 3 + i)
    return K.flatten(3).movedim(3, 0)


def _norm_on_grid(form: _Form, iterations: int) -> Tensor:
    """The largest norm of the transfer matrices, rounding added."""
    matrices = _transfer(form.kernel, form.grid)
    # each entry is a sum over the kernel's positions, dimension by dimension, of |K_t| at most,
    # with angles good to a few roundings
    terms = sum(form.kernel.shape[3:]) + 16 * len(form.grid)
    size = form.kernel.abs().flatten(3).sum(-1).flatten(1).norm(dim=1).amax()
    error = 2.0 * rounding_of_products(terms) * size
    parts = [
        spectral_norm_bound(part, iterations=iterations).amax() for part in matrices.split(256)
    ]
    return (torch.stack(parts).amax() + error) * (1.0 + 1e-15)


def overlaps(k: Sizes, stride: Sizes, dilation: Sizes = 1, dims: int = 2) -> int:
    """Largest number of windows that hold one pixel: Π ⌈k gcd(s, e)/s⌉ over the dimensions."""
    sizes = zip(
        _sizes("kernel_size", k, dims, 1),
        _sizes("stride", stride, dims, 1),
        _sizes("dilation", dilation, dims, 1),
        strict=True,
    )
    return math.prod(math.ceil(n * math.gcd(e, s) / s) for n, s, e in sizes)
