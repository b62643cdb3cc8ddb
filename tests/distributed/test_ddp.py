"""DistributedDataParallel on two processes."""

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from helpers import changed_weights, fingerprint, flatlora, lora_mlp, loss_of, mlp_batch, trainable
from launch import launch

STEPS = 3


def micro_batches(step: int) -> list[tuple[Tensor, Tensor]]:
    """Different data on each rank."""
    return [mlp_batch(seed=10 * step + 2 * i + dist.get_rank()) for i in range(2)]


def with_ddp(built_on: str, rank_noise: str) -> dict[str, Any]:
    model = lora_mlp()
    before = fingerprint(model)
    options = {"base": torch.optim.AdamW, "lr": 1e-2, "rank_noise": rank_noise}
    if built_on == "the model, before wrapping":
        optimizer = flatlora(model, **options)
    ddp = DistributedDataParallel(model)
    if built_on == "the model, after wrapping":
        optimizer = flatlora(model, **options)
    elif built_on == "the wrapper":
        optimizer = flatlora(ddp, **options)

    losses, noisy, adapters = [], [], []
    for step in range(STEPS):
        for i, batch in enumerate(micro_batches(step)):
            with ddp.no_sync() if i == 0 else nullcontext():
                loss = loss_of(ddp, batch)
                loss.backward()
            losses.append(loss.item())
            noisy.append(fingerprint(model))
        optimizer.step()
        optimizer.zero_grad()
        adapters.append([p.detach().clone() for p in trainable(model)])
    assert not changed_weights(model, before)
    return {"losses": losses, "noisy": noisy, "adapters": adapters}


def by_hand(rank_noise: str) -> list[float]:
    """What DDP does, written out."""
    model = lora_mlp()
    optimizer = flatlora(model, base=torch.optim.AdamW, lr=1e-2, rank_noise=rank_noise, auto=False)
    losses = []
    for step in range(STEPS):
        with optimizer.perturbed():
            for batch in micro_batches(step):
                loss = loss_of(model, batch)
                loss.backward()
                losses.append(loss.item())
        for p in trainable(model):
            dist.all_reduce(p.grad.div_(2))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def ddp_against_by_hand(built_on: str, rank_noise: str) -> dict[str, Any]:
    return {**with_ddp(built_on, rank_noise), "by hand": by_hand(rank_noise)}


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        first, second = list(first.values()), list(second.values())
    return len(first) == len(second) and all(map(equal, first, second))


@pytest.mark.parametrize(
    ("built_on", "rank_noise"),
    [
        ("the model, before wrapping", "independent"),
        ("the model, after wrapping", "shared"),
        ("the wrapper", "independent"),
        ("the wrapper", "shared"),
    ],
)
def test_ranks_agree_on_the_adapters_and_equal_a_loop_by_hand(built_on: str, rank_noise: str) -> None:
    first, second = launch(ddp_against_by_hand, built_on, rank_noise)
    assert equal(first["adapters"], second["adapters"])
    for result in (first, second):
        assert result["losses"] == result["by hand"]
        same_within_a_step = [equal(*result["noisy"][i : i + 2]) for i in range(0, 2 * STEPS, 2)]
        assert same_within_a_step == [True] * STEPS
        assert not equal(*result["noisy"][1:3])  # and new in the next one
    assert equal(first["noisy"], second["noisy"]) == (rank_noise == "shared")


def with_a_layer_each() -> list[str]:
    """Each rank runs a layer of its own, and gets the gradient of the other one from the other rank."""
    model = lora_mlp()
    optimizer = flatlora(model, mode="virtual", auto=False)
    layers = [model.base_model.model.fc1, model.base_model.model.fc2]
    mine = layers[dist.get_rank()]
    with optimizer.perturbed():
        mine(torch.randn(2, mine.in_features)).square().sum().backward()
    for p in trainable(model):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(warning.message) for warning in caught]


def test_a_layer_that_ran_on_another_rank_is_not_missed() -> None:
    assert launch(with_a_layer_each) == [[], []]


def with_zero_redundancy() -> dict[str, Any]:
    def train(make: Any) -> tuple[list[Tensor], list[int]]:
        model: nn.Module = lora_mlp()
        before = fingerprint(model)
        optimizer = flatlora(model, base=make, lr=1e-2)
        ddp = DistributedDataParallel(model)
        for step in range(STEPS):
            loss_of(ddp, micro_batches(step)[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not changed_weights(model, before)
        if isinstance(optimizer.base, ZeroRedundancyOptimizer):
            optimizer.consolidate_state_dict()
        groups = optimizer.state_dict()["param_groups"] if dist.get_rank() == 0 else []
        return [p.detach() for p in trainable(model)], [g["flatlora_step"] for g in groups]

    def zero(parameters: Any, lr: float) -> ZeroRedundancyOptimizer:
        return ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.AdamW, lr=lr)

    return {"zero": train(zero), "adamw": train(torch.optim.AdamW)}


def test_zero_redundancy_optimizer_as_base() -> None:
    for result in launch(with_zero_redundancy):
        assert equal(result["zero"][0], result["adamw"][0])
        assert result["zero"][1] == result["adamw"][1]
