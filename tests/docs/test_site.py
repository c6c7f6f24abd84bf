"""The site builds without a warning, has every public name, and no broken link inside."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from doc_code import DOCS, ROOT

import lrmanifold as lrm
import lrmanifold.testing


def public_names() -> set[str]:
    """Every class and function that a package exports under lrmanifold, by its shortest name."""
    names = set()
    rooms = [getattr(lrm, name) for name in lrm.__all__]
    for package in [lrm, lrm.testing, *filter(inspect.ismodule, rooms)]:
        found = getattr(package, "__all__", None) or [
            name
            for name, value in vars(package).items()
            if not name.startswith("_")
            and inspect.isfunction(value)
            and value.__module__ == package.__name__
        ]
        prefix = package.__name__
        names |= {
            f"{prefix}.{name}"
            for name in found
            if inspect.isclass(getattr(package, name)) or inspect.isfunction(getattr(package, name))
        }
    return names


# Of use inside the library and its benchmarks only.
UNDOCUMENTED = {"lrmanifold.viz.need_matplotlib", "lrmanifold.viz.plain_log_ticks"}


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(p.read_text(encoding="utf-8") for p in (DOCS / "api").glob("*.md"))
    directive = r"^\.\. auto(?:class|function|exception|data):: ([\w.]+)$"
    documented = set(re.findall(directive, pages, flags=re.MULTILINE))
    missing = public_names() - documented - UNDOCUMENTED
    # A name that is exported twice has its entry at the shorter place.
    missing = {n for n in missing if f"lrmanifold.{n.rpartition('.')[2]}" not in documented}
    assert sorted(missing) == []


class Links(HTMLParser):
    """The links and anchors of one page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[key] for key in ("id", "name") if given.get(key)}
        self.links += [given[key] for key in ("href", "src") if given.get(key)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built without a warning."""
    pytest.importorskip("myst_nb")
    pytest.importorskip("pydata_sphinx_theme")
    target = tmp_path_factory.mktemp("site") / "html"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", DOCS, target]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert built.returncode == 0, built.stderr[-4000:]
    return target.resolve()


@pytest.mark.slow
def test_links_lead_somewhere_and_no_page_asks_another_site(site):
    pages = {p.resolve(): Links(p) for p in site.rglob("*.html")}
    broken = []
    for page, found in pages.items():
        # The theme's templates are no pages; a listing of source links to one place a module only.
        if {"_static", "_modules"} & set(page.relative_to(site).parts):
            continue
        for link in found.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            anchors = pages[target].anchors if target in pages else set()
            if not target.exists() or (
                url.fragment and target in pages and unquote(url.fragment) not in anchors
            ):
                broken.append((page.name, link))
    assert broken == []
    loaded = re.compile(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*\"")
    text = {p: p.read_text(encoding="utf-8", errors="replace") for p in pages}
    assert [(p.name, found) for p in pages for found in loaded.findall(text[p])] == []


LOOK = """() => ({
    wide: document.documentElement.scrollWidth - window.innerWidth,
    broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src),
    raw: [...document.querySelectorAll(".math")].filter(m => !m.querySelector("mjx-container"))
        .map(m => m.textContent.slice(0, 60)),
})"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_are_whole_in_a_browser_without_network(site, width, scheme):
    """No raw TeX, no broken picture, no page wider than the window."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no browser")
    faults = {}
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        page = context.new_page()
        for path in sorted([*site.glob("*.html"), *site.glob("lessons/*.html")]):
            page.goto(path.as_uri())
            page.wait_for_function("() => !window.MathJax || !!MathJax.startup?.promise")
            page.evaluate("() => window.MathJax?.startup?.promise")
            page.evaluate(
                "() => document.images && [...document.images].map(i => i.loading = 'eager')"
            )
            page.wait_for_load_state("load")
            found = page.evaluate(LOOK)
            if found["wide"] > 0 or found["broken"] or found["raw"]:
                faults[path.name] = found
        browser.close()
    assert faults == {}
