"""Engines that hide the weights are refused, in words that say what to do."""

from __future__ import annotations

import warnings

import bitsandbytes as bnb
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from helpers import flatlora, lora_mlp, trainable, with_lora
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


def sharded_in_4_bits() -> list[str]:
    linear = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_storage=torch.float32)
    model = with_lora(nn.Sequential(linear.to("cpu")), ["0"])
    optimizer = flatlora(model)
    optimizer.perturb()
    optimizer.step()
    fully_shard(model)
    optimizer.param_groups[0]["params"] = trainable(model)
    return [refusal(optimizer.perturb), refusal(lambda: flatlora(model))]


def test_weights_in_4_bits_that_are_sharded() -> None:
    later, before = launch(sharded_in_4_bits)[0]
    assert "4-bit weight was sharded after this optimizer was built" in later
    assert "both quantized and sharded" in before
