r"""T7: the projected step on cond <= κ follows the constrained flow to first order in h.

**Statement.** K = K_τ, F ℓ-Lipschitz with one-sided constant λ, ‖F‖ <= μ and σ_r >= s along both
paths, c the constant of L4.3, β = c/s. For the constrained flow Ẏ = P_{T_K(Y)}F(Y) and the
catching-up steps y_{k+1} = Π_K(y_k + hF(y_k)) from the same start,

    ‖y_k - Y(kh)‖ <= h μ e^{A kh/2} sqrt(½ + (8ℓ + 36βμ) kh),    A = max(0, 2λ + ℓ + 8βμ):

**O(h)**, however often the boundary is met or left, and without any gradient structure of F.

**Proof.** n_{k+1} = (y_k + hF_k - y_{k+1})/h is a proximal normal of K at y_{k+1}, ‖n_{k+1}‖ <= μ
because y_k ∈ K; v_{k+1} = (y_{k+1} - y_k)/h = F_k - n_{k+1}, ‖v‖ <= 2μ. Let y(t) = y_k + θv_{k+1},
θ = t - kh, and D = y - Y(t), F(Y) = Ẏ + N. Then ½(‖D‖²)' is the sum of

  (i) ⟨D, F_k - F(Y)⟩ <= λ‖D‖² + 2ℓμθ‖D‖;
  (ii) ⟨y - Y, N⟩ <= 2βμ(‖D‖² + 4μ²h²): y is a mean of y_k and y_{k+1}, both in K; L4.3 at Y;
  (iii) ⟨Y - y, n_{k+1}⟩ = ⟨Y - y_{k+1}, n_{k+1}⟩ + (h-θ)⟨v_{k+1}, n_{k+1}⟩, the first as in (ii).

Everything is of order ‖D‖² + h² but the last, which is as large as h at every step that runs into
the boundary; summed naively it gives O(√h). But by L4.3 at y_k, where n_k is normal, ⟨v_{k+1}, n_k⟩
<= 4βμ³h, so

    ⟨v_{k+1}, n_{k+1}⟩ <= ⟨v_{k+1}, n_{k+1} - n_k⟩ + 4βμ³h
                       = ⟨v_{k+1}, F_k - F_{k-1}⟩ - ⟨v_{k+1}, v_{k+1} - v_k⟩ + 4βμ³h
                      <= (4ℓμ² + 4βμ³) h + ½(‖v_k‖² - ‖v_{k+1}‖²):

it telescopes (with n_0 = 0, v_0 = F_0). As ∫2(h-θ)dθ = h² and the weights of Gronwall's lemma
decrease, ‖D‖² <= e^{AT} h² [(4ℓμ² + 32βμ³)T + (4ℓμ² + 4βμ³)T + ½μ²]. ∎

For the step of CondLR, y_{k+1} = Π_K(R(hP_y F)), the same proof holds with other constants:
P_y^⊥F_k is a normal at y_k, P_yF is Lipschitz along the path (L3.3), and R differs from y + hP_yF
by O(h²).

The argument is Rulla's (1996; Nochetto, Savaré, Verdi 2000) for gradient flows of convex functions,
where the telescoping comes from monotonicity; here prox-regularity takes its place at the price of
O(h). Inexact catching-up for prox-regular sets: arXiv 2501.04781. For O(h) on a nonconvex set we
know no earlier proof. Ours.

**Checked**: the bound (catching-up steps), the slope and cond <= κ at every step (these and
CondLR), on flows that are at the boundary for a twentieth of the time at least. Clipping at every
second step only keeps the rate, but leaves the set by O(h); at every √N-th step it costs the rate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import geoopt
import torch
from torch import Tensor

import lrmanifold as lrm
from lrmanifold import linalg

from ..approximation import constrained_flow
from ..approximation.constrained_flow import project, reach_constant
from ..approximation.flows import GRID
from ..approximation.problems import Problem, problem
from ..core import Claim, Control, Evidence, Sample, Source, largest, not_met
from ..plotting import slope
from ..sampling import Draw

ORDER = 1.0
SIZE = 1.0  # factor of the bound
TOLERANCE = 0.08
REFINEMENTS = (1, 2, 4)
REFERENCE = 8 * GRID
METHODS = ("catching-up", "CondLR")
#: Largest cond/κ of a point in the set, with room for rounding.
INSIDE = 1.0 + 1e-6
#: The boundary is met for at least this share of the time.
SHARE = 0.05

Step = Callable[[Problem, Tensor, float, float, int], Tensor]


def sample(
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    method: str | None = None,
    tau: float | None = None,
    **fixed,
) -> Sample:
    """Gradient flows between points that are worse conditioned than K allows."""
    draw = Draw(seed, torch.float64, device)
    drawn = draw.choose(0.0, 0.1, 0.5)
    tau = drawn if tau is None else tau
    options = {
        "families": (("quadratic", "completion")[seed // 2 % 2],),
        "m": draw.integer(5, 8),
        "n": draw.integer(4, 7),
        "rank": draw.integer(2, 3),
        "spread": 3.0 * (1.0 + tau),
        "change": draw.uniform(0.3, 0.6),
        "noise": 0.02,
        **fixed,
    }
    at = problem(seed, device, **options)  # type: ignore[arg-type]
    return {"problem": at, "tau": tau, "method": method or METHODS[seed % 2]}


def catching_up(at: Problem, Y: Tensor, h: float, tau: float, k: int) -> Tensor:
    """Π_K(Y + hF(Y))."""
    (F,) = at.force(torch.zeros((), dtype=Y.dtype), (Y,))
    return project(Y + h * F, at.rank, tau)


def condlr(at: Problem, Y: Tensor, h: float, tau: float, k: int) -> Tensor:
    """One step of the library's optimizer, without momentum."""
    M = lrm.WellConditioned(Y.shape[-2], Y.shape[-1], at.rank, tau=tau)
    p = geoopt.ManifoldParameter(M.from_dense(Y), manifold=M)
    optimizer = lrm.optim.CondLR([p], h)
    (F,) = at.force(torch.zeros((), dtype=Y.dtype), (Y,))
    (-(F * M.to_dense(p)).sum()).backward()
    optimizer.step()
    return M.to_dense(p.detach())


