"""Tensor parallelism: column- and row-wise weights, DTensors cut along dim 0 and 1; alone and under FSDP2."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from helpers import flatlora, lora_convnet, lora_mlp, loss_of, mlp_batch
from launch import launch, refusal


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def parallelize(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    plan = {
        "fc1.base_layer": ColwiseParallel(),
        "fc1.lora_B.default": ColwiseParallel(),
        "fc2.base_layer": RowwiseParallel(),
        "fc2.lora_A.default": RowwiseParallel(),
    }
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {f"base_model.model.{k}": v for k, v in plan.items()})


def train(model: nn.Module) -> dict[str, Any]:
    optimizer = flatlora(model, base=torch.optim.AdamW, lr=1e-2)
    clean = [whole(t.weight.tensor) for t in optimizer.targets]
    losses, noisy = [], []
    for step in range(3):
        loss = loss_of(model, mlp_batch(step))
        noisy.append([whole(t.weight.tensor) for t in optimizer.targets])
        with torch.no_grad():
            losses.append(loss_of(model, mlp_batch(step)).item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(torch.equal(whole(t.weight.tensor), w) for t, w in zip(optimizer.targets, clean, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(noisy[0], clean, strict=True))
    return {"losses": losses, "noisy": noisy}


def train_in_parallel() -> dict[str, Any]:
    model = parallelize(lora_mlp())
    placements = [t.weight.tensor.placements for t in flatlora(model, auto=False).targets]
    assert placements == [(Shard(0),), (Shard(1),)]
    return train(model)


def test_same_noise_and_curve_as_the_whole_model() -> None:
    expected = train(lora_mlp())
    for actual in launch(train_in_parallel):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-7)


def train_in_both() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return train(fully_shard(parallelize(lora_mlp(), mesh["tensor"]), mesh=mesh["data"]))


def test_fsdp2_on_top() -> None:
    expected = train(lora_mlp())
    for actual in launch(train_in_both, world=4):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-7)


def cut_kernels() -> str:
    model = lora_convnet()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    conv = model.get_submodule("base_model.model.conv1.base_layer")
    conv.weight = nn.Parameter(distribute_tensor(conv.weight.data, mesh, [Shard(2)]), requires_grad=False)
    return refusal(lambda: flatlora(model))


def virtual() -> str:
    return refusal(lambda: flatlora(parallelize(lora_mlp()), mode="virtual", noise="gaussian"))


def test_what_is_refused() -> None:
    assert "only weights that are sharded along dim 0 or 1" in launch(cut_kernels)[0]
    assert "sharded weights can only be perturbed in place" in launch(virtual)[0]
