"""Schedules for options other than the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._arguments import (
    check_callable,
    check_instance,
    check_integer,
    check_rate,
    check_state,
    check_text,
    shown,
)


class OptionScheduler:
    """Set an option of every group by a function of the step, as LambdaLR does for the rate.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    option : str
        A key of the groups whose values are numbers, such as "penalty" or "weight_decay".
    function : callable
        Step number (0 before the first call of :meth:`step`) to a factor of the initial value.

    Raises
    ------
    TypeError, ValueError
        If a group has no such option or one that is no number, if the function returns something
        else, or the optimizer refuses a value; no group has changed then.

    Examples
    --------
    >>> warm = OptionScheduler(optimizer, "penalty", lambda step: min(1.0, step / 500))
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, option: str, function: Callable[[int], float]
    ) -> None:
        kind = torch.optim.Optimizer
        check_instance("optimizer", optimizer, kind, "a torch.optim.Optimizer")
        check_text("option", option)
        check_callable("function", function, "a function of the step")
        missing = [i for i, g in enumerate(optimizer.param_groups) if option not in g]
        if missing:
            raise ValueError(
                f"option must be one of the groups' {sorted(optimizer.param_groups[0])}, "
                f"got {option!r}"
            )
        self.optimizer, self.option, self.function = optimizer, option, function
        self.initial = [_copied(g[option]) for g in optimizer.param_groups]
        self.count = 0
        self._apply()

    def _apply(self) -> None:
        groups = self.optimizer.param_groups
        # a group that was added later starts from what it has
        self.initial += [_copied(g[self.option]) for g in groups[len(self.initial) :]]
        for value in self.initial:
            check_rate(f"the option {self.option!r} of each group", value, low=None)
        factor = self.function(self.count)
        check_rate(f"function({self.count})", factor, low=None)
        values = [value * factor for value in self.initial]
        pairs = list(zip(groups, values, strict=True))
        if check := getattr(self.optimizer, "_check_options", None):
            for group, value in pairs:
                check({**group, self.option: value})
        for group, value in pairs:
            if isinstance(group[self.option], Tensor):
                group[self.option].fill_(value)  # which a captured step reads
            else:
                group[self.option] = value

    def step(self) -> None:
        """Advance by one and set the option."""
        self.count += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Step count and initial values (the function is not saved)."""
        return {"count": self.count, "initial": list(self.initial)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore and set the option accordingly.

        Raises
        ------
        TypeError, ValueError
            If it is no such state, or one of more groups than there are. Nothing is changed then.
        """
        check_state(state, ("count", "initial"))
        if not isinstance(state["initial"], (list, tuple)):
            found = shown(state["initial"])
            raise ValueError(f"initial of state must be a list of values, got {found}")
        initial, groups = list(state["initial"]), self.optimizer.param_groups
        if len(initial) > len(groups):
            raise ValueError(
                f"state must be of at most {len(groups)} groups, as the optimizer has, got "
                f"{len(initial)}: add the groups first"
            )
        before = self.count, self.initial
        self.count, self.initial = check_integer("state['count']", state["count"], low=0), initial
        try:
            self._apply()
        except Exception:  # a value that the optimizer refuses
            self.count, self.initial = before
            raise


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
