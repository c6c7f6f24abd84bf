"""No damaged file loads without a word: the fuzz script, a part of it by default."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import corruption
import pytest

KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(missing, reason="needs safetensors"))
    for kind, missing in (
        (kind, kind.name.endswith("tensors") and not importlib.util.find_spec("safetensors"))
        for kind in corruption.KINDS.values()
    )
]


def assert_all_refused(kind: corruption.Kind, count: int, seed: int) -> None:
    found, notes = corruption.attack(kind, count, seed)
    assert found["refused"] == count, "\n".join(notes)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_40_damages_to_every_kind_of_file_are_refused_by_name(kind):
    assert_all_refused(kind, 40, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_300_damages_to_every_kind_of_file_are_refused_by_name(kind, seed):
    assert_all_refused(kind, 300, seed)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_whole_files_load_and_leave_no_others_behind(kind, tmp_path: Path):
    path = tmp_path / kind.name
    kind.save(path)
    kind.load(path)
    assert [p.name for p in tmp_path.iterdir()] == [kind.name]
