"""A claim as plain text, from what it says alone: no torch, so that `--list` is quick."""

from __future__ import annotations

import textwrap
from typing import Any

from .text import to_text

WIDTH = 80


def statement(claim: Any) -> str:
    """Title, statement, hypotheses and source of a claim or of its catalogue entry."""
    source = getattr(claim, "source", claim)
    lines = (to_text(claim.statement), f"if {'; '.join(claim.hypotheses)}",
             f"[{source.tag}] {source.reference}")  # fmt: skip
    wrapped = (
        textwrap.fill(x, WIDTH, initial_indent="  ", subsequent_indent="    ") for x in lines
    )
    return "\n".join([textwrap.fill(f"{claim.id}: {claim.title}", WIDTH), *wrapped])
