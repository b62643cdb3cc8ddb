"""Builds the documentation: pages in Markdown, and the API reference from the docstrings."""

import html
import re
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx

project = "flatlora-optim"
author = project_copyright = "The flatlora-optim developers"
release = version = installed_version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
templates_path = []

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_math_renderer = "mathml"

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

copybutton_selector = ", ".join(
    f"div.highlight-{language} pre" for language in ("python", "py", "bash", "yaml", "json")
)

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
    ("py:.*", r"Axes|FrozenWeight|Schedule|UnsupportedAdapterError|(.*\.)?T"),
]


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (_inline_math, None), (_displayed_math, None))
    app.connect("include-read", _unlink_files)


def _inline_math(writer: Any, node: nodes.math) -> None:
    """Browsers draw MathML themselves: no script, no network."""
    writer.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def _displayed_math(writer: Any, node: nodes.math_block) -> None:
    formula = latex2mathml.converter.convert(node.astext(), display="block")
    writer.body.append(f'<div class="math" title="{html.escape(node.astext())}">{formula}</div>')
    raise nodes.SkipNode


def _unlink_files(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """Files outside of docs/ link to files of the repository, which are no pages here: keep their names."""
    content[0] = re.sub(r"(?<!!)\[([^]]+)\]\((?!https?:|#)[^)]+\)", r"\1", content[0])
