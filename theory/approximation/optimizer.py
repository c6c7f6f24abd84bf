r"""The library's own optimizer follows the flow: certificate plus O(lr).

**Statement.** Let Y_k be the iterates of ``lrmanifold.optim.CondLR`` with learning rate h, no
momentum, on :class:`~lrmanifold.FixedRank` (any retraction) or
:class:`~lrmanifold.WellConditioned`, and Y(t) the projected flow, or the constrained flow on K_τ.
On a fixed time,

    max_k ‖Y_k - Y(kh)‖ = O(h),    so    ‖Y_k - W(kh)‖ <= certificate + C h,

the certificate being that of theorem A (FixedRank) or B (WellConditioned), W the full gradient
flow.

**Proof.** One step is an explicit Euler step ξ = -h P_Y ∇L followed by a retraction, which differs
from Y + ξ by O(h²); on K_τ the step ends with the projection of the core, which removes the
outward normal part of the step up to O(h²). Gronwall. ∎

Checked with gradients from autograd, in float64, h = T/32, T/64, T/128: the slope, and the
inequality with the C measured at the largest h. **Not covered**: stochastic gradients, momentum,
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import geoopt
import torch
from torch import Tensor

import lrmanifold as lrm

from ..core import Claim, Control, Evidence, Sample, Source, not_met
from ..plotting import slope
from ..sampling import Draw
from . import _constrained, _constrained_paths
from ._flows import GRID, integrate, norm, on_grid
from ._problems import Layers, Problem, problem
from .certificate import certificate

ORDER = 1.0
TOLERANCE = 0.2
REFINEMENTS = (1, 2, 4)
GRADIENT_FLOWS = ("quadratic", "completion", "tanh net")

Step = Callable[[list[geoopt.ManifoldParameter], float], None]


def sample(
    seed: int, dtype: torch.dtype, device: torch.device, *, tau: float | None = -1.0, **fixed
) -> Sample:
    """A gradient flow, and a manifold: FixedRank with a retraction (`tau` None), or K_τ."""
    draw = Draw(seed, torch.float64, device)
    choice = draw.choose(None, 0.0, 0.1, 1.0)
    tau = choice if tau == -1.0 else tau
    families = GRADIENT_FLOWS if tau is None else GRADIENT_FLOWS[:2]
    options: dict = {"families": families, "change": draw.uniform(0.2, 0.5), "noise": 0.02}
    options["rank"] = draw.integer(2, 3)
    options["spread"] = draw.uniform(1.0, 1.3) * (1.5 if tau is None else 1.0 + tau)
    retraction = draw.choose(*lrm.retractions.available()) if tau is None else "factored"
    at = problem(seed, device, **{**options, **fixed})
    return {"problem": at, "tau": tau, "retraction": retraction}


def condlr(params: list[geoopt.ManifoldParameter], lr: float) -> Step:
    """One step of the library's optimizer."""
    optimizer = lrm.optim.CondLR(params, lr)
    return lambda params, lr: optimizer.step()


def without_metric(params: list[geoopt.ManifoldParameter], lr: float) -> Step:
    """Gradient descent on the factors themselves: no (SSᵀ)⁻¹, so it follows another flow."""

    def step(params: list[geoopt.ManifoldParameter], lr: float) -> None:
        for p in params:
            with torch.no_grad():
                p.copy_(p.manifold.projx(p - lr * p.grad))

    return step


