"""Ranks that adapt during training, by the interface of a learning-rate scheduler."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg
from .._arguments import (
    check_callable,
    check_instance,
    check_integer,
    check_module,
    check_number,
    check_state,
    check_text,
)
from .._stack import stack_level
from .._wrappers import names_without_wrappers
from ..factors import unpack
from ..manifolds import WellConditioned
from ..nn.layer import LowRankLayer
from ..optim.arithmetic import PlainArithmetic
from ..optim.coordinates import is_factored
from ..optim.rank import (
    augment,
    factors_of,
    nearest_rank,
    new_directions,
    rank_for_tolerance,
    resize,
    truncate,
)
from ..parameter import replace_data
from .budget import Rule, excess, meet_budget, value_for


class RankScheduler:
    r"""Augment each layer's bases, train, truncate: ranks follow the problem.

    Call :meth:`step` after each ``optimizer.step()``. Every `every` steps the ranks adapt: weights,
    the optimizer's state and the geometry are resized together.

    **Layers without a bound** (``tau=None``, which must have ``gradient="probe"``): the core is
    truncated to the relative tolerance, then `augment` directions of the latest gradient (GV and
    GᵀU, what is new in them) are added with zeros in the core, which leaves the function as it is;
    the optimizer trains all of them until the next time. Call :meth:`truncate` at the end.

    **Layers with a bound** (``tau``): a zero in the core would break cond <= 1 + τ, so everything
    happens inside :meth:`step`, which then needs a closure: augmentation, `coefficient_steps`
    gradient steps on the core alone with the bound lifted, and truncation to the rank, at most that
    of the tolerance, whose set {cond <= 1 + τ} is nearest, with the projection onto it: a direction
    much weaker than the others is cheaper to drop than to lift. The certificate holds whenever
    :meth:`step` has returned. Directions can be told apart only if the coefficient steps carry the
    core a good part of its way, coefficient_lr · coefficient_steps · curvature of about 1 or more.

    Layers whose weight needs no gradient, or that the optimizer does not hold, stay as they are.

    Parameters
    ----------
    model : nn.Module
    optimizer : torch.optim.Optimizer
        Any that keeps its momentum as a tangent vector (ours; geoopt's RiemannianSGD and Adam).
    tol : float or dict
        Relative truncation tolerance ϑ in [0, 1): the smallest rank with
        ‖truncated singular values‖ <= ϑ ‖S‖. A dict maps glob patterns on module names to values,
        here and below; layers without a match keep their rank.
    min_rank, max_rank : int or dict
    every : int
        Optimizer steps between two adaptations.
    augment : int, optional
        Directions added; as many as the present rank by default. Never above `max_rank`.
    target_compression : float, optional
        Share of the parameters of the adapted layers to save, in (0, 1). Where the tolerance alone
        keeps more, further directions are dropped, over all layers in the order of relative
        truncated energy σ²/‖S‖² per parameter saved.
    coefficient_steps : int
        For layers with a bound.
    coefficient_lr : float, optional
        Rate of those steps; the optimizer's present one by default. Set it with Adam, whose lr is
        not a gradient-descent rate.
    grad_scaler : torch.amp.GradScaler, optional
        The one by which the closure scales its loss: gradients are divided by its factor.

    Raises
    ------
    ValueError
        For options out of range, budgets that `min_rank` forbids, and layers without a bound whose
        gradients or retraction need S⁻¹.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        tol: Rule,
        min_rank: Rule = 1,
        max_rank: Rule | None = None,
        every: int = 1,
        augment: int | None = None,
        target_compression: float | None = None,
        coefficient_steps: int = 10,
        coefficient_lr: float | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        check_module("model", model)
        check_instance("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
        self.model, self.optimizer = model, optimizer
        self.every = check_integer("every", every, low=1)
        self.coefficient_steps = check_integer("coefficient_steps", coefficient_steps, low=1)
        self.augment = None if augment is None else check_integer("augment", augment, low=0)
        found = {
            name: layer
            for name, layer in names_without_wrappers(model).items()
            if isinstance(layer, LowRankLayer)
        }
        for key, rule in (("tol", tol), ("min_rank", min_rank), ("max_rank", max_rank)):
            for pattern in rule if isinstance(rule, Mapping) else ():
                check_text(f"a pattern in {key}", pattern)
                if found and not any(fnmatchcase(name, pattern) for name in found):
                    raise ValueError(
                        f"{key} pattern {pattern!r} matches no layer; there are {list(found)}"
                    )
        ends: dict[str, Any] = {"low": 0.0, "open_low": True, "open_high": True}
        if target_compression is not None:
            check_number("target_compression", target_compression, high=1.0, **ends)
        if coefficient_lr is not None:
            check_number("coefficient_lr", coefficient_lr, **ends)
        self.tol, self.min_rank, self.max_rank = tol, min_rank, max_rank
        self.target_compression, self.coefficient_lr = target_compression, coefficient_lr
        if grad_scaler is not None:
            kind = torch.amp.GradScaler
            check_instance("grad_scaler", grad_scaler, kind, "a torch.amp.GradScaler")
        self.grad_scaler = grad_scaler
        self.count = 0
        self._layers: dict[str, LowRankLayer] = {}
        for name, layer in found.items():
            known = any(layer.weight is other.weight for other in self._layers.values())
            if not known and value_for(tol, name) is not None:
                self._layers[name] = layer
        if not self._layers:
            raise ValueError("model must have low-rank layers that tol applies to, got none")
        if not self._held():
            raise ValueError(
                f"optimizer must move weights of the model that tol applies to, got one that holds "
                f"none of {list(self._layers)}: build it after factorize, from this model"
            )
        for name, layer in self._layers.items():
            check_number(f"tol of {name}", value_for(tol, name), low=0.0, high=1.0, open_high=True)
            low, high = value_for(min_rank, name), value_for(max_rank, name)
            low = 1 if low is None else check_integer(f"min_rank of {name}", low, low=1)
            if high is not None:
                check_integer(f"max_rank of {name}", high, low=int(low), hint=f"min_rank is {low}")
            if not _capped(layer) and layer.manifold.gradient != "probe":
                raise ValueError(
                    f"{name} has no bound on its condition number and gradients that divide by S; "
                    "an augmented core is singular: build it with gradient='probe'"
                )
            if not _capped(layer) and self.augment != 0 and is_factored(layer.manifold):
                raise ValueError(
                    f"{name} has no bound on its condition number and the retraction 'factored', "
                    "which divides by S; an augmented core is singular: leave the retraction to "
                    "the layer, or take 'svd', 'ksl' or 'bug'"
                )
        if target_compression is not None:
            least = {name: self._limits(name, layer)[0] for name, layer in self._layers.items()}
            if excess(self._layers, least, target_compression) > 0:
                raise ValueError(
                    f"target_compression = {target_compression} needs ranks below min_rank, {least}"
                )

    @property
    def ranks(self) -> dict[str, int]:
        """Present rank of each adapted layer."""
        return {name: layer.rank for name, layer in self._layers.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Count one optimizer step; adapt the ranks if it is time.

        Parameters
        ----------
        closure : callable, optional
            Clears the gradients, evaluates the loss, calls ``backward``. Needed for layers with a
            bound, and called 1 + `coefficient_steps` times when their ranks adapt. Gradients of
            other parameters and the persistent buffers of the model, such as the statistics of
            batch norms, are afterwards what they were before.

        Raises
        ------
        TypeError
            If the closure is no function.
        ValueError
            Without a closure, if a layer has a bound.

        Notes
        -----
        After an error, or with a RuntimeWarning when a gradient of the coefficient steps holds NaN
        or Inf, weights, ranks and the optimizer's state are those from before. The warning counts
        as a step; an error does not, so that a second call tries again.
        """
        if closure is not None:
            check_callable("closure", closure, "a function that calls backward()")
        layers = self._trained()
        capped = {k: v for k, v in layers.items() if _capped(v)}
        if capped and closure is None:
            raise ValueError(
                f"step needs a closure: {next(iter(capped))} has a bound on its condition number"
            )
        if (self.count + 1) % self.every:
            self.count += 1
            return
        saved = [(x, x.rank, x.weight.data.clone(), dict(self._state(x))) for x in layers.values()]
        arithmetic = PlainArithmetic(x.weight.device.type for x in layers.values())
        try:
            with arithmetic.plain():
                self._adapt(layers, capped, closure and partial(arithmetic.evaluate, closure))
        except BaseException as error:
            for layer, rank, data, state in saved:
                layer.manifold.set_rank_(rank)
                replace_data(layer.weight, data)
                self._state(layer).update(state)
            if not isinstance(error, _NonFiniteError):
                raise
            warnings.warn(
                f"the gradient of {error} is not finite: this adaptation is left out; if it "
                "happens again, lower coefficient_lr",
                RuntimeWarning,
                stacklevel=stack_level(),
            )
        self.count += 1

    @torch.no_grad()
    def truncate(self) -> None:
        """Cut every layer to its tolerance (and the budget), and project it onto its set."""
        layers = self._trained()
        with PlainArithmetic(x.weight.device.type for x in layers.values()).plain():
            self._truncate(layers)

    def _truncate(self, layers: dict[str, LowRankLayer]) -> None:
        points = {name: factors_of(layer.weight) for name, layer in layers.items()}
        spectra = {name: linalg.svdvals(X.S) for name, X in points.items()}
        ranks = {name: self._tolerated(name, s) for name, s in spectra.items()}
        if self.target_compression is not None:
            least = {name: self._limits(name, layer)[0] for name, layer in layers.items()}
            meet_budget(layers, spectra, ranks, least, self.target_compression)
        for name, layer in layers.items():
            X = points[name]
            if ranks[name] < X.S.shape[-1]:
                X = truncate(X, ranks[name])
            elif not _capped(layer):
                continue
            X = X._replace(S=layer.manifold.project_core(X.S))
            resize(layer.weight, X, self._state(layer))

    # -- parts

    def _trained(self) -> dict[str, LowRankLayer]:
        return {name: layer for name, layer in self._held().items() if layer.weight.requires_grad}

    def _held(self) -> dict[str, LowRankLayer]:
        held = {p for group in self.optimizer.param_groups for p in group["params"]}
        return {name: layer for name, layer in self._layers.items() if layer.weight in held}

    def _state(self, layer: LowRankLayer) -> dict[str, Any]:
        return self.optimizer.state.get(layer.weight, {})

    def _limits(self, name: str, layer: LowRankLayer) -> tuple[int, int]:
        M = layer.manifold
        high = value_for(self.max_rank, name)
        high = min(M.m, M.n) if high is None else min(M.m, M.n, int(high))
        return min(int(value_for(self.min_rank, name) or 1), high), high

    def _widen(self, name: str, layer: LowRankLayer, found: tuple[Tensor, Tensor] | None) -> None:
        """Augment a layer by the directions found, as far as there is room."""
        if found is not None:
            wanted = layer.rank if self.augment is None else self.augment
            room = min(wanted, found[0].shape[-1], self._limits(name, layer)[1] - layer.rank)
            X = augment(factors_of(layer.weight), *found, max(0, room))
            resize(layer.weight, X, self._state(layer))

    def _tolerated(self, name: str, s: Tensor) -> int:
        low, high = self._limits(name, self._layers[name])
        low, high = min(low, s.shape[-1]), min(high, s.shape[-1])
        tol: Any = value_for(self.tol, name)
        rank = min(max(rank_for_tolerance(s, tol), low), high)
        return nearest_rank(self._layers[name].manifold, s, low, rank)

    def _adapt(
        self,
        layers: Mapping[str, LowRankLayer],
        capped: Mapping[str, LowRankLayer],
        closure: Callable[[], Any] | None,
    ) -> None:
        directions = {k: new_directions(v.weight) for k, v in layers.items() if k not in capped}
        none = all(layers[k].weight.grad is None for k in directions)
        if directions and self.augment != 0 and none:
            warnings.warn(
                f"{next(iter(directions))} and the other layers without a bound have no "
                "gradients, so that no rank can grow: call the scheduler's step after "
                "optimizer.step() and before zero_grad()",
                RuntimeWarning,
                stacklevel=stack_level(),
            )
        if capped and closure is not None:
            with self._gradients_aside(capped), self._buffers_aside():
                self._try_out(capped, closure)
        self.truncate()
        for name, found in directions.items():
            # The truncated bases are part of the old ones; directions are made orthogonal anew.
            self._widen(name, layers[name], found)

    def _try_out(self, layers: Mapping[str, LowRankLayer], closure: Callable[[], Any]) -> None:
        """Augment layers with a bound and let their cores alone follow the gradient."""
        rates = {
            p: (g["lr"] if self.coefficient_lr is None else self.coefficient_lr)
            * (-1.0 if g.get("maximize") else 1.0)
            for g in self.optimizer.param_groups
            for p in g["params"]
        }
        scale = 1.0 if self.grad_scaler is None else 1.0 / self.grad_scaler.get_scale()
        closure()
        if all(layer.weight.grad is None for layer in layers.values()):
            warnings.warn(
                f"the closure left no gradient for {next(iter(layers))} and the other layers with "
                "a bound, so that no rank can grow. Does it call backward()?",
                RuntimeWarning,
                stacklevel=stack_level(),
            )
        for name, layer in layers.items():
            self._widen(name, layer, new_directions(layer.weight))
        for _ in range(self.coefficient_steps):
            closure()
            for name, layer in layers.items():
                p, M = layer.weight, layer.manifold
                if p.grad is None:
                    continue
                rate = rates.get(p, 0.0) * scale
                unpack(p.data, M.m, M.n).S.sub_(rate * unpack(p.grad, M.m, M.n).S)
                if not bool(torch.isfinite(p.data).all()):
                    raise _NonFiniteError(name)

    @contextlib.contextmanager
    def _gradients_aside(self, layers: Mapping[str, LowRankLayer]) -> Iterator[None]:
        """Put the gradients of all other parameters back at the end; those of `layers` are gone.

        The closure's own, left behind, would add to those of the next step.
        """
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        kept = {p: p.grad for p in (*self.model.parameters(), *held)}
        kept.update({layer.weight: None for layer in layers.values()})
        for p in kept:
            p.grad = None
        try:
            yield
        finally:
            for p, grad in kept.items():
                p.grad = grad

    @contextlib.contextmanager
    def _buffers_aside(self) -> Iterator[None]:
        """Put the model's persistent buffers back at the end.

        Batch norms would count one batch many times, most of them with cores that are dropped.
        """
        kept = [
            (module._buffers, name, buffer, buffer.clone())
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]
        try:
            yield
        finally:
            for buffers, name, buffer, value in kept:
                buffers[name] = buffer.copy_(value)

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """Step count and ranks (the weights of those ranks are the model's)."""
        return {"count": self.count, "ranks": self.ranks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the count. Load the model first: its weights bring their ranks with them.

        Raises
        ------
        ValueError
            If it is no such state, or the model's ranks are not those that were saved.
        """
        check_state(state, ("ranks", "count"))
        if state["ranks"] != self.ranks:
            raise ValueError(
                f"ranks must be those of the model, {self.ranks}, got {state['ranks']}: load the "
                "model's state dict first"
            )
        self.count = check_integer("state['count']", state["count"], low=0)


def _capped(layer: LowRankLayer) -> bool:
    return isinstance(layer.manifold, WellConditioned)


class _NonFiniteError(Exception):
    """A coefficient step of the layer named left the finite numbers."""
