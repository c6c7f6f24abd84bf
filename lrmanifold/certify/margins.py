"""Certified radii of images, and the share of a data set that is verified."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import check_callable, check_integer, check_module, check_number, shown
from .._evaluation import check_attacked, evaluation_mode
from ._digest import digest
from ._labels import check_labels
from ._sizes import SMALLEST
from ._trace import Recorder, gives_the_same, refuse_hooks
from .bounds import CertificationError
from .lipschitz import LipschitzReport, lipschitz, repeated

_UNIT = 2.0**-53


def radius(
    model: nn.Module, x: Tensor, y: Tensor | None = None, *, bound: LipschitzReport | None = None
) -> Tensor:
    r"""Certified l2 radius of each sample: no input closer than that has another class.

    :math:`\min_{j \ne y} (z_y - z_j - e) / (L \|w_y - w_j\|)` with L the bound of everything before
    the last linear layer, w its rows, or :math:`(z_y - z_j - e)/(\sqrt 2 L_{total})` if that is
    larger or the network ends otherwise. Logits are computed in float64 from the stored numbers;
    e is a proved bound of that forward's rounding at x and at every point of the ball, so the
    certificate holds for the network in exact arithmetic and as evaluated in float64. A float32
    forward may differ within about 1e-6 of the boundary.

    Parameters
    ----------
    model : nn.Module
        Takes `x` as it is: put the normalisation inside, as
        :class:`lrmanifold.experiments.training.Normalized` does, and the radius is in the unit of
        the images before it.
    x : Tensor, shape (B, ...)
        Floating point.
    y : Tensor, shape (B,), optional
        True classes: a sample that is misclassified gets 0. None: the prediction is certified.
    bound : LipschitzReport, optional
        Of this model with this input shape, to spare its computation.

    Returns
    -------
    Tensor, shape (B,), float64

    Raises
    ------
    BoundError
        Where the model has no bound.
    ValueError
        If `bound` belongs to other weights or shapes, or x or y are wrong.
    """
    report = _report(model, x, bound)
    return _radii(report, x, y)


def _report(model: nn.Module, x: Tensor, bound: LipschitzReport | None) -> LipschitzReport:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or len(x) < 1:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a floating point tensor (B, ...), B >= 1, got {got}")
    if bound is None:
        return lipschitz(model, tuple(x.shape[1:]))
    if not isinstance(bound, LipschitzReport):
        raise TypeError(f"bound must be what lipschitz returns, got {type(bound).__name__}")
    if bound.network.input_shape != tuple(x.shape[1:]):
        raise ValueError(
            f"bound is for inputs of shape {bound.network.input_shape}, x has "
            f"{tuple(x.shape[1:])}: make it by lipschitz(model, input_shape)"
        )
    if bound.digest != digest(model):
        raise ValueError("bound belongs to other weights than the model's: make it anew")
    refuse_hooks(model)  # of all modules: no fingerprint of this one
    if not gives_the_same(model, bound.network.graph, x[:2]):
        raise ValueError("bound belongs to another model: on x this one gives other outputs")
    return bound


@torch.no_grad()
def _radii(report: LipschitzReport, x: Tensor, y: Tensor | None) -> Tensor:
    network = report.network
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x must be finite")
    recorder = Recorder(network.graph)
    recorder.batch = len(x)
    device = next((p.device for p in network.graph.parameters()), x.device)
    with evaluation_mode(network.graph):
        z = recorder.run(x.detach().to(device, torch.float64, copy=True))
    if z.ndim != 2 or z.shape[1] < 2:
        raise ValueError(f"model must give logits (B, classes >= 2), got {tuple(z.shape)}")
    classes = z.shape[1]
    predicted = z.argmax(1)
    if y is not None:
        check_labels(y, len(x), classes)
    label = predicted if y is None else y.to(device, torch.long)
    own = z.gather(1, label[:, None])
    other = torch.arange(classes, device=device) != label[:, None]
    # how fast class j may come nearer, before rounding is counted
    slopes = math.sqrt(2.0) * report.total * (1.0 + 1e-14) * torch.ones_like(z)
    gaps = report.head_gaps()
    if gaps is not None:
        steep = report.body * (1.0 + 1e-14) * gaps.to(device)[label]
        if report.body > 0:
            steep = torch.where(gaps.to(device)[label] > 0, steep.clamp_min(SMALLEST), steep)
        slopes = torch.minimum(slopes, steep)

    e, growth = _forward_error(report, recorder)
    # √2 e at x and √2 e at the perturbed point, where it has grown with the distance
    margins = own - z - 3.0 * e[:, None]
    distance = torch.where(margins > 0, margins / (slopes + 3.0 * growth), 0.0)
    distance = torch.where(other, distance, math.inf).amin(1)
    return torch.where(predicted == label, distance, 0.0) * (1.0 - 1e-14)


def _forward_error(report: LipschitzReport, recorder: Recorder) -> tuple[Tensor, float]:
    """(e, g) with ‖computed - exact‖ of the logits at most e + g d at every point within d of x.

    e has shape (B,).
    """
    network, walked = report.network, report.walked
    errors: dict[str, tuple[Any, float]] = {}
    for node in network.graph.graph.nodes:
        if node.op == "placeholder":
            errors[node.name] = torch.zeros_like(recorder.norms[node.name]), 0.0
        elif node.name in walked.local:
            bound = walked.local[node.name]
            live = [n for n in node.all_input_nodes if n.name in errors]
            e: Any = 0.0
            length: Any = 0.0
            g = longer = 0.0
            pairs = zip(repeated(node, live), network.stretches(node, live), strict=True)
            for n, stretch in pairs:
                error, growth = errors[n.name]
                e, g = e + stretch * error, g + stretch * growth
                # of the computed value: here, and what it gains with the distance
                length = length + stretch * (recorder.norms[n.name] * (1.0 + 1e-9) + 2.0 * error)
                longer += stretch * (walked.total[n.name] + 2.0 * growth)
            norm = float(bound.norm)
            # of numbers that underflow the roundings are absolute, fewer than 2^53 half denormals
            e = norm * e + _UNIT * (bound.slope * length + bound.offset) + SMALLEST
            g = norm * g + (_UNIT * bound.slope * longer + SMALLEST if bound.slope else 0.0)
            e, g = e * (1.0 + 1e-9), g * (1.0 + 1e-9)
            errors[node.name] = e, g
    return errors[network.output.name]


def verified_accuracy(
    model: nn.Module,
    data: Iterable[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor],
    eps: float | Sequence[float],
    *,
    attack: Callable[..., Tensor] | None = None,
    batch_size: int = 500,
    progress: Callable[[int], Any] | None = None,
    bound: LipschitzReport | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Share of samples that are right and stay right within each radius: a proof, not an attack.

    Parameters
    ----------
    model : nn.Module
        Takes images before normalisation; see :func:`radius`.
    data : tensors (x, y), or an iterable of such batches
    eps : float or several
        l2 radii, each at least 0.
    attack : callable (model, x, y, eps, **options) -> Tensor, optional
        Such as :func:`lrmanifold.robustness.pgd` with ``norm="l2", steps=50, restarts=3``: adds the
        accuracy under it, and checks the proof: verified <= attacked <= clean must hold sample by
        sample.
    batch_size : int
    progress : callable, optional
        Called with the number of samples done.
    bound : LipschitzReport, optional
    **options
        Of `attack`.

    Returns
    -------
    dict
        ``clean``, ``verified`` (eps -> share), ``attacked`` (eps -> share, with `attack`),
        ``count``, ``radius`` (mean and median of the certified radii) and ``bound`` (L).

    Raises
    ------
    CertificationError
        If the attack moved a certified sample into another class within its radius.
    """
    several = isinstance(eps, Iterable) and not isinstance(eps, (str, bytes))
    strengths = [check_number("eps", e, low=0) for e in (eps if several else [eps])]  # type: ignore[union-attr]
    if not strengths:
        raise ValueError("eps must hold at least one number, got none")
    batch_size = check_integer("batch_size", batch_size, low=1)
    if attack is not None:
        check_callable("attack", attack, "a function (model, x, y, eps, **options)")
    if progress is not None:
        check_callable("progress", progress, "a function of the number of samples")
    check_module("model", model)
    if options and attack is None:
        raise TypeError(f"options {sorted(options)} belong to an attack, which was not given")
    radii: list[Tensor] = []
    right = count = 0
    attacked = dict.fromkeys(strengths, 0)
    for x, y in _batches(data, batch_size):
        if bound is None or not radii:
            bound = _report(model, x, bound)
        elif bound.network.input_shape != tuple(x.shape[1:]):
            raise ValueError(
                f"all batches must have one shape, got {bound.network.input_shape} and "
                f"{tuple(x.shape[1:])}: a bound depends on it"
            )
        r = _radii(bound, x, y)
        correct = r > 0
        logits = _logits(bound, x)
        clean = logits.argmax(1) == y.to(logits.device)
        if bool((correct & ~clean).any()):
            raise CertificationError("a sample with a positive radius is misclassified")
        right, before, count = right + int(clean.sum()), count, count + len(y)
        radii.append(r.cpu())
        if attack is not None:
            for e in strengths:
                broken = _attacked(model, bound, attack, x, y, e, options)
                attacked[e] += int((clean & ~broken).sum())
                wrong = (broken & (r > e)).nonzero()[:, 0].tolist()
                if wrong:
                    raise CertificationError(
                        f"eps={e:g}: {len(wrong)} certified samples were broken, for instance "
                        f"number {before + wrong[0]}, of radius {float(r[wrong[0]]):.6g}: "
                        "some bound is wrong"
                    )
        if progress is not None:
            progress(count)
    if not count:
        raise ValueError("data holds no samples")
    assert bound is not None
    every = torch.cat(radii)
    found: dict[str, Any] = {
        "clean": right / count,
        "verified": {e: float((every > e).double().mean()) for e in strengths},
        "count": count,
        "radius": {"mean": float(every.mean()), "median": float(every.median())},
        "bound": bound.total,
    }
    if attack is not None:
        found["attacked"] = {e: n / count for e, n in attacked.items()}
    return found


