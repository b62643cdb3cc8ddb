"""Composer's ``Trainer``."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import without_cuda  # noqa: F401

pytest.importorskip("composer", reason="make test-trainers")
from composer import Trainer
from composer.models import ComposerModel
from composer.utils import dist as composer_dist

from common import (
    Averaging,
    Watch,
    adapter,
    flat_optimizer,
    hand_written_loop,
    identical,
    tiny_model,
    token_batches,
)
from flatlora_optim.integrations.composer import FlatLoRACallback
from launch import launch

BATCHES, EPOCHS = 4, 2
STEPS = BATCHES * EPOCHS


class Model(ComposerModel):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model()
        self.losses: list[float] = []

    def forward(self, batch: Any) -> Any:
        return self.model(**batch)

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        self.losses.append(outputs.loss.item())
        return outputs.loss

    def eval_forward(self, batch: Any, outputs: Any = None) -> Any:
        return self.model(**batch)

    def get_metrics(self, is_train: bool) -> dict[str, Any]:
        return {}

    def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None: ...


def adamw(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)


def rows(batches: int) -> list[dict[str, torch.Tensor]]:
    ids = [row for batch in token_batches(batches) for row in batch["input_ids"]]
    return [{"input_ids": row, "labels": row} for row in ids]


def fit(folder: Path, load: str | None = None) -> tuple[Any, Watch, Any]:
    model = Model()
    watch = Watch(model.model)
    data = []
    for batches in (BATCHES, 1):
        own = composer_dist.get_sampler(
            examples := rows(batches * composer_dist.get_world_size()), shuffle=False
        )
        data.append(torch.utils.data.DataLoader(examples, batch_size=2, sampler=own))
    trainer = Trainer(
        model=model,
        optimizers=adamw(model),
        train_dataloader=data[0],
        eval_dataloader=data[1],
        max_duration=f"{EPOCHS}ep",
        device="cpu",
        device_train_microbatch_size=2,
        callbacks=[FlatLoRACallback(sigma=0.1, seed=7)],
        save_folder=str(folder),
        save_interval="1ep",
        save_overwrite=True,
        load_path=load,
        progress_bar=False,
        seed=0,
    )
    trainer.fit()
    return trainer, watch, model


def test_same_losses_as_by_hand_and_when_resumed(tmp_path: Path) -> None:
    trainer, watch, model = fit(tmp_path)
    assert {("train", True), ("backward", True), ("observe", False)} <= set(watch.uses)
    assert ("observe", True) not in watch.uses
    assert watch.is_clean()
    (base,) = trainer.state.optimizers
    assert type(base) is torch.optim.AdamW
    assert not [key for group in base.param_groups for key in group if "flatlora" in key]

    assert model.losses == pytest.approx(by_hand(torch.optim.AdamW), abs=1e-6, rel=0)

    _, watch, resumed = fit(tmp_path / "again", str(next(tmp_path.glob("ep1*"))))
    assert resumed.losses == model.losses[BATCHES:]
    assert identical(adapter(resumed.model), adapter(model.model))
    assert watch.is_clean()


def by_hand(base: Any) -> list[float]:
    model, rank, world = (
        tiny_model(),
        composer_dist.get_global_rank(),
        composer_dist.get_world_size(),
    )
    optimizer = flat_optimizer(model, base=base, schedule="cosine", total_steps=STEPS, auto=False)
    ids = torch.cat([batch["input_ids"] for batch in token_batches(BATCHES * world)])[rank::world].split(2)
    windows = [[{"input_ids": batch, "labels": batch}] for batch in ids] * EPOCHS
    return hand_written_loop(model, optimizer, windows)


def two_processes(folder: str) -> tuple[list[float], list[float], list[float]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(zip(names, map(str, (rank, rank, 0, world, world)), strict=True))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # unused: the group is there already
    _, watch, model = fit(Path(folder))
    assert {("train", True), ("backward", True), ("observe", False)} <= set(watch.uses)
    assert ("observe", True) not in watch.uses
    assert watch.is_clean()
    _, watch, resumed = fit(Path(folder, "again"), str(next(Path(folder).glob("ep1*rank0*"))))
    assert watch.is_clean()
    return model.losses, resumed.losses, by_hand(Averaging)


def test_two_processes(tmp_path: Path) -> None:
    results = launch(two_processes, str(tmp_path), timeout=200)
    for losses, resumed, expected in results:
        assert losses == pytest.approx(expected, abs=1e-5, rel=0)
        assert resumed == losses[BATCHES:]
    assert results[0][0] != results[1][0]
