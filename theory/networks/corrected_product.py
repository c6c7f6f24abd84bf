r"""The corrected product bound, with the angle to each layer's row space.

**Statement.** For f = W_L σ(... σ(W_1 x)) with layer inputs z⁽ⁱ⁻¹⁾ (z⁽⁰⁾ = x) and pre-activations
z_i,

    cond(f; x) <= Π κ(W_i)/cos θ_i(x) · Π cond(σ_i; z_i),    cos θ_i = ‖V_iᵀ z⁽ⁱ⁻¹⁾‖/‖z⁽ⁱ⁻¹⁾‖.

**Proof.** Chain rule; cond(W; z) = ‖W‖‖z‖/‖Wz‖ and ‖Wz‖ = ‖W P_row z‖ >= ‖W⁺‖⁻¹‖P_row z‖. ∎

κ(W_i) = cond(S_i), which the library bounds by 1 + τ; cos θ_i costs nothing, because the low-rank
forward computes V_iᵀz anyway. Attained by one layer at the right place (control). mathematics 6
(ours).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from ..sampling import Draw, eps
from .plain_product import near_kernel
from .random_networks import Net, bounds, random_net

CONSTANT = 1.0
BATCH = 50
ROUNDING = 100.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """Nets of 1 to 4 layers, random sizes, ranks and τ; Gaussian inputs, or ones near a kernel."""
    draw = Draw(seed, dtype, device, **fixed)
    sizes = tuple(draw.integer(2, 16) for _ in range(draw.integer(2, 5)))
    rank, tau = draw.integer(1, 8), draw.choose(0.0, 0.1, 1.0, 9.0)
    net = random_net(draw, batch=BATCH, sizes=sizes, rank=rank, tau=tau)
    x = draw.give(draw.normal(BATCH, sizes[0]))
    return {"net": net, "x": near_kernel(net, x) if seed % 4 == 3 else x}


def attained(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """One layer; x along the smallest singular direction plus the kernel."""
    draw = Draw(seed, dtype, device)
    net = random_net(draw, batch=BATCH, sizes=(8, 8), rank=3, tau=1.0)
    Q = torch.linalg.svd(net.S[0]).Vh[..., -1, :]
    row = (net.V[0] @ Q[..., None])[..., 0]
    x = draw.give(draw.normal(BATCH, 8))
    kernel = x - (net.V[0] @ (net.V[0].mT @ x[..., None]))[..., 0]
    return {"net": net, "x": row + kernel}


def check(sample: Sample, *, constant: float = CONSTANT, cosine: bool = True) -> Evidence:
    net: Net = sample["net"]
    b = bounds(net, sample["x"])
    bound = constant * (b.corrected if cosine else b.plain)
    ratio = b.measured / bound
    # Each layer input is known to eps of its norm, and Vᵀz to that over cos θ.
    worst_angle = float((b.corrected / b.plain).max())
    tolerance = ROUNDING * eps(sample["x"]) * worst_angle
    place = int(ratio.argmax())
    ratios = tuple(ratio.tolist())
    holds = bool((ratio <= 1.0 + tolerance).all())
    measured, limit = float(b.measured[place]), float(bound[place])
    detail = {"plain bound violated": int((b.measured > b.plain).sum())}
    return Evidence(measured, limit, holds, True, len(ratios), detail, ratios)


def figure(dtype: torch.dtype, device: torch.device):
    """Plain and corrected bound against the measured condition number, one point a net."""
    from ..plotting import COLOURS, new
    from .plain_product import sample as low_rank

    fig, (left, right) = new(2, width=5.2, sharex=True, sharey=True)
    given = low_rank(0, dtype, device)
    net, x = given["net"], given["x"]
    kinds = (
        ("Gaussian x", x, COLOURS[1], "o"),
        ("x near ker W_1", near_kernel(net, x), COLOURS[2], "^"),
    )
    low, high = 1.0, 1e6
    for name, point, colour, marker in kinds:
        b = bounds(net, point)
        cond = b.measured.cpu()
        for ax, bound in ((left, b.plain), (right, b.corrected)):
            ax.scatter(bound.cpu(), cond, s=16, alpha=0.7, color=colour, marker=marker, label=name)
    for ax, title in ((left, "plain: Π κ(W_i) Π cond(σ_i)"), (right, "corrected: with 1/cos θ_i")):
        ax.plot([low, high], [low, high], color=COLOURS[0], linewidth=1)
        ax.fill_between([low, high], [low, high], high, color=COLOURS[2], alpha=0.08, linewidth=0)
        ax.text(1.4, 3e5, "bound violated", color=COLOURS[2], va="top")
        ax.set(
            xscale="log",
            yscale="log",
            xlim=(low, high),
            ylim=(low, high),
            xlabel="bound",
            title=title,
        )
    left.set(ylabel="measured cond(f; x)")
    right.legend(loc="lower right")
    fig.suptitle("Three LeakyReLU layers of rank 4 in 16 x 16, cond(W_i) <= 1.1, 100 nets")
    return fig


CLAIM = Claim(
    id="networks/corrected-product",
    title="The product bound with the angle to the row spaces",
    statement=(
        r"\mathrm{cond}(f;x)\le\prod_i\frac{\kappa(W_i)}{\cos\theta_i(x)}"
        r"\prod_i\mathrm{cond}(\sigma_i;z_i)"
    ),
    hypotheses=("LeakyReLU net without biases", "V_iᵀ z ≠ 0"),
    source=Source("ours", "mathematics 6"),
    sample=sample,
    check=check,
    extremal=(Extremal(attained),),
    controls=(
        Control("0.9 of it, one layer", partial(check, constant=0.9), attained),
        Control("without the cosines", partial(check, cosine=False), attained),
    ),
    trials=24,
    figure=figure,
    float32="100 eps / Π cos θ_i relative: Vᵀz is known to eps ‖z‖",
)
