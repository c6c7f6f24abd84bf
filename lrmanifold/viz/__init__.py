"""Pictures of training and of robustness, ready for a slide.

Each function returns a matplotlib ``Figure`` and never shows it: ``figure.savefig(path)``, or let a
notebook display it. Global settings of matplotlib stay as they are. Colours are those of Okabe and
Ito, told apart also with colour-blind eyes; line styles and markers differ too.

matplotlib is imported when a function is called: ``pip install 'lrmanifold[demo]'``.
"""

from ._look import MARKERS, PALETTE, legend_below, need_matplotlib, new_figure, plain_log_ticks
from ._pictures import accuracy_curves, accuracy_panels, spectra
from ._slider import slider

__all__ = [
    "MARKERS",
    "PALETTE",
    "accuracy_curves",
    "accuracy_panels",
    "legend_below",
    "need_matplotlib",
    "new_figure",
    "plain_log_ticks",
    "slider",
    "spectra",
]
