"""The README's code runs, leaves the weights alone, and its table of options is the truth."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from flatlora_optim import FlatLoRAOptimizer
from helpers import changed_weights, fingerprint

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(6, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.attention(x)))


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the README's readers are told that they have."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    model = get_peft_model(Classifier(), LoraConfig(target_modules=["attention", "head"], r=2))
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return {
        "torch": torch,
        "FlatLoRAOptimizer": FlatLoRAOptimizer,
        "model": model,
        "base": base,
        "loss_fn": F.cross_entropy,
        "batches": [(torch.randn(5, 6), torch.randint(4, (5,))) for _ in range(3)],
        "tokens": torch.randint(50, (2, 7)),
        "name": tmp_path / "llama",
        "path": tmp_path / "checkpoint.pt",
    }


def save_tiny_llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(folder)


def language_model(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    save_tiny_llama(folder)
    config = LoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return {"model": model, "base": base, "dataset": [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 16}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n", 1)[0][:60])
def test_block_runs_and_leaves_the_weights_alone(block: str, namespace: dict[str, Any]) -> None:
    if "from_pretrained(name" in block:
        save_tiny_llama(namespace["name"])
    if "Trainer(" in block:
        namespace |= language_model(namespace["name"])
    if "FlatLoRAOptimizer(" not in block:
        base, model = namespace["base"], namespace["model"]
        namespace["optimizer"] = FlatLoRAOptimizer(base, model, sigma=0.1, total_steps=8)
    frozen = fingerprint(namespace["model"])
    trained = {n: p.clone() for n, p in namespace["model"].named_parameters() if p.requires_grad}

    exec(compile(block, "README.md", "exec"), namespace)

    optimizer = namespace["optimizer"]
    assert isinstance(optimizer, FlatLoRAOptimizer)
    assert not optimizer.is_perturbed
    if namespace["model"].state_dict().keys() >= frozen.keys():
        assert not changed_weights(namespace["model"], frozen)
    if "in batches:" in block or "trainer.train()" in block:
        assert optimizer.step_count == (len(namespace["batches"]) if "in batches:" in block else 2)
        assert any(
            not torch.equal(p, trained[n]) for n, p in namespace["model"].named_parameters() if n in trained
        )
        assert optimizer.metrics()["seconds"] > 0


def test_all_three_styles_and_qlora_are_shown() -> None:
    text = "\n".join(BLOCKS)
    for shown in ("optimizer.perturbed()", "optimizer.step(closure)", "load_in_4bit", "register("):
        assert shown in text
    assert len(BLOCKS) >= 8


def test_options_are_those_of_the_constructor() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? ?\|", README, re.M)
    documented = dict(rows)
    parameters = inspect.signature(FlatLoRAOptimizer).parameters.values()
    actual = {p.name: "" if p.default is p.empty else repr(p.default).replace("'", '"') for p in parameters}
    assert documented == actual


def test_members_exist() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model = get_peft_model(model, LoraConfig(target_modules=["0"], r=2))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, total_steps=8)
    table = README.split("| member | meaning |")[1].split("\n\n")[0]
    first_cells = [row.split(" | ")[0] for row in table.splitlines()]
    members = [name for cell in first_cells for name in re.findall(r"`(\w+)(?:\(\))?`", cell)]
    assert len(members) >= 12
    assert [name for name in members if not hasattr(optimizer, name)] == []


def test_links_lead_to_files_that_exist() -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
