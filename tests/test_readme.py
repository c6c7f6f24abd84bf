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


def test_commands_have_the_options_that_are_typed():
    testing = pytest.importorskip("typer.testing")
    from lrmanifold._commands import app

    lines = [line.split("#")[0].split() for line in "\n".join(blocks("sh")).splitlines()]
    lines += [words.split() for words in re.findall(r"`(lrmanifold .*?)`", README)]
    commands = [words for words in lines if words[:1] == ["lrmanifold"]]
    assert {words[1] for words in commands} == {"train", "report", "certify"}
    for _, command, *rest in commands:
        # --help comes first, so nothing is trained, but unknown commands are still refused
        shown = testing.CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, shown.output
        for option in (word for word in rest if word.startswith("--")):
            assert f"{option} " in shown.output, f"lrmanifold {command} has no {option}"


def test_named_places_exist():
    for path in re.findall(r"^\| `([\w/.]+)`", README, flags=re.MULTILINE):
        assert (ROOT / path).exists(), path
    assert lrm.__version__ in README
