"""A report is refused when the model gives something else than when it was made."""

from __future__ import annotations

import enum

import numpy as np
import pytest
import torch
from torch import nn

from lrmanifold import certify

D = torch.float64


class Mode(enum.Enum):
    SOFT = 1
    HARD = -1


class Holder:
    def __init__(self):
        self.gain = 1.0


def with_default(x, *, gain=1.0):
    return gain * x


GAIN = 1.0


class Signed(nn.Module):
    """Logits ±x and 0.6; the sign comes from places that are no tensors."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 2, dtype=D)
        self.layer.weight.data = torch.tensor([[1.0], [0.0]], dtype=D)
        self.layer.bias.data = torch.tensor([0.0, 0.6], dtype=D)
        self.mode, self.holder, self.names = Mode.SOFT, Holder(), {"soft"}
        self.number, self.array = np.float32(1), np.array([1.0])

    def forward(self, x):
        sign = self.mode.value * self.holder.gain * float(self.number) * float(self.array[0])
        sign = sign * GAIN * (-1 if "hard" in self.names else 1)
        return self.layer(with_default(x * sign))


SIGNS = {
    "enum": lambda model, patch: setattr(model, "mode", Mode.HARD),
    "object": lambda model, patch: setattr(model.holder, "gain", -1.0),
    "number": lambda model, patch: setattr(model, "number", np.float32(-1)),
    "array": lambda model, patch: model.array.__setitem__(0, -1.0),
    "set": lambda model, patch: model.names.add("hard"),
    "default": lambda model, patch: patch.setitem(with_default.__kwdefaults__, "gain", -1.0),
    "global": lambda model, patch: patch.setitem(globals(), "GAIN", -1.0),
}


@pytest.mark.parametrize("change", SIGNS.values(), ids=SIGNS)
def test_a_report_is_stale_after_a_change_of_anything_that_the_forward_asks(change, monkeypatch):
    """Radii of 1.4 were given for the other class."""
    model, x, y = Signed(), torch.tensor([[2.0]], dtype=D), torch.tensor([0])
    report = certify.lipschitz(model, (1,))
    assert certify.radius(model, x, y, bound=report).item() > 1.3
    change(model, monkeypatch)
    assert model(x).argmax() == 1
    with pytest.raises(ValueError, match="bound belongs to"):
        certify.radius(model, x, y, bound=report)
    with pytest.raises(ValueError, match="bound belongs to"):
        certify.verified_accuracy(model, (x, y), 0.1, bound=report)


CELL = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 2)
    def forward(self, x):
        return self.layer({})
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("torch.tanh(x)", "torch.neg(x)"),
        ("(lambda z: torch.tanh(z))(x)", "(lambda z: torch.neg(z))(x)"),
        ("(lambda z: 2 * z)(x)", "(lambda z: 3 * z)(x)"),
    ],
)
def test_a_report_is_stale_after_a_cell_of_a_notebook_was_edited(first, second):
    """The bytecode is the same: the names differ, or what stands inside of a function."""
    models = []
    for text in (first, second):
        space = {"torch": torch, "__name__": "__main__"}
        exec(compile(CELL.format(text), "<cell>", "exec"), space)
        torch.manual_seed(0)
        models.append(space["Net"]())
    report, zero = certify.lipschitz(models[0], (1,)), torch.zeros(1, 1)  # where all give the same
    with pytest.raises(ValueError, match="other weights"):
        certify.radius(models[1], zero, bound=report)


def made_with(factor):
    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 2)

        @torch.no_grad()
        def forward(self, x):
            return factor * self.layer(x)

    torch.manual_seed(0)
    return Made()


def test_a_report_sees_what_a_method_closes_over():
    report = certify.lipschitz(made_with(1.0), (1,))
    certify.radius(made_with(1.0), torch.zeros(1, 1), bound=report)
    with pytest.raises(ValueError, match="other weights"):
        certify.radius(made_with(1.0 + 1e-9), torch.zeros(1, 1), bound=report)
