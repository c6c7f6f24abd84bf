"""What happens to the low-rank weights while a model trains, as numbers for any logger."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import linalg
from .._arguments import check_callable, check_integer, check_module
from .._worst import worst
from .._wrappers import names_without_wrappers, unwrapped
from ..nn import LowRankLayer
from ..optim import GeometricOptimizer
from ._flow_certificate import FlowCertificate
from ._output_bound import output_bound


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
        reference = None if reference is None else unwrapped(reference)
        self._certificate, self._reference = None, reference
        if reference is not None and loss is not None:
            if optimizer is None:
                raise TypeError("a certificate needs the optimizer of the model, got None")
            layers = {"" if x is model else name: x for name, x in self._layers.items()}
            self._certificate = FlowCertificate(layers, model, reference, loss)

    def step(self) -> dict[str, float]:
        """Count a step; the measurements if it is time for them, else an empty dict.

        With a reference: call it when both models have made their step, and while `loss` still
        sees the batch of that step.
        """
        self.steps += 1
        if self._certificate is not None and self.optimizer is not None:
            self._certificate.advance(float(self.optimizer.param_groups[0]["lr"]))
        return {} if self.steps % self.every else self.measure()

    def output_bound(self, x: Tensor, *, certified: bool = False) -> Tensor:
        """How far the outputs of the two models on `x` can be apart, layer by layer.

        Theorem T3: Σ_i Π_{j>i}L_j ‖(Y_i - W_i) z_{i-1}(x)‖, z the inputs of the twin's layers, L
        the Lipschitz constants of the model's. A class whose logit in the twin exceeds all others
        by √2 times that is the model's class too. Both in evaluation mode and in float64, of whose
        rounding it takes no account.

        Parameters
        ----------
        x : Tensor, shape (N, ...)
        certified : bool
            Use ``flow/bound`` for all layers together in place of the measured changes: the largest
            Σ_i a_i δ_i with Σ δ_i² <= bound², a_i = Π_{j>i}L_j ‖z_{i-1}(x)‖.

        Returns
        -------
        Tensor, shape (N,), float64

        Raises
        ------
        ValueError
            Without a reference, for models without a bound (:func:`lrmanifold.certify.lipschitz`),
            with jumps or of other layers than each other. With `certified`: for a model that is no
            chain (``nn.Sequential``) of linear and convolutional layers, used once each, and
            functions without parameters or buffers; and if weights have moved since :meth:`step`.
        """
        if self._certificate is None or self._reference is None:
            raise ValueError("output_bound needs a monitor with reference and loss, got none")
        distance = None
        if certified:
            if not self._certificate.is_current():
                raise ValueError(
                    "certified=True is about the weights at the last step(), and they have moved "
                    "since: call step() after each step of the two models"
                )
            distance = self._certificate.numbers()["flow/bound"]
        return output_bound(self.model, self._reference, x, distance)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The measurements now; an accelerator is waited for once."""
        columns = ("cond", "drift", "sigma_max", "sigma_min")
        rows = torch.stack([_numbers(layer) for layer in self._layers.values()]).tolist()
        found: dict[str, float] = {"step": self.steps}
        for (name, layer), row in zip(self._layers.items(), rows, strict=True):
            found.update({f"{key}/{name}": x for key, x in zip(columns, row, strict=True)})
            found[f"rank/{name}"] = layer.rank
        found["cond"] = worst(row[0] for row in rows)
        found["drift"] = worst(row[1] for row in rows)
        if self.optimizer is not None:
            found["skipped_steps"] = self.optimizer.skipped_steps
        if self._certificate is not None:
            if self.steps == 0:
                self._certificate.restart()
            found.update(self._certificate.numbers())
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
    worst of all layers ``cond`` and ``drift``, NaN if one of them is; with an optimizer
    ``skipped_steps``, how many steps it has left out so far.

    A measurement costs one r x r SVD without vectors and 2 (m + n) r² flops a layer, less than an
    optimizer step.

    With `reference` and `loss` the distance to the model that trains without a rank is bounded too,
    by theorems T1 and T2 of ``theory/training``. Train the dense twin beside the low-rank model, by
    ``torch.optim.SGD`` with the same rate on the same batches. The bound is for what is really
    trained: minibatches, finite steps, any retraction, any τ. It needs no hypothesis that could
    fail on the way; momentum, decay or another optimizer only make it larger. With W, Y the weights
    of twin and model, X the point nearest to W that has the ranks and condition numbers of the
    model:

    - ``flow/distance`` = ‖Y - W‖, ``flow/best`` = ‖W - X‖, ``flow/error`` = ‖Y - X‖ are measured;
    - ``flow/certificate`` bounds ``flow/error``, and ``flow/bound`` bounds ``flow/distance``;
    - ``flow/rate`` = λ_k + κ_k, ``flow/gradient`` = ‖F(X) - F(W)‖, ``flow/companion`` = ‖d‖,
      ``flow/step`` = ‖ρ‖, ``flow/turning`` = G and ``flow/kappa/<name>`` are the theorem's terms in
      the last step; ``flow/part/<term>`` is what each has added to the square of the certificate
      since the start; ``flow/time`` is the sum of the rates;
    - ``flow/holds`` is 1 as long as the certificate is finite, and never 1 again after that. A
      change of rank starts the certificate anew, from the measured error.

    Every step then costs three dense gradients and an SVD of each dense weight, on the CPU in
    float64.

    Parameters
    ----------
    model : nn.Module
        With low-rank layers. Those it has now are watched, under the names that they have without
        ``torch.compile`` and DDP around them.
    optimizer : Optimizer of :mod:`lrmanifold.optim`, optional
        Its skipped steps are counted. Needed with `reference`, for the length of the steps.
    every : int
        Steps between two measurements.
    reference : nn.Module, optional
        The dense twin, with parameters of the same names.
    loss : callable, optional
        ``loss(model)`` is the loss, a scalar tensor, of a dense model of that kind on the batch of
        the step that was made last.

    Returns
    -------
    Monitor

    Raises
    ------
    ValueError
        If the model has no low-rank layer, for an `every` below 1, and for a `reference` without
        `loss` or of other shapes.
    TypeError
        If `optimizer` is none of this library's, or missing with `reference`.

    Examples
    --------
    >>> monitor = lrmanifold.monitor(model, optimizer, every=50)
    >>> for x, y in batches:
    ...     train_step(x, y)
    ...     for key, value in monitor.step().items():
    ...         writer.add_scalar(key, value, monitor.steps)
    """
    return Monitor(model, optimizer, every, reference, loss)
