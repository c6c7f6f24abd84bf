r"""T1 with constants: training stays within C (ε + h) of its dense twin, for every minibatch order.

**Statement.** In T1 let every F_k be ℓ-Lipschitz with one-sided constant λ, ‖F_k‖ <= μ at W and Y,
X = Π_r W, ‖W - X‖ <= ε, σ_r(X), σ_r(Y) >= s, ε + 2hμ < s, the svd retraction, and Y(0) = X(0). Let

    a = λ + μ/s,  g = ℓ + μ/s,  α = sqrt(1 + 2ha + h²g²),
    C = ℓε + μ (ε + 3hμ/2)/(s - ε - 2hμ) + hμ²/(2(s - hμ)).

Then ‖Y_k - X_k‖ <= C h (1 + hg)/α · (α^k - 1)/(α - 1), hence **max_k ‖Y_k - W_k‖ = O(ε + h)** on
every fixed time kh <= T. As h → 0 this is theorem A's C (e^{at} - 1)/a.

**Proof.** (i) X(t) = Π_r(W + tF), t in [0, h], has the velocity (I - S_N)⁻¹P_{X(t)}F with ‖S_N‖ <=
(ε + hμ)/(s - hμ) (L3.6; Weyl), so ‖X(t) - X‖ <= tμ s/(s - ε - 2hμ), and by L3.3 ‖P_{X(t)} - P_X‖ <=
‖X(t) - X‖/s. Integrate: ‖d‖ <= μ (ε + 3hμ/2)/(s - ε - 2hμ). (ii) ‖ρ‖ <= hμ²/(2(s - hμ)), the
retraction error of mathematics 2. (iii) By L3.3 G <= (ℓ + μ/s)e + ℓε = ge + ℓε. So T1 gives, with
c = C,

    E⁺² <= (1 + 2ha) E² + 2hcE + h²(gE + c)² = α²E² + 2hc(1 + hg)E + h²c² <= (αE + hc(1 + hg)/α)²,

because α <= 1 + hg (as a <= g). Sum the geometric series. ∎

Checked: the inequality, and the two orders apart: the slope of log max‖Y - X‖ in ε with h far below
it, and in h with ε = 0 at the start (‖W - X‖ is then of order h itself). Ours.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ..approximation.problems import Batch, Layers
from ..core import Claim, Control, Evidence, Sample, Source, largest
from ..plotting import slope
from ._steps import Training, run, stacked

ORDER_EPS = 1.0
ORDER_H = 1.0
SIZE = 1.0  # factor of C
TOLERANCE = 0.08
TIME = 0.5
#: (h, noise): in the first ladder ε falls and h is far below it, in the second h falls.
EPS_LADDER = tuple((TIME / 128, 0.04 * 0.5**k) for k in range(3))
H_LADDER = tuple((TIME / n, 0.0) for n in (32, 64, 128))


def turning(seed: int, device: torch.device, h: float, noise: float, *, size: int = 6) -> Training:
    """F(W) = BW + WC from a start off M_r by `noise`.

    F is tangent to M_r at every W in it: the flow keeps the rank, and the distance to M_r stays of
    order `noise`; a step loses the rank by O(h²).
    """
    draw = Batch(seed, device, size)
    m, n = draw.integer(5, 8), draw.integer(4, 6)
    r = draw.integer(1, 2)
    X0 = draw.low_rank(m, n, draw.values(r, 2.0))
    B, C = 0.5 * draw.units(m, m), 0.5 * draw.units(n, n)

    def field(k: int, W: Layers) -> Layers:
        return (B @ W[0] + W[0] @ C,)

    W0 = X0 + noise * draw.units(m, n)
    return Training("turning", field, (W0,), (r,), h, round(TIME / h))


#: Of the field: ‖B‖ + ‖C‖ bounds both.
LIPSCHITZ, ONE_SIDED = 1.0, 1.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    ladders = {"eps": EPS_LADDER, "h": H_LADDER}
    return {
        name: [turning(seed, device, *rung, **fixed) for rung in ladder]
        for name, ladder in ladders.items()
    }


def bound(at: Training, q: dict[str, Tensor], size: float) -> tuple[Tensor, Tensor]:
    """The bound at the last step (B,), and whether its hypotheses are met."""
    h, mu, s, eps = at.h, q["mu"].amax(0), q["s"].amin(0), q["eps"].amax(0)
    ell, lam = LIPSCHITZ, ONE_SIDED
    a, g = lam + mu / s, ell + mu / s
    gap = (s - eps - 2.0 * h * mu).clamp_min(1e-12)
    C = ell * eps + mu * (eps + 1.5 * h * mu) / gap + h * mu.square() / (2.0 * (s - h * mu))
    alpha = (1.0 + 2.0 * h * a + (h * g).square()).sqrt()
    growth = (alpha.pow(at.steps) - 1.0) / (alpha - 1.0)
    return size * C * h * (1.0 + h * g) / alpha * growth, ~(gap <= 1e-9)


def check(
    sample: Sample,
    *,
    order_eps: float = ORDER_EPS,
    order_h: float = ORDER_H,
    size: float = SIZE,
) -> Evidence:
    inside, slopes, ratios = True, {}, []
    deviations = []
    for name, ladder in (("eps", sample["eps"]), ("h", sample["h"])):
        errors, sizes = [], []
        for at in ladder:
            q = dict(stacked(run(at)))
            limit, met = bound(at, q, size)
            e = q["next"].amax(0)
            inside = inside and bool((e <= limit)[met].all())
            ratios += (e / limit)[met].tolist()
            errors.append(math.sqrt(float(e.square().mean())))
            sizes.append(math.sqrt(float(q["eps"].amax(0).square().mean())))
        steps = [at.h for at in ladder]
        slopes[name] = slope(sizes if name == "eps" else steps, errors)
        wanted = order_eps if name == "eps" else order_h
        deviations.append(abs(slopes[name] - wanted))
    worst = largest(deviations)
    detail = {"slopes": slopes, "e / bound, largest": largest(ratios)}
    return Evidence(worst, TOLERANCE, worst <= TOLERANCE and inside, True, 1, detail)


def figure(dtype: torch.dtype, device: torch.device):
    """max ‖Y - X‖ against ε and against h, with the bound."""
    from ..plotting import COLOURS, new

    fig, axes = new(2, width=4.8)
    given = sample(3, dtype, device)
    for ax, name in zip(axes, ("eps", "h"), strict=True):
        rows = [dict(stacked(run(at))) for at in given[name]]
        y = [float(q["next"].amax()) for q in rows]
        pairs = zip(given[name], rows, strict=True)
        limits = [float(bound(at, q, 1.0)[0].max()) for at, q in pairs]
        x = [float(q["eps"].amax()) for q in rows] if name == "eps" else [a.h for a in given[name]]
        ax.loglog(x, y, "o-", color=COLOURS[1], label=f"max ‖Y - X‖: slope {slope(x, y):.2f}")
        ax.loglog(x, limits, "--", color=COLOURS[0], label="T1 with constants")
        ax.set_xticks(x, [f"{v:.1e}" for v in x])
        ax.minorticks_off()
        ax.set(xlabel="ε = max ‖W - X‖" if name == "eps" else "step h")
        ax.legend()
    axes[0].set_ylabel("distance, Frobenius norm")
    return fig


CLAIM = Claim(
    id="training/discrete-a-priori",
    title="T1 with constants: within C (ε + h), slopes in ε and in h",
    statement=(
        r"\|Y_k-X_k\|\le C\,h\,\frac{1+hg}{\alpha}\cdot\frac{\alpha^k-1}{\alpha-1},\quad "
        r"C=\ell\varepsilon+\mu\frac{\varepsilon+3h\mu/2}{s-\varepsilon-2h\mu}+\frac{h\mu^2}{2(s-h\mu)}"
    ),
    hypotheses=("F_k ℓ-Lipschitz, ‖F_k‖ <= μ", "ε + 2hμ < s <= σ_r(X), σ_r(Y)", "Y(0) = Π_r W(0)"),
    source=Source("ours", "theory/training/discrete_a_priori.py"),
    sample=sample,
    check=check,
    controls=(
        Control("order ½ in ε", partial(check, order_eps=0.5)),
        Control("order 2 in h", partial(check, order_h=2.0)),
        Control("a hundredth of C", partial(check, size=0.01)),
    ),
    loose={"size": 0.188},
    trials=10,
    figure=figure,
    float32="float64 only: errors of O(h²) a step are compared",
    kind="order",
)
