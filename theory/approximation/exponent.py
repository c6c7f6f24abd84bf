r"""The exponent μ/s of theorem A is attained.

**Statement.** On the flow Ȧ = ν u_⊥v_⊥ᵀ, A(0) = X₀ with smallest singular value σ belonging to (u,
v), everything orthonormal: X(t) = X₀ rests, μ = ν, s = σ, λ = ℓ = δ = 0, and

    ‖Y(t) - X(t)‖ = ‖Y(0) - X(0)‖ e^{μt/s} (1 + O(θ²))

for Y(0) = X₀ with the pair (u, v) turned by θ towards (u_⊥, v_⊥).

**Proof.** On ρ w zᵀ with w, z turned by θ, P_Y turns the force into θ' = (ν/ρ) sin θ cos θ and
ρ' = ν sin²θ; the other singular pairs are orthogonal to both. Hence tan θ grows like e^{νt/σ} up to
O(θ²), and ‖Y - X‖ = √2 σ sin θ + O(θ²). ∎

Valid for νt < σ, after which the normal pair overtakes and X jumps. So e^{μt/s} is no artefact of
the proof: pushing a low-rank flow away from its manifold makes it unstable at the rate force /
smallest singular value, a reason to keep σ_r large. But it takes a push that lasts: here ε = νt.
For small ε there is no such factor (``no_blow_up.py``). mathematics 4.1 (ours).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Sample, Source, identity
from .certificate import certificate
from .extremal import sharp_exponent
from .flows import GRID, integrate, measure
from .problems import Problem

EXPONENT = 1.0  # of μt/s
TOLERANCE = 100.0  # times θ²


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return sharp_exponent(seed, dtype, device, **fixed)


def check(sample: Sample, *, exponent: float = EXPONENT) -> Evidence:
    at: Problem = sample["problem"]
    q = measure(at, integrate(at, 2 * GRID))
    s = torch.minimum(q["s_X"], q["s_Y"]).amin(0)
    claimed = exponent * q["mu"].amax(0) / s * at.horizon
    grown = (q["e"][-1] / q["e"][0]).log()
    deviation = float((grown / claimed - 1.0).abs().max())
    detail = {"measured exponent / (μ/s)": float((grown / claimed).mean() * exponent)}
    # The growth stops being exponential by O(θ²), θ at the end of the time.
    tolerance = TOLERANCE * sample["theta"] ** 2
    return identity(deviation, tolerance=tolerance, independent=at.batch, detail=detail)


def figure(dtype: torch.dtype, device: torch.device):
    """Growth of ‖Y - X‖ against the certificate with the right and with 0.9 of the exponent."""
    from ..plotting import COLOURS, new

    at = sample(0, dtype, device)["problem"]
    fig, ax = new(width=6.0)
    q, _, _ = certificate(at)
    short, _, _ = certificate(at, curvature=0.45)
    t, start = q["t"][:, 0].cpu(), float(q["e"][0, 0])
    ax.plot(t, q["E"][:, 0].cpu() / start, color=COLOURS[0], label="certificate: e(0) exp(μt/s)")
    ax.plot(t, short["E"][:, 0].cpu() / start, "--", color=COLOURS[2], label="0.9 of the exponent")
    points = {"color": COLOURS[1], "markersize": 5, "label": "measured ‖Y - X‖"}
    ax.plot(t[::2], q["e"][::2, 0].cpu() / start, "o", **points)
    ax.set(xlabel="time t in units of s/μ", ylabel="‖Y - X‖ / ‖Y(0) - X(0)‖", yscale="log")
    ax.set_yticks([1.0, 1.2, 1.5, 2.0], ["1", "1.2", "1.5", "2"])
    ax.minorticks_off()
    ax.set(title="The exponent μ/s of theorem A is attained")
    ax.legend(loc="upper left")
    return fig


CLAIM = Claim(
    id="approximation/exponent",
    title="The exponent μ/s is attained",
    statement=r"\|Y(t)-X(t)\|=\|Y(0)-X(0)\|\,e^{\mu t/s}\,(1+O(\theta^2))",
    hypotheses=("Ȧ = ν u_⊥v_⊥ᵀ, A(0) = X₀", "νt < σ", "θ << 1"),
    source=Source("ours", "mathematics 4.1, end"),
    sample=sample,
    check=check,
    controls=(
        Control("0.9 of the exponent", partial(check, exponent=0.9)),
        Control("1.1 of the exponent", partial(check, exponent=1.1)),
    ),
    trials=8,
    figure=figure,
    float32="float64 only: e starts at 10⁻³ σ and is compared to O(10⁻⁴) of itself",
    kind="identity",
)
