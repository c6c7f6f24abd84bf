"""Every claim behind robust low-rank training, as a program that could prove it wrong.

``verify`` checks one claim, one of these or one's own; ``template.py`` is a file to start from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .catalogue import claims
    from .core import Claim, Control, Evidence, Extremal, Source, identity, inequality, not_met
    from .public import verify
    from .runner import Verdict

__all__ = [
    "Claim", "Control", "Evidence", "Extremal", "Source", "Verdict", "claims", "identity",
    "inequality", "not_met", "verify",
]  # fmt: skip

_WHERE = {"claims": "catalogue", "verify": "public", "Verdict": "runner"}


def __getattr__(name: str) -> Any:
    # Imported when asked for: `python -m theory --list` needs neither torch nor geoopt.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE.get(name, 'core')}", __name__), name)
