"""Configuration of Sphinx: `python -m sphinx -W docs build/docs` builds the site offline."""

import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pages  # noqa: E402

import jgd  # noqa: E402

project, author, copyright = "jgd", "The jgd authors", "The jgd authors"
version = release = jgd.__version__

extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]  # MathJax from the package
myst_enable_extensions = ["attrs_inline", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks hold their outputs, and the tests execute them
add_module_names = False
toc_object_entries = False

html_theme = "furo"
html_title = f"jgd {version}"
html_static_path = ["_static"]
html_css_files = ["jgd.css"]
html_show_sphinx = False

LINKS = {  # links to files of the repository, and the pages of the site that replace them
    r"\]\((?:\.\./)+benchmarks/README\.md": "](/benchmarks.md",
    r"\]\((?:\.\./)+notebooks/": "](/notebooks/",
}
linkcheck_ignore = [r"https://doi\.org/"]  # publishers reject automatic requests


def _replace_links(app, name, text):
    """Replace links of the repository in the source of a page by links of the site."""
    for link, page in LINKS.items():
        text[0] = re.sub(link, page, text[0])
    if name == "optimizers":  # link the names in the table to their pages
        text[0] = re.sub(r"(?m)^\| `(\w+)` \|", r"| [`\1`](/optimizers/\1.md) |", text[0])


def setup(app):
    pages.write(HERE)
    app.connect("source-read", _replace_links)
