"""Builds the sdist and the wheel into dist/, checks them, and tries the wheel with torch alone.

    python tools/package.py [ADDRESS [REVISION]]

ADDRESS is that of the repository, say https://HOST/OWNER/NAME. With it, the metadata names the
repository, and the README's links lead to its files at REVISION ("main" by default), so that an index shows
them right. It is written nowhere else.

Needs `build` and `twine` where it runs. Torch is installed as `constraints.txt` says.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
FENCED = re.compile(r"(^```.*?^```)", re.M | re.S)
PICTURE, LINK = (re.compile(rf"({start}\]\()(?!https?:|mailto:|#)(?=\S)") for start in (r"!\[[^\]]*", ""))


def main(address: str = "", revision: str = "main") -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        export(source)
        if address:
            name_the_repository(source, address.rstrip("/"), revision)
        run(sys.executable, "-m", "build", "--outdir", str(DIST), str(source))
        run(sys.executable, "-m", "twine", "check", "--strict", *map(str, DIST.iterdir()))
        (wheel,) = DIST.glob("*.whl")
        try_alone(wheel, Path(folder, "environment"))


def export(folder: Path) -> None:
    """Copies what git knows or would take, as it is now."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():  # not deleted meanwhile
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def name_the_repository(folder: Path, address: str, revision: str) -> None:
    readme, project = folder / "README.md", folder / "pyproject.toml"
    readme.write_text(absolute_links(readme.read_text("utf-8"), address, revision), "utf-8")
    files = f"{address}/blob/{revision}"
    urls = f'Repository = "{address}"\nIssues = "{address}/issues"\nChangelog = "{files}/CHANGELOG.md"\n'
    before, table, after = project.read_text("utf-8").partition("[project.urls]\n")
    assert table, "pyproject.toml has no [project.urls]"
    project.write_text(before + table + urls + after, "utf-8")


def absolute_links(markdown: str, address: str, revision: str) -> str:
    """The text, with links to files of the repository made absolute. Pictures need the files themselves."""
    parts = FENCED.split(markdown)
    for i in range(0, len(parts), 2):  # code is in between
        parts[i] = PICTURE.sub(rf"\1{address}/raw/{revision}/", parts[i])
        parts[i] = LINK.sub(rf"\1{address}/blob/{revision}/", parts[i])
    return "".join(parts)


def try_alone(wheel: Path, environment: Path) -> None:
    """Installs the wheel and torch, and trains without NumPy and without a compiler."""
    venv.create(environment, with_pip=True)
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    constraints = str(ROOT / "constraints.txt")
    run(str(python), "-m", "pip", "install", "--quiet", "--constraint", constraints, str(wheel))
    alone = {key: value for key, value in os.environ.items() if key not in ("CC", "PYTHONPATH")} | {
        "PATH": ""
    }
    code = "import importlib.util as u; assert not (u.find_spec('numpy') or u.find_spec('peft'))"
    for command in (["-c", code], [str(ROOT / "tools/smoke.py")], ["-m", "flatlora_optim.report"]):
        # In a folder without the sources: what is installed is what runs.
        subprocess.run([str(python), *command], cwd=environment, env=alone, check=True)


def run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
