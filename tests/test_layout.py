"""The layout of the package: few rooms, one direction of imports."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import flatlora_optim

PACKAGE = Path(flatlora_optim.__file__).parent
ROOMS = ("kernels", "targets", "noise", "perturbation", "optimizer", "landscape", "integrations")
"""From the bottom to the top: each imports from those before it only."""


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, also inside functions and for types only."""
    found = set()
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.ImportFrom) and node.level):
            continue
        base = package[: len(package) - node.level + 1] + (node.module or "").split(".")
        base = [part for part in base if part]
        for alias in node.names:
            inner = ".".join([*base, alias.name])
            found.add(inner if inner in MODULES else ".".join(base))
    return found - {name}


def test_ten_entries_at_the_top() -> None:
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert len(entries) <= 10, sorted(entries)
    assert entries >= {*ROOMS, "__init__.py", "py.typed"}


def test_no_import_circle() -> None:
    graph = {name: imports(name) for name in MODULES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(MODULES)


def test_imports_follow_the_order_of_the_rooms() -> None:
    for name in MODULES:
        room = name.split(".")[0]
        if room not in ROOMS:
            continue
        for other in imports(name):
            assert ROOMS.index(other.split(".")[0]) <= ROOMS.index(room), f"{name} imports {other}"


def test_each_room_has_a_map() -> None:
    for room in ROOMS:
        modules = [name.split(".")[1] for name in MODULES if name.startswith(f"{room}.")]
        described = ast.get_docstring(ast.parse(MODULES[room].read_text())) or ""
        assert [name for name in modules if f"``{name}``" not in described] == []