def _batches(data: Any, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor):
        x, y = data
        if not isinstance(y, Tensor):
            raise TypeError(f"data must be tensors (x, y), got {shown(y)} for y")
        if not len(x):
            raise ValueError("data holds no samples")
        if len(x) != len(y):
            raise ValueError(f"x and y must be equally long, got {len(x)} and {len(y)}")
        return zip(x.split(size), y.split(size), strict=True)
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise TypeError(f"data must be (x, y) or batches of it, got {shown(data)}")
    return map(_pair, data)


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"data must give pairs (x, y), got {shown(batch)}")
    return batch[0], batch[1]


@torch.no_grad()
def _logits(report: LipschitzReport, x: Tensor) -> Tensor:
    graph = report.network.graph
    device = next((p.device for p in graph.parameters()), x.device)
    with evaluation_mode(graph):
        return graph(x.detach().to(device, torch.float64, copy=True))


def _attacked(
    model: nn.Module,
    report: LipschitzReport,
    attack: Callable[..., Tensor],
    x: Tensor,
    y: Tensor,
    eps: float,
    options: dict[str, Any],
) -> Tensor:
    """Which samples have another class, in float64, at what the attack found within eps."""
    # a copy: an attack may write into what it is given
    found = check_attacked(attack(model, x.clone(), y, eps, **options), x) if eps else x
    # an attack may leave the ball by a rounding of float32; that would be no counterexample
    change = found.detach().double() - x.double()
    length = change.flatten(1).norm(dim=1).clamp_min(1e-300)
    shrink = (eps / length).clamp_max(1.0).view(-1, *[1] * (x.ndim - 1))
    z = _logits(report, x.double() + shrink * change)
    return z.argmax(1) != y.to(z.device)
