"""A trained change of a frozen weight that starts at zero: U S Vᵀ - U₀ S₀ V₀ᵀ."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import linalg
from .._arguments import check_choice, check_number, shown
from ..factors import unpack
from ..manifolds import FixedRank
from ..parameter import gathered, is_wrapped_in_ddp
from ..precision import storage_tolerance, without_autocast
from ._whole import WholeWeight
from .linear import LowRankLinear

#: Under this name torch keeps what is no tensor of a module, here the scale.
SCALE = "_extra_state"
#: What a state dict has of a change.
PARTS = ("start", "update.weight", SCALE)


class Change(WholeWeight):
    r"""ΔW = s (U S Vᵀ - U₀ S₀ V₀ᵀ), where U S Vᵀ is trained and the point it started from is kept.

    What adapters of all kinds hold, one for each name. See :class:`LowRankAdapter` for why the
    difference, and not a product that starts at zero.

    Parameters
    ----------
    in_features, out_features : int
        n and m of the weight that is changed.
    rank : int
        In 1..min(m, n).
    weight : Tensor, shape (m, n), optional
        The weight that is changed: where U S Vᵀ starts depends on it. Without it (it is quantized,
        say) the start has the size that torch's own layer would have.
    tau : float or None
        The condition number of U S Vᵀ stays at most 1 + tau; None for no bound.
    alpha : float, optional
        The scale s is alpha / rank, as in LoRA; 1 by default. It does not follow a rank that
        changes later.
    dropout : float
        Probability that an input of the change, not of the frozen layer, is set to 0 in training.
    init : {"random", "svd"}
        As in :class:`LowRankAdapter`; "svd" needs the weight.
    device, dtype
        As in torch.
    **geometry
        `gradient` and `retraction` of :class:`LowRankLinear`.

    Attributes
    ----------
    update : LowRankLinear
        The trained point U S Vᵀ.
    start : Tensor, shape (m + r + n, r)
        Buffer: the point at the start, packed.
    change_scale : float
        Saved with the two, and loaded with them.
    change_dropout : float
    """

    start: Tensor
    # Of the class, so that a layer in an adapter's place does not inherit them. Long names: plain
    # ones would hide buffers that hooks of a dense layer keep under them.
    change_scale: float = 1.0
    change_dropout: float = 0.0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        weight: Tensor | None = None,
        tau: float | None = 0.1,
        alpha: float | None = None,
        dropout: float = 0.0,
        init: str = "random",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **geometry: Any,
    ) -> None:
        super().__init__()
        check_choice("init", init, ("random", "svd"))
        dropout = check_number("dropout", dropout, low=0, high=1, open_high=True)
        if alpha is not None:
            alpha = check_number("alpha", alpha, low=0, open_low=True)
        self.in_features, self.out_features = in_features, out_features
        update = LowRankLinear(
            in_features,
            out_features,
            rank,
            bias=False,
            tau=tau,
            device=device,
            dtype=dtype,
            **geometry,
        )
        if weight is None and init == "svd":
            raise ValueError("init='svd' needs a weight with values, got none: use init='random'")
        if not update.weight.is_meta:
            _place(update, weight, init)
        self.update = update
        self.register_buffer("start", update.weight.detach().as_subclass(Tensor).clone())
        if alpha is not None:
            self.change_scale = alpha / update.rank
        if dropout:
            self.change_dropout = dropout

    @property
    def rank(self) -> int:
        """Rank of the trained point; ΔW has up to twice as much."""
        return self.update.rank

    def forward(self, x: Tensor) -> Tensor:
        """ΔW x for x of shape (..., in_features), in the dtype of the change."""
        x = x.to(self.start.dtype)
        if self.change_dropout:
            x = F.dropout(x, self.change_dropout, self.training)  # one mask for both terms
        y = self._difference(x)
        return y if self.change_scale == 1.0 else self.change_scale * y

    def _difference(self, x: Tensor) -> Tensor:
        U, S, V = unpack(self.start, self.out_features, self.in_features)
        before = self.update._last(self.update._first(x, V), U, S, None)
        # The same operations on the same numbers at the start: exactly 0.
        return self.update(x) - before

    def dense_change(self, dtype: torch.dtype | None = None) -> Tensor:
        """ΔW, dense, shape (out_features, in_features), with gradients.

        Of a dtype that holds both at least float32 and `dtype`.
        """
        wide = linalg.compute_dtype(self.start.dtype)
        wide = wide if dtype is None else torch.promote_types(wide, dtype)
        now = self.update.manifold.to_dense(self.update.weight.to(wide))
        U, S, V = unpack(self.start.to(wide), self.out_features, self.in_features)
        change = now - U @ S @ V.mT  # in this order exactly 0 at the start
        return change if self.change_scale == 1.0 else self.change_scale * change

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The change ΔW, dense, shape (out_features, in_features), in at least float32."""
        wide = linalg.compute_dtype(self.start.dtype)
        now, start = (
            unpack(X.detach().to(wide), self.out_features, self.in_features)
            for X in (self.update.weight, self.start)
        )
        return self.change_scale * _difference_of(*now, *start)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Change:
        before = self.start.dtype
        super()._apply(fn, recurse)
        if self.start.dtype != before:
            self._remove_rounding()
        return self

    def _remove_rounding(self) -> None:
        """What the update does after a change of dtype, the start does too: ΔW stays the same."""
        M = self._manifold_of_rank(self.start.shape[-1])
        if not self.start.is_meta and not _is_point(M, self.start):
            with torch.no_grad():
                self.start.copy_(M.projx(self.start))

    def _manifold_of_rank(self, rank: int) -> FixedRank:
        """The update's manifold; where the update began it may have had another rank."""
        return copy.copy(self.update.manifold).set_rank_(rank)

    def get_extra_state(self) -> Tensor:
        """The scale, which torch puts into the state dict as ``_extra_state``."""
        # In float64, and no buffer: it must not be rounded with the weights.
        return torch.tensor(self.change_scale, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take the scale of a state dict, with which its factors were trained."""
        if not state.is_meta:
            self.change_scale = float(state)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        rest = (prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._run_load_hooks(state_dict, *rest)
        self.rename_old_keys(state_dict, prefix)
        parts = {key: state_dict.get(prefix + key) for key in PARTS}
        if reason := self.why_not_loaded(parts):
            error_msgs.append(f"{prefix}{reason}")
            state_dict.pop(prefix + "update.weight", None)
            return
        start, update = parts["start"], parts["update.weight"]
        if isinstance(update, Tensor) and not self._takes(update):
            return  # the update says why; start and scale mean nothing without it
        if isinstance(start, Tensor) and start.shape != self.start.shape:
            self.start = self.start.new_empty(start.shape)  # of another rank
        self._load_without_hooks(state_dict, *rest)
        if isinstance(start, Tensor) and start.dtype != self.start.dtype:
            self._remove_rounding()

    def rename_old_keys(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Give the scale of an older state dict its present key, in place."""
        has_scale = type(self).get_extra_state is not nn.Module.get_extra_state
        if has_scale and prefix + "scale" in state_dict:
            state_dict[prefix + SCALE] = state_dict.pop(prefix + "scale")

    def why_not_loaded(self, parts: Mapping[str, Any]) -> str:
        """Why what a state dict has of ``PARTS`` cannot be loaded, in words; or "".

        The value of ``update.weight`` is left to the layer that it is the weight of.
        """
        start, update, scale = (parts.get(key) for key in PARTS)
        if (start is None) != (update is None):
            lacks, has = PARTS[:2] if start is None else PARTS[1::-1]
            return (
                f"{lacks} is missing, and {has} means nothing without it: save an "
                "adapter by lrmanifold.nn.trained_state_dict(model), which keeps both"
            )
        if isinstance(start, Tensor):
            m, n = self.out_features, self.in_features
            rank = start.shape[-1] if start.ndim == 2 else 0
            if not 1 <= rank <= min(m, n) or start.shape[0] != m + rank + n:
                return (
                    f"start must have shape ({m} + r + {n}, r) with r in 1..{min(m, n)}, got "
                    f"{tuple(start.shape)}"
                )
        if scale is None or (isinstance(scale, Tensor) and scale.is_meta):
            return ""
        if not (isinstance(scale, Tensor) and scale.numel() == 1 and math.isfinite(scale)):
            return f"{SCALE} must be a finite number, the scale, got {shown(scale)}"
        return ""

    def _takes(self, value: Tensor) -> bool:
        """Whether the update will load this weight, of whatever rank."""
        M = self._manifold_of_rank(self.update._rank_of(value))
        if tuple(value.shape) != M.point_shape:
            return False
        if value.shape != self.update.weight.shape and is_wrapped_in_ddp(self.update.weight):
            return False
        return value.is_meta or _is_point(M, gathered(value))

    def extra_repr(self) -> str:
        return f"scale={self.change_scale:g}, dropout={self.change_dropout:g}"


@without_autocast
def _difference_of(
    U: Tensor, S: Tensor, V: Tensor, U_0: Tensor, S_0: Tensor, V_0: Tensor
) -> Tensor:
    """U S Vᵀ - U₀ S₀ V₀ᵀ."""
    return torch.cat((U @ S, -U_0 @ S_0), -1) @ torch.cat((V, V_0), -1).mT


def _is_point(M: FixedRank, X: Tensor) -> bool:
    tol = storage_tolerance(X.dtype)
    return M.check_point_on_manifold(X, atol=tol, rtol=tol)


@torch.no_grad()
def _place(update: LowRankLinear, W: Tensor | None, init: str) -> None:
    """Give `update` its start; nothing but `update` is written."""
    M = update.manifold
    if W is None or W.is_meta:
        size = math.sqrt(M.m / (3.0 * min(M.m, M.n)))  # torch's entries have variance 1/(3 n)
    else:
        if not bool(torch.isfinite(W).all()):
            raise ValueError("dense.weight must be finite, got NaN or Inf")
        W = W.detach().to(torch.promote_types(W.dtype, torch.float32))
        if init == "svd":
            update.weight.copy_(M.from_dense(W))
            return
        size = float(torch.linalg.matrix_norm(W)) / min(M.m, M.n) ** 0.5
    if size > 0:  # of a zero weight, the size of a fresh layer
        S = M.unpack(update.weight.data).S
        S.copy_(size * torch.eye(M.rank, dtype=S.dtype, device=S.device))
