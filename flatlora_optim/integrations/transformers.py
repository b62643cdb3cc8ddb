"""For Hugging Face ``Trainer`` and those built on it (TRL)."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optimizer import FlatLoRAOptimizer


class FlatLoRACallback(TrainerCallback):  # type: ignore[misc]
    """Takes ``total_steps`` from the trainer and logs sigma and the noise norm::

        optimizer = FlatLoRAOptimizer(base, model, sigma=0.05, total_steps="deferred")
        trainer = Trainer(
            model, args, ..., optimizers=(optimizer, None), callbacks=[FlatLoRACallback(optimizer)]
        )

    The console and ``trainer.state.log_history`` get the values then. Trainer calls the reporters
    of ``report_to`` (W&B, TensorBoard) before the callbacks it is given; for them, put this one first
    instead of passing it::

        trainer.callback_handler.callbacks.insert(0, FlatLoRACallback(optimizer))
    """

    def __init__(self, optimizer: FlatLoRAOptimizer) -> None:
        self._optimizer = optimizer
        self._metrics: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._optimizer.total_steps = state.max_steps

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The last moment at which this step's noise is known.
        values = self._optimizer.metrics()
        self._metrics = {f"flatlora/{name}": values[name] for name in ("sigma", "noise_norm")}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            logs.update(self._metrics)
            state.log_history[-1].update(self._metrics)
