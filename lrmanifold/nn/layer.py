"""What linear and convolutional low-rank layers share: one packed weight and its geometry."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import geoopt
import torch
from torch import Tensor, nn

from .. import linalg
from .._arguments import check_device, check_dtype
from ..errors import GeometryError
from ..manifolds import Factors, FixedRank, WellConditioned
from ..manifolds.fixed_rank import Gradient
from ..parameter import PointParameter, gathered, replace_data
from ..precision import STORAGE_DTYPES, storage_tolerance, without_autocast
from ._carry import take_marks
from ._sharded import takes_sharded
from ._whole import WholeWeight


def make_manifold(
    m: int,
    n: int,
    rank: int,
    *,
    tau: float | None,
    gradient: Gradient = "factors",
    retraction: str | None = None,
    scale: float | str = "free",
) -> FixedRank:
    """:class:`WellConditioned` for a number `tau`, plain :class:`FixedRank` for None.

    The retraction is "factored" unless S may be singular: a plain fixed-rank weight with probe
    gradients moves by "bug", which has no inverse of S.
    """
    if retraction is None:
        retraction = "bug" if tau is None and gradient == "probe" else "factored"
    if tau is None:
        if scale != "free":
            raise ValueError(f"scale needs a bound tau, got tau=None with scale={scale!r}")
        return FixedRank(m, n, rank, retraction=retraction, gradient=gradient)
    return WellConditioned(
        m,
        n,
        rank,
        tau=tau,
        retraction=retraction,
        gradient=gradient,
        scale=scale,  # type: ignore[arg-type]
    )


INITS = ("svd", "random")

_ADOPTABLE = (nn.Parameter, geoopt.ManifoldParameter, PointParameter)


def _alike(a: geoopt.Manifold, b: geoopt.Manifold) -> bool:
    keys = ("m", "n", "rank", "retraction", "gradient", "tau", "centre", "scale")
    return type(a) is type(b) and all(getattr(a, k, None) == getattr(b, k, None) for k in keys)


class LowRankLayer(WholeWeight):
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
        self.__dict__["_manifold"], self.__dict__["_lead"] = manifold, lead
        check_device("device", factory.get("device"))
        check_dtype("dtype", factory.get("dtype"), STORAGE_DTYPES)
        weight = torch.empty(*lead, *manifold.point_shape, **factory)
        check_dtype("torch's default dtype", weight.dtype, STORAGE_DTYPES)
        self.register_parameter("weight", PointParameter(weight, manifold=manifold))

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
        """Views U (..., m, r), S (..., r, r), V (..., n, r) of the weight, with gradients.

        A layer with ``gradient="probe"`` expects other gradients of U and V than these views give:
        there a loss of the factors must go through :meth:`dense_weight`, or through S alone.
        """
        return self.manifold.unpack(self.weight)

    @property
    def U(self) -> Tensor:
        """Left factor, shape (..., m, r): UᵀU = I. A view of the weight, with gradients.

        It is no parameter: train ``weight``. Under ``torch.no_grad()``, writing into the view
        writes into the weight, which then must stay on its manifold.
        """
        return self.factors.U

    @property
    def S(self) -> Tensor:
        """Core, shape (..., r, r), a full matrix: its singular values are the weight's.

        A view of the weight with gradients, as :attr:`U`.
        """
        return self.factors.S

    @property
    def V(self) -> Tensor:
        """Right factor, shape (..., n, r): VᵀV = I. A view of the weight, as :attr:`U`."""
        return self.factors.V

    def sigma_max(self) -> Tensor:
        """Largest singular value of the weight matrix, differentiable; shape (...) of its batch.

        From the core alone. At tau = 0 it is α = ‖S‖_F/√r, without a decomposition. For other tau
        the singular vectors are constants, so the gradient u vᵀ is exact and a second derivative
        is not offered. For training: not rounded upwards, see :mod:`lrmanifold.certify` for that.
        """
        S = self.factors.S
        if self.tau == 0.0:
            return S.square().sum((-2, -1)).sqrt() / math.sqrt(S.shape[-1])
        with torch.no_grad():
            U, _, Vh = linalg.svd(S.detach().to(linalg.compute_dtype(S.dtype)))
            u, v = U[..., :, :1].to(S.dtype), Vh[..., :1, :].mT.to(S.dtype)
        return (u.mT @ S @ v)[..., 0, 0]

    @property
    def alpha(self) -> Tensor:
        """α of the scaled partial isometry W = α Q that a weight with tau = 0 is, differentiable.

        Raises ValueError for another tau, whose weight has no such number; see :meth:`sigma_max`.
        """
        if self.tau != 0.0:
            raise ValueError(f"alpha belongs to tau = 0, got tau = {self.tau}: use sigma_max()")
        return self.sigma_max()

    def __dir__(self) -> list[str]:
        # torch.jit.trace asks for every name that is listed here
        return [name for name in super().__dir__() if name != "alpha" or self.tau == 0.0]

    @property
    def compression(self) -> float:
        """Share of the dense layer's weights that is saved (negative if the layer is larger)."""
        m, n, r = self.manifold.m, self.manifold.n, self.manifold.rank
        return 1.0 - (m + r + n) * r / (m * n)

    def reset_parameters(self) -> None:
        """Haar-uniform bases and S = αI with the Frobenius norm of torch's default dense weight.

        That default has entries of variance 1/(3 n), hence α² r = m/3; the bias is uniform in
        ±1/√n, as in torch. A fixed scale is α itself.
        """
        if self.weight.is_meta:
            return
        M = self.manifold
        with torch.no_grad():
            shape, dtype = self.weight.shape, linalg.compute_dtype(self.weight.dtype)
            X = M.random(*shape, dtype=dtype, device=self.weight.device)
            # the manifold's: an attribute of that name would hide one that hooks keep here
            scale = getattr(M, "scale", "free")
            size = math.sqrt(M.m / (3.0 * M.rank)) if scale == "free" else scale
            S = float(size) * torch.eye(M.rank, dtype=dtype, device=X.device)
            U, _, V = M.unpack(X)
            self.weight.copy_(M.pack(U, S.expand(*shape[:-2], -1, -1), V))
            if self.bias is not None:
                bound = 1.0 / math.sqrt(M.n)
                self.bias.uniform_(-bound, bound)

    def to_dense(self) -> nn.Module:
        """torch's layer with the same function."""
        raise NotImplementedError  # the abstract contract: each layer knows its dense class

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the dense layer's weight."""
        with torch.no_grad():
            return tuple(self.dense_weight().shape)

    def dense_weight(self) -> Tensor:
        """The weight in the dense layer's shape, with gradients; formed anew at each call."""
        return self.as_weight(self.manifold.to_dense(self.weight))

    def matricised(self, weight: Tensor) -> Tensor:
        """A dense layer's weight as the matrix that the manifold holds, shape (..., m, n)."""
        return weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matricised`."""
        return matrix

    def _take_over(self, module: nn.Module, init: str) -> None:
        """Fill this layer from a dense one."""
        weight, bias = module.weight, getattr(module, "bias", None)
        with torch.no_grad():
            if init == "svd" and not weight.is_meta:  # type: ignore[union-attr]
                matrix = self.matricised(weight.detach())  # type: ignore[union-attr, operator]
                self.weight.copy_(self._nearest(matrix))
            if self.bias is not None:
                self.bias.copy_(bias)  # type: ignore[arg-type]
                self.bias.requires_grad_(bias.requires_grad)  # type: ignore[union-attr, arg-type]
        self.weight.requires_grad_(weight.requires_grad)  # type: ignore[union-attr]
        take_marks(self.weight, weight)  # type: ignore[arg-type]
        self.train(module.training)

    def _nearest(self, matrix: Tensor) -> Tensor:
        """The point that the layer takes over from a dense weight."""
        return self.manifold.from_dense(matrix)

    def _hand_over(self, module: nn.Module) -> None:
        """Fill a dense layer of the same shape from this one."""
        with torch.no_grad():
            matrix = without_autocast(self.manifold.to_dense)(self.weight)
            module.weight.copy_(self.as_weight(matrix))  # type: ignore[operator, union-attr]
            if self.bias is not None:
                module.bias.copy_(self.bias)  # type: ignore[operator, union-attr]
                module.bias.requires_grad_(self.bias.requires_grad)  # type: ignore[union-attr]
        module.weight.requires_grad_(self.weight.requires_grad)  # type: ignore[union-attr]
        take_marks(module.weight, self.weight)  # type: ignore[arg-type]
        module.train(self.training)

    def _register_bias(self, size: int | None, **factory: Any) -> None:
        bias = None if size is None else nn.Parameter(torch.empty(size, **factory))
        self.register_parameter("bias", bias)

    def _defect(self, X: Tensor) -> str | None:
        """In words, why `X` is no point of the manifold up to rounding of its dtype; None if it is.

        Tensors without values (meta) pass.
        """
        shape = (*self.__dict__["_lead"], *self.manifold.point_shape)
        if tuple(X.shape) != shape:
            size = f"{self.manifold.m} x {self.manifold.n}"
            return f"its shape must be {shape}, rank {self.rank} of {size}, got {tuple(X.shape)}"
        if X.is_meta:
            return None
        X = gathered(X)
        tol = storage_tolerance(X.dtype)
        ok, reason = self.manifold.check_point_on_manifold(X, explain=True, atol=tol, rtol=tol)
        return None if ok else reason

    def _adopt(self, weight: Any) -> None:
        """Make `weight` a ManifoldParameter of this layer's manifold, unless it is one.

        In place, as ``torch.utils.swap_tensors`` does it: who holds the parameter, an optimizer
        or a layer it is tied to, holds the same one afterwards.
        """
        known = getattr(weight, "manifold", None)
        if known is not self.manifold:
            if known is None or isinstance(known, geoopt.Euclidean):
                if type(weight) not in _ADOPTABLE:
                    raise GeometryError(
                        f"weight must be an nn.Parameter or a geoopt.ManifoldParameter to be put "
                        f"on {self.manifold}, got {type(weight).__name__}"
                    )
                weight.__class__ = PointParameter
                if weight is not self.__dict__.get("_own_weight"):
                    # the weight before may stay in a layer it was tied to, with a rank of its own
                    self.__dict__["_manifold"] = copy.copy(self.manifold)
                weight.manifold = self.manifold
            elif _alike(known, self.manifold):
                self.__dict__["_manifold"] = known
            else:
                raise GeometryError(f"weight must be on {self.manifold}, got one on {known}")
        if type(weight) is geoopt.ManifoldParameter:
            weight.__class__ = PointParameter
        # Where a weight is put back from, should somebody take it out behind the layer's back.
        self._keep(weight)

    # -- doors through which torch replaces a weight

    def __setattr__(self, name: str, value: Any) -> None:
        replica = self.__dict__.get("_is_replica")
        if name == "weight" and not replica and not takes_sharded(self, value):
            self._check_weight(value)
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's; a weight must be a point of the manifold."""
        known = name == "weight" and "_own_weight" in self.__dict__
        if known and not takes_sharded(self, param):
            self._check_weight(param)
        super().register_parameter(name, param)
        if name == "weight" and not known:
            self._keep(param)

    def _check_weight(self, value: Any) -> None:
        if not isinstance(value, nn.Parameter):
            raise GeometryError(
                f"weight must be a parameter on {self.manifold}, got {type(value).__name__}"
            )
        reason = self._defect(value.data)
        if reason is not None:
            raise GeometryError(f"weight must be a point of {self.manifold}: {reason}")
        self._adopt(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankLayer:
        def plain(t: Tensor) -> Tensor:
            # A conversion to what it is returns the parameter, which nn.Parameter(...) refuses.
            converted = fn(t)
            if t is weight and converted.dtype not in STORAGE_DTYPES:
                names = ", ".join(str(d) for d in STORAGE_DTYPES)
                raise TypeError(
                    f"a low-rank layer must be in one of {names}, got {converted.dtype}: densify "
                    "it first"
                )
            return converted.detach() if isinstance(converted, geoopt.ManifoldTensor) else converted

        weight = self.weight
        before = weight.dtype
        super()._apply(plain, recurse)
        self._adopt(self._parameters["weight"])
        if self.weight.dtype != before:
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
        rest = (prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._run_load_hooks(state_dict, *rest)
        key = prefix + "weight"
        value = state_dict.get(key)
        if isinstance(value, Tensor):
            before, after = self.manifold.rank, self._rank_of(value)
            self.manifold.set_rank_(after)
            reason = self._defect(value)
            if reason is not None:
                # Return before anything of this layer is loaded, its bias included.
                self.manifold.set_rank_(before)
                error_msgs.append(f"{key}{self._mismatch(value, reason)}")
                return
            if after != before:
                try:
                    replace_data(self.weight, self.weight.data.new_empty(value.shape))
                except RuntimeError:
                    self.manifold.set_rank_(before)  # refused: the layer stays as it was
                    raise
        self._load_without_hooks(state_dict, *rest)
        # torch swaps instead of setting, or not, by a global switch.
        self._adopt(self._parameters["weight"])
        if isinstance(value, Tensor) and value.dtype != self.weight.dtype:
            self._remove_rounding()

    def _rank_of(self, value: Tensor) -> int:
        """Rank of a checkpoint, which may be another one: adaptive runs save layers of any rank."""
        r, M = value.shape[-1] if value.ndim >= 2 else 0, self.manifold
        fits = tuple(value.shape) == (*self.__dict__["_lead"], M.m + r + M.n, r)
        return r if fits and 1 <= r <= min(M.m, M.n) else M.rank

    def _mismatch(self, value: Tensor, reason: str) -> str:
        """Ends the message on a weight of a state dict that is none of this layer."""
        m, n, rank = self.manifold.m, self.manifold.n, self.rank
        if self._is_dense(value):
            return (
                f": the layer is low-rank here, rank {rank} of {m} x {n}, and {tuple(value.shape)} "
                "is the shape of the dense weight; load it into the dense model and factorize "
                "that, or factorize this one as the saved one was, with the same rank and exclude"
            )
        lead = "".join(f"{size}, " for size in self.__dict__["_lead"])
        r = self._rank_of(value)  # its own: another rank is no defect
        if tuple(value.shape) != (*self.__dict__["_lead"], m + r + n, r):
            shape = f"({lead}{m} + r + {n}, r), r <= {min(m, n)}"
            reason = f"its shape must be {shape}, got {tuple(value.shape)}"
        elif "orthonormal" in reason:
            reason += ". If it was averaged, take lrmanifold.optim.retracting_average"
        return f" is not a point of {self.manifold}: {reason}"

    def _is_dense(self, value: Tensor) -> bool:
        size = math.prod(self.__dict__["_lead"]) * self.manifold.m
        return value.shape[:1] == (size,) and value.numel() == size * self.manifold.n

    # -- function

    def forward(self, x: Tensor) -> Tensor:
        """Vᵀ, then U S and the bias, by thin products."""
        U, S, V = self.factors
        if self.manifold.gradient == "probe" and torch.is_grad_enabled():
            return self._forward_with_probes(x, U, S, V)
        return self._last(self._first(x, V), U, S, self.bias)

    def _forward_with_probes(self, x: Tensor, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        """The same values; the gradients that reach U and V are GV and GᵀU.

        ``W = U S Vᵀ + K Vᵀ + U Lᵀ`` with probes K = U - U and L = V - V that are zero in value but
        not in derivative, the other U and V being constants (mathematics 1). Twice the forward
        products. The probes act on `x` itself: their part of its gradient is zero, but the
        derivative of that part by the weights, which input-gradient penalties take, is not.
        """
        U_, V_ = U.detach(), V.detach()
        z = self._first(x, V_)
        y = self._last(z, U_, S, self.bias)
        y = y + self._last(z, U - U_, None, None)
        return y + self._last(self._first(x, V - V_), U_, None, None)

    def _first(self, x: Tensor, V: Tensor) -> Tensor:
        """Apply Vᵀ."""
        raise NotImplementedError  # the abstract contract, as below

    def _last(self, z: Tensor, U: Tensor, S: Tensor | None, bias: Tensor | None) -> Tensor:
        """Apply U S (U alone if `S` is None) and add the bias."""
        raise NotImplementedError

    # -- words

    def _geometry_repr(self) -> str:
        tau = "None" if self.tau is None else f"{self.tau:g}"
        fixed = getattr(self.manifold, "scale", "free")
        scale = "" if fixed == "free" else f"scale={fixed:g}, "
        return f"rank={self.rank}, tau={tau}, {scale}compression={self.compression:.1%}"
