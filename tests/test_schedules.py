"""How sigma_t grows, and that the noise follows it."""

from __future__ import annotations

import math

import pytest
import torch

from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.optimizer.schedule import Schedule
from helpers import OwnLoRA, flatlora, int_view

TOTAL, SIGMA = 4, 0.2
EXPECTED = {
    "cosine": [SIGMA / 2 * (1 - math.cos(math.pi * t / TOTAL)) for t in range(TOTAL + 1)] + [SIGMA] * 3,
    "linear": [SIGMA * t / TOTAL for t in range(TOTAL + 1)] + [SIGMA] * 3,
    "constant": [SIGMA] * (TOTAL + 4),
}


def curve(schedule: str | Schedule, steps: int = TOTAL + 4) -> list[float]:
    layer = OwnLoRA(torch.zeros(3, 3))
    optimizer = flatlora(layer, sigma=SIGMA, schedule=schedule, total_steps=TOTAL)
    found = []
    for _ in range(steps):
        found.append(optimizer.sigma)
        assert optimizer.metrics()["sigma"] == found[-1]
        with optimizer.perturbed():
            pass
        optimizer.step()
    return found


@pytest.mark.parametrize("schedule", EXPECTED)
def test_sigma_follows_the_formula_and_stays_at_its_last_value(schedule: str) -> None:
    assert curve(schedule) == pytest.approx(EXPECTED[schedule])


def test_any_callable_of_the_step_will_do() -> None:
    assert curve(lambda step: 1 / (step + 1), steps=3) == pytest.approx([SIGMA, SIGMA / 2, SIGMA / 3])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_noise_grows_with_sigma(schedule: str) -> None:
    layer = OwnLoRA(torch.randn(50, 400, dtype=torch.float64))
    clean = layer.weight.clone()
    merged = (clean + 1.5 * layer.lora_B.detach() @ layer.lora_A.detach()).norm()
    optimizer = flatlora(layer, sigma=SIGMA, schedule=schedule, total_steps=TOTAL)
    relative = []
    for _ in range(TOTAL + 2):
        with optimizer.perturbed():
            relative.append(((layer.weight - clean).norm() / merged).item())
        optimizer.step()
    assert relative == pytest.approx(EXPECTED[schedule][: TOTAL + 2], rel=0.05)


def test_the_first_step_of_the_cosine_is_plain_lora() -> None:
    layer = OwnLoRA(torch.randn(3, 3))
    before = int_view(layer.weight).clone()
    with flatlora(layer, schedule="cosine", total_steps=10).perturbed():
        assert torch.equal(int_view(layer.weight), before)


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_a_callable_that_returns_nonsense_is_an_error(value: float) -> None:
    layer = OwnLoRA(torch.randn(3, 3))
    before = int_view(layer.weight).clone()
    optimizer = flatlora(layer, schedule=lambda step: value)
    with pytest.raises(ValueError, match="finite factor >= 0"):
        layer(torch.ones(1, 3))
    assert torch.equal(int_view(layer.weight), before)
    assert not optimizer.is_perturbed


def test_the_length_of_the_run_may_be_set_later() -> None:
    layer = OwnLoRA(torch.randn(3, 3))
    base = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    optimizer = FlatLoRAOptimizer(base, layer, sigma=SIGMA, total_steps="deferred")
    with pytest.raises(RuntimeError, match=r"optimizer\.total_steps"):
        optimizer.perturb()
    assert not optimizer.is_perturbed
    optimizer.total_steps = 2
    with optimizer.perturbed():
        pass
    optimizer.step()
    assert optimizer.sigma == pytest.approx(SIGMA / 2)
    with pytest.raises(ValueError, match="at least 1"):
        optimizer.total_steps = 0
    assert optimizer.total_steps == 2
