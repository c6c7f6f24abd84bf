"""The networks: the same shape for every method, with the layers of that method."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lrmanifold import certify, linalg
from lrmanifold.experiments.data import Dataset
from lrmanifold.experiments.factors import TwoFactors
from lrmanifold.nn import (
    ConvexPotential,
    LowRankLayer,
    LowRankLinear,
    MaxMin,
)

from .peers import liresnet
from .plan import Run


def _product(pair: TwoFactors, context: certify.Context) -> Any:
    """‖A Bᵀ‖₂ of the product, not the product of the two norms."""
    layers: list[Any] = list(pair)
    Bt, A = (layer.weight for layer in layers)
    if not context.exact:
        return _power(A, Bt, context)
    Bt, A = Bt.double(), A.double()
    error = linalg.rounding_of_products(A.shape[1]) * float(A.norm() * Bt.norm())
    norm = float(linalg.spectral_norm_bound(A @ Bt)) + 2.0 * error
    size = float(A.norm() * Bt.norm())
    bias = float(layers[1].bias.double().norm())
    slope = 5.0 * (Bt.shape[1] + A.shape[1] + 8) * size
    return certify.Bound(norm, "product of both", slope=slope, offset=5.0 * bias)


def _power(A: Tensor, Bt: Tensor, context: certify.Context) -> Tensor:
    with torch.no_grad():
        v, steps = context.memory.get(context.name), 3
        if v is None or v.dtype != A.dtype:
            generator = torch.Generator().manual_seed(0)
            v, steps = torch.randn(Bt.shape[1], generator=generator).to(A), 30
        for _ in range(steps):
            u = nn.functional.normalize(A @ (Bt @ v), dim=0)
            v = nn.functional.normalize(Bt.mT @ (A.mT @ u), dim=0)
        context.remember(v)
        u = nn.functional.normalize(A @ (Bt @ v), dim=0)
    return (u @ A) @ (Bt @ v)


certify.register_bound(TwoFactors, _product)


def _linear(run: Run) -> Callable[[int, int], nn.Module]:
    def make(n: int, m: int) -> nn.Module:
        rank = min(run.rank or m, m, n)
        if run.method == "low rank":
            return LowRankLinear(n, m, rank, tau=0.0, scale=run.scale or "free")
        if run.method == "low rank tau 0.1":
            return LowRankLinear(n, m, rank, tau=0.1)
        if run.method == "orthogonal":
            return LowRankLinear(n, m, min(m, n), tau=0.0)
        if run.method == "factors":
            return TwoFactors(nn.Linear(n, rank, bias=False), nn.Linear(rank, m))
        return nn.Linear(n, m)

    return make


class Tokens(nn.Module):
    """Images as their 4 x 4 patches, (B, C, H, W) to (B, HW / 16, 16 C), four neighbours together.

    The order is that of a quadtree, so the patches of every level lie side by side: a tree of
    Patchify and 1 x 1 convolutions is then linear layers on views. H = W must be 4 times a power
    of 2.
    """

    def forward(self, x: Tensor) -> Tensor:
        """A permutation of entries."""
        batch, channels, side = x.shape[0], x.shape[1], x.shape[-1]
        levels = (side // 4).bit_length() - 1
        x = x.reshape(batch, channels, *(2,) * levels, 4, *(2,) * levels, 4)
        rows = [2 + k for k in range(levels + 1)]
        columns = [3 + levels + k for k in range(levels + 1)]
        pairs = [d for pair in zip(rows[:-1], columns[:-1], strict=True) for d in pair]
        x = x.permute(0, *pairs, 1, rows[-1], columns[-1])
        return x.reshape(batch, 4**levels, 16 * channels)


def _tokens(module: Tokens, context: certify.Context) -> certify.Bound:
    return certify.Bound(1.0, "rearranges entries", slope=0.0)


certify.register_bound(Tokens, _tokens)


def build(run: Run, data: Dataset) -> nn.Sequential:
    """The network of a run, from torch's global generator."""
    channels, height, width = data.image_shape
    make, classes = _linear(run), data.classes
    if run.network == "liresnet":
        return liresnet(channels, height, classes)
    if run.network == "mlp":
        sizes = [channels * height * width, *run.widths]
        layers: list[nn.Module] = [nn.Flatten()]
        for n, m in itertools.pairwise(sizes):
            layers += [make(n, m), MaxMin()]
        last = sizes[-1]
    elif run.network == "potential":
        last = run.widths[0]
        first = channels * height * width
        layers = [nn.Flatten(), LowRankLinear(first, last, 2 * run.rank, tau=0.0), MaxMin()]
        layers += [ConvexPotential(last, run.rank) for _ in run.widths[1:]]
    elif run.network == "folds":
        # no first layer that drops pixels: each layer folds space along `rank` directions, and with
        # as many rows as rank every Jacobian is orthogonal
        last = channels * height * width
        layers = [nn.Flatten(), *(ConvexPotential(last, run.rank, rows) for rows in run.widths)]
    elif run.network == "tree":
        layers, last, tokens = [Tokens()], 16 * channels, height * width // 16
        for i, m in enumerate(run.widths):
            if i > 0 and tokens > 1:
                # four neighbours side by side: a view, because of the order of the patches
                tokens, last = tokens // 4, 4 * last
                layers += [nn.Unflatten(1, (tokens, 4)), nn.Flatten(2)]
            layers += [make(last, m), MaxMin(-1)]
            layers += [ConvexPotential(m, rank, rank) for rank in run.folds]
            last = m
        layers += [nn.Flatten()]
        last *= tokens
    else:
        raise ValueError(
            "network must be 'mlp', 'potential', 'folds', 'tree' or 'liresnet', got "
            f"{run.network!r}"
        )
    head = nn.Linear(last, classes)
    with torch.no_grad():
        head.weight.mul_(run.head)
    return nn.Sequential(*layers, head)


def truncate(model: nn.Sequential, rank: int) -> nn.Sequential:
    """Each hidden dense layer as the two factors of its truncated SVD."""
    layers: list[nn.Module] = []
    for module in list(model)[:-1]:
        if isinstance(module, nn.Linear):
            U, s, Vh = linalg.svd(module.weight.detach().double())
            here = module.weight.device
            first = nn.Linear(module.in_features, rank, bias=False, device=here)
            second = nn.Linear(rank, module.out_features, device=here)
            with torch.no_grad():
                root = s[:rank].sqrt()
                first.weight.copy_(root[:, None] * Vh[:rank])
                second.weight.copy_(U[:, :rank] * root)
                second.bias.copy_(module.bias)
            layers.append(TwoFactors(first, second))
        else:
            layers.append(module)
    return nn.Sequential(*layers, model[-1])


def sizes(model: nn.Module) -> dict[str, int]:
    """Numbers stored in training, and numbers that a deployed network needs.

    Deployed: of each low-rank weight the two factors with the core folded in, or the dense matrix
    where that is smaller.
    """
    stored = sum(p.numel() for p in model.parameters())
    deployed = stored
    for module in model.modules():
        if isinstance(module, LowRankLayer):
            M = module.manifold
            copies = module.weight.shape[:-2].numel()
            # a convex potential needs α beside them; the layer alone does not
            deployed += copies * min(M.m * M.n, (M.m + M.n) * M.rank) - module.weight.numel()
    return {"stored": stored, "deployed": deployed}
