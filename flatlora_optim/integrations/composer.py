"""For Composer: ``Trainer(callbacks=[FlatLoRACallback(sigma=0.05)])``."""

from __future__ import annotations

from typing import Any

from composer.core import Callback, State, TimeUnit
from composer.loggers import Logger

from ..optimizer import FlatLoRAOptimizer
from .options import checked_options, metrics_of


class FlatLoRACallback(Callback):  # type: ignore[misc]
    """Wraps the trainer's optimizer, and unwraps it when the fit has ended.

    Args:
        sigma, **options: As in :class:`.FlatLoRAOptimizer`.
        log_interval: Batches between two logs of sigma and the noise norm.
    """

    def __init__(self, *, sigma: float, log_interval: int = 10, **options: Any) -> None:
        self._options = checked_options(sigma=sigma, **options)
        self._log_interval = log_interval
        self._watch: Any = None
        self._metrics: dict[str, float] | None = None
        self._wanted = False
        self.optimizer: FlatLoRAOptimizer | None = None
        """The optimizer in use, if any."""

    def before_load(self, state: State, logger: Logger) -> None:
        self._wrap(state)

    def fit_start(self, state: State, logger: Logger) -> None:
        optimizer = self.optimizer or self._wrap(state)
        if (total := _batches(state)) is not None:
            optimizer.total_steps = total
        optimizer.step_count = state.timestamp.batch.value

    def batch_start(self, state: State, logger: Logger) -> None:
        self._wanted = (state.timestamp.batch.value + 1) % self._log_interval == 0

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._metrics is not None:
            logger.log_metrics(self._metrics)
            self._metrics = None

    def fit_end(self, state: State, logger: Logger) -> None:
        self._take_out(state)

    def close(self, state: State, logger: Logger) -> None:
        self._take_out(state)

    def _wrap(self, state: State) -> FlatLoRAOptimizer:
        (base,) = state.optimizers
        self.optimizer = FlatLoRAOptimizer.adopt(base, state.model, **self._options)
        self._watch = self.optimizer.register_step_pre_hook(self._measure)
        state.optimizers = self.optimizer
        return self.optimizer

    def _measure(self, optimizer: FlatLoRAOptimizer, args: Any, kwargs: Any) -> None:
        if self._wanted:
            self._metrics, self._wanted = metrics_of(optimizer), False

    def _take_out(self, state: State) -> None:
        if self.optimizer is not None:
            self._watch.remove()
            state.optimizers = self.optimizer.detach()
            self.optimizer = None


def _batches(state: State) -> int | None:
    """The number of batches of the whole run. Each is one optimizer step."""
    duration = state.max_duration
    if duration is None or duration.unit not in (TimeUnit.BATCH, TimeUnit.EPOCH):
        return None
    if duration.unit == TimeUnit.BATCH:
        return int(duration.value)
    return None if state.dataloader_len is None else int(duration.value * state.dataloader_len.value)
