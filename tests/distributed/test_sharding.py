"""The parts of factors that each process gets, and what it costs to get those of many weights."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from counting import counted
from flatlora_optim.kernels import has_triton
from flatlora_optim.targets.sharding import cuts, parts_at_once
from helpers import flatlora, with_lora
from launch import launch

PLACES = list(product([Replicate(), Shard(0), Shard(1)], repeat=2))
ROWS, COLUMNS = 5, 7  # over 4 processes, some parts are smaller than others, and some are empty


def parts_of_all_placements() -> None:
    """All ways to place a weight, its two factors, and both at once."""
    mesh = init_device_mesh("cpu", (2, 2))
    weight, left, right = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, 3), torch.randn(3, COLUMNS)
    wanted, expected = [], []
    for of_weight in PLACES:
        placed = distribute_tensor(weight, mesh, of_weight)
        sizes, first = compute_local_shape_and_global_offset(weight.shape, mesh, of_weight)
        rows, columns = (slice(start, start + size) for start, size in zip(first, sizes, strict=True))
        cut = cuts(placed)
        for of_factor in [None, *PLACES]:
            for factor, dim, part in ((left, 0, left[rows]), (right, 1, right[:, columns])):
                sharded = factor if of_factor is None else distribute_tensor(factor, mesh, of_factor)
                wanted.append((sharded, dim, cut[dim]))
                expected.append(part)
                wanted.append((sharded.T, 1 - dim, cut[dim]))
                expected.append(part.T)
    parts = parts_at_once(wanted)
    assert len(parts) == 4 * len(PLACES) * (1 + len(PLACES))
    assert all(map(torch.equal, parts, expected))


def test_each_process_gets_its_part_whatever_the_placements() -> None:
    launch(parts_of_all_placements, world=4)


STYLES = [(ColwiseParallel, "lora_B"), (RowwiseParallel, "lora_A")]


def adapted(engine: str, layers: int) -> nn.Module:
    """So many layers, and LoRA of a rank that 2 processes can't share out evenly."""
    torch.manual_seed(0)
    names = [str(i) for i in range(layers)]
    model = with_lora(nn.Sequential(*[nn.Linear(6, 6) for _ in names]), names, r=3)
    if engine == "one process":
        return model
    if engine == "fsdp2":
        for layer in model.base_model.model:
            fully_shard(layer)
        return fully_shard(model)
    plan = {}
    for i, name in enumerate(names):
        style, factor = STYLES[i % 2]
        for part in ("base_layer", f"{factor}.default"):
            plan[f"base_model.model.{name}.{part}"] = style()
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def work(engine: str, noise: str, layers: int) -> list[list[str]]:
    """What perturb and restore do, with all tables to be made anew."""
    optimizer = flatlora(adapted(engine, layers), noise=noise)
    optimizer.perturb()
    optimizer.step()
    if has_triton(torch.device("cpu")):
        from flatlora_optim.kernels import triton

        triton._norm_tables.cache_clear()  # gathered factors may lie elsewhere in each step, or not
    with counted(pytest.MonkeyPatch()) as perturbing:
        optimizer.perturb()
    with counted(pytest.MonkeyPatch()) as restoring:
        optimizer.restore()
    return [perturbing.operations, restoring.operations]


KINDS = [("fsdp2", "gaussian"), ("fsdp2", "low_rank"), ("tensor parallel", "low_rank")]


def work_of_all_kinds() -> Any:
    kinds = [*KINDS, ("one process", "gaussian"), ("one process", "low_rank")]
    return {kind: [work(*kind, layers) for layers in (2, 4)] for kind in kinds}


def test_sharding_adds_no_work_or_collectives_for_each_weight() -> None:
    for found in launch(work_of_all_kinds):
        growth = {
            kind: [len(more) - len(less) for less, more in zip(few, many, strict=True)]
            for kind, (few, many) in found.items()
        }
        for engine, noise in KINDS:
            perturb, restore = growth["one process", noise]
            is_native = noise == "gaussian" and not has_triton(torch.device("cpu"))
            assert growth[engine, noise] == [perturb + 2 * is_native, restore]  # a view of its scales
            for perturbing, restoring in found[engine, noise]:
                # A is gathered, B is there already; tensor parallelism has both where they are needed.
                assert len([name for name in perturbing if "gather" in name]) == (engine == "fsdp2")
                assert len([name for name in perturbing if "reduce" in name]) == 1
                assert not any("::" in name for name in restoring)
