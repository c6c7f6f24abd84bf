r"""T2 in discrete time: networks with a bound on the condition number of every layer.

**Statement.** As T1, on K = ΠK_{τ_i} with the product metric (τ_i = ∞: only a rank). Let X, X⁺, Y,
Y⁺ ∈ K, N_X ∈ N_K(X), N₀ = P_Y^⊥F_k(Y), N₁ ∈ N_K(Y⁺), all arbitrary, and

    ρ = (Y⁺-Y)/h + N₁ - F_k(Y) + N₀,   d = (X⁺-X)/h + N_X - F_k(W),
    c = ‖F_k(X)-F_k(W)‖ + ‖d‖ + ‖ρ‖,   G = ‖F_k(Y)-N₀ - F_k(W)+N_X‖,
    κ_k = ½ max_i (‖N₀‖₂/σ_r(Y) + (‖N_{X,⊥}‖₂ + ‖N_{X,S}⁻‖₂)/σ_r(X)),
    2q = max_i h(‖N_{1,⊥}‖₂ + ‖N_{1,S}⁻‖₂)/σ_r(Y⁺).

If ‖Y - X‖ <= E and 2q < 1 then

    (1 - 2q) E⁺² = max(0, 1 + 2h(λ_k + κ_k)) E² + 2hcE + h² (G+‖d‖+‖ρ‖)² - h²‖N₁‖²

bounds ‖Y⁺ - X⁺‖²; for 2q >= 1 the root of the first three terms plus h‖N₁‖ does.

**Proof.** Let Z = Y⁺ + hN₁, so Z = Y + h(F_k(Y) - N₀ + ρ). T1's expansion, with L4.3 (first form)
in place of L3.4 at X and T2 for several layers, bounds ‖Z - X⁺‖² by the first three terms. N₁ is
normal at Y⁺, so by L4.3 there ‖Z - X⁺‖² >= h²‖N₁‖² + (1 - 2q)‖Y⁺ - X⁺‖², as in the claim
``projected-step``. ∎

The normal at Y⁺ is implicit, as in the catching-up algorithm: the step's clipping is part of the
bound, not an error, so it holds while the constraint is active. N_X and N₁ are free; the monitor
takes N₁ within the row and column spaces of Y⁺ (N_{1,⊥} = 0), where clipping acts, and those N_X,
N₁ that make ‖d‖ and ‖ρ‖ least.

Checked on the library: ``lrmanifold.monitor`` beside minibatch training of small networks with τ =
0, 0.1, 0.5 and without a bound. **Sharp**, every term: in one step Y is clipped, X is Y with its
last singular pair turned into the normal space; the examples of T1; a turned pair on the boundary,
where N_X has a part in the core; and weight decay of one of the two alone, which is all of d, or of
ρ. Ours.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lrmanifold as lrm

from ..approximation.constrained_flow import project
from ..approximation.extremal import sharp_reach
from ..approximation.problems import Layers
from ..core import Claim, Control, Evidence, Extremal, Sample, Source, largest
from ..sampling import Draw
from ._fields import resting_twin, turned_pair
from ._steps import Training
from .projected_step import turned

TAUS = (0.1, 0.0, 0.5, None)
ROUNDING = 1e-10


def sample(
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tau: float | None = -1.0,
    steps: int = 12,
) -> Sample:
    """A two-layer network near low rank, its dense twin beside it, and minibatches of 8."""
    draw = Draw(seed, torch.float64, torch.device("cpu"))
    tau = TAUS[seed % len(TAUS)] if tau == -1.0 else tau
    n, width, out = draw.integer(4, 8), draw.integer(4, 8), draw.integer(3, 5)
    sizes = ((width, n), (out, width))
    weights = [draw.normal(*size) / size[1] ** 0.5 for size in sizes]
    noise = [draw.log_uniform(1e-3, 0.05) * draw.normal(*size) for size in sizes]
    x, y = draw.normal(32, n), draw.normal(32, out)
    order = [torch.randint(32, (8,), generator=draw.generator).tolist() for _ in range(steps)]
    h = draw.choose(0.02, 0.1, 0.3)
    return {"weights": weights, "noise": noise, "x": x, "y": y, "order": order, "h": h, "tau": tau}


def train(given: Sample) -> list[dict[str, float]]:
    """Rows of the monitor."""
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=False).double() for w in given["weights"]]
    dense = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    with torch.no_grad():
        for layer, w in zip(layers, given["weights"], strict=True):
            layer.weight.copy_(w)
        rank = min(min(w.shape) for w in given["weights"]) - 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = lrm.factorize(dense, rank=rank, tau=given["tau"], keep_larger=True)
        twin = lrm.densify(copy.deepcopy(model))
        for p, w in zip(twin.parameters(), given["noise"], strict=True):
            p.add_(w)
    x, y = given["x"], given["y"]

    def loss(index: list[int], net: nn.Module) -> Tensor:
        return (net(x[index]) - y[index]).square().sum(1).mean()

    return _run(model, twin, given["h"], [partial(loss, index) for index in given["order"]])


def _run(
    model: nn.Module,
    twin: nn.Module,
    h: float,
    losses: Sequence[Callable[[nn.Module], Tensor]],
    decay: tuple[float, float] = (0.0, 0.0),
) -> list[dict[str, float]]:
    """Rows of the monitor; `decay` is the weight decay of the model and that of the twin."""
    optimizer = lrm.optim.CondLR(model.parameters(), h, weight_decay=decay[0])
    full = torch.optim.SGD(twin.parameters(), h, weight_decay=decay[1])
    now = [losses[0]]
    monitor = lrm.monitor(model, optimizer, every=1, reference=twin, loss=lambda net: now[0](net))
    rows = []
    for loss in losses:
        now[0] = loss
        for net, rule in ((model, optimizer), (twin, full)):
            rule.zero_grad()
            loss(net).backward()
            rule.step()
        rows.append(monitor.step())
    if optimizer.skipped_steps:
        raise ArithmeticError(f"CondLR left out {optimizer.skipped_steps} steps: NaN or Inf")
    return rows


def attained(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """One step: Y on the boundary is pushed outwards and clipped, the twin rests at X."""
    draw = Draw(seed, torch.float64, torch.device("cpu"))
    r, tau = draw.integer(2, 4), draw.choose(0.2, 1.0)
    U, V = draw.frame(r + 3, r + 1), draw.frame(r + 2, r + 1)
    s = torch.full((r,), 1.0 + tau, dtype=torch.float64)
    s[-1] = 1.0
    Y = U[:, :r] @ torch.diag(s) @ V[:, :r].mT
    push = torch.ones(r, dtype=torch.float64)
    push[-1] = -(r - 1) * (1.0 + tau)
    push = U[:, :r] @ torch.diag(push / push.norm()) @ V[:, :r].mT
    # The monitor's set is smaller by rounding of float32: X must be in that one.
    inside = (1.0 + tau) * (1.0 - 1e-5) - 1.0
    X = project(turned(Y, U[:, r:], V[:, r:], r, 0.5 * torch.pi), r, inside)

    def field(W: Tensor) -> Tensor:
        near = float((W - Y).norm()) < 0.5 * float((X - Y).norm())
        return push if near else 0.0 * push

    return {"Y": Y, "W": X, "field": field, "r": r, "tau": tau, "h": 0.1, "steps": 1}


def resting(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """E⁺ = E + h‖F(X) - F(W)‖: see :func:`theory.training._fields.resting_twin`."""
    return _of(resting_twin(seed, device))


def turning(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Growth at the rate κ: see :func:`theory.training._fields.turned_pair`."""
    return _of(turned_pair(seed, device, h=2e-3, steps=30))


