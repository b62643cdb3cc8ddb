"""PyTorch-Ignite: supervised trainer with accumulation, evaluator, Checkpoint handler."""

from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver, global_step_from_engine
from torch.nn import functional as F

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


def loss_of(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    tokens, labels = batch
    return cross_entropy(model(tokens), labels)


def cross_entropy(output: Any, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(batch["input_ids"], batch["labels"]) for batch in token_batches(BATCHES)]


def run(folder: str, resume: str | None = None) -> tuple[list[float], list[torch.Tensor], Watch]:
    model = tiny_model()
    watch = Watch(model)
    optimizer = flat_optimizer(model)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        cross_entropy,
        gradient_accumulation_steps=2,
        output_transform=lambda x, y, output, loss: loss.item(),
    )
    evaluator = create_supervised_evaluator(model)
    losses: list[float] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output))
    # After three batches: in the middle of an accumulated step.
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), lambda: evaluator.run(data()[:1]))
    state = {"trainer": trainer, "model": model, "optimizer": optimizer}
    saver = DiskSaver(folder, require_empty=False)
    checkpoint = Checkpoint(
        state, saver, n_saved=None, global_step_transform=global_step_from_engine(trainer)
    )
    trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
    if resume is not None:
        Checkpoint.load_objects(state, torch.load(resume, weights_only=False))
    trainer.run(data(), max_epochs=EPOCHS)
    return losses, adapter(model), watch


def resumed_after_one_epoch(folder: str) -> tuple[list[float], list[torch.Tensor], bool]:
    losses, weights, watch = run(folder, f"{folder}/checkpoint_1.pt")
    return losses, weights, watch.is_clean()


def test_same_curve_as_by_hand_and_when_resumed(tmp_path: Path) -> None:
    losses, weights, watch = run(str(tmp_path))
    watch.assert_noise_only_in_training()
    assert watch.is_clean()

    model = tiny_model()
    windows = [data()[i : i + 2] for i in range(0, BATCHES, 2)] * EPOCHS
    by_hand = hand_written_loop(model, flat_optimizer(model, auto=False), windows, loss_of=loss_of, mean=True)
    assert [loss / 2 for loss in losses] == by_hand
    assert identical(weights, adapter(model))

    resumed, resumed_weights, clean = in_new_process(resumed_after_one_epoch, str(tmp_path))
    assert resumed == losses[BATCHES:]
    assert identical(resumed_weights, weights)
    assert clean
