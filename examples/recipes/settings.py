"""Recipes as nested dicts: reading, variants, overrides, and the templates in them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from jinja2 import Environment, StrictUndefined

Recipe = dict[str, Any]

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def variants(name: str) -> list[str]:
    """The data sets that one recipe is for; empty where there is but one."""
    return list(_read(FOLDER / f"{name}.yaml").get("variants", {}))


def load(name: str, variant: str | None = None) -> Recipe:
    """Reads a recipe of this folder, with one of its variants merged in."""
    if name not in NAMES:
        raise SystemExit(f"no recipe {name!r}: choose one of {', '.join(NAMES)}")
    recipe = _read(FOLDER / f"{name}.yaml")
    choices = recipe.pop("variants", {})
    if variant is None and choices:
        raise SystemExit(f"{name} needs --variant, one of {', '.join(choices)}")
    if variant is not None and variant not in choices:
        raise SystemExit(f"{name} has no variant {variant!r}: choose one of {', '.join(choices) or 'none'}")
    recipe["name"] = f"{name}-{variant}" if variant else name
    return merge(recipe, choices[variant]) if variant else recipe


def merge(base: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A new recipe in which ``changes`` win, at every depth."""
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        inner = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if inner else copy.deepcopy(value)
    return merged


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """Applies ``training.learning_rate=0.001`` and the like. Values are YAML."""
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals:
            raise SystemExit(f"--set needs key=value, got {assignment!r}")
        change: Any = yaml.safe_load(value)
        for key in reversed(path.split(".")):
            change = {key: change}
        recipe = merge(recipe, change)
    return recipe


def save(recipe: Recipe, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))


def saved(folder: Path) -> Recipe:
    """The recipe that a run was made with."""
    return _read(folder / "recipe.yaml")


def dtype(recipe: Recipe) -> torch.dtype:
    value: torch.dtype = getattr(torch, recipe["dtype"])
    return value


def processes() -> PartialState:
    """This process among those of the run, and its device."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def render(template: str, values: Mapping[str, Any]) -> str:
    """Fills in a prompt. Templates are Jinja, as in lm-eval."""
    return _environment().from_string(template).render(values)


def holds(expression: str, values: Mapping[str, Any]) -> bool:
    return bool(_environment().compile_expression(expression)(**values))


@lru_cache
def _environment() -> Environment:
    return Environment(keep_trailing_newline=True, undefined=StrictUndefined)


def _read(path: Path) -> Recipe:
    recipe: Recipe = yaml.safe_load(path.read_text())
    return recipe
