r"""The exact chain rule: condition numbers multiply along a network, at the points it passes.

**Statement.** cond(g∘f; x) <= cond(g; f(x)) · cond(f; x).

**Proof.** ‖J_g J_f‖ <= ‖J_g‖‖J_f‖, and the norms of f(x) cancel. ∎

Attained when the leading left singular vector of J_f is the leading right one of J_g. What is
wrong with the usual product bound is not this rule but what is put for its factors; see
``plain_product.py``. mathematics 6 (classical).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality
from ..sampling import Draw, eps
from .random_networks import condition

CONSTANT = 1.0
ROUNDING = 50.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """f(x) = act(Ax + a), g(y) = act(By + b) with smooth or piecewise linear activations."""
    draw = Draw(seed, dtype, device, **fixed)
    n, k, m = (draw.integer(2, 9) for _ in range(3))
    A, B, a, b = draw.normal(k, n), draw.normal(m, k), draw.normal(k), draw.normal(m)
    names = (draw.choose("tanh", "silu", "leaky_relu"), draw.choose("tanh", "silu", "leaky_relu"))
    blocks = {"A": A, "a": 0.5 * a, "B": B, "b": 0.5 * b, "x": draw.normal(n)}
    return {**{key: draw.give(z) for key, z in blocks.items()}, "activations": names}


def aligned(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Linear layers whose leading singular vectors meet."""
    draw = Draw(seed, dtype, device)
    n = draw.integer(2, 8)
    P, Q, R = (draw.frame(n, n) for _ in range(3))
    s, t = (draw.spectrum(n, 10.0) for _ in range(2))
    blocks = {"A": (P * s) @ Q.mT, "B": (R * t) @ P.mT, "x": draw.normal(n)}
    zero = torch.zeros(n)
    given = {key: draw.give(z) for key, z in {**blocks, "a": zero, "b": zero}.items()}
    return {**given, "activations": (None, None)}


def check(sample: Sample, *, constant: float = CONSTANT) -> Evidence:
    s = sample

    def layer(W: torch.Tensor, b: torch.Tensor, name: str | None, x: torch.Tensor) -> torch.Tensor:
        z = W @ x + b
        return z if name is None else getattr(torch.nn.functional, name)(z)

    f = partial(layer, s["A"], s["a"], s["activations"][0])
    g = partial(layer, s["B"], s["b"], s["activations"][1])
    x = s["x"]
    measured = condition(lambda z: g(f(z)), x)
    bound = constant * condition(f, x) * condition(g, f(x))
    return inequality(measured, bound, tolerance=ROUNDING * eps(x) * float(bound))


CLAIM = Claim(
    id="networks/chain-rule",
    title="Condition numbers multiply along a network",
    statement=r"\mathrm{cond}(g\circ f;x)\le\mathrm{cond}(g;f(x))\,\mathrm{cond}(f;x)",
    hypotheses=("f, g differentiable at x, f(x)", "x, f(x), g(f(x)) ≠ 0"),
    source=Source("classical", "mathematics 6"),
    sample=sample,
    check=check,
    extremal=(Extremal(aligned),),
    controls=(Control("0.9 of it, aligned layers", partial(check, constant=0.9), aligned),),
    trials=60,
    float32="50 eps of the bound: products of a few small matrices",
)
