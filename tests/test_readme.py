"""Everything the README asks a reader to type works as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lrmanifold as lrm

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_python_blocks_run_one_after_the_other(capsys):
    names: dict = {}
    assert len(blocks("python")) == 1
    for i, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, python block {i + 1}", "exec"), names)
    printed = capsys.readouterr().out
    assert "256 x 64" in printed
    attacked = names["attacked"]
    assert attacked[0.0] > 0.9 > attacked[0.1] > 0.5
    assert all(layer.cond <= 1.1 * (1 + 1e-5) for layer in lrm.report(names["model"]).layers[:2])


def test_every_fence_is_of_a_language_that_is_tested():
    assert len(re.findall("^```", README, flags=re.MULTILINE)) == 2 * (
        len(blocks("python")) + len(blocks("sh"))
    )


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_the_command_line_does_what_is_said():
    testing = pytest.importorskip("typer.testing")
    from lrmanifold.cli._commands import app

    shown = testing.CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert all(f" {command} " in shown for command in ("train", "report", "certify", "demo"))


def test_links_lead_somewhere():
    found = re.findall(r"\]\(([\w/.-]+)\)", README)
    assert found
    assert [path for path in found if not (ROOT / path).exists()] == []


def test_the_version_is_that_of_the_package():
    assert lrm.__version__ in README
