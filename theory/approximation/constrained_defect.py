r"""Theorem C: the constrained flow against a comparison path in the set.

**Statement.** With K = K_τ and the constrained flow of theorem B, let X(t) ∈ K be absolutely
continuous, ‖W - X‖ <= ε, and D_K = Ẋ - P_{T_K(X)}F(W) its defect. Then e = ‖Y - X‖ fulfils

    e' <= (λ + κ_K) e + ℓε + ‖D_K‖,    κ_K = c (‖N_Y‖/σ_r(Y) + ‖N_X‖/σ_r(X)),

N_X = F(W) - P_{T_K(X)}F(W), c as in theorem B.

**Proof.** As theorem A, with L4.3 at Y and at X. ∎

Checked for X = Π_K(W). Strictly inside K the defect is theorem A's δ. On the boundary it can be as
large as the force, but only while W returns to the set. So this is no O(ε) theorem by itself: it
is a certificate, with the defect measured. mathematics 4.2 (ours).
"""

from __future__ import annotations

from functools import partial

from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from ._constrained_paths import run, sample, trapezoid
from ._evidence import along_paths
from .extremal import sharp_reach

REACH = 1.0  # factor of the sharp c
DEFECT = 1.0  # of ‖D_K‖


def check(sample: Sample, *, defect: float = DEFECT, reach: float = REACH) -> Evidence:
    at, tau = sample["problem"], sample["tau"]
    q, met, moved = run(sample, defect=defect, reach=reach)
    detail = {
        "problem": at.name,
        "τ": tau,
        "share of time active": float(q["active"].mean()),
        "∫‖D_K‖, largest": float(trapezoid(q["t"][:, 0], q["defect"])[-1].max()),
        "ε, largest": float(q["eps"].max()),
    }
    return along_paths(q["e"], q["C"], met, moved=moved, reason="not resolved", detail=detail)


CLAIM = Claim(
    id="approximation/constrained-defect",
    title="Theorem C: the well-conditioned flow against a path in K_τ",
    statement=(
        r"e'\le(\lambda+\kappa_K)e+\ell\varepsilon+\|\dot X-P_{T_K(X)}F(W)\|,\quad "
        r"\kappa_K=c\Big(\frac{\|N_Y\|}{\sigma_r(Y)}+\frac{\|N_X\|}{\sigma_r(X)}\Big)"
    ),
    hypotheses=(
        "Ẏ = P_{T_K(Y)} F(Y), K = K_τ",
        "X = Π_K(W) absolutely continuous",
        "τ in {0, .1, 1}",
    ),
    source=Source("ours", "mathematics 4.2, theorem C, with the sharp c"),
    sample=sample,
    check=check,
    extremal=(Extremal(sharp_reach),),
    controls=(
        Control("0.9 of c, where it is attained", partial(check, reach=0.9 * REACH), sharp_reach),
        Control(
            "0.9 of ‖D_K‖, on a nearly tight path",
            partial(check, defect=0.9 * DEFECT),
            partial(sample, families=("prescribed path",), tau=0.0, change=0.1),
        ),
        Control(
            "no defect", partial(check, defect=0.0), partial(sample, families=("prescribed path",))
        ),
    ),
    trials=9,
    float32="float64 only: P_{T_K} is a difference quotient with step 10⁻⁶",
)
