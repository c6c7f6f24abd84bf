"""One lesson as slides that need no internet: ``make slides LESSON=4-well-conditioned``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from docutils import nodes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import conf as site  # the lessons run here as they do for the site

project, author, copyright = site.project, site.author, site.copyright
myst_enable_extensions = site.myst_enable_extensions
nb_execution_mode, nb_execution_timeout = site.nb_execution_mode, site.nb_execution_timeout
nb_execution_in_temp, nb_execution_raise_on_error = True, True
nb_merge_streams = True
nb_mime_priority_overrides = [
    ("revealjs", "image/png", 0),
    ("revealjs", "text/html", 10),
    ("revealjs", "text/plain", 20),
]

LESSON = os.environ.get("LESSON", "4-well-conditioned")
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx-mathjax-offline", "sphinx_revealjs"]
root_doc = f"lessons/{LESSON}"
include_patterns = [f"{root_doc}.md"]
# Links to other pages are text on a slide.
suppress_warnings = ["myst.xref_missing", "download.not_readable"]

revealjs_html_theme = "revealjs-simple"
revealjs_style_theme = "white"
revealjs_static_path = [str(Path(__file__).parent / "_static")]
revealjs_css_files = ["slides.css"]
revealjs_script_conf = {
    "width": 1280,
    "height": 800,
    "margin": 0.05,
    "center": False,
    "hash": True,
    "slideNumber": True,
}


def _pictures_apart(app, doctree, name):
    """A slide of its own for each cell with a picture: below its text it would be off screen."""
    from sphinx_revealjs.nodes import revealjs_break

    for cell in list(doctree.findall(nodes.container)):
        code = cell.get("nb_element") == "cell_code" and isinstance(cell.parent, nodes.section)
        if code and next(cell.findall(nodes.image), None) is not None:
            cell.parent.insert(cell.parent.index(cell), revealjs_break(notitle=True))


def setup(app):
    app.connect("doctree-resolved", _pictures_apart)
