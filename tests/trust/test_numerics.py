"""Values at the edges: not finite, zero, enormous, subnormal, and noise too small for 16 bits."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from flatlora_optim import FlatLoRAOptimizer
from helpers import OwnLoRA, flatlora, int_view, lora_mlp, loss_of, mlp_batch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RESTORE = ["exact", "snapshot"]


def noise_on(layer: OwnLoRA, restore: str = "exact", sigma: float = 0.1) -> Tensor:
    """The weight under noise, in float64; asserts that the weight comes back."""
    before = int_view(layer.weight).clone()
    optimizer = flatlora(layer, sigma=sigma, restore=restore)
    with optimizer.perturbed():
        noisy = layer.weight.double()
    assert torch.equal(int_view(layer.weight), before)
    return noisy


def without_adapter(weight: Tensor) -> OwnLoRA:
    layer = OwnLoRA(weight)
    torch.nn.init.zeros_(layer.lora_B)
    return layer


@pytest.mark.parametrize("restore", RESTORE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_a_diverged_adapter_reaches_get_no_noise(value: float, restore: str) -> None:
    weight = torch.randn(4, 32)
    layer = OwnLoRA(weight.clone())
    with torch.no_grad():
        layer.lora_B[1, 0] = value
    changed = (noise_on(layer, restore) != weight.double()).any(1)
    assert changed.tolist() == [True, False, True, True]
    layer = OwnLoRA(weight.clone())
    with torch.no_grad():
        layer.lora_A[0, 3] = value
    assert torch.equal(noise_on(layer, restore), weight.double())


def test_a_diverged_run_says_so_itself() -> None:
    model = lora_mlp()
    optimizer = flatlora(model)
    with torch.no_grad():
        model.base_model.model.fc1.lora_A["default"].weight[0, 0] = math.nan
    loss = loss_of(model, mlp_batch())
    assert loss.isnan()
    loss.backward()
    optimizer.step()
    assert math.isfinite(optimizer.metrics()["noise_norm"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("restore", RESTORE)
def test_rows_of_zeros_get_no_noise(dtype: torch.dtype, restore: str) -> None:
    weight = torch.randn(4, 32).to(dtype)
    weight[2] = 0
    noisy = noise_on(without_adapter(weight.clone()), restore)
    assert (noisy != weight.double()).any(1).tolist() == [True, True, False, True]
    zeros = torch.zeros(4, 32, dtype=dtype)
    assert not noise_on(without_adapter(zeros.clone()), restore).any()
    # What counts is the merged weight.
    assert noise_on(OwnLoRA(zeros.clone()), restore).any(1).all()


@pytest.mark.parametrize("restore", RESTORE)
def test_enormous_float16_rows_stay_finite(restore: str) -> None:
    largest = torch.finfo(torch.float16).max
    weight = (torch.sign(torch.randn(8, 256)) * largest).half()
    noisy = noise_on(without_adapter(weight.clone()), restore, sigma=0.5)
    assert noisy.isfinite().all()
    assert noisy.abs().max() == largest
    # Half of the noise points outwards and has nowhere to go.
    assert 0.4 < (noisy == weight.double()).double().mean() < 0.6


@pytest.mark.parametrize(
    ("dtype", "size", "gets_noise"),
    [
        (torch.float16, 6e-8, True),  # the smallest subnormal
        (torch.float16, 6e4, True),
        (torch.bfloat16, 1e-18, True),
        (torch.bfloat16, 1e17, True),
        (torch.float32, 1e-18, True),
        (torch.float32, 1e17, True),
        # The square of the norm leaves the range of float32.
        (torch.bfloat16, 1e-30, False),
        (torch.bfloat16, 1e30, False),
        (torch.float32, 1e-30, False),
        (torch.float32, 1e30, False),
    ],
)
def test_the_range_of_row_norms(dtype: torch.dtype, size: float, gets_noise: bool) -> None:
    weight = (torch.randn(4, 64).clamp(-1, 1) * size).to(dtype)
    noisy = noise_on(without_adapter(weight.clone()), sigma=0.5)
    eps = noisy - weight.double()
    assert noisy.isfinite().all()
    if gets_noise:
        relative = eps.norm() / weight.double().norm()
        assert 0.35 < relative < 0.65
    else:
        assert not eps.any()


# ---------------------------------------------------------------------- noise too small for 16 bits


def steps_of(dtype: torch.dtype, sigma: float, schedule: str = "cosine") -> list[str]:
    """The warnings of a few steps of training on a weight of usual size."""
    layer = without_adapter((torch.randn(256, 256) * 0.02).to(dtype))
    optimizer = flatlora(layer, sigma=sigma, schedule=schedule, total_steps=6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            with optimizer.perturbed():
                pass
            optimizer.step()
    return [str(w.message) for w in caught if "rounds the noise away" in str(w.message)]


@pytest.mark.parametrize(("dtype", "sigma"), [(torch.bfloat16, 5e-4), (torch.float16, 5e-5)])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_noise_that_is_rounded_away_is_reported_once_with_the_number(
    dtype: torch.dtype, sigma: float, schedule: str
) -> None:
    (message,) = steps_of(dtype, sigma, schedule)
    # As one would measure it by hand.
    weight = torch.randn(256, 256) * 0.02
    weight = weight.to(dtype)
    scale = sigma * weight.float().norm(dim=1, keepdim=True) / 16
    noisy = (weight.float() + scale * torch.randn(256, 256)).to(dtype)
    lost = (noisy == weight).float().mean().item()
    number = int(message.split("%")[0].split()[-1]) / 100
    assert lost > 0.5
    assert abs(number - lost) < 0.03
    assert str(dtype).removeprefix("torch.") in message


@pytest.mark.parametrize(
    ("dtype", "sigma"), [(torch.bfloat16, 0.02), (torch.float16, 0.005), (torch.float32, 1e-4)]
)
def test_usual_noise_is_not_complained_about(dtype: torch.dtype, sigma: float) -> None:
    # Early in the schedule it is rounded away, and grows.
    assert not steps_of(dtype, sigma)


def test_float32_is_not_advised_to_become_float32() -> None:
    assert not steps_of(torch.float32, 1e-9)


@pytest.mark.parametrize(("sigmas", "is_reported"), [((0.0, 5e-4), True), ((0.1, 5e-4), False)])
def test_what_is_lost_is_the_mean_over_the_weights_with_noise(
    sigmas: tuple[float, float], is_reported: bool
) -> None:
    layers = torch.nn.ModuleList(without_adapter((torch.randn(64, 64) * 0.02).bfloat16()) for _ in sigmas)
    groups = [
        {"params": [layer.lora_A, layer.lora_B], "sigma": sigma}
        for layer, sigma in zip(layers, sigmas, strict=True)
    ]
    optimizer = FlatLoRAOptimizer(torch.optim.SGD(groups, lr=0.1), layers, sigma=0.1, schedule="constant")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.perturb()
    assert any("rounds the noise away" in str(w.message) for w in caught) == is_reported
