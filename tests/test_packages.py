"""Fetching models and data out of packages: cached, checksummed, and clear when it can't be done."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from packages import PackageUnavailableError, extract, fetch

REQUIREMENT = "flatlora-test-data==1.0"


@pytest.fixture
def sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a wheel that pip finds in a folder of ours, and nowhere else."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    wheel = tmp_path / "index" / "flatlora_test_data-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "flatlora_test_data-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("flatlora_test_data/weights.txt", "1 2 3")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: flatlora-test-data\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_a_package_is_fetched_once_and_again_when_the_cached_file_is_damaged(
    sha256: str, tmp_path: Path
) -> None:
    file = fetch(REQUIREMENT, sha256)
    assert (extract(file) / "flatlora_test_data/weights.txt").read_text() == "1 2 3"

    index = tmp_path / "index"
    index.rename(tmp_path / "elsewhere")
    assert fetch(REQUIREMENT, sha256) == file  # without the index

    (tmp_path / "elsewhere").rename(index)
    file.write_bytes(b"damaged")
    assert hashlib.sha256(fetch(REQUIREMENT, sha256).read_bytes()).hexdigest() == sha256


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive that the command ``npm pack`` of ours brings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    archive = tmp_path / "digits-1.0.0.tgz"
    archive.write_bytes(b"archive")
    command = tmp_path / "bin" / "npm"
    command.parent.mkdir()
    command.write_text(
        f'#!/bin/sh\n[ "$1 $3 $4" = "pack digits@1.0.0 --pack-destination" ] && cp {archive} "$5"\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=":")
    return archive


def test_npms_packages_are_fetched_by_npm(npm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = hashlib.sha256(npm.read_bytes()).hexdigest()
    assert fetch("digits@1.0.0", sha256, client="npm").read_bytes() == b"archive"
    with pytest.raises(PackageUnavailableError, match="another checksum"):
        fetch("digits@1.0.0", "0" * 64, client="npm")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PackageUnavailableError, match="npm is not installed"):
        fetch("digits@1.0.0", "1" * 64, client="npm")


@pytest.mark.parametrize("wrong", ["checksum", "index"])
def test_what_cannot_be_had_says_so(sha256: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong == "checksum":
        sha256 = "0" * 64
    else:
        monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(PackageUnavailableError, match=r"can't download flatlora-test-data==1\.0") as error:
        fetch(REQUIREMENT, sha256)
    assert f"SHA-256 {sha256} elsewhere and put it into" in str(error.value)