def about_the_mean(at: Problem, Y: Tensor, h: float, tau: float, k: int) -> Tensor:
    """Clip about the mean: feasible, but no projection."""
    (F,) = at.force(torch.zeros((), dtype=Y.dtype), (Y,))
    P, s, Qh = linalg.svd(Y + h * F)
    values = linalg.clip_values(s[..., : at.rank], tau, centre="mean")
    return (P[..., : at.rank] * values[..., None, :]) @ Qh[..., : at.rank, :]


def sometimes(
    at: Problem, Y: Tensor, h: float, tau: float, k: int, every: Callable[[float], int]
) -> Tensor:
    """Truncate at every step, clip at every `every(N)`-th one only, N the number of steps."""
    (F,) = at.force(torch.zeros((), dtype=Y.dtype), (Y,))
    if (k + 1) % every(at.horizon / h) == 0:
        return project(Y + h * F, at.rank, tau)
    P, s, Qh = linalg.svd(Y + h * F)
    return (P[..., : at.rank] * s[..., None, : at.rank]) @ Qh[..., : at.rank, :]


def second(steps: float) -> int:
    return 2


def root(steps: float) -> int:
    return round(steps**0.5)


STEPS: dict[str, Step] = {"catching-up": catching_up, "CondLR": condlr}


def constants(at: Problem, tau: float, path: constrained_flow.ConstrainedPath) -> dict[str, Tensor]:
    """μ, s, β, A of the statement, with a tenth of room for the steps' own path; (B,) each."""
    mu = 1.1 * torch.linalg.matrix_norm(path.F).amax(0)
    s = 0.9 * linalg.svdvals(path.Y)[..., at.rank - 1].amin(0)
    beta = reach_constant(at.rank, tau) / s
    assert at.lipschitz is not None
    assert at.one_sided is not None
    A = (2.0 * at.one_sided + at.lipschitz + 8.0 * beta * mu).clamp_min(0.0)
    return {"mu": mu, "s": s, "beta": beta, "A": A}


