"""How easily is a network fooled: attacks, the worst of many of them, and the condition number.

**Units.** `x` is always the image *before* normalisation, `eps` is in its unit, and `mean`, `std`
per channel are applied inside: the model sees ``(x - mean) / std``. The scaled, unclipped attack
of the published CIFAR tables, ``x_norm + eps * sign(g) / std`` on normalised input, is
``clip=None`` and ``loss=F.cross_entropy``: it is ``x + eps * sign(g)``, normalised (g has the same
sign either way).

**Nothing of the model changes.** A module runs in evaluation mode and gets each training flag
back; so does the module of a bound method such as ``model.forward``. Gradients are taken with
respect to the input only, so `.grad`, `requires_grad` and buffers stay. To attack a module in train
mode pass a plain function that calls it.

**The scale of the logits does not matter.** The default loss, :func:`margin_loss`, does not
saturate: a network and the same network with its logits times 1000 are fooled alike. Cross entropy
saturates in float32, and the network looks robust.

**Half precision.** Images in float16 or bfloat16 are changed in float32, as many steps are shorter
than their spacing; the model sees them rounded to their own dtype, and what rounding does counts
as the model's.

**Which to use.** :func:`fgsm` is one step and the weakest. :func:`pgd` serves for curves and for
choosing settings. :func:`worst_case` is the number to publish. :func:`check_masking` asks whether
gradients mislead the attacks. None of them proves anything: that is :mod:`lrmanifold.certify`.
"""

from .._evaluation import evaluation_mode
from ._accuracy import accuracy_under_attack
from ._attacks import fgsm, pgd
from ._local_condition import condition_number
from ._loss import margin_loss
from ._masking import Masking, check_masking
from ._worst_case import WorstCase, worst_case

__all__ = [
    "Masking",
    "WorstCase",
    "accuracy_under_attack",
    "check_masking",
    "condition_number",
    "evaluation_mode",
    "fgsm",
    "margin_loss",
    "pgd",
    "worst_case",
]
