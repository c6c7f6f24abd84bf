"""LiResNet, rebuilt from its paper: convolutions x + K * x, norms by power iteration in training.

K. Hu, A. Zou, Z. Wang, K. Leino, M. Fredrikson, *Unlocking deterministic robustness certification
on ImageNet*, NeurIPS 2023: a strided stem, linear residual convolutions with MinMax, a neck with
orthogonal rows (from a Cholesky factor), dense linear residuals, a last layer with rows of norm 1,
EMMA as the loss. Nothing of it is low-rank. Certified here by the same sound bounds as all others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrmanifold import certify, linalg
from lrmanifold.nn import MaxMin

WIDTH, DEPTH, FEATURES, DENSE = 64, 4, 256, 5
_ITERATIONS = 10


def _rounding(W: Tensor, bias: Tensor, copies: int, pixels: int) -> dict[str, float]:
    """Slope and offset of products in float64, as the library has them for its own layers."""
    inner = W[0].numel() + 8
    size, shift = float(W.double().norm()), float(bias.detach().double().norm())
    return {"slope": 5.0 * inner * size * copies, "offset": 5.0 * shift * math.sqrt(pixels)}


class LinearResidual(nn.Module):
    """x + K * x + b on images, one convolution of the kernel K + δ; its norm is that of the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(channels))
        with torch.no_grad():
            self.kernel.mul_(0.3)

    @property
    def total(self) -> Tensor:
        """K + δ."""
        delta = torch.zeros_like(self.kernel)
        delta[:, :, 1, 1] = torch.eye(len(delta), dtype=delta.dtype, device=delta.device)
        return self.kernel + delta

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.total, self.bias, padding=1)


class DenseResidual(nn.Module):
    """x + A x + b."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(features, features) / features**0.5)
        self.bias = nn.Parameter(torch.zeros(features))

    @property
    def total(self) -> Tensor:
        """I + A."""
        W = self.weight
        return W + torch.eye(len(W), dtype=W.dtype, device=W.device)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.total, self.bias)


class OrthogonalRows(nn.Module):
    """L⁻¹ W with L Lᵀ = W Wᵀ, on vectors or on separate patches of images."""

    def __init__(self, n: int, m: int, patch: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, n) / n**0.5)
        self.bias = nn.Parameter(torch.zeros(m))
        self.patch = patch

    @property
    def rows(self) -> Tensor:
        """The matrix; rows of norm 1 up to a small shift of the Gram matrix."""
        with torch.autocast(self.weight.device.type, enabled=False):
            gram = self.weight @ self.weight.mT
            shift = 1e-5 * gram.diagonal().mean().detach()
            eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            # without a report to the host, which an accelerator would be waited for
            L = torch.linalg.cholesky_ex(gram + shift * eye)[0]
            return torch.linalg.solve_triangular(L, self.weight, upper=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.patch:
            return F.linear(x, self.rows, self.bias)
        kernel = self.rows.view(len(self.weight), -1, self.patch, self.patch)
        return F.conv2d(x, kernel, self.bias, stride=self.patch)


def _convolution(module: LinearResidual, context: certify.Context) -> Any:
    if context.exact:
        K = module.total.detach().double()
        shape = context.need_shape("the norm of the convolution depends on the size of the image")
        norm = float(linalg.convolution_norm(K, input_size=shape[-2:], padding=1)) * (1.0 + 1e-12)
        pixels = math.prod(shape[-2:])
        return certify.Bound(norm, "map of K + δ", **_rounding(K, module.bias, 9, pixels))
    K, shape = module.total, context.need_shape("power iteration")
    with torch.no_grad():
        x, steps = context.memory.get(context.name), _ITERATIONS
        if x is None:
            x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(K)
        for _ in range(steps):
            y = F.conv2d(x, K, padding=1)
            x = F.conv_transpose2d(y, K, padding=1)
            x = x / x.norm()
        context.remember(x)
        y = F.conv2d(x, K, padding=1)
        y = y / y.norm()
    return (y * F.conv2d(x, K, padding=1)).sum()


def _matrix(module: DenseResidual, context: certify.Context) -> Any:
    if context.exact:
        A = module.total.detach().double()
        norm = float(linalg.spectral_norm_bound(A)) * (1.0 + 1e-12)
        return certify.Bound(norm, "norm of I + A", **_rounding(A, module.bias, 1, 1))
    A = module.total
    with torch.no_grad():
        v = context.memory.get(context.name)
        if v is None:
            v = torch.randn(A.shape[1], generator=torch.Generator().manual_seed(0)).to(A)
        for _ in range(_ITERATIONS):
            v = F.normalize(A.mT @ (A @ v), dim=0)
        context.remember(v)
        u = F.normalize(A @ v, dim=0)
    return u @ A @ v


def _orthogonal(module: OrthogonalRows, context: certify.Context) -> Any:
    if not context.exact:
        return torch.ones((), dtype=module.weight.dtype, device=module.weight.device)
    Q = module.rows.detach().double()
    norm = float(linalg.spectral_norm_bound(Q)) * (1.0 + 1e-12)
    pixels = 1
    if module.patch:
        shape = context.need_shape("the bias is added at every patch")
        pixels = math.prod(side // module.patch for side in shape[-2:])
    return certify.Bound(norm, "norm of the rows", **_rounding(Q, module.bias, 1, pixels))


certify.register_bound(LinearResidual, _convolution)
certify.register_bound(DenseResidual, _matrix)
certify.register_bound(OrthogonalRows, _orthogonal)


def liresnet(channels: int, side: int, classes: int) -> nn.Sequential:
    """About 0.8 million numbers for images of 32 x 32."""
    half = side // 2
    layers: list[nn.Module] = [nn.Conv2d(channels, WIDTH, 5, stride=2, padding=2), MaxMin()]
    for _ in range(DEPTH):
        layers += [LinearResidual(WIDTH), MaxMin()]
    layers += [OrthogonalRows(16 * WIDTH, WIDTH, patch=4), nn.Flatten()]
    layers += [OrthogonalRows(WIDTH * (half // 4) ** 2, FEATURES), MaxMin()]
    for _ in range(DENSE):
        layers += [DenseResidual(FEATURES), MaxMin()]
    head = nn.Linear(FEATURES, classes)
    unit_rows(head)
    return nn.Sequential(*layers, head)


@torch.no_grad()
def unit_rows(head: Any) -> None:
    """Rows of the last layer to norm 1, after every step."""
    head.weight.copy_(F.normalize(head.weight, dim=1))
