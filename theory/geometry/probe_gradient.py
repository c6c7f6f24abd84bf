r"""The Riemannian gradient without an inverse of S.

**Statement.** Add zero parameters ("probes") K̃ = 0 ∈ R^{m x r}, L̃ = 0 ∈ R^{n x r} to the forward
pass,

    W = U S Vᵀ + K̃ Vᵀ + U L̃ᵀ      (V and U detached in the last two terms).

Then ∂L/∂K̃ = G V and ∂L/∂L̃ = GᵀU exactly, hence U_p = (I - UUᵀ) ∂L/∂K̃, V_p = (I - VVᵀ) ∂L/∂L̃. In
floating point, relative to ‖G‖ and with unit roundoff u,

    probes:  error of U_p <= C u, whatever cond(S);
    solve with S (claim gradient-map):  error of U_p <= C u cond(S), and typically >= c u cond(S).

**Why.** g_U = G V Sᵀ has lost what S damps: the rounding of the products with large singular values
is divided by the small ones afterwards. The probes never multiply by S.

**Checked** always in float32 against float64, on a linear regression through the low-rank forward
pass that a layer uses (the dense W is not formed), at cond(S) = 10² … 10⁶; and on the library's own
layer with probes, all three blocks. mathematics 1 and 8 (ours).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

import lrmanifold as lrm
from lrmanifold import Factors

from ..core import Claim, Control, Evidence, Sample, Source, largest, not_met
from ..sampling import Draw
from .gradient_map import left_block

WORKING = torch.float32
UNIT_ROUNDOFF = torch.finfo(WORKING).eps / 2
UPPER = 16.0
TYPICAL = 0.01  # the median problem of a sample loses at least this share of u cond(S)
PROBLEMS = 9


def forward(X: Factors, x: Tensor, K: Tensor, L: Tensor) -> Tensor:
    """x Wᵀ by thin products, with the probes."""
    z = x @ X.V
    return (z @ X.S.mT) @ X.U.mT + (x @ X.V.detach()) @ K.mT + (x @ L) @ X.U.detach().mT


def gradients(X: Factors, x: Tensor, y: Tensor, *, scaled: bool = False) -> dict[str, Tensor]:
    """U_p by both routes, in the precision of the arguments."""
    leaves = Factors(*(b.clone().requires_grad_() for b in X))
    K, L = torch.zeros_like(X.U).requires_grad_(), torch.zeros_like(X.V).requires_grad_()
    output = forward(leaves, x, K @ X.S if scaled else K, L)  # scaled: wrong, K̃ S Vᵀ
    loss = 0.5 * (output - y).square().sum() / len(x)
    g_U, _, _, g_K, _ = torch.autograd.grad(loss, (*leaves, K, L))
    probe = g_K - X.U @ (X.U.mT @ g_K)
    return {"solve": left_block(X.U, g_U, X.S), "probe": probe}


def by_the_library(X: Factors, x: Tensor, y: Tensor) -> Factors:
    """The blocks of the Riemannian gradient as a layer with probes gives them."""
    (m, r), n = X.U.shape, len(X.V)
    made: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
    layer = lrm.nn.LowRankLinear(n, m, r, bias=False, tau=None, gradient="probe", **made)
    with torch.no_grad():
        layer.weight.copy_(layer.manifold.pack(*X))
    loss = 0.5 * (layer(x) - y).square().sum() / len(x)
    (gradient,) = torch.autograd.grad(loss, layer.weight)
    return layer.manifold.unpack(layer.manifold.egrad2rgrad(layer.weight.detach(), gradient))


def problem(draw: Draw, m: int, n: int, r: int, cond: float) -> Sample:
    X = Factors(draw.frame(m, r), draw.core(draw.spectrum(r, cond, 1 / cond)), draw.frame(n, r))
    x, y = draw.normal(64, n), draw.normal(64, m)
    return {"X": draw.give_point(X), "x": draw.give(x), "y": draw.give(y)}


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """PROBLEMS independent problems of one size and one condition number."""
    del dtype
    draw = Draw(seed, WORKING, device, **fixed)
    m, n, r = draw.size(6, 40)
    r, cond = min(max(r, 2), m), draw.cond(1e2, 1e6)
    return {"cond": cond, "problems": [problem(draw, m, n, r, cond) for _ in range(PROBLEMS)]}


def relative_errors(X: Factors, x: Tensor, y: Tensor, *, scaled: bool) -> dict[str, float]:
    """Errors of both routes, and of all blocks that the library gives.

    The reference is the dense G at the rounded factors, in float64.
    """
    wide = Factors(*(b.double() for b in X))
    G = (x.double() @ (wide.U @ wide.S @ wide.V.mT).mT - y.double()).mT @ x.double() / len(x)
    core = wide.U.mT @ G @ wide.V
    exact = Factors(G @ wide.V - wide.U @ core, core, G.mT @ wide.U - wide.V @ core.mT)

    def relative(found: Tensor, block: Tensor) -> float:
        return float((found - block).norm() / G.norm())

    errors = {k: relative(v, exact.U) for k, v in gradients(X, x, y, scaled=scaled).items()}
    library = by_the_library(X, x, y)
    return {**errors, "library": largest(map(relative, library, exact))}


def check(sample: Sample, *, route: str = "probe", scaled: bool = False) -> Evidence:
    cond = sample["cond"]
    m, r = sample["problems"][0]["X"].U.shape
    if r < 2 or r == m:
        return not_met("r = 1, where cond(S) = 1, or r = m, where U_p = 0")
    errors = [relative_errors(**p, scaled=scaled) for p in sample["problems"]]
    solve = sorted(e["solve"] / (UNIT_ROUNDOFF * cond) for e in errors)
    bound = UPPER * UNIT_ROUNDOFF
    measured = largest(e[key] for e in errors for key in (route, "library"))
    typical = solve[len(solve) // 2]
    return Evidence(
        measured,
        bound,
        holds=measured <= bound and solve[-1] <= UPPER and typical >= TYPICAL,
        independent=len(errors),
        detail={"cond": cond, "errors": errors, "typical solve / (u cond)": typical},
        ratios=tuple(e[route] / bound for e in errors),
    )


def figure(dtype: torch.dtype, device: torch.device):
    """Error of U_p against cond(S) in float32."""
    from ..plotting import COLOURS, new

    details = [check(sample(seed, dtype, device)).detail for seed in range(40)]
    points = [(d["cond"], e) for d in details for e in d["errors"]]
    fig, ax = new()
    conds = torch.tensor([1e2, 1e6])
    for key, colour, marker, label in (
        ("solve", COLOURS[2], "s", "solve with S: (I - UUᵀ) g_U S⁻ᵀ"),
        ("probe", COLOURS[1], "o", "probes: (I - UUᵀ) ∂L/∂K̃"),
    ):
        x, y = [cond for cond, _ in points], [error[key] for _, error in points]
        ax.scatter(x, y, s=12, color=colour, marker=marker, label=label)
    ax.plot(conds, UNIT_ROUNDOFF * conds, "--", color=COLOURS[0], label="u cond(S)")
    ax.axhline(UNIT_ROUNDOFF, color=COLOURS[0], linestyle=":", label="u = 6e-8")
    ax.set(xscale="log", yscale="log", xlabel="cond(S)", ylabel="‖error of U_p‖ / ‖G‖, float32")
    ax.set(title="Riemannian gradient in float32: what the inverse of S costs")
    ax.legend(loc="upper left")
    return fig


CLAIM = Claim(
    id="geometry/probe-gradient",
    title="S⁻¹-free gradient: accurate at every condition number",
    statement=(
        r"W=USV^\top+\tilde KV^\top+U\tilde L^\top\Rightarrow \partial_{\tilde K}L=GV,\ "
        r"\partial_{\tilde L}L=G^\top U;\quad \frac{\|\delta U_p\|}{\|G\|}\le 16u\ "
        r"\text{(probe)},\ \le16u\,\mathrm{cond}(S)\text{, typically}\ge0.01u\,\mathrm{cond}(S)"
        r"\ \text{(solve)}"
    ),
    hypotheses=("cond(S) in [1e2, 1e6]", "2 <= r < m", "loss of a linear model"),
    source=Source("ours", "mathematics 1 and 8"),
    sample=sample,
    check=check,
    controls=(
        Control("the solve route with the probes' bound", partial(check, route="solve")),
        Control("probe K̃ S Vᵀ in place of K̃ Vᵀ", partial(check, scaled=True)),
    ),
    trials=24,
    figure=figure,
    float32="always in float32, against float64; its bound is the claim itself",
)
