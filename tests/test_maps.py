"""Architecture and contributing guide name what is there, all of it and nothing else."""

from __future__ import annotations

import re

import pytest

from test_layout import MODULES, PACKAGE, ROOMS

ROOT = PACKAGE.parent
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGES = {"architecture": ARCHITECTURE, "contributing": CONTRIBUTING}


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    named = re.findall(r"[\w./-]+/[\w.-]+\.(?:py|c|h|md|yml)\b", PAGES[page])
    assert len(named) > 5
    missing = [name for name in named if not (PACKAGE / name).exists() and not (ROOT / name).exists()]
    assert missing == []


def test_each_module_is_on_the_map() -> None:
    for room in ROOMS:
        section = ARCHITECTURE.split(f"### `{room}/`")[1].split("\n#")[0]
        rows = set(re.findall(r"^\| `([\w/]+?)/?` \|", section, re.M)) - {"__init__"}
        modules = {name.split(".")[1] for name in MODULES if name.startswith(f"{room}.")}
        assert rows == modules


def test_the_order_of_the_rooms_is_drawn() -> None:
    drawing = ARCHITECTURE.split("```text\n")[1].split("```")[0]
    assert tuple(line.split()[-1] for line in drawing.splitlines()) == ROOMS


def test_ten_questions_have_ten_answers() -> None:
    questions = CONTRIBUTING.split("at the end):")[1].split("###")[0]
    asked = re.findall(r"^(\d+)\. Where", questions, re.M)
    answers = dict(re.findall(r"(\d+) `([\w/.]+)`", CONTRIBUTING.split("## Answers")[1]))
    assert list(answers) == asked == [str(i) for i in range(1, 11)]
    for path in answers.values():
        room, module = path.removesuffix(".py").split("/")
        assert f"| `{module}` |" in ARCHITECTURE.split(f"### `{room}/`")[1].split("\n#")[0]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([a-z-]+)", CONTRIBUTING, re.M)) <= targets