def sharp_corner(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """The same on the boundary, where half of the rate is N_{X,S}⁻: ``approximation.extremal``."""
    tau, zero = 1.0, torch.zeros((), dtype=torch.float64)
    at = sharp_reach(seed, torch.float64, device, tau=tau, theta=0.05, rank=2)["problem"]
    assert at.low_rank_start is not None
    U, S, V = at.low_rank_start[0]
    return _first(
        at.start[0], U @ S @ V.mT, partial(at.force, zero), r=at.rank, tau=tau, h=2e-3, steps=10
    )


def shrinking(seed: int, dtype: torch.dtype, device: torch.device, *, twin: bool) -> Sample:
    """Weight decay of one of the two alone, no force: E⁺ = E + h‖d‖, or E + h‖ρ‖."""
    draw = Draw(seed, torch.float64, torch.device("cpu"))
    r, tau = draw.integer(1, 3), draw.choose(None, 0.5)
    s = torch.linspace(1.2, 1.0, r, dtype=torch.float64)
    Y = draw.frame(r + 3, r) @ torch.diag(s) @ draw.frame(r + 2, r).mT
    return {"Y": Y, "W": Y, "field": torch.zeros_like, "r": r, "tau": tau, "h": 0.1, "steps": 12,
            "decay": (0.0, 0.1) if twin else (0.1, 0.0)}  # fmt: skip


def _of(at: Training) -> Sample:
    Y = (at.low_rank_start or at.start)[0]
    r = at.ranks[0]
    return _first(at.start[0], Y, partial(at.field, 0), r=r, tau=None, h=at.h, steps=at.steps)


def _first(W: Tensor, Y: Tensor, force: Callable[[Layers], Layers], **more: Any) -> Sample:
    """The first problem of a batch of one layer."""

    def field(Z: Tensor) -> Tensor:
        return force((Z.expand_as(W),))[0][0]

    return {"Y": Y[0], "W": W[0], "field": field, **more}


def train_one_layer(given: Sample) -> list[dict[str, float]]:
    """Rows of the monitor for one matrix, moved by any field."""
    dense = nn.Sequential(nn.Linear(given["Y"].shape[1], given["Y"].shape[0], bias=False)).double()
    with torch.no_grad():
        next(dense.parameters()).copy_(given["Y"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lrm.factorize(
            copy.deepcopy(dense), rank=given["r"], tau=given["tau"], keep_larger=True
        )
    with torch.no_grad():
        next(dense.parameters()).copy_(given["W"])
    eye = torch.eye(given["Y"].shape[1], dtype=torch.float64)

    def loss(net: nn.Module) -> Tensor:
        W = net(eye).mT
        return -(given["field"](W.detach()) * W).sum()

    return _run(model, dense, given["h"], [loss] * given["steps"], given.get("decay", (0.0, 0.0)))


def check(sample: Sample, *, nonexpansive: bool = False, without: tuple[str, ...] = ()) -> Evidence:
    rows = train_one_layer(sample) if "field" in sample else train(sample)
    measured = torch.tensor([[row["flow/error"]] for row in rows], dtype=torch.float64)
    squares = []
    for row in rows:
        square = row["flow/certificate"] ** 2
        if nonexpansive:
            square -= largest((0.0, row["flow/part/clip"]))
        square -= sum(row[f"flow/part/{name}"] for name in without)
        squares.append([largest((square, 0.0))])
    bound = torch.tensor(squares, dtype=torch.float64).sqrt()
    ratio = measured / bound.clamp_min(1e-300)
    # Examples of one layer are attained to the end: too large a rate shows there, not at the start.
    place = len(rows) - 1 if "field" in sample else int(ratio.argmax())
    holds = bool((measured <= bound * (1.0 + 1e-9) + ROUNDING).all())
    detail = {"τ": sample["tau"], "h": sample["h"], "clipped": rows[-1]["flow/part/clip"]}
    return Evidence(
        float(measured[place]), float(bound[place]), holds, True, 1, detail,
        tuple(ratio.flatten().tolist()),
    )  # fmt: skip


CLAIM = Claim(
    id="training/constrained-steps",
    title="T2 in discrete time: steps of networks with bounded condition numbers",
    statement=(
        r"(1-2q)\|Y^+-X^+\|^2\le\max(0,1+2h(\lambda_k+\kappa_k))E^2+2hcE"
        r"+h^2(G+\|d\|+\|\rho\|)^2-h^2\|N_1\|^2"
    ),
    hypotheses=("‖Y - X‖ <= E, X, X⁺, Y, Y⁺ in ΠK_{τ_i}", "N₁ normal at Y⁺, N_X at X; 2q < 1"),
    source=Source("ours", "theory/training/constrained_steps.py; lrmanifold.monitor"),
    sample=sample,
    check=check,
    # One for each term of the bound: without it the certificate is passed there.
    extremal=(
        Extremal(attained),
        Extremal(resting),
        Extremal(turning),
        Extremal(sharp_corner),
        Extremal(partial(shrinking, twin=True)),
        Extremal(partial(shrinking, twin=False)),
    ),
    controls=(
        Control("the clip taken as nonexpansive", partial(check, nonexpansive=True), attained),
        Control(
            "steps of finite length left out",
            partial(check, without=("square", "companion", "step")),
            partial(sample, tau=0.1),
        ),
    ),
    trials=60,
    float32="float64 only: differences of steps are compared",
)
