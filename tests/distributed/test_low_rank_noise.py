"""Low-rank noise on weights of which each process holds a part: the same training as in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam

from helpers import changed_weights, fingerprint, flatlora, lora_mlp, loss_of, mlp_batch, trainable
from launch import launch
from test_fsdp2 import MODELS, evaluating, output, shard
from test_tensor_parallel import parallelize

Batches = Callable[[int], Callable[[nn.Module], Tensor]]


def train(model: nn.Module, batches: Batches, sigma: float = 0.1, **options: Any) -> dict[str, list[float]]:
    """Each step with an evaluation between forward and backward."""
    optimizer = flatlora(model, base=Adam, lr=1e-2, sigma=sigma, noise="low_rank", **options)
    assert {p.mode for p in optimizer._weights.perturbations} == {"virtual, low rank"}
    record: dict[str, list[float]] = {"loss": [], "evaluation": [], "noise norm": []}
    for step in range(3):
        loss_fn = batches(step)
        loss = loss_fn(model)
        record["noise norm"].append(optimizer.metrics()["noise_norm"])
        with evaluating(model):
            record["evaluation"].append(loss_fn(model).item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        record["loss"].append(loss.item())
    return record


def of(name: str) -> Batches:
    def batches(step: int) -> Callable[[nn.Module], Tensor]:
        x = MODELS[name][1](torch.Generator().manual_seed(step))
        return lambda model: output(model, x).pow(2).mean()

    return batches


def of_mlp(step: int) -> Callable[[nn.Module], Tensor]:
    return lambda model: loss_of(model, mlp_batch(step))


def sharded(reshard_after_forward: bool) -> dict[str, Any]:
    return {
        name: train(shard(build(), reshard_after_forward=reshard_after_forward), of(name))
        for name, (build, _) in MODELS.items()
    }


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_fsdp2(reshard_after_forward: bool) -> None:
    expected = {name: train(build(), of(name)) for name, (build, _) in MODELS.items()}
    assert expected["linear"] != train(lora_mlp(), of("linear"), sigma=0.2)
    for actual in launch(sharded, reshard_after_forward):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def in_parallel() -> dict[str, Any]:
    return train(parallelize(lora_mlp()), of_mlp)


def test_tensor_parallel() -> None:
    expected = train(lora_mlp(), of_mlp)
    for actual in launch(in_parallel):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def replicated(rank_noise: str) -> tuple[list[float], list[Tensor]]:
    model = DistributedDataParallel(lora_mlp())
    losses = train(model, of_mlp, rank_noise=rank_noise)["loss"]
    assert dist.get_world_size() == 2
    return losses, [p.detach() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("rank_noise", ["independent", "shared"])
def test_ddp(rank_noise: str) -> None:
    (losses, adapters), (losses_2, adapters_2) = launch(replicated, rank_noise)
    assert all(map(torch.equal, adapters, adapters_2))
    assert (losses == losses_2) == (rank_noise == "shared")
    if rank_noise == "shared":
        assert losses == pytest.approx(train(lora_mlp(), of_mlp)["loss"], rel=1e-5)


def on_shared_weights(model: nn.Module) -> list[float]:
    for adapter in trainable(model):
        adapter.data = adapter.data.clone()
    before = fingerprint(model)

    def batches(step: int) -> Callable[[nn.Module], Tensor]:
        def loss_fn(model: nn.Module) -> Tensor:
            loss = loss_of(model, mlp_batch(step))
            assert not changed_weights(model, before)
            return loss

        return loss_fn

    return train(model, batches, seed=dist.get_rank(), rank_noise="shared")["loss"]


def test_processes_that_share_the_weights_train_as_each_would_alone() -> None:
    model = lora_mlp().share_memory()
    before = fingerprint(model)
    together = launch(on_shared_weights, model)
    assert not changed_weights(model, before)
    assert together == [train(lora_mlp(), of_mlp, seed=seed)["loss"] for seed in range(2)]
    assert together[0] != together[1]
