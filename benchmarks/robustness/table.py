"""A table in a file of JSON lines: rows are appended whole, and a torn last line is not a row."""

from __future__ import annotations

import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any


class Table:
    """Rows (dicts with a ``key``) in a file; appending is one write, reading skips what is torn."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows; of equal keys the last."""
        if not self.path.is_file():
            return []
        found: dict[str, dict[str, Any]] = {}
        for line in self.path.read_bytes().split(b"\n"):  # a torn line may end within a letter
            try:
                row = json.loads(line)
            except ValueError:
                continue
            found[row["key"]] = row
        return list(found.values())

    def append(self, row: dict[str, Any]) -> None:
        """Add a row at the end."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(finite(row), ensure_ascii=False, allow_nan=False, sort_keys=True)
        with open(self.path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # processes may share a table; freed on closing
            torn = self.path.stat().st_size and not self._ends_whole()
            file.write((("\n" if torn else "") + line + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def _ends_whole(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def finite(value: Any) -> Any:
    """The value for strict JSON: no NaN, no infinity; numbers with six significant digits."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
