"""Engines that hide the weights are refused, in words that say what to do."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from helpers import flatlora, lora_mlp
from launch import launch, refusal


def fsdp1(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def wrapped_by_fsdp1() -> list[str]:
    model = lora_mlp()
    wrapped = fsdp1(model)
    refusals = [refusal(lambda: flatlora(wrapped)), refusal(lambda: flatlora(model))]
    later = lora_mlp()
    optimizer = flatlora(later)
    wrapped_later = fsdp1(later)
    refusals.append(refusal(lambda: wrapped_later(torch.ones(1, 6))))
    assert not optimizer.is_perturbed
    return refusals


def test_fsdp1() -> None:
    for message in launch(wrapped_by_fsdp1)[0]:
        assert "FSDP1" in message
        assert "fully_shard" in message
