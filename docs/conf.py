"""Builds the documentation: the README, and the API reference from the docstrings."""

import re
from importlib.metadata import version as installed_version
from pathlib import Path

from sphinx.application import Sphinx

project = "flatlora-optim"
author = "The flatlora-optim developers"
release = version = installed_version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"{project} {release}"

myst_heading_anchors = 3  # for the README's links to its own sections

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

# A reference to nothing is a warning, and `make docs` makes warnings errors. Other packages are
# not looked up, and what is internal has no place on the page.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(collections|matplotlib|nn|torch|transformers)\..*|Optimizer"),
    ("py:.*", "FrozenWeight|Schedule|UnsupportedAdapterError"),
]


def setup(app: Sphinx) -> None:
    app.connect("include-read", _unlink_files)


def _unlink_files(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """The README links to files of the repository, which are no pages here: keep their names."""
    content[0] = re.sub(r"(?<!!)\[([^]]+)\]\((?!https?:|#)[^)]+\)", r"\1", content[0])
