"""Hugging Face Trainer, with `optimizers=(optimizer, scheduler)`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from common import (
    Recording,
    Watch,
    adapter,
    flat_optimizer,
    hand_written_loop,
    identical,
    in_new_process,
    loss_of_model,
    tiny_model,
    token_rows,
)
from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.integrations.transformers import FlatLoRACallback


class RecordingTrainer(Recording, Trainer):
    pass


class Inspector(TrainerCallback):
    """Looks at the weights wherever a user's callback could, and generates in mid-accumulation."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.seen: list[tuple[str, bool]] = []

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(("noise between substeps", not self.watch.is_clean()))
        model.eval()
        model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=2, do_sample=False)
        model.train()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(("clean after step", self.watch.is_clean()))

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(("clean when saved", self.watch.is_clean()))

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(("clean when logged", self.watch.is_clean()))

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(("clean when evaluated", self.watch.is_clean()))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **options,
    }
    return TrainingArguments(output_dir=str(folder), **options)


def build(folder: Path, **options: Any) -> tuple[RecordingTrainer, FlatLoRAOptimizer, Watch]:
    model = tiny_model()
    watch = Watch(model)
    optimizer = flat_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6)
    trainer = RecordingTrainer(
        model,
        arguments(folder, **options),
        train_dataset=token_rows(14),
        eval_dataset=token_rows(4),
        optimizers=(optimizer, scheduler),
    )
    return trainer, optimizer, watch


def smoothed_loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    batch = dict(batch)
    labels = batch.pop("labels")
    items = batch["num_items_in_batch"]
    return LabelSmoother(0.1)(model(**batch), labels, shift_labels=True, num_items_in_batch=items)


def resume(folder: str) -> tuple[list[float], list[torch.Tensor], bool]:
    trainer, _, watch = build(Path(folder), max_steps=6, gradient_checkpointing=True)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return trainer.losses, adapter(trainer.model), watch.is_clean()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_steps": 6, "gradient_checkpointing": True}, id="max_steps-checkpointing"),
        pytest.param(
            {"num_train_epochs": 2, "label_smoothing_factor": 0.1, "load_best_model_at_end": True},
            id="epochs-smoothing-best",
        ),
    ],
)
def test_same_curve_as_by_hand_and_when_resumed(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer, optimizer, watch = build(tmp_path, **options)
    trainer.add_callback(inspector := Inspector(watch))
    trainer.train()

    watch.assert_noise_only_in_training()
    assert {what for what, _ in inspector.seen} == {
        "noise between substeps",
        "clean after step",
        "clean when saved",
        "clean when logged",
        "clean when evaluated",
    }
    assert all(holds for _, holds in inspector.seen)
    assert watch.is_clean()
    assert not optimizer.is_perturbed

    # 14 examples in batches of 2 make windows of 2, 2, 2 and 1 batches in each epoch.
    windows = list(trainer.windows.values())
    assert [len(w) for w in windows] == ([2, 2, 2, 1] * 2)[: len(windows)]
    model = tiny_model()
    by_hand = flat_optimizer(model, auto=False)
    losses = hand_written_loop(
        model,
        by_hand,
        windows,
        loss_of=smoothed_loss if "label_smoothing_factor" in options else loss_of_model,
        scheduler=torch.optim.lr_scheduler.LinearLR(by_hand, 1.0, 0.1, total_iters=6),
        max_norm=1.0,
    )
    assert trainer.losses == losses
    assert optimizer.step_count == len(windows)
    if not options.get("load_best_model_at_end"):
        assert identical(adapter(trainer.model), adapter(model))

    if "max_steps" in options:
        resumed, weights, clean = in_new_process(resume, str(tmp_path))
        assert resumed == trainer.losses[4:]
        assert identical(weights, adapter(trainer.model))
        assert clean


def test_callback_takes_total_steps_from_the_trainer_and_logs(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = flat_optimizer(model, schedule="cosine", total_steps="deferred")
    received: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            received.append(dict(logs))

    trainer = Trainer(
        model,
        arguments(tmp_path, num_train_epochs=2, eval_strategy="no"),
        train_dataset=token_rows(12),
        optimizers=(optimizer, None),
        callbacks=[Reporter()],
    )
    trainer.callback_handler.callbacks.insert(0, FlatLoRACallback(optimizer))
    trainer.train()
    assert optimizer.total_steps == trainer.state.max_steps == 6
    logged = [entry for entry in received if "loss" in entry]
    sigmas = [0.1 * 0.5 * (1 - torch.cos(torch.tensor(torch.pi * t / 6)).item()) for t in range(6)]
    assert [entry["flatlora/sigma"] for entry in logged] == pytest.approx(sigmas, abs=1e-7)
    assert all(entry["flatlora/noise_norm"] > 0 for entry in logged[1:])
    assert [entry["flatlora/sigma"] for entry in trainer.state.log_history if "loss" in entry] == [
        entry["flatlora/sigma"] for entry in logged
    ]
