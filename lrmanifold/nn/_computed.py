"""Modules that compute a weight which code written for torch's layers may want to set."""

from __future__ import annotations

from torch import nn


class ComputedWeight(nn.Module):
    """Refuses a parameter under the name of a property, and says where it belongs."""

    # What to set instead, in words.
    set_instead: str

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's, which ``module.name = parameter`` calls; refused for properties."""
        if isinstance(getattr(type(self), name, None), property):
            raise AttributeError(
                f"{name} of {type(self).__name__} is computed and cannot be set: set "
                f"{self.set_instead}"
            )
        super().register_parameter(name, param)
