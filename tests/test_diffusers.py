"""The usual text-to-image loop of diffusers, with LoRA on attention and convolutions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn

from helpers import assert_equal_tensors, changed_weights, fingerprint, flatlora, randomize_adapters

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
STEPS = 4


def unet() -> nn.Module:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=[*ATTENTION, "conv1", "conv2"]))
    randomize_adapters(model)
    return model.train()


def dit() -> nn.Module:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_embeds_ada_norm=10,
    )
    # "proj" is the patch embedding, a convolution.
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[*ATTENTION, "proj", "net.2"]))
    randomize_adapters(adapted)
    return adapted.train()


def predict(model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    if isinstance(model, UNet2DConditionModel):
        return model(noisy, timesteps, encoder_hidden_states=text).sample
    labels = text[:, 0, 0].gt(0).long()
    return model(noisy, timestep=timesteps, class_labels=labels).sample[:, :4]


def loss_of(model: nn.Module, step: int) -> Tensor:
    torch.manual_seed(step)  # also for the DiT, which drops class labels in training
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8)
    noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (2,))
    noisy = DDPMScheduler(num_train_timesteps=1000).add_noise(latents, noise, timesteps)
    return F.mse_loss(predict(model, noisy, timesteps, text), noise)


def optimizer_for(model: nn.Module) -> Any:
    return flatlora(model, base=torch.optim.AdamW, lr=1e-2)


def by_hand(model: nn.Module) -> list[float]:
    optimizer = flatlora(model, base=torch.optim.AdamW, lr=1e-2, auto=False)
    losses = []
    for step in range(STEPS):
        with optimizer.perturbed():
            loss = loss_of(model, step)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("build", [unet, dit])
def test_noise_in_training_alone_and_the_same_curve_as_by_hand(build: Any, tmp_path: Path) -> None:
    model = build()
    clean = fingerprint(model)
    optimizer = optimizer_for(model)
    assert not optimizer.skipped
    weights = {f"{target.name}.base_layer.weight" for target in optimizer.targets}
    assert {target.weight.tensor.ndim for target in optimizer.targets} == {2, 4}

    losses, noisy = [], []
    for step in range(STEPS):
        loss = loss_of(model, step)
        assert changed_weights(model, clean) == weights
        noisy.append(fingerprint(model))
        if step == 2:
            assert_same_image(model, build, optimizer, tmp_path)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert not changed_weights(model, clean)
    for first, second in pairwise(noisy):
        assert not any(torch.equal(first[name], second[name]) for name in weights)
    assert losses == by_hand(build())

    resumed = build()
    optimizer = optimizer_for(resumed)
    saved = torch.load(tmp_path / "saved.pt")
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert loss_of(resumed, 2).item() == losses[2]


def assert_same_image(model: nn.Module, build: Any, optimizer: Any, folder: Path) -> None:
    """Sampling and saving in the middle of a step see clean weights."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, folder / "saved.pt")
    copy = build()
    copy.load_state_dict(state["model"])
    assert_equal_tensors(fingerprint(copy), fingerprint(build()))
    with torch.no_grad():
        assert torch.equal(loss_of(model.eval(), 9), loss_of(copy.eval(), 9))
    model.train()


@pytest.mark.slow
def test_example_learns(tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "examples" / "text_to_image.py"
    assert len(path.read_text().splitlines()) < 130
    done = subprocess.run(
        [sys.executable, path, "--steps", "60"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = re.search(r"^Result: validation loss ([\d.]+)", done.stdout, re.MULTILINE)
    assert result, done.stdout
    assert float(result[1]) < 0.2  # 1 is to predict zeros
    folder = tmp_path / "outputs" / "text_to_image"
    assert (folder / "pytorch_lora_weights.safetensors").exists()
    with Image.open(folder / "before_and_after.png") as grid:
        for row, colour in enumerate(((255, 0, 0), (0, 255, 0), (0, 0, 255))):
            after = torch.tensor(grid.getpixel((grid.width // 2 + 48, 72 * row + 32)))  # of 8 pixels each
            assert (after - torch.tensor(colour)).abs().max() < 60