def train(given: Sample, steps: int, method: Callable[..., Step]) -> Layers:
    """Iterates as dense matrices, (GRID + 1, B, m, n) for each layer."""
    at: Problem = given["problem"]
    params = []
    for start in at.start:
        m, n = start.shape[-2:]
        manifold: lrm.FixedRank
        if given["tau"] is None:
            manifold = lrm.FixedRank(m, n, at.rank, retraction=given["retraction"])
        else:
            manifold = lrm.WellConditioned(m, n, at.rank, tau=given["tau"])
        params.append(geoopt.ManifoldParameter(manifold.from_dense(start), manifold=manifold))
    lr = at.horizon / steps
    step, history = method(params, lr), []
    for k in range(steps + 1):
        W = tuple(p.manifold.to_dense(p) for p in params)
        if k % (steps // GRID) == 0:
            history.append([w.detach() for w in W])
        if k == steps:
            break
        # A loss with the gradient -F(W) at the present W.
        F = at.force(torch.zeros((), dtype=W[0].dtype), tuple(w.detach() for w in W))
        loss = -sum((f * w).sum() for f, w in zip(F, W, strict=True))
        for p in params:
            p.grad = None
        loss.backward()
        step(params, lr)
    return tuple(torch.stack(w) for w in zip(*history, strict=True))


def reference(given: Sample) -> tuple[Layers, Layers, Tensor, Tensor]:
    """Low-rank and full flow on the grid, the certificate, and the resolved problems."""
    at, tau = given["problem"], given["tau"]
    if tau is None:
        path = integrate(at, 4 * GRID)
        q, met, _ = certificate(at)
        return tuple(map(on_grid, path.Y)), tuple(map(on_grid, path.W)), q["eps"] + q["E"], met
    constrained = _constrained.integrate(at, tau, 16 * GRID)
    q, met, _ = _constrained_paths.run(given)
    return (on_grid(constrained.Y),), (on_grid(constrained.W),), q["B"], met


def distances(given: Sample, method: Callable[..., Step]) -> dict[str, list]:
    """For every learning rate: rms over problems of max ‖Y_k - Y‖, and ‖Y_k - W‖ (GRID + 1, B)."""
    Y, W, bound, met = reference(given)
    out: dict[str, list] = {"lr": [], "error": [], "to full": [], "bound": [bound], "met": [met]}
    for k in REFINEMENTS:
        iterates = train(given, k * GRID, method)
        gap = tuple(a - b for a, b in zip(iterates, Y, strict=True))
        out["lr"].append(given["problem"].horizon / (k * GRID))
        out["error"].append(norm(gap).amax(0))
        out["to full"].append(norm(tuple(a - b for a, b in zip(iterates, W, strict=True))))
    return out


def check(
    sample: Sample, *, order: float = ORDER, method: Callable[..., Step] = condlr
) -> Evidence:
    found = distances(sample, method)
    met = found["met"][0]
    if not bool(met.any()):
        return not_met("the flow is not resolved, or ε >= s")
    errors = [float(e[met].square().mean().sqrt()) for e in found["error"]]
    fitted = slope(found["lr"], errors)
    constant = found["error"][0] / found["lr"][0]
    inside, worst = True, 0.0
    for lr, far in zip(found["lr"][1:], found["to full"][1:], strict=True):
        ratio = (far / (found["bound"][0] + (1.0 + TOLERANCE) * constant * lr))[:, met]
        worst = max(worst, float(ratio.max()))
        inside = inside and worst <= 1.0
    deviation = abs(fitted - order)
    detail = {
        "problem": sample["problem"].name,
        "manifold": sample["retraction"] if sample["tau"] is None else f"τ = {sample['tau']:g}",
        "slope": fitted,
        "error / lr": errors[-1] / found["lr"][-1],
        "‖Y_k - W‖ / (certificate + C lr)": worst,
    }
    holds = deviation <= TOLERANCE and inside
    return Evidence(deviation, TOLERANCE, holds, True, int(met.sum()), detail)


def figure(dtype: torch.dtype, device: torch.device):
    """Error against learning rate, with fitted slopes, and one run inside its certificate."""
    from ..plotting import COLOURS, MARKERS, new

    fig, (left, right) = new(2, width=5.4)
    fixed = {"m": 10, "n": 8, "rank": 3, "change": 0.6, "noise": 0.03, "horizon": 2.0}
    for k, (tau, name) in enumerate(((None, "M_r"), (0.1, "τ = 0.1"), (0.0, "τ = 0"))):
        spread = 1.8 if tau is None else 1.0 + tau
        given = sample(1, dtype, device, tau=tau, families=("completion",), spread=spread, **fixed)
        found = distances(given, condlr)
        errors = [float(e.square().mean().sqrt()) for e in found["error"]]
        label = f"{name}: slope {slope(found['lr'], errors):.2f}"
        left.loglog(found["lr"], errors, MARKERS[k] + "-", color=COLOURS[k + 1], label=label)
        if tau is None:
            t = torch.linspace(0, given["problem"].horizon, GRID + 1)
            bound = found["bound"][0][:, 0].cpu()
            right.fill_between(
                t, 0 * t, bound, color=COLOURS[6], alpha=0.35, label="ε + E: theorem A"
            )
            for j in (0, 2):
                label = f"‖Y_k - W‖, lr = {found['lr'][j]:.3f}"
                y = found["to full"][j][:, 0].cpu()
                right.plot(t, y, MARKERS[j], markersize=4, color=COLOURS[1 + j], label=label)
    left.set(xlabel="learning rate", ylabel="max ‖Y_k - Y(t_k)‖, rms of 8 problems")
    left.set(title="CondLR against its flow (matrix completion)")
    left.set_xticks(found["lr"], [f"{lr:.3f}" for lr in found["lr"]])
    left.set_xticks([], minor=True)
    left.set_yticks([], minor=True)
    left.set_yticks([1e-3, 2e-3, 4e-3], ["0.001", "0.002", "0.004"])
    left.legend(loc="upper left")
    right.set(xlabel="time k · lr", ylabel="distance to the full flow", ylim=(0, None))
    right.set(title="CondLR against full training, M_r")
    right.legend(loc="lower right")
    return fig


CLAIM = Claim(
    id="approximation/optimizer",
    title="CondLR stays inside the certificate plus O(lr)",
    statement=r"\max_k\|Y_k-Y(kh)\|=O(h),\quad \|Y_k-W(kh)\|\le\text{certificate}+C\,h",
    hypotheses=("full gradient, no momentum, float64", "those of theorem A or B"),
    source=Source("ours", "mathematics 4; lrmanifold.optim.CondLR"),
    sample=sample,
    check=check,
    controls=(
        Control("order 2", partial(check, order=2.0)),
        Control(
            "factor gradients without the metric (SSᵀ)⁻¹",
            partial(check, method=without_metric),
            partial(sample, tau=None, spread=3.0),
        ),
    ),
    trials=6,
    figure=figure,
    float32="float64 only: errors of O(lr²) a step are compared",
    kind="order",
)
