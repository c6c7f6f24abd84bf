"""Fine-tuning a frozen dense weight by a well-conditioned low-rank update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .._arguments import check_instance, check_module
from .._wrappers import unwrapped
from ._carry import carry_over, take_marks
from ._obstacles import weight_defect
from .change import PARTS, Change


class LowRankAdapter(Change):
    r"""A frozen ``nn.Linear`` plus a trained update ΔW = U S Vᵀ - U₀ S₀ V₀ᵀ that starts at zero.

    **Zero start and a condition number.** A product B A that starts at B = 0 (LoRA) has no
    condition number at the start and any one later. Here what is trained is the point U S Vᵀ of
    :class:`~lrmanifold.WellConditioned`, with cond <= 1 + τ from the first step to the last, and
    the point it started from is subtracted. At the start the two terms are computed by the same
    operations on the same numbers: the layer's output is *to the bit* that of the dense layer, in
    every dtype, and the frozen weight is never rewritten. The price is a second thin product, 2 b
    (m + n) r flops more for a batch of b; :meth:`merge` removes both.

    What the bound says and what not: cond(U S Vᵀ) <= 1 + τ keeps all r directions of the adapter
    in use and its gradients of one scale. ΔW itself has rank up to 2r and no bound, neither has
    W + ΔW.

    The size of S₀ does not scale the learning rate (the Riemannian step acts on the matrix U S Vᵀ),
    but how fast bases turn: a step of size ‖ξ‖ turns them by about ‖ξ‖/σ.

    Parameters
    ----------
    dense : nn.Linear
        Its parameters are taken themselves, not copied, and frozen; its hooks, and buffers and
        attributes that somebody added, go on to the adapter. A layer whose weight is computed
        (pruned, normalised, parametrized) is refused.
    rank : int
        In 1..min(in_features, out_features).
    tau : float or None
        The condition number of U S Vᵀ stays at most 1 + tau; None for no bound.
    init : {"random", "svd"}
        Where U S Vᵀ starts: Haar-uniform bases and a multiple of the identity, the root mean square
        of W's singular values; or the leading singular directions of W, projected to the bound.
    dtype : torch.dtype, optional
        Of the update, the dense layer's by default; float32 beside a bfloat16 weight, say.
    **geometry
        `gradient` and `retraction` of :class:`LowRankLinear`.

    Attributes
    ----------
    weight : Tensor, shape (out_features, in_features)
        W + ΔW, formed when it is asked for. In the state dict "weight" is W alone, so that
        checkpoints of the dense layer load (``strict=False``).
    base_weight, bias : nn.Parameter
        Of the dense layer, frozen.
    update : LowRankLinear
        The trained point U S Vᵀ.
    start : Tensor, shape (m + r + n, r)
        Buffer: the point at the start, packed. It belongs to the update: save both, by
        :func:`trained_state_dict` or in the whole state dict. Loading one without the other raises.

    Notes
    -----
    Weight decay on ``update.weight`` would pull U S Vᵀ to zero, that is ΔW to -U₀ S₀ V₀ᵀ: leave it
    at 0.

    Examples
    --------
    >>> model.fc1 = lrmanifold.nn.LowRankAdapter(model.fc1, rank=8)
    >>> optimizer = lrmanifold.optim.CondLR(model.fc1.parameters(), lr=0.05)
    >>> model.fc1 = model.fc1.merge()  # an nn.Linear again
    """

    bias: nn.Parameter | None
    start: Tensor
    # Names that a layer in its place does not take over.
    inner_parts = frozenset({"update", "start"})
    # Its scale is always 1, and not saved.
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state
    __jit_unused_properties__ = ["weight", "base_weight", "rank"]  # noqa: RUF012

    def __init__(
        self,
        dense: nn.Linear,
        rank: int,
        *,
        tau: float | None = 0.1,
        init: str = "random",
        dtype: torch.dtype | None = None,
        **geometry: Any,
    ) -> None:
        _check(dense)
        super().__init__(
            dense.in_features,
            dense.out_features,
            rank,
            weight=dense.weight,
            tau=tau,
            init=init,
            device=dense.weight.device,
            dtype=dtype or dense.weight.dtype,
            **geometry,
        )
        # Frozen last: an error above leaves the dense layer as it was.
        dense.requires_grad_(False)
        # Not by register_parameter, for which the property is an attribute of that name.
        self._parameters["weight"] = dense.weight  # type: ignore[assignment]
        self._keep(dense.weight)
        carry_over(dense, self)
        self.train(dense.training)

    @property
    def base_weight(self) -> nn.Parameter:
        """W, the frozen weight."""
        return self._parameters["weight"]  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """W + ΔW, dense, with gradients for the update; formed anew at each call.

        For code that reads ``layer.weight`` instead of calling the layer, as torch's transformer
        and attention do. Of the dtype of W.
        """
        W = self.base_weight
        change = self.dense_change(W.dtype)
        return (W.to(change.dtype) + change).to(W.dtype)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # Reached by tensors only, and those are for replicas of DataParallel; see nn.Module.
        if not self.__dict__.get("_is_replica"):
            raise TypeError(f"weight must be an nn.Parameter, got {type(value).__name__}")
        self._parameters["weight"] = value  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """W x + b + (U S Vᵀ - U₀ S₀ V₀ᵀ) x for x of shape (..., in_features)."""
        y = F.linear(x, self._parameters["weight"], self.bias)  # type: ignore[arg-type]
        return y + self._difference(x.to(self.start.dtype)).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """The ``nn.Linear`` with the same function, of weight W + ΔW, trainable again.

        This layer stays as it is. The sum is formed in at least float32 and rounded once.
        """
        W, delta = self.base_weight, self.delta()
        merged = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=W.device,
            dtype=W.dtype,
        )
        merged.weight.copy_(W.to(torch.promote_types(W.dtype, delta.dtype)) + delta)
        take_marks(merged.weight, W)
        if self.bias is not None:
            merged.bias.copy_(self.bias)
        return merged.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankAdapter:
        super()._apply(fn, recurse)
        self._keep(self._parameters["weight"])
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._keep(self._parameters["weight"])

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


def trained_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What training has changed in a model with frozen parts: much smaller than its state dict.

    All parameters that require gradients, and for each adapter (:class:`LowRankAdapter`, the active
    one of :func:`adapt`, one of PEFT) the point it started from and its scale, without which its
    update means nothing. Load it by ``model.load_state_dict(state, strict=False)`` into the model
    with the same frozen parts. Buffers of other modules (statistics of batch norms) are not in it.

    Parameters
    ----------
    model : nn.Module
        Of a compiled, DDP or DataParallel model the one inside is meant: names have no prefix of
        the wrapper, and the state is loaded into the model inside.

    Returns
    -------
    dict
        From names to tensors, as in ``model.state_dict()``.
    """
    model = unwrapped(check_module("model", model))
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, module in model.named_modules():
        if not isinstance(module, Change):
            continue
        if isinstance(module, LowRankAdapter) or module.update.weight.requires_grad:
            prefix = f"{name}." if name else ""
            wanted |= {f"{prefix}{key}" for key in PARTS}
    return {key: value for key, value in model.state_dict().items() if key in wanted}


def _check(dense: Any) -> None:
    """Raise, before anything is changed, for a layer that an adapter could not stand for."""
    check_instance("dense", dense, nn.Linear, "a Linear")
    weight = dense._parameters.get("weight")
    reason = ""
    if parametrize.is_parametrized(dense) or weight is None:
        reason = "its weight is computed (weight_norm, prune, a parametrization)"
    elif isinstance(dense, nn.modules.lazy.LazyModuleMixin):
        reason = "it is lazy: run a batch through the model first"
    elif type(dense).forward is not nn.Linear.forward or "forward" in vars(dense):
        reason = f"it has a forward of its own ({type(dense).__name__})"
    elif vars(dense).get("_compiled_call_impl") is not None:
        reason = "it is compiled: adapt first, then compile"
    else:
        reason = weight_defect(weight)
    if reason:
        raise ValueError(f"dense must be a plain Linear with a weight of its own, but {reason}")
