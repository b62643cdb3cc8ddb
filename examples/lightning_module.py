"""Flat-LoRA in Lightning: return the optimizer from `configure_optimizers`.

python examples/lightning_module.py [--steps 200] [--sigma 0.05]
"""

from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import tiny
from flatlora_optim import FlatLoRAOptimizer


class Module(lightning.LightningModule):
    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.model = tiny.model()
        self.sigma = sigma

    def configure_optimizers(self) -> dict[str, Any]:
        base = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=5e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        self.optimizer = FlatLoRAOptimizer(base, self.model, sigma=self.sigma, total_steps=steps, seed=42)
        scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, total_iters=steps)
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        self.log("sigma", self.optimizer.sigma, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("validation_loss", self.model(**batch).loss)


def main(steps: int, sigma: float) -> None:
    trainer = lightning.Trainer(
        accelerator="auto",
        max_steps=steps,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    module = Module(sigma)
    held_out = DataLoader(tiny.Counting(256, seed=1), batch_size=256)
    trainer.fit(module, DataLoader(tiny.Counting(2048), batch_size=16, shuffle=True), held_out)
    (metrics,) = trainer.validate(module, held_out, verbose=False)
    print(f"Result: loss {metrics['validation_loss']:.3f} on held-out sequences")


if __name__ == "__main__":
    main(**tiny.options(__doc__))
