"""The three extension points, as docs/extending.md shows them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer, find_targets
from flatlora_optim.targets import discovery
from helpers import changed_weights, fingerprint, lora_mlp, mlp_batch, trainable

TEXT = (Path(__file__).parent.parent / "docs/extending.md").read_text(encoding="utf-8")
_, ADAPTER, SOURCE, MIXED, BOTH_SIGNS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
WEIGHT = "base_model.model.fc1.base_layer.weight"


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page's readers have, and types of target that are forgotten again."""
    monkeypatch.setattr(discovery, "_TARGET_TYPES", list(discovery._TARGET_TYPES))
    model = lora_mlp()
    base = torch.optim.SGD(trainable(model), lr=1e-3)
    space = {"torch": torch, "nn": nn, "FlatLoRAOptimizer": FlatLoRAOptimizer, "GaussianNoise": None}
    return space | {
        "model": model,
        "base": base,
        "new_base": lambda: base,
        "loss_fn": F.cross_entropy,
        "batches": [mlp_batch(3)],
    }


def run(code: str, space: dict[str, Any]) -> None:
    exec(compile(code, "extending.md", "exec"), space)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in trainable(model)]


def at(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    """The gradients at the weights as they are right now."""
    x, y = batch
    twin = lora_mlp()
    twin.load_state_dict({name: p.detach().clone() for name, p in model.named_parameters()})
    return list(torch.autograd.grad(F.cross_entropy(twin(x), y), trainable(twin)))


@pytest.mark.parametrize("code", [ADAPTER, SOURCE, MIXED, BOTH_SIGNS])
def test_each_is_short(code: str) -> None:
    assert len([line for line in code.splitlines() if line]) < 30


def test_an_adapter(space: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run(ADAPTER, space)
    assert "VectorTarget('0', dense, (6, 8))" in capsys.readouterr().out
    layer = space["VectorLoRA"](nn.Linear(700, 60), rank=3)
    nn.init.normal_(layer.b)
    model = nn.Sequential(layer)
    (target,) = find_targets(model).targets
    weight = layer.base.weight.detach()
    with torch.no_grad():
        merged = model(torch.eye(700)).T - layer.base.bias[:, None]
    base = torch.optim.SGD(target.all_parameters(), lr=0.1)
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.3, schedule="constant")
    clean = weight.clone()
    with optimizer.perturbed():
        noise = weight - clean
        model(torch.randn(5, 700)).square().mean().backward()
    spread = noise.square().mean(1).sqrt() * math.sqrt(700) / merged.norm(dim=1)
    assert (spread - 0.3).abs().max() < 0.3 * 5 / math.sqrt(2 * 700)
    optimizer.step()
    assert torch.equal(weight, clean)


def test_a_source_of_noise(space: dict[str, Any]) -> None:
    run("from flatlora_optim import GaussianNoise\n" + SOURCE, space)
    model, optimizer = space["model"], space["optimizer"]
    weight, bits = dict(model.named_parameters())[WEIGHT].detach(), fingerprint(model)
    clean, noises = weight.clone(), []
    for batch in (1, 2, 3):
        x, y = mlp_batch(batch)
        F.cross_entropy(model(x), y).backward()
        noises.append(weight - clean)
        optimizer.step()
        optimizer.zero_grad()
    assert not changed_weights(model, bits)
    first, second, third = noises
    torch.testing.assert_close(second, -first, rtol=1e-2, atol=1e-4)  # the adapter has learned in between
    assert (third - first).norm() > first.norm()


def test_mixed_gradients(space: dict[str, Any]) -> None:
    model, (batch,) = space["model"], space["batches"]
    optimizer = space["optimizer"] = FlatLoRAOptimizer(
        space["base"], model, sigma=0.5, schedule="constant", auto=False
    )
    clean, bits = at(model, batch), fingerprint(model)
    with optimizer.perturbed():
        noisy = at(model, batch)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(clean, noisy, strict=True))
    run(MIXED, space)
    for grad, a, b in zip(gradients(model), clean, noisy, strict=True):
        torch.testing.assert_close(grad, (a + b) / 2)
    assert not changed_weights(model, bits)
    assert optimizer.step_count == 1


def test_both_signs(space: dict[str, Any]) -> None:
    model, (batch,) = space["model"], space["batches"]
    bits, weight = fingerprint(model), dict(model.named_parameters())[WEIGHT]
    clean = weight.detach().clone()
    seen: list[tuple[Tensor, list[Tensor]]] = []

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        seen.append((weight.detach() - clean, at(model, batch)))
        return F.cross_entropy(out, y)

    run("from flatlora_optim import GaussianNoise\n" + BOTH_SIGNS, space | {"loss_fn": loss_fn})
    (plus, one), (minus, other) = seen
    assert plus.any()
    torch.testing.assert_close(minus, -plus)
    for grad, a, b in zip(gradients(model), one, other, strict=True):
        torch.testing.assert_close(grad, (a + b) / 2)
    assert not changed_weights(model, bits)
