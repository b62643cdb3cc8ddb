"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch

import flatlora_optim
from helpers import flatlora, lora_mlp, mlp_batch

NEEDS = {
    "integrations.axolotl": "axolotl",
    "integrations.composer": "composer",
    "integrations.lightning": "lightning",
    "kernels.triton": "a GPU",
    "landscape.plot": "matplotlib",
}
MODULES = [
    info.name
    for info in pkgutil.walk_packages(flatlora_optim.__path__, "flatlora_optim.")
    if (needed := NEEDS.get(info.name.partition(".")[2])) is None or find_spec(needed)
]
WITH_EXAMPLES = {"FlatLoRAOptimizer", "perturbed", "clean", "register", "expected_loss"}


def examples(module: ModuleType) -> list[doctest.DocTest]:
    model = lora_mlp()
    known = {"model": model, "optimizer": flatlora(model), "x": mlp_batch()[0]}
    return [test for test in doctest.DocTestFinder().find(module, extraglobs=known) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    runner = doctest.DocTestRunner()
    for test in examples(importlib.import_module(name)):
        torch.manual_seed(0)
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_the_main_entry_points_have_examples() -> None:
    found = {
        test.name.rpartition(".")[2] for name in MODULES for test in examples(importlib.import_module(name))
    }
    assert found >= WITH_EXAMPLES
