"""Runs the python blocks of README.md and of these pages, as a reader would paste them: top to bottom.

python docs/blocks.py             # run all pages
python docs/blocks.py --write     # and write what they print, and the figures that they save, into the pages
python docs/blocks.py docs/quickstart.md --write

A block of `output` right after a python block holds what that block prints. Code that can't run on any
machine is marked as `py`, and says why in its first line.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs/figures"
_BLOCK = re.compile(r"^```(python|output)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    language: str
    code: str
    span: tuple[int, int]
    """Of the code, in the page."""
    line: int


def pages() -> list[Path]:
    """Those that have python blocks."""
    files = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    return [path for path in files if blocks(path.read_text(encoding="utf-8"))]


def blocks(text: str) -> list[Block]:
    return [
        Block(match[1], match[2], match.span(2), text[: match.start(2)].count("\n") + 1)
        for match in _BLOCK.finditer(text)
    ]


@contextlib.contextmanager
def somewhere_else(folder: Path) -> Iterator[None]:
    """A block may save files, and draws without a screen. Libraries print nothing of their own."""
    before, home = dict(os.environ), Path.cwd()
    os.environ |= {"MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    # Transformers imports DeepSpeed wherever it is installed, which prints that it had to look for a GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(home)
        os.environ.clear()
        os.environ |= before


def run(path: Path, folder: Path) -> tuple[dict[str, Any], list[tuple[Block, str, str]]]:
    """Runs a page's blocks in one namespace.

    Returns:
        The namespace; and of each python block that is followed by an `output` block that block, what is in
        it, and what was printed.
    """
    text = path.read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "__main__"}
    outputs, printed = [], ""
    with somewhere_else(folder):
        for block in blocks(text):
            if block.language == "output":
                outputs.append((block, block.code, printed))
                continue
            screen = io.StringIO()
            code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
            with contextlib.redirect_stdout(screen):
                exec(code, names)
            printed = screen.getvalue()
    return names, outputs


def shape(text: str) -> str:
    """A text without its numbers, which differ a little from machine to machine."""
    return re.sub(r"\s*-?\d[\d.,]*(e[-+]?\d+)?", " #", text).strip()


def write(path: Path, outputs: list[tuple[Block, str, str]], folder: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for block, _, printed in reversed(outputs):
        text = text[: block.span[0]] + printed + text[block.span[1] :]
    path.write_text(text, encoding="utf-8")
    for figure in folder.glob("*.png"):
        if f"figures/{figure.name}" in text:
            shutil.copy(figure, FIGURES)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=Path, help="all, if none is named")
    parser.add_argument("--write", action="store_true", help="write outputs and figures into the pages")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for path in [page.resolve() for page in args.pages] or pages():
        print(path.relative_to(ROOT), file=sys.stderr)
        with tempfile.TemporaryDirectory() as name:
            _, outputs = run(path, Path(name))
            if args.write:
                write(path, outputs, Path(name))


if __name__ == "__main__":
    main()
