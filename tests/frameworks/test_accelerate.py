"""Accelerate: prepare, accumulate, save_state and load_state, schedulers, fp16 with a scaler."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

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

BATCHES = 7  # the last window is a single batch


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate's settings are per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Loop:
    """The loop of Accelerate's documentation."""

    def __init__(self, folder: Path | str, **flat: Any) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, project_dir=folder)
        model = tiny_model().train()
        self.watch = Watch(model)
        self.flat = flat_optimizer(model, **flat)
        scheduler = torch.optim.lr_scheduler.LinearLR(self.flat, 1.0, 0.1, total_iters=4)
        rows = [
            {"input_ids": row, "labels": row} for batch in token_batches(BATCHES) for row in batch["labels"]
        ]
        loader = torch.utils.data.DataLoader(rows, batch_size=2)
        # prepare() comes after the optimizer was built on the bare model.
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, self.flat, loader, scheduler
        )
        self.losses: list[float] = []

    def train(self, batches: Any, save_at: int | None = None, folder: str | None = None) -> None:
        for i, batch in enumerate(batches):
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.losses.append(loss.item())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            if i % 3 == 0:
                self.evaluate(batch)
            if i == save_at:
                self.accelerator.save_state(folder)

    @torch.no_grad()
    def evaluate(self, batch: Any) -> None:
        self.model.eval()
        self.model(**batch)
        self.accelerator.get_state_dict(self.model)
        self.model.train()


def resume(folder: str) -> tuple[list[float], list[torch.Tensor], int, bool]:
    loop = Loop(folder)
    loop.accelerator.load_state(folder)
    loop.train(loop.accelerator.skip_first_batches(loop.loader, 4))
    return loop.losses, adapter(loop.model), loop.flat.step_count, loop.watch.is_clean()


def test_same_curve_as_by_hand_and_when_resumed(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.train(loop.loader, save_at=3, folder=str(tmp_path / "state"))
    loop.watch.assert_noise_only_in_training()
    assert loop.watch.is_clean()
    assert loop.flat.step_count == 4

    model = tiny_model()
    optimizer = flat_optimizer(model, auto=False)
    batches = token_batches(BATCHES)
    losses = hand_written_loop(
        model,
        optimizer,
        [batches[i : i + 2] for i in range(0, BATCHES, 2)],
        # Accelerate divides by the number of accumulated batches, also in a shorter last window.
        loss_of=lambda model, batch: model(**batch).loss / 2,
        scheduler=torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4),
        max_norm=1.0,
    )
    assert [loss / 2 for loss in loop.losses] == losses
    assert identical(adapter(loop.model), adapter(model))

    resumed, weights, steps, clean = in_new_process(resume, str(tmp_path / "state"))
    assert resumed == loop.losses[4:]
    assert identical(weights, adapter(loop.model))
    assert steps == 4
    assert clean


def test_length_of_the_run_may_be_set_after_prepare() -> None:
    accelerator = Accelerator(cpu=True)
    model = tiny_model().train()
    flat = flat_optimizer(model, schedule="cosine", total_steps="deferred")
    model, optimizer = accelerator.prepare(model, flat)
    batch = token_batches(1)[0]
    with pytest.raises(RuntimeError, match=r"optimizer\.total_steps"):
        model(**batch)
    flat.total_steps = 10
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    assert flat.step_count == 1


def test_fp16_scaler_skips_a_step_and_the_scheduler_with_it() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    if accelerator.scaler is None or not accelerator.scaler.is_enabled():
        # Accelerate makes its scaler for the accelerator; on a CPU, bring the CPU's.
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    model = tiny_model().train()
    watch = Watch(model)
    flat = flat_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(flat, 1.0, 0.1, total_iters=4)
    model, optimizer, scheduler = accelerator.prepare(model, flat, scheduler)
    skipped = []
    for i, batch in enumerate(token_batches(4)):
        loss = model(**batch).loss
        accelerator.backward(loss * (float("inf") if i == 1 else 1.0))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        skipped.append(optimizer.step_was_skipped)
    assert skipped == [False, True, False, False]
    assert flat.step_count == 3
    assert scheduler.get_last_lr() == pytest.approx([1e-2 * (1 - 0.9 * 3 / 4)])
    assert set(watch.uses) == {("train", True), ("backward", True)}
    assert watch.is_clean()
