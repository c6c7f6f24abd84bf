"""Activations that keep the length of a signal: what a certified network is built with."""

from __future__ import annotations

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
        half = x.shape[self.dim] // 2
        a, b = x.narrow(self.dim, 0, half), x.narrow(self.dim, half, half)
        parts = [torch.maximum(a, b), torch.minimum(a, b)]
        if x.shape[self.dim] % 2:
            parts.append(x.narrow(self.dim, 2 * half, 1))
        return torch.cat(parts, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
