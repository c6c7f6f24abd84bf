"""Sphinx builds the pages of this folder: ``make docs``."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import lrmanifold

ROOT = Path(__file__).resolve().parents[1]
# The lessons run in kernels of their own and import `theory`, which is not part of the package.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
# Lessons are timed on one thread; matrices here are too small for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["LRMANIFOLD_STILL"] = "1"  # a page cannot move a slider
sys.path.insert(0, str(ROOT))

project = "lrmanifold"
version = release = lrmanifold.__version__
author = "the lrmanifold founders"
copyright = author

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    "sphinx-mathjax-offline",  # formulas are set by files of the site, not by a content network
]
exclude_patterns = ["_build"]

# -- pages

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
# No internet is needed to build: names of other libraries are set in type, not linked.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|geoopt|numpy|np|nn|matplotlib|pymanopt|collections|typing)\b.*"),
    ("py:.*", r"(Tensor|Figure|Axes|Any|Callable|Iterable|Mapping|Sequence|Literal)\b.*"),
    # Named in docstrings in passing, by their short names.
    ("py:.*", r"(.*GeometricOptimizer|block_moments|FixedRank\.(egrad2rgrad|ehess2rhess))"),
    # Type aliases and private bases, which have no entry of their own.
    ("py:.*", r"(lrmanifold\.)?(\w+\.)*(Array|Clip|Gradient|Loss|Metric|Model|Norm|PerChannel)"),
    ("py:.*", r"(lrmanifold\.)?(\w+\.)*(Retraction|Rule|Rank|Centre|Integrator|_\w+)"),
    ("py:.*", r"(lrmanifold\.)?(\w+\.)*(WholeWeight|ComputedWeight)"),
]

# -- lessons: executed at build, in the time that they promise

nb_execution_mode = "force"
nb_execution_in_temp = True  # cells may write files
nb_execution_timeout = 120  # a cell; a whole lesson takes a quarter of that on a free machine
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

# -- reference, from the docstrings

autodoc_default_options = {"exclude-members": "extra_repr, get_extra_state, set_extra_state"}
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autosummary_generate = False
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

# -- looks

html_theme = "pydata_sphinx_theme"
html_title = "lrmanifold"
html_static_path = ["_static"]
html_favicon = "_static/logo.svg"
html_css_files = ["lrmanifold.css"]
html_copy_source = False
html_show_sourcelink = False
html_sidebars = {"index": [], "quickstart": []}
html_theme_options = {
    "logo": {
        "text": "lrmanifold",
        "image_light": "_static/logo.svg",
        "image_dark": "_static/logo.svg",
    },
    "header_links_before_dropdown": 6,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def plain_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings here are plain text: |x| is an absolute value, **options and *shape are arguments.

    reStructuredText would see a substitution and the beginning of bold or italic type.
    """
    for i, line in enumerate(lines):
        if "|" in line:
            line = re.sub(r"(?<![\\`])\|", r"\\|", line)
        if line.count("**") % 2:
            line = line.replace("**", r"\*\*")
        if line.count("*") % 2:
            line = re.sub(r"(?<![\\`*])\*(?=\w)", r"\*", line)
        lines[i] = line


def results_copied(app) -> None:
    """The tables' pages and pictures are written beside the results; the site has copies."""
    source, target = ROOT / "benchmarks" / "results", Path(app.srcdir) / "results"
    shutil.rmtree(target, ignore_errors=True)
    for path in (p for end in ("md", "png") for p in source.rglob(f"*.{end}")):
        if path.name != "remarks.md":  # is in its table's page
            copied = target / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copied)
    folder = target / "robustness"
    names = sorted(path.parent.name for path in folder.glob("*/report.md"))
    entries = "\n".join([*(f"{name} <{name}/report>" for name in names), "before"])
    with (folder / "report.md").open("a", encoding="utf-8") as index:
        index.write(f"\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n")


def results_linked(app, name, source: list[str]) -> None:
    """Links that work in the repository work on the site."""
    source[0] = source[0].replace("../benchmarks/results/", "results/")


def unbroken(app, name, source: list[str]) -> None:
    """A mean and its spread stay on one line, and so does 3e-4, which is no code."""
    text = re.sub(r"(?<=\d) ± (?=\d)", "\u00a0±\u00a0", source[0])
    code_or_minus = r"(?ms)(^```.*?^```$|`[^`\n]*`)|(?<=\de)-(?=\d)"
    source[0] = re.sub(code_or_minus, lambda found: found[1] or "\u2011", text)


def setup(app) -> None:
    """Hooks of this project."""
    app.connect("builder-inited", results_copied)
    app.connect("source-read", results_linked)
    app.connect("source-read", unbroken)
    app.connect("autodoc-process-docstring", plain_text, priority=900)
