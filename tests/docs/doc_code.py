"""The code in the documentation, as a reader would type it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LESSONS = sorted((DOCS / "lessons").glob("[0-9]*.md"))

CELL = "{code-cell} python"
_FENCE = re.compile(r"^(```+|:::+)([^\n]*)\n(.*?)^\1$", flags=re.DOTALL | re.MULTILINE)


def fences(path: Path) -> list[tuple[str, str]]:
    """(what stands behind the opening fence, content) of each fenced block."""
    return [(m[2].strip(), m[3]) for m in _FENCE.finditer(path.read_text(encoding="utf-8"))]


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a language, without options and magic commands of notebook cells."""
    return [
        re.sub(r"^%.*\n|\A(:[^\n]*\n)+", "", content, flags=re.MULTILINE)
        for opening, content in fences(path)
        if opening == language
    ]


def python(path: Path) -> str:
    """What the fences of Python code are called: pages that are executed have cells."""
    return CELL if blocks(path, CELL) else "python"


def run(path: Path, language: str, changes: dict[str, str] | None = None) -> dict:
    """Execute the blocks one after the other, with words replaced; the names that they define."""
    names: dict = {"__name__": path.stem}
    written = blocks(path, language)
    for old, new in (changes or {}).items():
        assert old in "".join(written), old
        written = [block.replace(old, new) for block in written]
    for i, block in enumerate(written):
        exec(compile(block, f"{path.name}, block {i + 1}", "exec"), names)
    return names
