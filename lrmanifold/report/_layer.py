"""One layer of a report: what it is, and its singular values."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg
from .._worst import worst
from ..nn import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLayer
from ..nn.kinds import is_quantized, matrices_of, matrix_of, weight_parameters
from ..nn.plan import packed_size
from ..nn.two_factors import TwoFactors, is_pair
from ..precision import STORAGE_DTYPES, storage_tolerance


@dataclass(frozen=True)
class LayerReport:
    """One linear or convolutional layer: low-rank, dense, or two factors of one matrix A Bᵀ.

    For grouped convolutions every group has a matrix of its own: `sigma_max`, `sigma_min`, `cond`
    and `drift` are each the worst of any group (so `cond` is not always their ratio), `rank` the
    smallest.

    Attributes
    ----------
    name : str
        Qualified name in the model; empty if the model is the layer.
    kind : str
        Class of the layer.
    low_rank : bool
    shape : (m, n)
        Of the weight as a matrix (of each group): outputs x inputs, for a convolution
        out_channels x in_channels · prod(kernel_size).
    groups : int
    rank : int
        Of a dense weight the numerical rank: singular values below 2 eps ‖W‖, the rounding of
        storage, count as zero. 0 where nothing was measured; `note` says why.
    sigma_max, sigma_min : float
        Largest and smallest nonzero singular value. For a convolution they are those of the matrix
        above, not of the operator on images.
    cond : float
        ‖W‖₂ ‖W⁺‖₂ = σ_max/σ_min over the nonzero singular values; nan for a zero weight, and where
        nothing was measured.
    drift : float or None
        max(|UᵀU - I|, |VᵀV - I|) of a low-rank layer.
    tau : float or None
        Bound for `cond` minus 1, where there is one.
    dense_weights, trained_weights, folded_weights : int
        m n; what is trained, (m + r + n) r; and what inference needs, (m + n) r with the core
        folded into a factor, which is also what two free factors train. For a dense layer all three
        are m n. Biases are not counted here, and
        a weight that several layers share only in the first.
    note : str
        What is unusual, if anything.
    batch : int or None
        Rows that the weight is multiplied with in one pass, batch size x output positions, if an
        example was given. A step of :class:`~lrmanifold.optim.CondLR` costs about ``rank/batch`` of
        the layer's forward and backward pass with the scalar metric, 4/3 of that with the exact
        one: nothing can hide it where the rank is not small against the batch.
    """

    name: str
    kind: str
    low_rank: bool
    shape: tuple[int, int]
    groups: int
    rank: int
    sigma_max: float
    sigma_min: float
    cond: float
    drift: float | None
    tau: float | None
    dense_weights: int
    trained_weights: int
    folded_weights: int
    note: str = ""
    batch: int | None = None
    map_cond: float | None = None

    @property
    def has_kernel(self) -> bool:
        """Whether some nonzero input is mapped to zero: rank < n."""
        return self.rank < self.shape[1]


def measure(name: str, module: Any, image: tuple[int, ...] | None = None) -> LayerReport:
    """The row of a low-rank, dense or quantized layer, or of two factors.

    `image` is what a convolution sees.
    """
    if is_pair(module):
        return _two_factors(name, module, image)
    if is_quantized(module):
        return _unmeasured(name, module, module.weight(), "quantized")
    weight = _with_values(name, module)
    if weight.layout is not torch.strided:
        return _unmeasured(name, module, weight, f"sparse ({weight.layout})")
    if weight.dtype not in STORAGE_DTYPES:
        return _unmeasured(name, module, weight, f"of {weight.dtype}")
    found = (_low_rank if isinstance(module, LowRankLayer) else _dense)(name, module, weight)
    if isinstance(module, _CONVOLUTIONS) and math.isfinite(found.cond):
        kernel = _kernel(module)
        return dataclasses.replace(found, map_cond=_map_cond(module, kernel, image))
    return found


_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, LowRankConv1d, LowRankConv2d, LowRankConv3d,
)  # fmt: skip


def _kernel(module: Any) -> Tensor:
    """With the map on images of the same cond: of W = U S Vᵀ the filters S Vᵀ, as UᵀU = I."""
    kernel: Tensor = module.weight.detach()
    if isinstance(module, LowRankLayer):
        # a union of layers with different types of kernel_size tells a checker nothing
        layer: Any = module
        X = layer.manifold.unpack(kernel.double())
        rows = (X.S @ X.V.mT).reshape(-1, *layer.kernel_size, layer.in_channels // layer.groups)
        kernel = rows.movedim(-1, 1)
    return kernel


def _map_cond(module: Any, kernel: Tensor, image: tuple[int, ...] | None) -> float | None:
    """Of the map on images."""
    circular = module.padding_mode == "circular" and module.padding not in (0, "valid")
    if circular and image is None:
        return None
    try:
        found = linalg.convolution_singular_range(
            kernel, input_size=image, stride=module.stride, padding=module.padding,
            dilation=module.dilation, groups=module.groups, padding_mode=module.padding_mode,
        )  # fmt: skip
    except ValueError:  # images that are smaller than the kernel
        return None
    if found is None:
        return None
    low, high = found
    # below it a singular value of the float32 numbers that are stored is rounding
    return high / low if low > 2.0 * torch.finfo(module.weight.dtype).eps * high else math.inf


def _unmeasured(name: str, module: Any, weight: Tensor, why: str) -> LayerReport:
    """The row of a layer whose weight is no real matrix of 16 bits or more."""
    outputs = getattr(module, "out_features", None) or getattr(module, "out_channels", None)
    inputs = getattr(module, "in_features", None)
    if outputs is None:
        outputs = weight.shape[0]
    if inputs is None:
        inputs = math.prod(weight.shape[1:])
    return LayerReport(
        name=name,
        kind=type(module).__name__,
        low_rank=False,
        shape=(int(outputs), int(inputs)),
        groups=1,
        rank=0,
        sigma_max=math.nan,
        sigma_min=math.nan,
        cond=math.nan,
        drift=None,
        tau=None,
        dense_weights=weight.numel(),
        trained_weights=weight.numel(),
        folded_weights=weight.numel(),
        note=f"not measured: its weight is {why}",
    )


def _low_rank(name: str, layer: Any, weight: Tensor) -> LayerReport:
    M = layer.manifold
    shape, groups = (M.m, M.n), weight[..., 0, 0].numel()
    wide = weight.to(linalg.compute_dtype(weight.dtype))
    finite = bool(torch.isfinite(wide).all())
    s = M.svdvals(wide).reshape(groups, -1) if finite else wide.new_full((1, 1), math.nan)
    cond = float((s[:, 0] / s[:, -1]).max())
    drift = float(M.drift(wide).max()) if finite else math.nan
    # half precision and long runs may be off by rounding; more than that is worth a word
    slack = storage_tolerance(weight.dtype)
    note = "" if finite else "NaN or Inf"
    if layer.tau is not None and cond > (1.0 + layer.tau) * (1.0 + slack):
        note = "cond above 1 + tau"
    if drift > slack:
        note = "left the manifold (U, V not orthonormal): cond is not the weight's"
    return LayerReport(
        name=name,
        kind=type(layer).__name__,
        low_rank=True,
        shape=shape,
        groups=groups,
        rank=layer.rank,
        sigma_max=float(s.max()),
        sigma_min=float(s.min()),
        cond=cond,
        drift=drift,
        tau=layer.tau,
        dense_weights=groups * M.m * M.n,
        trained_weights=packed_size(shape, layer.rank, groups),
        folded_weights=groups * (M.m + M.n) * layer.rank,
        note=note,
    )


def _two_factors(name: str, pair: TwoFactors, image: tuple[int, ...] | None) -> LayerReport:
    """The row of the product A Bᵀ: its r singular values are those of R_a Bᵀ, A = Q R_a."""
    thin: Any = pair[0]
    for key, part in pair.named_children():
        _with_values(f"{name}.{key}" if name else key, part)
    A, Bt = pair.factors()
    r = min(len(A), *Bt.shape)
    finite = bool(torch.isfinite(A).all() and torch.isfinite(Bt).all())
    s = pair.svdvals() if finite else torch.full((r,), math.nan, dtype=torch.float64)
    found = LayerReport(
        name=name,
        kind=type(pair).__name__,
        low_rank=True,
        shape=(len(A), Bt.shape[1]),
        groups=1,
        rank=r,
        sigma_max=float(s[0]),
        sigma_min=float(s[-1]),
        cond=float(s[0] / s[-1]),
        drift=None,
        tau=None,
        dense_weights=len(A) * Bt.shape[1],
        trained_weights=A.numel() + Bt.numel(),
        folded_weights=A.numel() + Bt.numel(),
        note="" if finite else "NaN or Inf",
    )
    if isinstance(thin, _CONVOLUTIONS) and math.isfinite(found.cond):
        _, R = linalg.qr(A.double(), rank_deficient=True)
        kernel = (R @ Bt.double()).reshape(-1, *thin.weight.shape[1:])
        return dataclasses.replace(found, map_cond=_map_cond(thin, kernel, image))
    return found


def _dense(name: str, module: Any, weight: Tensor) -> LayerReport:
    shape, groups = matrix_of(module)
    # of a normalised layer more than its weight: what that is made of
    size = sum(p.numel() for p in weight_parameters(module)) or groups * shape[0] * shape[1]
    eps = torch.finfo(weight.dtype).eps
    finite = bool(torch.isfinite(weight).all())
    ranks, largest, smallest = [], [], []
    if finite:
        W = matrices_of(module).detach().double()
        norms = torch.linalg.matrix_norm(W)
        for s, norm in zip(linalg.svdvals(W), norms, strict=True):
            nonzero = s[s > 2 * eps * norm]
            ranks.append(len(nonzero))
            largest.append(float(nonzero[0]) if len(nonzero) else 0.0)
            smallest.append(float(nonzero[-1]) if len(nonzero) else 0.0)
    else:
        ranks, largest, smallest = [min(shape)], [math.nan], [math.nan]
    conds = [a / b if b else math.nan for a, b in zip(largest, smallest, strict=True)]
    return LayerReport(
        name=name,
        kind=type(module).__name__,
        low_rank=False,
        shape=shape,
        groups=groups,
        rank=min(ranks),
        sigma_max=max(largest),
        sigma_min=min(smallest),
        cond=worst(conds),
        drift=None,
        tau=None,
        dense_weights=size,
        trained_weights=size,
        folded_weights=size,
        note="" if finite else "NaN or Inf",
    )


def _with_values(name: str, module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    where = f"layer {name!r} ({type(module).__name__})"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"report needs values, {where} is lazy: run a batch through the model")
    if not isinstance(weight, Tensor):
        raise ValueError(f"report needs values, {where} has no weight")
    if weight.is_meta:
        raise ValueError(
            f"report needs values, {where} is on the meta device: use to_empty() and load a state"
        )
    return weight.detach()
