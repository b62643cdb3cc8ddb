"""The study: its engine trains what the package trains, its methods are their formulas."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from flatlora_optim import FlatLoRAOptimizer, NoiseKey
from flatlora_optim.landscape import expected_loss
from study.methods import METHODS, BiLoRA, EFMLoRA, Method, pseudo_inverse
from study.population import AdamW, AdaptedLinear, Examples, Population
from study.tasks import digits

TARGETS = ("qkv", "proj", "fc1", "fc2")


class Recorded:
    """The package's Gaussian numbers, kept for the engine."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, int], Tensor] = {}

    def block(self, key: NoiseKey, number: int, out: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * key.step + number)
        out.normal_(generator=generator)
        self.numbers[key.step, number] = out.clone()
        return out


@pytest.fixture(scope="module")
def vit() -> digits.ViT:
    torch.manual_seed(0)
    return digits.ViT(2, width=16).requires_grad_(False)


def examples(count: int, seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    return Examples(
        (torch.randn(count, 16, 16, generator=generator),), torch.randint(5, (count,), generator=generator)
    )


def one_of(population: Population, run: int) -> dict[str, Tensor]:
    """A run's trained tensors, by the names they have in the model."""
    named = {}
    for name, module in population.model.named_modules():
        for part in ("A", "B") if isinstance(module, AdaptedLinear) else ():
            named[f"{name}.{part}"] = getattr(module, part)[run].detach().clone()
    head = population.model.get_submodule("head")
    return named | {
        "head.weight": head.weight[run].detach().clone(),
        "head.bias": head.bias[run, 0].detach().clone(),
    }


def as_peft(vit: digits.ViT, start: dict[str, Tensor]) -> nn.Module:
    """The same model with the package's own kind of adapters."""
    import copy

    model = get_peft_model(copy.deepcopy(vit), LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS)))
    for name, value in start.items():
        module, _, part = name.rpartition(".")
        layer = model.base_model.model.get_submodule(module)
        with torch.no_grad():
            if module == "head":
                getattr(layer, part).copy_(value)
                getattr(layer, part).requires_grad_(True)
            else:
                getattr(layer, f"lora_{part}")["default"].weight.copy_(value)
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    named = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            named[
                name.removeprefix("base_model.model.").replace("lora_", "").replace(".default.weight", "")
            ] = p
    return named


def test_the_engine_trains_what_the_package_trains(vit: digits.ViT) -> None:
    """Fed with the same noise, for two runs at once against one after the other."""
    steps, sigma, lr, data = 6, 0.5, 0.02, examples(40)
    order = torch.Generator().manual_seed(1)
    batches = [torch.randperm(40, generator=order)[:8] for _ in range(steps)]
    population = Population(vit, [3, 4], targets=TARGETS, heads=("head",), rank=4)
    starts = [one_of(population, run) for run in range(2)]
    source = Recorded()
    by_package = []
    for start in starts:
        model = as_peft(vit, start)
        base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
        optimizer = FlatLoRAOptimizer(
            base, model, sigma=sigma, total_steps=steps, noise=source, restore="snapshot"
        )
        for index in batches:
            batch = data.take(index)
            F.cross_entropy(model(*batch.inputs), batch.labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        by_package.append(trained(model))
    assert len(source.numbers) == (steps - 1) * len(population.layers)  # none in the first step

    optimizer = AdamW(population.theta, torch.full((2,), lr), torch.full((2,), 0.1))
    method = Method(population, torch.full((2,), sigma), steps)
    for step, index in enumerate(batches):

        def numbers(layer: AdaptedLinear, step: int = step) -> Tensor:
            known = source.numbers.get((step, population.layers.index(layer)))
            return torch.zeros(1) if known is None else known[None].expand(2, -1, -1)

        batch = data.take(index.repeat(2))
        with population.noisy(numbers, method.sigma()):
            gradient = population.gradients(batch)
        optimizer.step(gradient, 1.0)
        method.after()
    for run in range(2):
        for name, value in one_of(population, run).items():
            torch.testing.assert_close(value, by_package[run][name].detach(), rtol=2e-3, atol=2e-4)
            if not name.endswith("bias"):
                assert not torch.equal(value, starts[run][name])
