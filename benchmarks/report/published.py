"""Published figures, and what differs from ours. Accuracy in %; never in one column with ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A line of a published table: accuracy at each strength; `saved` in the paper's own words."""

    method: str
    saved: str
    accuracy: tuple[float, ...]


CIFAR_STRENGTHS = ("clean", "0.002", "0.004", "0.006")
CIFAR_FGSM = (
    Figure("dense", "0 %", (89.83, 78.61, 64.66, 53.71)),
    Figure("Cayley SGD", "0 %", (89.62, 74.46, 58.16, 45.29)),
    Figure("CondLR τ=0.5", "50 %", (89.97, 72.25, 60.19, 50.17)),
    Figure("CondLR τ=0.5", "80 %", (89.33, 68.23, 48.54, 36.66)),
    Figure("RobustDLRT", "94 %", (89.35, 78.72, 66.02, 54.15)),
    Figure("DLRT", "94.6 %", (89.55, 74.71, 59.61, 47.56)),
    Figure("A Bᵀ", "80 %", (88.10, 64.24, 42.66, 29.90)),
    Figure("SVD pruning", "80 %", (87.99, 63.57, 42.06, 29.27)),
)
CIFAR_NOTE = (
    "VGG16, FGSM scaled by the standard deviation and not clipped, on the original images (ours "
    "are a JPEG re-encoding). The CondLR paper's 50 % is a rank of half of min(m, n), not half "
    "of the "
    "weights."
)
# Measured with the published code: LeNet5, 5 epochs, constant rate, one seed.
LENET_STRENGTHS = ("clean", "0.03", "0.06")
LENET: dict[str, tuple[Figure, ...]] = {
    "mnist": (
        Figure("dense SGD", "0 %", (98.5, 96.6, 92.2)),
        Figure("dense AdamW, cosine", "0 %", (99.0, 97.4, 94.1)),
        Figure("A Bᵀ", "67 %", (98.2, 95.1, 87.6)),
        Figure("SVD truncation", "67 %", (97.6, 94.3, 87.4)),
        Figure("CondLR τ=0", "65 %", (98.3, 96.2, 92.3)),
        Figure("CondLR τ=0", "5 %", (98.7, 97.2, 94.7)),
        Figure("RobustDLRT β=0.075", "69 %", (98.2, 96.0, 92.5)),
    ),
    "fashion-mnist": (
        Figure("dense", "0 %", (87.7, 65.8, 43.0)),
        Figure("A Bᵀ", "67 %", (86.4, 61.9, 39.4)),
        Figure("SVD truncation", "67 %", (69.0, 40.7, 27.2)),
        Figure("CondLR τ=0", "65 %", (85.4, 67.5, 51.0)),
    ),
}
LENET_NOTE = "LeNet5, measured with the published code: five epochs, constant rate, one seed, FGSM."


Lines = tuple[tuple[str, ...], tuple[Figure, ...], str]


def of(data: str) -> Lines | None:
    """Strengths, lines and a note for a data set."""
    if data == "cifar10":
        return CIFAR_STRENGTHS, CIFAR_FGSM, CIFAR_NOTE
    return (LENET_STRENGTHS, LENET[data], LENET_NOTE) if data in LENET else None
