"""New modules in the places of old ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def exchanged(model: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """Put ``new[id(old)]`` in the place of each old module, in place, wherever it is used.

    A new module may hold the old one, and be in the model already: it is not put into itself.

    Returns
    -------
    nn.Module
        `model`, or the module in its own place.
    """
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            put = new.get(id(child))
            if put is not None and put is not parent:
                setattr(parent, name, put)
    return new.get(id(model), model)
