"""Low-rank multi-head attention: torch's function, with four projections of low rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import check_choice, check_flag, check_instance, check_integer, check_number
from ._carry import take_marks
from ._computed import ComputedWeight
from ._masks import merged_masks
from ._obstacles import ATTENTION_WEIGHTS
from .layer import INITS, LowRankLayer
from .linear import LowRankLinear

#: Names of the projections, which are linear layers without bias but for the last.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class LowRankMultiheadAttention(ComputedWeight):
    """Drop-in for ``nn.MultiheadAttention`` whose projections are low-rank layers.

    The projections of query, key, value and output are layers of their own, `q_proj`, `k_proj`,
    `v_proj` and `out_proj`: each with its rank, listed by :func:`lrmanifold.report`, moved by every
    optimizer of this library. Any of them may be a dense ``nn.Linear`` instead. In torch's layer
    the first three are one tensor, which no factorization could share.

    All arguments of torch's forward are taken: masks of both kinds, `need_weights`,
    `average_attn_weights`, `is_causal`, inputs without a batch. Without `need_weights` it runs by
    ``scaled_dot_product_attention``. torch's fused kernel for whole encoder layers reads dense
    weights: an ``nn.TransformerEncoderLayer`` does not take it with this attention inside. Nested
    tensors are refused. ``nn.TransformerEncoder`` makes them of padded batches, unless this
    attention is in the layer it is built from, or comes in by a conversion of the whole encoder;
    otherwise set its ``use_nested_tensor = False``.

    Parameters
    ----------
    embed_dim, num_heads
        As in torch.
    rank : int
        Of the projections, cut to the smaller side of each.
    dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first
        As in torch.
    tau, gradient, retraction, scale
        Of the projections, as in :class:`LowRankLinear`.
    device, dtype
        As in torch.

    Attributes
    ----------
    in_proj_bias : nn.Parameter or None, shape (3 embed_dim,)
        Of query, key and value, as in torch.
    in_proj_weight : Tensor or None
        The dense weights of query, key and value in one piece, formed when it is asked for; None
        with `kdim` or `vdim`, as in torch.
    """

    q_proj: Any
    k_proj: Any
    v_proj: Any
    out_proj: Any
    in_proj_bias: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    # Of torch's layer, what this one does not take over: it has its own.
    replaced_parts = frozenset({*ATTENTION_WEIGHTS, "out_proj"})
    # Three weights and not one: torch's fused encoder layer asks for this, and steps aside.
    _qkv_same_embed_dim = False
    inner_parts = frozenset(PROJECTIONS)
    set_instead = "the weights of its projections q_proj, k_proj and v_proj, or densify it first"

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        rank: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        tau: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **geometry: Any,
    ) -> None:
        super().__init__()
        self.embed_dim = check_integer("embed_dim", embed_dim, low=1)
        self.num_heads = check_integer("num_heads", num_heads, low=1)
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads = {num_heads}, got {embed_dim}"
            )
        self.head_dim = self.embed_dim // self.num_heads
        self.kdim = self.embed_dim if kdim is None else check_integer("kdim", kdim, low=1)
        self.vdim = self.embed_dim if vdim is None else check_integer("vdim", vdim, low=1)
        rank = check_integer("rank", rank, low=1)
        self.dropout = check_number("dropout", dropout, low=0, high=1)
        self.batch_first = check_flag("batch_first", batch_first)
        self.add_zero_attn = check_flag("add_zero_attn", add_zero_attn)
        bias = check_flag("bias", bias)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, (m, n) in self._shapes().items():
            biased = bias and name == "out_proj"
            r = min(rank, m, n)
            layer = LowRankLinear(n, m, r, biased, tau=tau, **geometry, **factory)
            self.add_module(name, layer)
        size = self.embed_dim
        in_bias = nn.Parameter(torch.zeros(3 * size, **factory)) if bias else None
        self.register_parameter("in_proj_bias", in_bias)
        for name in ("bias_k", "bias_v"):
            extra = None
            if check_flag("add_bias_kv", add_bias_kv):
                extra = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, 1, size, **factory)))
            self.register_parameter(name, extra)
        if bias:
            with torch.no_grad():
                self.out_proj.bias.zero_()

    @property
    def _in_one_piece(self) -> bool:
        """Whether torch's layer has one weight for query, key and value."""
        return self.kdim == self.embed_dim == self.vdim

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the projections."""
        e = self.embed_dim
        inputs = zip(PROJECTIONS, (e, self.kdim, self.vdim, e), strict=True)
        return {name: (e, n) for name, n in inputs}

    # -- conversion

    @classmethod
    def from_dense(
        cls,
        module: nn.MultiheadAttention,
        rank: int | Mapping[str, int],
        *,
        init: str = "svd",
        **geometry: Any,
    ) -> LowRankMultiheadAttention:
        """A low-rank attention from a dense one.

        Parameters
        ----------
        module : nn.MultiheadAttention
        rank : int or dict
            Of all projections, cut to the smaller side of each; or by name, "q_proj", "k_proj",
            "v_proj", "out_proj": those that are left out stay dense.
        init : {"svd", "random"}
        **geometry
            As in :meth:`LowRankLinear.from_dense`.

        Returns
        -------
        LowRankMultiheadAttention
            With the dtype, device, mode and ``requires_grad`` of `module`.
        """
        check_instance("module", module, nn.MultiheadAttention, "a MultiheadAttention")
        check_choice("init", init, INITS)
        dense = projections(module)
        if isinstance(rank, Mapping):
            if unknown := set(rank) - set(PROJECTIONS):
                raise ValueError(f"rank must name some of {PROJECTIONS}, got {sorted(unknown)}")
            ranks = {k: check_integer(f"rank[{k!r}]", r, low=1) for k, r in rank.items()}
        else:
            rank = check_integer("rank", rank, low=1)
            ranks = {k: min(rank, *p.weight.shape) for k, p in dense.items()}
        layers = {
            k: LowRankLinear.from_dense(p, ranks[k], init=init, **geometry) if k in ranks else p
            for k, p in dense.items()
        }
        return cls._of(module, layers)

    @classmethod
    def _of(
        cls, module: nn.MultiheadAttention, layers: Mapping[str, nn.Module]
    ) -> LowRankMultiheadAttention:
        """An attention with these projections and the rest of `module`."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        for key in ("embed_dim", "num_heads", "head_dim", "kdim", "vdim"):
            setattr(new, key, getattr(module, key))
        for key in ("dropout", "batch_first", "add_zero_attn"):
            setattr(new, key, getattr(module, key))
        for key, layer in layers.items():
            new.add_module(key, layer)
        for key in ("in_proj_bias", "bias_k", "bias_v"):
            value = getattr(module, key)
            new.register_parameter(key, None if value is None else copy_of(value))
        return new.train(module.training)

    def to_dense(self) -> nn.MultiheadAttention:
        """The ``nn.MultiheadAttention`` with the same function."""
        some = next(self.parameters())
        dense = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            self.in_proj_bias is not None,
            self.bias_k is not None,
            self.add_zero_attn,
            self.kdim,
            self.vdim,
            self.batch_first,
            device=some.device,
            dtype=some.dtype,
        )
        weights = {name: dense_weight(getattr(self, name)) for name in PROJECTIONS}
        with torch.no_grad():
            for name, target in projections(dense, copy=False).items():
                target.weight.copy_(weights[name])
            if self.out_proj.bias is not None:
                dense.out_proj.bias.copy_(self.out_proj.bias)
                dense.out_proj.bias.requires_grad_(self.out_proj.bias.requires_grad)
            for key in ("in_proj_bias", "bias_k", "bias_v"):
                if (value := getattr(self, key)) is not None:
                    getattr(dense, key).copy_(value)
                    getattr(dense, key).requires_grad_(value.requires_grad)
        whole = {name: _weight_with(dense, name) for name in PROJECTIONS}
        for weight in whole.values():
            weight.requires_grad_(False)
        for name, weight in whole.items():
            for key, p in getattr(self, name).named_parameters():
                if key.endswith("weight"):
                    weight.requires_grad_(weight.requires_grad or p.requires_grad)
                    take_marks(weight, p)
        return dense.train(self.training)

    # -- what readers of torch's layer ask for

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The dense weights of query, key and value, shape (3 embed_dim, embed_dim), or None."""
        if not self._in_one_piece:
            return None
        return torch.cat([dense_weight(getattr(self, name)) for name in PROJECTIONS[:3]])

    def _separate(self, name: str) -> Tensor | None:
        return None if self._in_one_piece else dense_weight(getattr(self, name))

    @property
    def q_proj_weight(self) -> Tensor | None:
        """The dense weight of the query, with `kdim` or `vdim`; else None, as in torch."""
        return self._separate("q_proj")

    @property
    def k_proj_weight(self) -> Tensor | None:
        """The dense weight of the key, with `kdim` or `vdim`; else None, as in torch."""
        return self._separate("k_proj")

    @property
    def v_proj_weight(self) -> Tensor | None:
        """The dense weight of the value, with `kdim` or `vdim`; else None, as in torch."""
        return self._separate("v_proj")

    # -- function

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's, masks, shapes and order of the arguments included.

        Returns
        -------
        Tensor
            Like `query`.
        Tensor or None
            With `need_weights`, the weights (batch, target, source), averaged over the heads, or
            (batch, heads, target, source).
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise TypeError(
                "LowRankMultiheadAttention takes no nested tensors: pad them and give "
                "key_padding_mask; nn.TransformerEncoder makes them itself, unless its "
                "use_nested_tensor is False"
            )
        batched = query.ndim == 3
        if query.ndim not in (2, 3) or key.ndim != query.ndim or value.ndim != query.ndim:
            raise ValueError(
                "query, key and value must have 3 dimensions each, or 2 without a batch, got "
                f"{query.ndim}, {key.ndim} and {value.ndim}"
            )
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            if key_padding_mask is not None and key_padding_mask.ndim == 1:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which must be given too")
        q, k, v = self._projected(query, key, value)
        mask = merged_masks(attn_mask, key_padding_mask, q, k.shape[2])
        # beside the causal mask itself there may be no other, and no further source
        hint = is_causal and key_padding_mask is None and not need_weights
        extra = (self.bias_k is not None) + self.add_zero_attn
        if extra:
            k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
            mask, hint = None if mask is None else F.pad(mask, (0, extra)), False
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        elif hint:
            y = F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, each (batch, heads, length, head_dim)."""
        parts = (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.chunk(3)
            parts = tuple(p + b for p, b in zip(parts, biases, strict=True))  # type: ignore[assignment]
        shape = (self.num_heads, self.head_dim)
        return tuple(p.unflatten(-1, shape).transpose(1, 2) for p in parts)

    def _extended(self, t: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values with the sources that `add_bias_kv` and `add_zero_attn` add."""
        if bias is not None:
            more = bias.view(1, self.num_heads, 1, self.head_dim).expand(len(t), -1, -1, -1)
            t = torch.cat([t, more.to(t.dtype)], 2)
        return F.pad(t, (0, 0, 0, 1)) if self.add_zero_attn else t

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        if dense := [prefix + key for key in ATTENTION_WEIGHTS if prefix + key in state_dict]:
            error_msgs.append(
                f"{', '.join(dense)}: of a dense attention; load it into the dense model and "
                "factorize that, or factorize this one as the saved one was"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        parts = [f"{self.embed_dim}, num_heads={self.num_heads}"]
        for name, usual in (("kdim", self.embed_dim), ("vdim", self.embed_dim), ("dropout", 0.0)):
            if getattr(self, name) != usual:
                parts.append(f"{name}={getattr(self, name)}")
        for name in ("batch_first", "add_zero_attn"):
            if getattr(self, name):
                parts.append(f"{name}=True")
        return ", ".join(parts)


def projections(module: nn.MultiheadAttention, *, copy: bool = True) -> dict[str, nn.Linear]:
    """The four projections of torch's attention as linear layers, the last with its bias.

    Their weights are copies, or views of the attention's own.
    """
    weight: Any = module.in_proj_weight
    names = PROJECTIONS[:3]
    if weight is not None:
        weights = dict(zip(names, weight.detach().chunk(3), strict=True))
    else:
        weights = {name: getattr(module, f"{name}_weight").detach() for name in names}
    weights["out_proj"] = module.out_proj.weight.detach()
    found = {}
    for name, value in weights.items():
        m, n = value.shape
        layer = nn.Linear(n, m, bias=False, device="meta")
        own = _weight_with(module, name)
        kept = value.clone(memory_format=torch.contiguous_format) if copy else value
        layer.weight = nn.Parameter(kept, requires_grad=own.requires_grad)
        take_marks(layer.weight, own)
        found[name] = layer.train(module.training)
    if module.out_proj.bias is not None:
        found["out_proj"].bias = copy_of(module.out_proj.bias) if copy else module.out_proj.bias
    return found


def dense_weight(layer: Any) -> Tensor:
    """The weight of a projection, low-rank, dense or folded, with gradients."""
    return layer.dense_weight() if isinstance(layer, LowRankLayer) else layer.weight


def copy_of(p: nn.Parameter) -> nn.Parameter:
    """A parameter with the same values."""
    return nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)


def _weight_with(module: nn.MultiheadAttention, name: str) -> nn.Parameter:
    """The parameter of torch's attention that is the weight of a projection, or holds it."""
    whole: Any = module.out_proj.weight if name == "out_proj" else module.in_proj_weight
    return getattr(module, f"{name}_weight") if whole is None else whole