def errors(given: Sample, step: Step) -> dict[str, list[Tensor]]:
    """max_k ‖y_k - Y(kh)‖ (B,) for each h, the largest cond/κ, and the bound."""
    at, tau = given["problem"], given["tau"]
    path = constrained_flow.integrate(at, tau, REFERENCE)
    q, reference = constants(at, tau, path), path.Y
    found: dict[str, list[Tensor]] = {"error": [], "outside": [], "bound": [], "h": []}
    for refinement in REFINEMENTS:
        steps = GRID // 2 * refinement
        h, Y = at.horizon / steps, reference[0]
        error, outside = torch.zeros_like(q["mu"]), torch.zeros_like(q["mu"])
        for k in range(steps):
            Y = step(at, Y, h, tau, k)
            s = linalg.svdvals(Y)
            outside = torch.maximum(outside, s[..., 0] / ((1.0 + tau) * s[..., at.rank - 1]))
            far = torch.linalg.matrix_norm(Y - reference[(k + 1) * (REFERENCE // steps)])
            error = torch.maximum(error, far)
        T = at.horizon
        inside = 0.5 + (8.0 * at.lipschitz + 36.0 * q["beta"] * q["mu"]) * T
        limit = h * q["mu"] * (0.5 * q["A"] * T).exp() * inside.sqrt()
        for key, value in (("error", error), ("outside", outside), ("bound", limit)):
            found[key].append(value)
        found["h"].append(torch.tensor(h))
    s = linalg.svdvals(path.Y)[..., : at.rank]
    share = s[..., 0] / ((1.0 + tau) * s[..., -1])
    at_bound = ~(share < 1.0 - 1e-9)
    # The reference has to be in the set, too: so NaN is not left out, but fails.
    found["outside"].append(share.amax(0))
    found["met"] = [at_bound.double().mean(0) >= SHARE]
    return found


def check(
    sample: Sample,
    *,
    order: float = ORDER,
    size: float = SIZE,
    inside: float = INSIDE,
    step: Step | None = None,
) -> Evidence:
    method = sample["method"]
    found = errors(sample, step or STEPS[method])
    met = found["met"][0]
    if not bool(met.any()):
        return not_met("the boundary is hardly met")
    sizes = [float(e[met].square().mean().sqrt()) for e in found["error"]]
    fitted = slope([float(h) for h in found["h"]], sizes)
    outside = largest(x[met].max() for x in found["outside"])
    shares = [
        float((e / (size * b))[met].max())
        for e, b in zip(found["error"], found["bound"], strict=True)
    ]
    bounded = method != "catching-up" or largest(shares) <= 1.0
    deviation = abs(fitted - order)
    holds = deviation <= TOLERANCE and outside <= inside and bounded
    detail = {
        "method": method,
        "τ": sample["tau"],
        "slope": fitted,
        "error / bound, largest": largest(shares),
        "cond / κ, largest": outside,
    }
    return Evidence(deviation, TOLERANCE, holds, True, 1, detail)


def figure(dtype: torch.dtype, device: torch.device):
    """Error against step for the projected step, CondLR, and the clip about the mean."""
    from ..plotting import COLOURS, MARKERS, new

    given = sample(1, dtype, device, tau=0.5, m=8, n=6, rank=3, change=0.6)
    fig, ax = new(width=6.4)
    rules = {**STEPS, "clip about the mean": about_the_mean}
    for k, (name, step) in enumerate(rules.items()):
        found = errors(given, step)
        h = [float(x) for x in found["h"]]
        e = [float(x.square().mean().sqrt()) for x in found["error"]]
        label = f"{name}: slope {slope(h, e):.2f}"
        ax.loglog(h, e, MARKERS[k] + "-", color=COLOURS[k + 1], label=label)
    ax.set_xticks(h, [f"1/{round(given['problem'].horizon / x)}" for x in h])
    ax.minorticks_off()
    ax.set(xlabel="step h", ylabel="max ‖y_k - Y(kh)‖, rms of 8 problems")
    ax.set(title="Steps on cond <= 1.5 against the constrained flow")
    ax.legend()
    return fig


CLAIM = Claim(
    id="training/catching-up",
    title="T7: projected steps on K_τ follow the constrained flow to O(h)",
    statement=(
        r"\|y_k-Y(kh)\|\le h\mu\,e^{Akh/2}\sqrt{\tfrac12+(8\ell+36\beta\mu)kh},\quad "
        r"A=\max(0,2\lambda+\ell+8\beta\mu),\quad \beta=c/s"
    ),
    hypotheses=(
        "y_{k+1} = Π_K(y_k + hF(y_k)), or the step of CondLR (slope only)",
        "F ℓ-Lipschitz, one-sided λ, ‖F‖ <= μ, σ_r >= s",
    ),
    source=Source("ours", "theory/training/catching_up.py"),
    sample=sample,
    check=check,
    controls=(
        Control("order ½, the naive sum", partial(check, order=0.5)),
        Control("order 2", partial(check, order=2.0)),
        Control(
            "clip about the mean",
            partial(check, step=about_the_mean),
            partial(sample, tau=0.5, rank=3),
        ),
        Control(
            "clip at every second step only: not in the set",
            partial(check, step=partial(sometimes, every=second)),
        ),
        Control(
            "clip at every √N-th step only: the rate is lost",
            partial(check, inside=float("inf"), step=partial(sometimes, every=root)),
        ),
    ),
    loose={"size": 0.0075},
    trials=8,
    figure=figure,
    float32="float64 only: errors of O(h²) a step are compared",
    kind="order",
)
