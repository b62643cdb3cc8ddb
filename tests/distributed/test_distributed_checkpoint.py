"""torch.distributed.checkpoint: saved by two processes, loaded by one."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from flatlora_optim import FlatLoRAOptimizer
from helpers import flatlora, lora_mlp, loss_of, mlp_batch, randomize_adapters
from launch import launch

SAVED_AT, TOTAL = 4, 8


def build(model: nn.Module, **options: object) -> FlatLoRAOptimizer:
    options = {"lr": 1e-2, "sigma": 0.1, "schedule": "cosine", "total_steps": TOTAL, "seed": 7, **options}
    return flatlora(model, base=AdamW, **options)


def train(model: nn.Module, optimizer: FlatLoRAOptimizer, start: int, stop: int) -> list[float]:
    losses = []
    for step in range(start, stop):
        optimizer.zero_grad()
        loss = loss_of(model, mlp_batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save_and_go_on(folder: Path, flatten: bool) -> list[float]:
    """Saves while the weights carry the next step's noise."""
    model = lora_mlp()
    fully_shard(model)
    optimizer = build(model)
    train(model, optimizer, 0, SAVED_AT)
    loss_of(model, mlp_batch(SAVED_AT))
    assert optimizer.is_perturbed
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    return train(model, optimizer, SAVED_AT, TOTAL)


@pytest.mark.parametrize("flatten", [False, True])
def test_saved_on_two_loaded_on_one(tmp_path: Path, flatten: bool) -> None:
    expected, _ = launch(save_and_go_on, tmp_path, flatten)

    model = lora_mlp(seed=1)  # also the frozen weights come from the checkpoint
    optimizer = build(model, sigma=0.2, seed=0, total_steps=None, schedule="constant")
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "torch.distributed is .*unavailable or uninitialized")
        warnings.filterwarnings("ignore", "as in the checkpoint, from now on sigma")
        weights, state = get_state_dict(model, optimizer, options=options)
        checkpoint = {"model": weights, "optimizer": state}
        dcp.load(checkpoint, checkpoint_id=tmp_path)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=checkpoint["model"],
            optim_state_dict=checkpoint["optimizer"],
            options=options,
        )
    assert (optimizer.step_count, optimizer.seed, optimizer.total_steps) == (SAVED_AT, 7, TOTAL)
    assert train(model, optimizer, SAVED_AT, TOTAL) == expected


def test_creating_state_is_no_step() -> None:
    model = lora_mlp()
    optimizer = build(model)
    randomize_adapters(model)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.state  # created by a step at learning rate 0
    assert optimizer.step_count == 0
    # A warm-up that starts at 0 is one, as its forward was perturbed.
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, 0, 1)
    assert optimizer.step_count == 1
