"""Builds the site: `make docs`."""

from ddf_mm.version import __version__

project = "ddf_mm"
author = "ddf_mm authors"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "deflist", "html_image"]
myst_heading_anchors = 3
# Links to files of the checkout, which are not part of the site.
suppress_warnings = ["myst.xref_missing"]

autodoc_member_order = "bysource"
# Types stand in the signature.
autodoc_typehints = "none"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"ddf_mm {version}"
exclude_patterns = ["_build"]
