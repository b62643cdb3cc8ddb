"""The table in docs/trainers.md: each row names a test that is there, and the release it was run with."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = [
    [cell.strip() for cell in line.strip("|\n").split(" | ")]
    for line in (ROOT / "docs/trainers.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| trainer ")
]
PINS = {
    name: pinned
    for path in (ROOT / "constraints.txt", *(ROOT / "tests/trainers").glob("*.txt"))
    for name, pinned in re.findall(r"^([\w-]+)==([^\s;]+)", path.read_text(), re.MULTILINE)
}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_row(row: list[str]) -> None:
    name, release = row[2].split()
    assert PINS[name] == release
    try:
        assert version(name) == release or "trainers/" in row[-1]
    except PackageNotFoundError:
        assert name in PINS  # in an environment of its own, or left out here
    tests = re.findall(r"`([\w/]+\.py)`", " ".join(row))
    assert tests
    assert all((ROOT / "tests" / test).exists() for test in tests)
