"""Convolutions as explicit matrices, for small images."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Padding = Literal["circular", "full", "same", "valid"]


def convolve(x: Tensor, kernel: Tensor, padding: Padding, stride: int = 1) -> Tensor:
    """Cross-correlation of images x (B, C_in, H, W) with a kernel (C_out, C_in, k, k).

    ``"circular"``: the image is periodic; ``"full"``: every patch that meets the image;
    ``"same"``: as many patches as pixels (odd k); ``"valid"``: patches inside the image.
    """
    k = kernel.shape[-1]
    around = {"circular": 0, "full": k - 1, "same": (k - 1) // 2, "valid": 0}[padding]
    if padding == "circular":
        before, after = (k - 1) // 2, k - 1 - (k - 1) // 2
        x = functional.pad(x, (before, after, before, after), mode="circular")
    # not conv2d: on a GPU its float32 has the ten bits of TF32 by default, a product all of them
    patches = functional.unfold(x, k, padding=around, stride=stride)
    height, width = ((side + 2 * around - k) // stride + 1 for side in x.shape[-2:])
    return (matricised(kernel) @ patches).unflatten(-1, (height, width))


def operator(kernel: Tensor, size: int, padding: Padding, stride: int = 1) -> Tensor:
    """The matrix T of the convolution on images (C_in, size, size)."""
    channels = kernel.shape[1]
    pixels = channels * size * size
    basis = torch.eye(pixels, dtype=kernel.dtype, device=kernel.device)
    images = basis.reshape(pixels, channels, size, size)
    return convolve(images, kernel, padding, stride).flatten(1).mT


def matricised(kernel: Tensor) -> Tensor:
    """K, shape (C_out, C_in k²): what acts on one patch."""
    return kernel.flatten(1)
