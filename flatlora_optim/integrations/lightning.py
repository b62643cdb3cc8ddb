"""For Lightning: ``Trainer(callbacks=[FlatLoRACallback(sigma=0.05)])``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from ..optimizer import FlatLoRAOptimizer
from ..targets import find_targets
from .options import checked_options, metrics_of


class FlatLoRACallback(Callback):
    """Wraps the optimizers of ``configure_optimizers`` that hold adapters, and unwraps them when the fit has
    ended.

    Sigma and the noise norm are logged each ``log_every_n_steps`` of the trainer.

    Args:
        sigma, **options: As in :class:`.FlatLoRAOptimizer`.

    Raises:
        ValueError: When the fit starts, if no optimizer holds an adapter.
    """

    def __init__(self, *, sigma: float, **options: Any) -> None:
        self._options = checked_options(sigma=sigma, **options)
        self.optimizers: list[FlatLoRAOptimizer] = []
        """The optimizers in use."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # The optimizers exist, but no checkpoint is loaded into them yet.
        self._take_out(trainer)
        found = find_targets(pl_module).targets
        adapters = {id(parameter) for target in found for parameter in target.all_parameters()}
        optimizers = [
            FlatLoRAOptimizer.adopt(each, pl_module, **self._options)
            if any(id(p) in adapters for group in each.param_groups for p in group["params"])
            else each
            for each in trainer.strategy.optimizers
        ]
        trainer.strategy.optimizers = optimizers
        self.optimizers = [each for each in optimizers if isinstance(each, FlatLoRAOptimizer)]
        if not self.optimizers:
            raise ValueError("no optimizer of `configure_optimizers` holds parameters of a LoRA adapter")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # `max_steps` and `global_step` count the steps of all optimizers together, the estimate batches.
        each_has = len(trainer.strategy.optimizers)
        total = trainer.estimated_stepping_batches
        if trainer.max_steps > 0:
            total = min(total, max(1, trainer.max_steps // each_has))
        for optimizer in self.optimizers:
            if 0 < total < float("inf"):  # else the length is not known
                optimizer.total_steps = int(total)
            optimizer.step_count = trainer.global_step // each_has

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if optimizer in self.optimizers and (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            pl_module.log_dict(metrics_of(optimizer))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._take_out(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Not earlier: checkpoints are also written when training ends.
        self._take_out(trainer)

    def _take_out(self, trainer: Any) -> None:
        if self.optimizers:
            trainer.strategy.optimizers = [
                each.detach() if each in self.optimizers else each for each in trainer.strategy.optimizers
            ]
            self.optimizers = []
