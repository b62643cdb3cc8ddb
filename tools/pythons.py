"""Runs the core tests with each supported Python that is here, in an environment of its own.

    python tools/pythons.py [VERSION ...] [TEST ...]

Without a version, all that the metadata names. Looks for python3.10 and so on in the PATH, and for those of
pyenv and uv. An interpreter that is missing is named, and is a failure only if it was asked for. The
environments, .venv-3.10 and so on, are kept and reused.

On Linux the index's own torch brings CUDA, several GB for each. PIP_EXTRA_INDEX_URL may name an index with
CPU builds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def supported() -> list[str]:
    """The versions that the package's metadata names."""
    return re.findall(
        r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text("utf-8")
    )


def candidates(version: str) -> Iterator[str]:
    yield f"python{version}"
    yield from map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    if shutil.which("uv"):
        found = subprocess.run(["uv", "python", "find", version], capture_output=True, text=True, check=False)
        yield found.stdout.strip()


def interpreter(version: str) -> str | None:
    """A Python of this version, if there is one: pyenv's names in the PATH may lead nowhere."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in candidates(version):
        if shutil.which(candidate):
            answer = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
            if answer.stdout.strip() == version:
                return candidate
    return None


def test(version: str, python: str, tests: list[str]) -> bool:
    environment = ROOT / f".venv-{version}"
    own = str(environment / "bin" / "python")
    pip = [own, "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt"]
    commands = [
        *([] if Path(own).exists() else [[python, "-m", "venv", str(environment)]]),
        [own, "-m", "pip", "install", "--quiet", "--upgrade", "pip"],
        [*pip, "torch"],  # first, so that nothing resolves to another build of it
        [*pip, "--editable", ".", "--group", "core"],
        [own, "-m", "pytest", "--quiet", "--numprocesses", "auto", "--dist", "loadfile", *tests],
    ]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    return all(
        subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode == 0 for command in commands
    )


def main(arguments: list[str]) -> int:
    versions = [argument for argument in arguments if re.fullmatch(r"3\.\d+", argument)]
    tests = [argument for argument in arguments if argument not in versions]
    results = {}
    for version in versions or supported():
        python = interpreter(version)
        print(f"Python {version}: {python or 'not found'}", flush=True)
        results[version] = (
            "not found" if python is None else "passed" if test(version, python, tests) else "FAILED"
        )
    print(*(f"Python {version}: {result}" for version, result in results.items()), sep="\n")
    # One that was asked for by name has to be there.
    return int("FAILED" in results.values() or bool(versions and "not found" in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
