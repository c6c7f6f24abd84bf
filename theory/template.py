r"""A claim of your own: copy this file, change it, run it.

**Statement.** For square A, B: κ(AB) <= κ(A) κ(B). (Put yours here, with hypotheses and constants.)

**Proof.** ‖AB‖₂ <= ‖A‖₂‖B‖₂, and (AB)⁻¹ = B⁻¹A⁻¹. ∎

**Sharp** for A and Aᵀ, which have the same singular vectors.

Three lines check it::

    import theory
    from my_claim import CLAIM
    print(theory.verify(CLAIM, trials=200, search=300))
"""

from __future__ import annotations

from functools import partial

import torch

import theory
from lrmanifold import linalg
from theory.core import Sample
from theory.sampling import Draw, eps

# Constants are keyword arguments of the check, so that `--mutate` can scale them.
CONSTANT = 1.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed: float) -> Sample:
    """Two cores. Draw with `Draw`: a seed is then one problem everywhere, and can be searched."""
    draw = Draw(seed, dtype, device, **fixed)
    r = draw.integer(2, 6)
    A, B = (draw.give(draw.core(draw.spectrum(r, draw.cond()))) for _ in range(2))
    return {"A": A, "B": B}


def check(sample: Sample, *, constant: float = CONSTANT) -> theory.Evidence:
    """Both sides, measured without using what is to be shown."""
    A, B = sample["A"], sample["B"]
    bound = constant * linalg.condition_number(A) * linalg.condition_number(B)
    # The smallest singular value of AB is known to eps ‖A‖‖B‖.
    tolerance = 100.0 * eps(A) * float(bound) ** 2
    return theory.inequality(linalg.condition_number(A @ B), bound, tolerance=tolerance)


def aligned(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """A and Aᵀ: where the constant is attained."""
    A = sample(seed, dtype, device)["A"]
    return {"A": A, "B": A.mT}


CLAIM = theory.Claim(
    id="mine/product",
    title="Condition numbers are submultiplicative",
    statement=r"\kappa(AB)\le\kappa(A)\,\kappa(B)",
    hypotheses=("A, B square and invertible",),
    source=theory.Source("classical", "any textbook"),
    sample=sample,
    check=check,
    # The unmodified claim has to be attained where it is sharp ...
    extremal=(theory.Extremal(aligned),),
    # ... and wrong versions have to be rejected.
    controls=(theory.Control("0.9 of it", partial(check, constant=0.9), aligned),),
    float32="100 eps bound²",
)

if __name__ == "__main__":
    print(theory.verify(CLAIM, trials=200, search=300))
