"""A picture with a slider in a live notebook, and a few still ones everywhere else."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .._arguments import check_callable, check_number
from ._look import need_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def slider(
    picture: Callable[[float], Figure],
    low: float,
    high: float,
    *,
    still: Sequence[float],
    steps: int = 50,
    name: str = "value",
) -> list[Figure]:
    """Show ``picture(value)`` under a slider from `low` to `high`.

    It needs a notebook and ``ipywidgets``. Without them, or where the environment variable
    ``LRMANIFOLD_STILL`` is set (pages and slides cannot move a slider), the pictures for the values
    in `still` are shown instead.

    Parameters
    ----------
    picture : callable
        From the value to a figure.
    low, high : float
        Ends of the slider.
    still : sequence of float
        Values for pictures that stand still.
    steps : int
        Positions of the slider.
    name : str
        Its label.

    Returns
    -------
    list of Figure
        The pictures that stand still; empty under a slider.
    """
    need_matplotlib()
    check_callable("picture", picture, "a function from a value to a Figure")
    low = check_number("low", low)
    high = check_number("high", high, low=low, open_low=True)
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        return [picture(value) for value in still]
    live = get_ipython() is not None and "LRMANIFOLD_STILL" not in os.environ
    if live:
        try:
            from ipywidgets import FloatSlider, interact
        except ImportError:
            live = False
    if live:
        control = FloatSlider(
            min=low, max=high, step=(high - low) / steps, value=still[0], description=name
        )
        interact(picture, **{"value": control})
        return []
    figures = [picture(value) for value in still]
    if get_ipython() is not None:
        for figure in figures:
            display(figure)
    return figures
