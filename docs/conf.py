"""The documentation site: Markdown pages and an API reference from docstrings. `make docs`."""

import re

from r1s_jax import __version__

project = "r1s_jax"
author = "The r1s_jax authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "r1s_jax"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": False}

_CODE = re.compile(r"``?([^`]+)``?")
_SPECIAL = re.compile(r"([*|\\]|_(?!\w))")


def _as_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text with code in single backticks; reStructuredText wants two."""
    parts = _CODE.split("\n".join(lines))  # text, code, text, ...
    parts[::2] = [_SPECIAL.sub(r"\\\1", text) for text in parts[::2]]
    parts[1::2] = [f"``{code}``" for code in parts[1::2]]
    lines[:] = "".join(parts).split("\n")


def setup(app) -> None:
    """Called by Sphinx. Napoleon, which reads `Args:` sections, comes after."""
    app.connect("autodoc-process-docstring", _as_rst, priority=400)
