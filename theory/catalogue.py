"""Which claims there are, and what they say, without importing any.

Each folder of ``theory`` whose ``__init__.py`` has a tuple ``CLAIMS`` is a group of claims, and
each entry ``name.CLAIM`` of that tuple is a module with ``CLAIM = Claim(...)``. So a new folder is
found by being there. Statements are read from the source, because importing torch, geoopt and
everything that checks them takes seconds.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from .core import Claim

_HERE = Path(__file__).resolve().parent
#: The order in which a reader would meet the groups; others follow by name.
_ORDER = ("geometry", "conditioning", "approximation", "training", "integrators", "networks")


@dataclass(frozen=True)
class Entry:
    """What a claim says: the fields of :class:`theory.core.Claim` that are words."""

    id: str
    title: str
    statement: str
    hypotheses: tuple[str, ...]
    tag: str
    reference: str
    group: str


class _HasId(Protocol):
    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=_HasId)


def groups() -> list[str]:
    """Names of the folders that hold claims."""
    found = [p.parent.name for p in _HERE.glob("*/__init__.py") if "CLAIMS" in p.read_text("utf-8")]
    return [*(g for g in _ORDER if g in found), *sorted(set(found) - set(_ORDER))]


def entries() -> list[Entry]:
    """All claims in words, in order."""
    return [entry for group in groups() for entry in _of_group(group)]


def load(group: str) -> tuple[Claim, ...]:
    """The claims of one folder, imported."""
    return import_module(f"{__package__}.{group}").CLAIMS


def claims() -> tuple[Claim, ...]:
    """All claims, imported, in the order in which a reader would meet them."""
    return tuple(claim for group in groups() for claim in load(group))


def find(claim_id: str) -> Claim:
    """The claim of that id.

    Raises
    ------
    KeyError
        If there is none.
    """
    for entry in entries():
        if entry.id == claim_id:
            for claim in load(entry.group):
                if claim.id == claim_id:
                    return claim
    raise KeyError(claim_id)


def select(known: list[T] | tuple[T, ...], pattern: str | None) -> list[T]:
    """Those whose id matches a glob pattern (``geometry/*``), or has it as its last part."""
    if pattern is None:
        return list(known)
    return [c for c in known if fnmatchcase(c.id, pattern) or c.id.split("/")[-1] == pattern]


def _of_group(group: str) -> Iterator[Entry]:
    for name in _order(_HERE / group / "__init__.py"):
        call = _call(_HERE / group / f"{name}.py")
        if call is None:
            raise ValueError(f"theory/{group}/{name}.py must have CLAIM = Claim(...), got none")
        words = {k.arg: k.value for k in call.keywords}
        source = words["source"]
        assert isinstance(source, ast.Call)
        tag, reference = (ast.literal_eval(x) for x in source.args)
        id_, title, statement, hypotheses = (
            ast.literal_eval(words[key]) for key in ("id", "title", "statement", "hypotheses")
        )
        yield Entry(id_, title, statement, hypotheses, tag, reference, group)


def _value(path: Path, name: str) -> ast.expr | None:
    for node in ast.parse(path.read_text("utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return node.value  # type: ignore[union-attr, attr-defined]
    return None


def _order(path: Path) -> list[str]:
    """Module names in the tuple CLAIMS = (module.CLAIM, ...)."""
    value = _value(path, "CLAIMS")
    assert isinstance(value, ast.Tuple)
    return [x.value.id for x in value.elts if isinstance(x, ast.Attribute)]  # type: ignore[attr-defined]


def _call(path: Path) -> ast.Call | None:
    value = _value(path, "CLAIM")
    return value if isinstance(value, ast.Call) else None
