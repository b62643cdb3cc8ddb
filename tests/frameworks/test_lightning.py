"""Lightning: automatic optimization (a closure), manual optimization, accumulation, resuming."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

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

BATCHES, EPOCHS = 6, 2
STEPS = EPOCHS * BATCHES // 2


class Module(lightning.LightningModule):
    def __init__(self, **flat: Any) -> None:
        super().__init__()
        self.model = tiny_model()
        self.flat = flat
        self.watch = Watch(self.model)
        self.losses: list[float] = []
        self.clean_when_saved: list[bool] = []

    def configure_optimizers(self) -> dict[str, Any]:
        self.optimizer = flat_optimizer(self.model, **self.flat)
        scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, total_iters=STEPS)
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("loss", self.model(**batch).loss)
        self.model.generate(batch["input_ids"][:1, :3], max_new_tokens=1, do_sample=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()}
        fresh = tiny_model().state_dict()
        self.clean_when_saved.append(
            all(torch.equal(weights[k], v) for k, v in fresh.items() if "lora_" not in k)
        )


class Manual(Module):
    """Accumulates two batches by hand."""

    automatic_optimization = False
    style = "automatic"

    def on_validation_model_zero_grad(self) -> None:
        """Lightning can't know that a window is open, and would drop its gradients."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        optimizer = self.optimizers()
        if self.style == "explicit":
            with optimizer.perturbed():
                loss = super().training_step(batch, index)
                self.manual_backward(loss / 2)
            assert not optimizer.is_perturbed
        else:
            loss = super().training_step(batch, index)
            self.manual_backward(loss / 2)
            assert optimizer.is_perturbed
        if index % 2:
            optimizer.step()
            self.lr_schedulers().step()
            optimizer.zero_grad()
        return loss


class ManualExplicit(Manual):
    style = "explicit"


def fit(module: Module, folder: Path | str, resume: str | None = None) -> None:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        accumulate_grad_batches=2 if module.automatic_optimization else 1,
        val_check_interval=3,  # batches: it falls into the middle of an accumulated step
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = [torch.utils.data.DataLoader(token_batches(n), batch_size=None) for n in (BATCHES, 1)]
    trainer.fit(module, *data, ckpt_path=resume, weights_only=False)


def by_hand() -> tuple[list[float], list[Tensor]]:
    model = tiny_model()
    optimizer = flat_optimizer(model, auto=False)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    batches = token_batches(BATCHES)
    windows = [batches[i : i + 2] for i in range(0, BATCHES, 2)] * EPOCHS
    losses = hand_written_loop(model, optimizer, windows, scheduler=scheduler, mean=True)
    return losses, adapter(model)


@pytest.mark.parametrize("module_class", [Module, Manual, ManualExplicit])
def test_same_curve_as_by_hand_and_noise_in_training_only(module_class: type[Module], tmp_path: Path) -> None:
    module = module_class()
    fit(module, tmp_path)
    module.watch.assert_noise_only_in_training()
    assert module.watch.is_clean()
    assert module.clean_when_saved
    assert all(module.clean_when_saved)
    assert module.optimizer.step_count == STEPS
    losses, weights = by_hand()
    assert [loss / 2 for loss in module.losses] == losses
    assert identical(adapter(module.model), weights)


def resumed_after_one_epoch(folder: str) -> tuple[list[float], list[Tensor], int, bool]:
    module = Module()
    fit(module, folder, resume=f"{folder}/step=3.ckpt")
    return module.losses, adapter(module.model), module.optimizer.step_count, module.watch.is_clean()


def test_resumes_in_a_new_process(tmp_path: Path) -> None:
    fit(Module(), tmp_path)
    losses, weights, steps, clean = in_new_process(resumed_after_one_epoch, str(tmp_path))
    expected, expected_weights = by_hand()
    assert [loss / 2 for loss in losses] == expected[BATCHES:]
    assert identical(weights, expected_weights)
    assert steps == STEPS
    assert clean
