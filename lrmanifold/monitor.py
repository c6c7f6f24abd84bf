"""What happens to the low-rank weights while a model trains, as numbers for any logger."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import linalg
from ._arguments import check_callable, check_integer, check_module
from ._flow_certificate import FlowCertificate, check_flow
from ._wrappers import names_without_wrappers, unwrapped
from .nn import LowRankLayer
from .optim import GeometricOptimizer


class Monitor:
    """See :func:`monitor`.

    Attributes
    ----------
    steps : int
        Calls of :meth:`step` so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        every: int,
        reference: nn.Module | None,
        loss: Callable[[nn.Module], Tensor] | None,
    ) -> None:
        check_module("model", model)
        every = check_integer("every", every, low=1)
        if reference is not None:
            check_module("reference", reference)
        if loss is not None:
            check_callable("loss", loss, "a function of the model")
        if optimizer is not None and not isinstance(optimizer, GeometricOptimizer):
            raise TypeError(
                "optimizer must be one of lrmanifold.optim, which count their skipped steps, got "
                f"{type(optimizer).__name__}"
            )
        model = unwrapped(model)
        self.model, self.optimizer, self.every = model, optimizer, every
        self.steps = 0
        self._layers = {
            name or "model": layer
            for name, layer in names_without_wrappers(model).items()
            if isinstance(layer, LowRankLayer)
        }
        if not self._layers:
            raise ValueError("model must have low-rank layers, got none; see lrmanifold.factorize")
        if (reference is None) != (loss is None):
            raise ValueError("reference and loss must be given together: a certificate needs both")
        self._certificate, self._time = None, 0.0
        if reference is not None and loss is not None:
            check_flow(optimizer)
            layers = {"" if x is model else name: x for name, x in self._layers.items()}
            self._certificate = FlowCertificate(layers, model, reference, loss)

    def step(self) -> dict[str, float]:
        """Count a step; the measurements if it is time for them, else an empty dict."""
        self.steps += 1
        if self._certificate is not None and self.optimizer is not None:
            self._time += float(self.optimizer.param_groups[0]["lr"])
        return {} if self.steps % self.every else self.measure()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The measurements now; an accelerator is waited for once."""
        columns = ("cond", "drift", "sigma_max", "sigma_min")
        rows = torch.stack([_numbers(layer) for layer in self._layers.values()]).tolist()
        found: dict[str, float] = {"step": self.steps}
        for (name, layer), row in zip(self._layers.items(), rows, strict=True):
            found.update({f"{key}/{name}": x for key, x in zip(columns, row, strict=True)})
            found[f"rank/{name}"] = layer.rank
        found["cond"] = max(row[0] for row in rows)
        found["drift"] = max(row[1] for row in rows)
        if self.optimizer is not None:
            found["skipped_steps"] = self.optimizer.skipped_steps
        if self._certificate is not None:
            check_flow(self.optimizer)
            found.update(self._certificate.measure(self._time))
        return found


def _numbers(layer: LowRankLayer) -> Tensor:
    """Condition number, drift, σ_max, σ_min, each the worst of any group; shape (4,) on the CPU.

    NaN where the weight is not finite, and for a core without singular values above 0.
    """
    M = layer.manifold
    X = layer.weight.detach()
    X = X.to(linalg.compute_dtype(X.dtype))
    device = X.device.type
    if device == "cpu" and not linalg.all_finite(X):
        return X.new_full((4,), torch.nan, dtype=torch.float64)
    with torch.autocast(device, enabled=False):
        s, drift = M.svdvals(X), M.drift(X)
    worst = (s[..., 0] / s[..., -1]).max(), drift.max(), s.max(), s.min()
    return torch.stack(worst).double().cpu()


def monitor(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    every: int = 50,
    reference: nn.Module | None = None,
    loss: Callable[[nn.Module], Tensor] | None = None,
) -> Monitor:
    """Watch the low-rank layers of a model: conditioning, drift, singular values, ranks.

    ``step()`` after each optimizer step gives a flat dict of numbers every `every` steps, and an
    empty one otherwise, which TensorBoard, Weights & Biases or a CSV file take as it is. The keys
    are the same each time: ``step``; for each layer ``cond/<name>``, ``drift/<name>``
    (max |UᵀU - I|, |VᵀV - I|), ``sigma_max/<name>``, ``sigma_min/<name>``, ``rank/<name>``; the
    worst of all layers ``cond`` and ``drift``; with an optimizer ``skipped_steps``.

    A measurement costs one r x r SVD without vectors and 2 (m + n) r² flops a layer, less than an
    optimizer step.

    With `reference` and `loss` the distance to the model that trains without a rank is certified
    too, by theorem A of mathematics 4.1 in its a-posteriori form. Train the dense twin beside the
    low-rank model, by ``torch.optim.SGD`` with the same rate and on the same batches; call
    ``measure()`` once before the first step. With W, Y the weights of twin and model, X the best
    approximation of W at the ranks of Y: ``flow/distance`` = ‖Y - W‖, ``flow/best`` = ‖W - X‖,
    ``flow/error`` = ‖Y - X‖, and ``flow/certificate``, which bounds ``flow/error`` for exact
    gradient flows; its growth ``flow/rate`` = λ + κ, ``flow/source`` = ℓε + δ and
    ``flow/kappa/<name>``; ``flow/time``, the sum of the rates; ``flow/holds``: 1 where the
    theorem's hypotheses are met, that is W has a gap behind its r-th singular value, ‖W - X‖ is
    below the smallest singular value, and no condition number is held at its bound. Steps of finite
    length, noise of batches and batch normalisation are not covered: it is a measurement, as good
    as the steps are short. Costs three dense gradients and an SVD of each dense weight.

    Parameters
    ----------
    model : nn.Module
        With low-rank layers. Those it has now are watched, under the names that they have without
        ``torch.compile`` and DDP around them.
    optimizer : Optimizer of :mod:`lrmanifold.optim`, optional
        Its skipped updates are reported.
    every : int
        Steps between two measurements.
    reference : nn.Module, optional
        The dense twin, with parameters of the same names.
    loss : callable, optional
        ``loss(model)`` is the loss, a scalar tensor, of a dense model of that kind on the present
        batch.

    Returns
    -------
    Monitor

    Raises
    ------
    ValueError
        If the model has no low-rank layer, for an `every` below 1, for a `reference` without `loss`
        or of other shapes, and if the optimizer does not follow the gradient flow (it needs
        momentum, decay, penalty, clip_margin 0, the exact metric, one rate).
    TypeError
        If `optimizer` is none of this library's or, with `reference`, not a CondLR.

    Examples
    --------
    >>> monitor = lrmanifold.monitor(model, optimizer, every=50)
    >>> for x, y in batches:
    ...     train_step(x, y)
    ...     for key, value in monitor.step().items():
    ...         writer.add_scalar(key, value, monitor.steps)
    """
    return Monitor(model, optimizer, every, reference, loss)
