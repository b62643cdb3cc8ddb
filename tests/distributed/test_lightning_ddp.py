"""Lightning's DDP strategy on two processes, and its callback."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from common import Averaging, adapter, flat_optimizer, hand_written_loop, identical, tiny_model, token_batches
from launch import launch
from test_lightning_callback import BATCHES, EPOCHS, STEPS, Module, fit


def worker(folder: str) -> tuple[list[float], list[float], list[float]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # unused: the group is there already
    os.environ.update(address, LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world))
    module = Module()
    fit(module, folder, processes=world)
    assert {("train", True), ("backward", True), ("observe", False)} <= set(module.watch.uses)
    assert ("observe", True) not in module.watch.uses
    assert module.watch.is_clean()

    resumed = Module()
    fit(resumed, folder, resume=f"{folder}/step=3.ckpt", processes=world)
    assert identical(adapter(resumed.model), adapter(module.model))
    assert resumed.watch.is_clean()

    model = tiny_model()
    optimizer = flat_optimizer(model, base=Averaging, auto=False, schedule="cosine", total_steps=STEPS)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    batches = token_batches(BATCHES * world)[rank::world]
    windows = [batches[i : i + 2] for i in range(0, BATCHES, 2)] * EPOCHS
    by_hand = hand_written_loop(model, optimizer, windows, scheduler=scheduler, mean=True)
    return module.losses, resumed.losses, [2 * loss for loss in by_hand]


def test_same_losses_as_by_hand_and_when_resumed(tmp_path: object) -> None:
    results = launch(worker, str(tmp_path), timeout=200)
    for losses, resumed, by_hand in results:
        assert all(abs(a - b) < 1e-5 for a, b in zip(losses, by_hand, strict=True))
        assert resumed == losses[BATCHES:]
    assert results[0][0] != results[1][0]  # each has its share of the data, and noise of its own
