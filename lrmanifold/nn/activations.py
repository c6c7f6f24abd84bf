"""Activations that keep the length of a signal: what a certified network is built with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import check_integer


class MaxMin(nn.Module):
    """Sort pairs of channels: channel i and channel i + C/2 become their maximum and minimum.

    A permutation of the entries of each sample, so it is 1-Lipschitz, keeps every gradient's length
    (a ReLU loses half of it on average) and can still express every 1-Lipschitz function together
    with orthogonal layers. No parameters. An odd number of channels leaves the last one as it is.

    Parameters
    ----------
    dim : int
        The dimension of the channels; not 0, the batch.

    References
    ----------
    C. Anil, J. Lucas, R. Grosse, *Sorting out Lipschitz function approximation*, ICML 2019.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = check_integer("dim", dim)
        if self.dim == 0:
            raise ValueError("dim must be an integer, not 0 (the batch), got 0")

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        # compilers and exporters write the derivative themselves, and know no custom one
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return _sorted(x, self.dim)
        return _SortPairs.apply(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class _SortPairs(torch.autograd.Function):
    """The sort, with the derivative that it has: the same permutation.

    torch's derivative of a maximum shares the gradient of ties, which costs many masks: on a CPU it
    takes five to ten times the time of this one, more than the layers around it. Here a tie is in
    order, so the Jacobian is a permutation at every input.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return _sorted(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        x, ctx.dim = inputs
        half = x.shape[ctx.dim] // 2
        # as numbers: torch.where with a mask is slower than a product
        swapped = (x.narrow(ctx.dim, 0, half) < x.narrow(ctx.dim, half, half)).to(x.dtype)
        ctx.save_for_backward(swapped)
        ctx.save_for_forward(swapped)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _permuted(grads[0], ctx.saved_tensors[0], ctx.dim), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _permuted(tangents[0], ctx.saved_tensors[0], ctx.dim)


def _sorted(x: Tensor, dim: int) -> Tensor:
    half = x.shape[dim] // 2
    a, b = x.narrow(dim, 0, half), x.narrow(dim, half, half)
    return _joined(torch.maximum(a, b), torch.minimum(a, b), x, dim)


def _permuted(t: Tensor, swapped: Tensor, dim: int) -> Tensor:
    half = t.shape[dim] // 2
    a, b = t.narrow(dim, 0, half), t.narrow(dim, half, half)
    change = (b - a) * swapped
    return _joined(a + change, b - change, t, dim)


def _joined(first: Tensor, second: Tensor, x: Tensor, dim: int) -> Tensor:
    parts = [first, second]
    if x.shape[dim] % 2:
        parts.append(x.narrow(dim, 2 * first.shape[dim], 1))
    return torch.cat(parts, dim)
