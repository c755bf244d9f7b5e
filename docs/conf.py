"""Sphinx's configuration of the site: `make docs` builds it into `build/docs`."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import generate  # noqa: E402

project = "clip_jax"
author = "the authors of clip_jax"
copyright = "the authors of clip_jax, Apache-2.0"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = "clip_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
highlight_language = "none"

# Single backquotes in docstrings are code, and links where they name something of the reference.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 80

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
# A notebook shows the outputs that it was saved with: most ask for weights from the network.
nb_execution_mode = "off"
suppress_warnings = ["myst.header"]


def site_links(app, docname: str, source: list[str]) -> None:
    """Lead links to the repository's notebooks to their pages."""
    up = "../" * docname.count("/")
    source[0] = source[0].replace(f"]({up}../notebooks/", f"]({up}generated/notebooks/")


def setup(app) -> None:
    """Write the generated pages before anything is read."""
    generate.write_pages(DOCS / "generated")
    app.connect("source-read", site_links)
