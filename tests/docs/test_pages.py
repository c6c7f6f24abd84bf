"""Everything the pages ask a reader to type works as written."""

from __future__ import annotations

import re

import pytest
import torch
from doc_code import CELL, DOCS, PAGES, ROOT, blocks, fences, python, run

import lrmanifold as lrm

LANGUAGES = {"python", "sh", "text"}


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch, tmp_path):
    """Files are written elsewhere, and a retraction registered by a page is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lrm.retractions, "_REGISTRY", dict(lrm.retractions._REGISTRY))


@pytest.fixture
def _every_warning():
    """Else torch warns once a process only."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.usefixtures("_every_warning")
@pytest.mark.filterwarnings("error:Converting a tensor with requires_grad")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, python(p))], ids=lambda p: p.stem)
def test_python_blocks_run_one_after_the_other(page):
    run(page, python(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_fence_is_tested_or_a_directive(page):
    for opening, _ in fences(page):
        assert opening in LANGUAGES or opening.startswith("{"), opening


def test_what_the_pages_print_is_true(capsys):
    """The blocks that end in a comparison say True."""
    for name in ("quickstart", "migrating", "how-to-choose"):
        run(DOCS / f"{name}.md", python(DOCS / f"{name}.md"))
    printed = capsys.readouterr().out
    assert "True" in printed
    assert "False" not in printed


def test_quickstart_trains_the_network_of_the_readme():
    """Both pages show one recommended start: the same network, optimizer and loop."""
    block = blocks(DOCS / "quickstart.md", CELL)[1]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert block.strip() in readme


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"`make ([\w-]+)`", text):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), (page.name, target)
        for module in re.findall(r"python -m ([\w.]+)", text):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
        for path in re.findall(r"`((?:theory|benchmarks)/[\w/]+\.(?:py|json))`", text):
            assert (ROOT / path).exists(), (page.name, path)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_what_a_page_links_in_the_repository_is_there(page):
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"(?:\]\(|^```\{image\} )([^)#\s]+)", text, flags=re.MULTILINE)
    for link in found:
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_sections_that_docstrings_cite_are_there():
    text = (DOCS / "mathematics.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^##+ ([\d.]+?)\.? ", text, flags=re.MULTILINE))
    source = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "lrmanifold").rglob("*.py"))
    cited = set(re.findall(r"mathematics (\d(?:\.\d)?)", source))
    assert cited <= sections
