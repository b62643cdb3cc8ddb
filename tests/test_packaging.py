"""What a release is made of agrees with itself: versions, Pythons, make targets, links."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import flatlora_optim

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import package
import pythons

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == flatlora_optim.__version__


def test_each_python_of_the_metadata_is_tested() -> None:
    versions = pythons.supported()
    assert versions == sorted(versions, key=lambda version: int(version.split(".")[1]))
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    assert versions[0] == oldest[1]
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert ci["jobs"]["core"]["strategy"]["matrix"]["python"] == versions


def test_this_python_is_found() -> None:
    version = "{}.{}".format(*sys.version_info)
    assert pythons.interpreter(version) is not None
    assert pythons.interpreter("2.0") is None


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_targets_that_exist(workflow: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    called = [re.findall(r"make ([a-z-]+)", step.get("run", "")) for step in steps(workflow)]
    assert [name for names in called for name in names if name not in targets] == []
    assert any(called)


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("[a](docs/x.md)", "[a](https://h/o/n/blob/v1/docs/x.md)"),
        ("[`a`](examples/)", "[`a`](https://h/o/n/blob/v1/examples/)"),
        ("![a](docs/x.png)", "![a](https://h/o/n/raw/v1/docs/x.png)"),
        ('[a](x.md "title")', '[a](https://h/o/n/blob/v1/x.md "title")'),
        ("[a](#use)", "[a](#use)"),
        ("[a](https://x/y)", "[a](https://x/y)"),
        ("[![a](x.svg)](y.md)", "[![a](https://h/o/n/raw/v1/x.svg)](https://h/o/n/blob/v1/y.md)"),
        (
            "```python\nmodels[0](x)\n```\n[a](b)",
            "```python\nmodels[0](x)\n```\n[a](https://h/o/n/blob/v1/b)",
        ),
    ],
)
def test_links_are_made_absolute(link: str, expected: str) -> None:
    assert package.absolute_links(link, "https://h/o/n", "v1") == expected


def test_every_link_of_the_readme_is_made_absolute() -> None:
    text = package.absolute_links((ROOT / "README.md").read_text(encoding="utf-8"), "https://h/o/n", "v1")
    prose = "".join(package.FENCED.split(text)[::2])
    assert re.findall(r"\]\((?!https?:|mailto:|#)[^)]*\)", prose) == []
