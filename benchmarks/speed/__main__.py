"""``python -m benchmarks.speed``: all speed benchmarks one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module

from ._run import execute, parse

# In the order of a reader's questions; each module has a function `measure`.
NAMES = (
    "step",
    "training",
    "layer",
    "inference",
    "clip",
    "retractions",
    "completion",
    "scaling",
    "memory",
    "drift",
    "accelerator",
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all of them with the same options; ``--only`` here chooses among the benchmarks."""
    settings = parse(argv, "All speed benchmarks.", "python -m benchmarks.speed")
    for name in settings.chosen(dict.fromkeys(NAMES)):
        module = import_module(f".{name}", __package__)
        execute(name, module.measure, replace(settings, only=None))


if __name__ == "__main__":
    main()
