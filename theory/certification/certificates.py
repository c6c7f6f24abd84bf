r"""What `lrmanifold.certify` says of whole networks is never contradicted.

**Statement.** Let L be the bound of ``certify.lipschitz`` and ρ(x) the radius of
``certify.radius`` for a network f. Then for all x and x'

    ‖f(x') - f(x)‖ <= L ‖x' - x‖,    and    ‖x' - x‖ < ρ(x) implies the class of x.

A label that is not the class of x has the radius 0, and ``certify.verified_accuracy`` is the share
of radii above ε.

**Proof.** The claims of this group, one for each kind of layer, multiplied as in `composition`,
with the margins of `pairwise-margin`. This is not about them but about what the library makes of
them. ∎

**Checked** on networks of low-rank layers (τ = 0, τ = 1, none), batch norms, residual and convex
potential layers, convolutions (strides, groups, circular padding) with and without pooling; f is
computed anew in dense float64 algebra. Quotients are taken along the largest singular vector of the
Jacobian at inputs and away from them; margins are attacked by gradient steps within ρ(x) towards
each other class, from x and from the sphere. The ratio is the larger of (quotient)/L and (fall of a
margin within ρ)/(that margin).

**Sharp**, both, for linear chains of rank 1: L where all logits grow alike and no margin falls, ρ
where two classes meet and a third lifts L; L too for means over patches of a constant image.
mathematics 9 (ours).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lrmanifold import certify

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, violated
from ..sampling import eps
from ._certified import (
    constant_image,
    contested,
    forward,
    network,
    random_network,
    stretched,
)

STRETCH = 1.0  # of L
REACH = 1.0  # divides the radius
STEPS = 16
ROUNDING = 500.0
SHORT = 0.01  # the shorter of two differences


def radii(model: nn.Module, x: Tensor, bound: certify.LipschitzReport) -> Tensor:
    """As the library computes them."""
    return certify.radius(model, x, bound=bound)


def without_root(model: nn.Module, x: Tensor, bound: certify.LipschitzReport) -> Tensor:
    """The margin over L, though two logits may move against each other."""
    with torch.no_grad():
        best = model(x).double().topk(2, dim=1).values
    return (best[:, 0] - best[:, 1]) / bound.total


def of_another(model: nn.Module, x: Tensor, bound: certify.LipschitzReport) -> Tensor:
    """Each input has the radius of its neighbour in the batch."""
    return radii(model, x, bound).roll(1)


def steepest(sample: Sample, points: Tensor) -> Tensor:
    """The largest singular vector of the Jacobian on the right, shaped as the points."""
    points = points.detach().requires_grad_()
    z = forward(sample, points)
    rows = [
        torch.autograd.grad(z[:, c].sum(), points, retain_graph=True)[0] for c in range(z.shape[1])
    ]
    jacobian = torch.stack([g.flatten(1) for g in rows], 1)
    return torch.linalg.svd(jacobian, full_matrices=False).Vh[:, 0].reshape(points.shape)


def quotients(sample: Sample) -> Tensor:
    """‖f(x') - f(x)‖/‖x' - x‖ for short and long differences."""
    x, step = sample["x"].double(), sample["step"].double()
    points = torch.cat((x, x + step))
    v = steepest(sample, points)
    found = [
        (forward(sample, points + t * v) - forward(sample, points)).norm(dim=1) / t
        for t in (SHORT, 1.0)
    ]
    found.append((forward(sample, x + step) - forward(sample, x)).norm(dim=1) / _lengths(step))
    return torch.cat(found)


def least_margins(sample: Sample, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Margins at the inputs, and the smallest found within each radius; (inputs, rivals)."""
    x = sample["x"].double()
    z = forward(sample, x)
    y, classes = z.argmax(1), z.shape[1]
    rivals = (y[:, None] + torch.arange(1, classes, device=x.device)) % classes
    ones = (1,) * (x.ndim - 1)

    def margins(at: Tensor) -> Tensor:
        """For each start, input and rival, which are the first three dimensions."""
        logits = forward(sample, at.flatten(0, 2)).unflatten(0, at.shape[:3])
        own = logits.gather(-1, y.reshape(1, -1, 1, 1).expand(*at.shape[:3], 1))
        other = logits.gather(-1, rivals[None, :, :, None].expand(*at.shape[:3], 1))
        return (own - other)[..., 0]

    far = sample["starts"].double()
    reach = radius.reshape(1, -1, 1, *ones)
    far = far / _lengths(far).reshape(-1, *ones)
    delta = torch.stack((torch.zeros_like(x), far, -far))[:, :, None]
    delta = (reach * delta).expand(-1, -1, classes - 1, *x.shape[1:])
    least = start = z.gather(1, y[:, None]) - z.gather(1, rivals)
    for k in range(STEPS + 1):
        delta = delta.detach().requires_grad_()
        found = margins(x[None, :, None] + delta)
        least = torch.minimum(least, found.detach().amin(0))
        (g,) = torch.autograd.grad(found.sum(), delta)
        size = g.flatten(3).norm(dim=-1).clamp_min(1e-300).reshape(*g.shape[:3], *ones)
        delta = delta.detach() - (2.0 if k == 0 else 1.0 - k / STEPS) * reach * g / size
        length = delta.flatten(3).norm(dim=-1).reshape(*g.shape[:3], *ones)
        delta = delta * (reach / length.clamp_min(1e-300)).clamp_max(1.0)
    return start, least


def _lengths(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def check(
    sample: Sample,
    *,
    stretch: float = STRETCH,
    reach: float = REACH,
    radii: Callable[[nn.Module, Tensor, certify.LipschitzReport], Tensor] = radii,
) -> Evidence:
    model, x = network(sample), sample["x"]
    report = certify.lipschitz(model, x.shape[1:])
    L, radius, z = report.total, radii(model, x, report), forward(sample, x.double())
    lengths = sum(float(_lengths(sample[key].double()).max()) for key in ("x", "step"))
    size = ROUNDING * (float(z.abs().max()) + L * (1.0 + lengths))
    with torch.no_grad():
        another = {"the library's network is another": (model(x) - z).abs().max()}
    for defects, tolerance in ((another, eps(x) * size), (_labelled(model, x, z, report), 0.0)):
        if (against := violated(defects, tolerance)) is not None:
            return against
    grown, (start, least) = quotients(sample), least_margins(sample, radius / reach)
    bound, fall, rounding = stretch * L, start - least, eps(z) * size
    held = (grown <= bound + rounding / SHORT).all() & (fall <= start + rounding).all()
    ratios = torch.cat((grown / bound, (fall / start).flatten()))
    return Evidence(float(ratios.max()), 1.0, bool(held), ratios=tuple(ratios.tolist()))


def _labelled(
    model: nn.Module, x: Tensor, z: Tensor, bound: certify.LipschitzReport
) -> dict[str, Tensor | float]:
    """Radii for given labels: 0 for wrong ones, and counted by `verified_accuracy`."""
    y = z.argmax(1)
    radius = certify.radius(model, x, y, bound=bound)
    wrong = certify.radius(model, x, (y + 1) % z.shape[1], bound=bound)
    middle = float(radius.min() + radius.max()) / 2.0
    share = certify.verified_accuracy(model, (x, y), middle, bound=bound)["verified"][middle]
    return {
        "radius of a wrong label": wrong.max(),
        "verified share": abs(share - float((radius > middle).double().mean())),
    }


duel = partial(contested, third=False)

CLAIM = Claim(
    id="certification/certificates",
    title="Bounds and radii of the library are never contradicted",
    statement=(
        r"\|f(x')-f(x)\|\le L\,\|x'-x\|,\quad "
        r"\|x'-x\|<\rho(x)\Rightarrow\text{same class},\quad L,\rho\text{ of lrmanifold.certify}"
    ),
    hypotheses=("a network that the library certifies, in evaluation mode",),
    source=Source("ours", "mathematics 9"),
    sample=random_network,
    check=check,
    extremal=(Extremal(stretched), Extremal(contested), Extremal(constant_image)),
    controls=(
        Control("0.99 of L", partial(check, stretch=0.99), stretched),
        Control("a radius 1.05 times as large", partial(check, reach=1 / 1.05), contested),
        Control("margin/L without the √2", partial(check, radii=without_root), duel),
        Control("the radius of another input", partial(check, radii=of_another)),
    ),
    trials=40,
    float32="500 eps of the logits where the library computes them; all else is in float64",
)
