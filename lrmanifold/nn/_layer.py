"""What linear and convolutional low-rank layers share: one packed weight and its geometry."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import geoopt
import torch
from torch import Tensor, nn

from ..errors import GeometryError
from ..manifolds import Factors, FixedRank, WellConditioned
from ..manifolds._dtype import storage_tolerance


def make_manifold(m: int, n: int, rank: int, tau: float | None) -> FixedRank:
    """:class:`WellConditioned` for a number `tau`, plain :class:`FixedRank` for None."""
    if tau is None:
        return FixedRank(m, n, rank, retraction="factored")
    return WellConditioned(m, n, rank, tau=tau)


class LowRankLayer(nn.Module):
    """A layer whose weight is one point of a low-rank manifold.

    **The module owns its geometry.** geoopt keeps the manifold as an attribute of the tensor, which
    torch drops when it replaces a parameter (``load_state_dict(assign=True)``, ``to_empty``,
    conversions that swap). Wherever a weight enters this module it is wrapped again, and refused
    when its values are off the manifold by more than rounding.

    Attributes
    ----------
    weight : geoopt.ManifoldParameter, shape (..., m + r + n, r)
        U (m), S (r), V (n) stacked; grouped convolutions have the groups as a batch dimension.
    bias : nn.Parameter or None
    """

    weight: geoopt.ManifoldParameter
    bias: nn.Parameter | None

    def __init__(self, manifold: FixedRank, lead: tuple[int, ...], **factory: Any) -> None:
        super().__init__()
        # Not a submodule: it has no parameters, and the module tree stays that of the dense model.
        self.__dict__["_manifold"] = manifold
        weight = torch.empty(*lead, *manifold.point_shape, **factory)
        if not weight.is_floating_point():
            raise TypeError(f"dtype must be a real floating point type, got {weight.dtype}")
        self.register_parameter("weight", geoopt.ManifoldParameter(weight, manifold=manifold))

    # -- geometry

    @property
    def manifold(self) -> FixedRank:
        """The manifold that the weight lives on."""
        return self.__dict__["_manifold"]

    @property
    def rank(self) -> int:
        """Rank of the weight matrix (of each group's, for a grouped convolution)."""
        return self.manifold.rank

    @property
    def tau(self) -> float | None:
        """Bound for the condition number minus 1; None without a bound."""
        return getattr(self.manifold, "tau", None)

    @property
    def factors(self) -> Factors:
        """Views U (..., m, r), S (..., r, r), V (..., n, r) of the weight, with gradients."""
        return self.manifold.unpack(self.weight)

    @property
    def compression(self) -> float:
        """Share of the dense layer's weights that is saved (negative if the layer is larger)."""
        m, n, r = self.manifold.m, self.manifold.n, self.manifold.rank
        return 1.0 - (m + r + n) * r / (m * n)

    def set_point(self, manifold: FixedRank, X: Tensor) -> geoopt.ManifoldParameter:
        """Put the layer on another manifold of the same m and n, at the point `X`.

        Returns the new parameter; an optimizer is told with ``optimizer.rebind(old, new)``.
        """
        if (manifold.m, manifold.n) != (self.manifold.m, self.manifold.n):
            raise ValueError(
                f"manifold must be of {self.manifold.m} x {self.manifold.n} matrices, "
                f"got {manifold.m} x {manifold.n}"
            )
        before, self.__dict__["_manifold"] = self.manifold, manifold
        try:
            self.weight = nn.Parameter(X.detach(), requires_grad=self.weight.requires_grad)
        except (GeometryError, ValueError):
            self.__dict__["_manifold"] = before
            raise
        return self.weight

    def reset_parameters(self) -> None:
        """Haar-uniform bases and S = αI with the Frobenius norm of torch's default dense weight.

        That default has entries of variance 1/(3 n), hence α² r = m/3; the bias is uniform in
        ±1/√n, as in torch.
        """
        if self.weight.is_meta:
            return
        M = self.manifold
        with torch.no_grad():
            shape, dtype = self.weight.shape, torch.float32
            X = M.random(*shape, dtype=dtype, device=self.weight.device)
            scale = math.sqrt(M.m / (3.0 * M.rank))
            S = scale * torch.eye(M.rank, dtype=dtype, device=X.device)
            U, _, V = M.unpack(X)
            self.weight.copy_(M.pack(U, S.expand(*shape[:-2], -1, -1), V))
            if self.bias is not None:
                bound = 1.0 / math.sqrt(M.n)
                self.bias.uniform_(-bound, bound)

    def to_dense(self) -> nn.Module:
        """torch's layer with the same function."""
        raise NotImplementedError  # the abstract contract: each layer knows its dense class

    def dense_weight(self) -> Tensor:
        """The weight in the dense layer's shape, with gradients; formed anew at each call."""
        raise NotImplementedError  # the abstract contract: each layer knows its dense shape

    def _take_over(self, module: nn.Module, matrix: Tensor, init: str) -> None:
        """Fill this layer from a dense one whose weight is `matrix`, shape (..., m, n)."""
        if init not in ("svd", "random"):
            raise ValueError(f"init must be 'svd' or 'random', got {init!r}")
        weight, bias = module.weight, module.bias
        with torch.no_grad():
            if init == "svd" and not matrix.is_meta:
                self.weight.copy_(self.manifold.from_dense(matrix.detach()))
            if self.bias is not None:
                self.bias.copy_(bias)  # type: ignore[arg-type]
                self.bias.requires_grad_(bias.requires_grad)  # type: ignore[union-attr]
        self.weight.requires_grad_(weight.requires_grad)  # type: ignore[union-attr]
        self.train(module.training)

    def _hand_over(self, module: nn.Module) -> None:
        """Fill a dense layer of the same shape from this one."""
        with torch.no_grad():
            module.weight.copy_(self.dense_weight())  # type: ignore[operator, union-attr]
            if self.bias is not None:
                module.bias.copy_(self.bias)  # type: ignore[operator, union-attr]
                module.bias.requires_grad_(self.bias.requires_grad)  # type: ignore[union-attr]
        module.weight.requires_grad_(self.weight.requires_grad)  # type: ignore[union-attr]
        module.train(self.training)

    def _register_bias(self, size: int | None, **factory: Any) -> None:
        bias = None if size is None else nn.Parameter(torch.empty(size, **factory))
        self.register_parameter("bias", bias)

    def _defect(self, X: Tensor) -> str | None:
        """In words, why `X` is no point of the manifold up to rounding of its dtype; None if it is.

        Tensors without values (meta) pass.
        """
        if X.is_meta:
            ok, reason = self.manifold.check_point(X, explain=True)
            return None if ok else reason
        tol = storage_tolerance(X.dtype)
        ok, reason = self.manifold.check_point_on_manifold(X, explain=True, atol=tol, rtol=tol)
        return None if ok else reason

    def _wrapped(self, weight: Tensor) -> geoopt.ManifoldParameter:
        wrapped = geoopt.ManifoldParameter(
            weight.data, manifold=self.manifold, requires_grad=weight.requires_grad
        )
        wrapped.grad = weight.grad
        return wrapped

    # -- doors through which torch replaces a weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, nn.Parameter):
            reason = self._defect(value.data)
            if reason is not None:
                raise GeometryError(f"weight must be a point of {self.manifold}: {reason}")
            if getattr(value, "manifold", None) is not self.manifold:
                value = self._wrapped(value)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankLayer:
        before = self.weight.dtype
        super()._apply(fn, recurse)
        weight = self._parameters["weight"]
        assert weight is not None
        if getattr(weight, "manifold", None) is not self.manifold:
            weight = self._parameters["weight"] = self._wrapped(weight)
        if weight.dtype != before:
            self._remove_rounding()
        return self

    def _remove_rounding(self) -> None:
        """Rounding to a shorter dtype is a drift in the longer one: take it out."""
        if not self.weight.is_meta and self._defect(self.weight.data) is not None:
            with torch.no_grad():
                self.weight.copy_(self.manifold.projx(self.weight))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        key = prefix + "weight"
        value = state_dict.get(key)
        refused = None
        if isinstance(value, Tensor) and value.shape == self.weight.shape:
            refused = self._defect(value)
            if refused is not None:
                error_msgs.append(f"{key} is not a point of {self.manifold}: {refused}")
                state_dict = {**state_dict, key: self.weight.detach()}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if refused is None and isinstance(value, Tensor) and value.dtype != self.weight.dtype:
            self._remove_rounding()

    # -- words

    def _geometry_repr(self) -> str:
        tau = "None" if self.tau is None else f"{self.tau:g}"
        return f"rank={self.rank}, tau={tau}, compression={self.compression:.1%}"
