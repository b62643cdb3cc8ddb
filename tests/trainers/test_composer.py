"""Composer's ``Trainer``."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("composer", reason="make test-trainers")
from composer import Trainer
from composer.models import ComposerModel

from common import Watch, adapter, hand_written_loop, identical, tiny_model, token_batches
from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.integrations.composer import FlatLoRACallback

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
    data = [torch.utils.data.DataLoader(rows(n), batch_size=2) for n in (BATCHES, 1)]
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

    by_hand = tiny_model()
    optimizer = FlatLoRAOptimizer(adamw(by_hand), by_hand, sigma=0.1, total_steps=STEPS, seed=7, auto=False)
    windows = [[batch] for batch in token_batches(BATCHES)] * EPOCHS
    losses = hand_written_loop(by_hand, optimizer, windows)
    assert model.losses == pytest.approx(losses, abs=1e-6, rel=0)

    _, watch, resumed = fit(tmp_path / "again", str(next(tmp_path.glob("ep1*"))))
    assert resumed.losses == model.losses[BATCHES:]
    assert identical(adapter(resumed.model), adapter(model.model))
    assert watch.is_clean()
