"""Independent attacks on certificates: nothing here uses the package's own."""

from __future__ import annotations

import torch
from torch import Tensor


def margin(z: Tensor, y: Tensor) -> Tensor:
    """Largest other logit minus the true one."""
    own = z.gather(1, y[:, None])[:, 0]
    return z.scatter(1, y[:, None], -torch.inf).amax(1) - own


def strongest(model, x: Tensor, y: Tensor, radius: Tensor, steps: int = 40, restarts: int = 3):
    """Largest margin that projected gradient ascent finds in each sample's own ball, (B,).

    From x itself and from random points of the sphere, with falling steps; the maximum is taken
    over every iterate.
    """
    shape = (-1, *[1] * (x.ndim - 1))
    best = margin(model(x), y).detach()
    generator = torch.Generator().manual_seed(0)
    for restart in range(restarts):
        delta = torch.zeros_like(x)
        if restart:
            delta = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x)
            delta = delta * (radius / delta.flatten(1).norm(dim=1)).view(shape)
        for k in range(steps):
            delta = delta.detach().requires_grad_()
            gap = margin(model(x + delta), y)
            best = torch.maximum(best, gap.detach())
            (g,) = torch.autograd.grad(gap.sum(), delta)
            length = g.flatten(1).norm(dim=1).clamp_min(1e-30).view(shape)
            size = radius.view(shape) * (2.0 if k < 3 else 1.5 * (1 - k / steps))
            delta = delta.detach() + size * g / length
            norm = delta.flatten(1).norm(dim=1).clamp_min(1e-30)
            delta = delta * (radius / norm).clamp_max(1.0).view(shape)
        best = torch.maximum(best, margin(model(x + delta), y).detach())
    return best


def power_iteration(f, x: Tensor, steps: int = 60) -> float:
    """The norm of the linear map f (without bias) from below."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype).to(x)
    v = v / v.norm()
    for _ in range(steps):
        u, pull = torch.func.vjp(f, v)
        w = pull(u)[0]
        v = w / w.norm()
    return float(f(v).detach().norm())
