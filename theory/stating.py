"""A claim as plain text, from what it says alone: no torch, so that `--list` is quick."""

from __future__ import annotations

import textwrap
from typing import Any

from .text import to_text

WIDTH = 80


def words(claim: Any) -> dict[str, Any]:
    """What a claim or its catalogue entry says, its statement in LaTeX."""
    source = getattr(claim, "source", claim)
    return {
        "id": claim.id, "title": claim.title, "statement": claim.statement,
        "hypotheses": list(claim.hypotheses), "tag": source.tag, "reference": source.reference,
    }  # fmt: skip


def statement(claim: Any) -> str:
    """Title, statement, hypotheses and source of a claim or of its catalogue entry."""
    said = words(claim)
    lines = (to_text(claim.statement), f"if {'; '.join(claim.hypotheses)}",
             f"[{said['tag']}] {said['reference']}")  # fmt: skip
    wrapped = (
        textwrap.fill(x, WIDTH, initial_indent="  ", subsequent_indent="    ") for x in lines
    )
    return "\n".join([textwrap.fill(f"{claim.id}: {claim.title}", WIDTH), *wrapped])
