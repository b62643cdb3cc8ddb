"""Lightning's ``FlatLoRACallback``: it wraps what ``configure_optimizers`` returned."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from common import (
    Watch,
    adapter,
    flat_optimizer,
    hand_written_loop,
    identical,
    in_new_process,
    tiny_model,
    token_batches,
)
from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.integrations.lightning import FlatLoRACallback

BATCHES, EPOCHS = 6, 2
STEPS = EPOCHS * BATCHES // 2


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model()
        self.watch = Watch(self.model)
        self.losses: list[float] = []
        self.clean_when_saved: list[bool] = []

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("loss", self.model(**batch).loss)
        self.model.generate(batch["input_ids"][:1, :3], max_new_tokens=1, do_sample=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fresh = {f"model.{name}": value for name, value in tiny_model().state_dict().items()}
        saved = checkpoint["state_dict"]
        self.clean_when_saved.append(
            all(torch.equal(saved[name], value) for name, value in fresh.items() if "lora_" not in name)
        )


def fit(
    module: lightning.LightningModule,
    folder: Path | str,
    resume: str | None = None,
    processes: int = 1,
    **options: Any,
) -> lightning.Trainer:
    options = {"schedule": "cosine", "seed": 7, **options}
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy="auto" if processes == 1 else "ddp",
        devices=processes,
        use_distributed_sampler=False,  # its order is another one after a resume
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        val_check_interval=3,
        num_sanity_val_steps=0,
        log_every_n_steps=2,
        default_root_dir=folder,
        callbacks=[
            FlatLoRACallback(sigma=0.1, **options),
            ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1),
        ],
        logger=CSVLogger(folder, name="log"),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rank = dist.get_rank() if processes > 1 else 0
    data = [
        torch.utils.data.DataLoader(token_batches(n * processes)[rank::processes], batch_size=None)
        for n in (BATCHES, 1)
    ]
    trainer.fit(module, *data, ckpt_path=resume, weights_only=False)
    return trainer


def resumed_after_one_epoch(folder: str) -> tuple[list[float], list[Tensor], bool]:
    module = Module()
    fit(module, folder, resume=f"{folder}/step=3.ckpt")
    return module.losses, adapter(module.model), module.watch.is_clean()


def test_same_curve_as_by_hand_and_when_resumed(tmp_path: Path) -> None:
    module = Module()
    trainer = fit(module, tmp_path)
    assert set(module.watch.uses) == {
        ("train", False), ("backward", False), ("train", True), ("backward", True), ("observe", False)
    }  # fmt: skip
    assert module.watch.is_clean()
    assert len(module.clean_when_saved) >= STEPS
    assert all(module.clean_when_saved)

    model = tiny_model()
    optimizer = flat_optimizer(model, auto=False, schedule="cosine", total_steps=STEPS)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    batches = token_batches(BATCHES)
    windows = [batches[i : i + 2] for i in range(0, BATCHES, 2)] * EPOCHS
    losses = hand_written_loop(model, optimizer, windows, scheduler=scheduler, mean=True)
    assert [loss / 2 for loss in module.losses] == losses
    assert identical(adapter(module.model), adapter(model))

    (base,) = trainer.strategy.optimizers
    assert type(base) is torch.optim.AdamW
    assert not [key for group in base.param_groups for key in group if "flatlora" in key or key == "sigma"]
    assert not any(each._forward_pre_hooks for each in module.modules())
    logged = [line.split(",") for line in (tmp_path / "log/version_0/metrics.csv").read_text().splitlines()]
    column = logged[0].index("flatlora/noise_norm")
    assert len([line for line in logged[1:] if line[column]]) == STEPS // 2

    resumed, weights, clean = in_new_process(resumed_after_one_epoch, str(tmp_path))
    assert resumed == module.losses[BATCHES:]
    assert identical(weights, adapter(module.model))
    assert clean


def test_taken_out_after_an_exception(tmp_path: Path) -> None:
    class Fails(Module):
        def on_after_backward(self) -> None:
            raise ValueError("stop here")

    module = Fails()
    with pytest.raises(ValueError, match="stop here"):
        fit(module, tmp_path, schedule="constant")
    assert module.watch.is_clean()
    assert not any(each._forward_pre_hooks for each in module.modules())


class TwoOptimizers(Module):
    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()["optimizer"], torch.optim.SGD(self.head.parameters(), lr=0.1)

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        first, second = self.optimizers()
        self.kinds = [type(first.optimizer), type(second.optimizer)]
        loss = self.model(**batch).loss + self.head(torch.ones(1, 1)).sum()
        self.manual_backward(loss)
        first.step()
        second.step()
        first.zero_grad()
        second.zero_grad()


def test_wraps_the_optimizer_that_holds_the_adapters(tmp_path: Path) -> None:
    """Both step in each batch, so that Lightning counts twice as many steps."""
    module, callback = TwoOptimizers(), FlatLoRACallback(sigma=0.1, schedule="constant")
    totals = []
    module.on_train_batch_start = lambda *_: totals.append(callback.optimizers[0].total_steps)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(token_batches(3), batch_size=None))
    assert totals == [3, 3, 3]
    assert module.kinds == [FlatLoRAOptimizer, torch.optim.SGD]
    assert set(module.watch.uses) == {("train", True), ("backward", True)}
    assert module.watch.is_clean()
