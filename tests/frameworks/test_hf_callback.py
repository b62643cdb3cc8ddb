"""`FlatLoRACallback(sigma=...)` in Hugging Face Trainer, which builds and keeps its own optimizer."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from torchao.optim import AdamW4bit
from transformers import Trainer, TrainerCallback, TrainingArguments, get_linear_schedule_with_warmup

from common import (
    Recording,
    Watch,
    adapter,
    hand_written_loop,
    identical,
    in_new_process,
    tiny_model,
    token_rows,
)
from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.integrations.transformers import FlatLoRACallback, attach

STEPS = 6


class RecordingTrainer(Recording, Trainer):
    pass


class Reporter(TrainerCallback):
    """As TensorBoard and others: it sees the logs as they are when its turn comes."""

    def __init__(self) -> None:
        self.received: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.received.append(dict(logs))


class Schedule(TrainerCallback):
    """Notes sigma and the learning rate of each step."""

    def __init__(self, callback: FlatLoRACallback) -> None:
        self.callback = callback
        self.seen: list[tuple[int, float, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self.callback.optimizer
        assert optimizer is not None
        self.seen.append((state.global_step, optimizer.sigma, optimizer.param_groups[0]["lr"]))


def arguments(folder: Path | str, **options: Any) -> TrainingArguments:
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        **options,
    }
    return TrainingArguments(output_dir=str(folder), **options)


def build(
    folder: Path | str,
    callbacks: list[Any],
    kind: type[Trainer] = RecordingTrainer,
    rank: int = 4,
    **options: Any,
) -> tuple[Any, Watch]:
    model = tiny_model(rank=rank)
    watch = Watch(model)
    trainer = kind(
        model,
        arguments(folder, **options),
        train_dataset=token_rows(14),
        eval_dataset=token_rows(4),
        callbacks=callbacks,
    )
    return trainer, watch


def cosine(step: int, total: int = STEPS) -> float:
    return 0.05 * (1 - math.cos(math.pi * step / total))


def assert_gone(trainer: Trainer) -> None:
    """Nothing of Flat-LoRA is left in the trainer's optimizer and model."""
    optimizer: Any = trainer.optimizer
    assert not isinstance(optimizer.optimizer, FlatLoRAOptimizer)
    assert not [
        key for group in optimizer.param_groups for key in group if "flatlora" in key or key == "sigma"
    ]
    for module in trainer.model.modules():
        assert not module._forward_pre_hooks
        assert not module._state_dict_hooks


def by_hand(windows: Any) -> tuple[list[float], Any]:
    model = tiny_model()
    base = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1)
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, total_steps=STEPS, seed=42, auto=False)
    losses = hand_written_loop(
        model,
        optimizer,
        windows,
        scheduler=get_linear_schedule_with_warmup(optimizer, 0, STEPS),
        max_norm=1.0,
    )
    return losses, adapter(model)


def resume(folder: str) -> tuple[list[float], list[torch.Tensor], bool]:
    trainer, watch = build(folder, [FlatLoRACallback(sigma=0.1)], save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return trainer.losses, adapter(trainer.model), watch.is_clean()


def test_same_curve_as_by_hand_and_when_resumed(tmp_path: Path) -> None:
    evaluating = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer, watch = build(tmp_path, [FlatLoRACallback(sigma=0.1)], **evaluating)
    trainer.train()
    # The first step of the cosine has no noise.
    assert set(watch.uses) == {
        ("train", False), ("backward", False), ("train", True), ("backward", True), ("observe", False)
    }  # fmt: skip
    assert watch.is_clean()
    assert_gone(trainer)
    losses, weights = by_hand(trainer.windows.values())
    assert trainer.losses == losses
    assert identical(adapter(trainer.model), weights)

    resumed, weights, clean = in_new_process(resume, str(tmp_path))
    assert resumed == trainer.losses[4:]
    assert identical(weights, adapter(trainer.model))
    assert clean


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit", "paged_lion_8bit", "adafactor", "sgd"])
def test_wraps_whatever_the_trainer_builds(tmp_path: Path, optim: str) -> None:
    trainer, watch = build(tmp_path, [FlatLoRACallback(sigma=0.1, schedule="constant")], optim=optim)
    trainer.train()
    assert set(watch.uses) == {("train", True), ("backward", True)}
    assert watch.is_clean()
    assert_gone(trainer)


def schedule_free(parameters: Any) -> Any:
    optimizer = schedulefree.AdamWScheduleFree(parameters, lr=1e-2, weight_decay=0.1)
    optimizer.train()
    return optimizer


def four_bit(parameters: Any) -> Any:
    return AdamW4bit(parameters, lr=1e-2, weight_decay=0.1, block_size=256)


class Evaluates:
    """What the trainer's evaluation every two steps does to a schedule-free optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.steps = optimizer, 0

    def step(self) -> None:
        self.steps += 1
        if self.steps % 2 == 0:
            self.optimizer.eval()
        if self.steps < STEPS:
            self.optimizer.train()


@pytest.mark.parametrize("optim", ["schedule_free_adamw", "adamw_torch_4bit"])
def test_optimizers_with_a_life_of_their_own(optim: str, tmp_path: Path) -> None:
    """One averages the weights it steps, and is switched at each evaluation; one has subclasses of tensors as
    its state, and a tensor as its learning rate."""
    free = optim == "schedule_free_adamw"
    rank = 4 if free else 64  # smaller adapters have no state in 4 bits
    options = {
        "optim": optim,
        "lr_scheduler_type": "constant" if free else "linear",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step
        trainer, watch = build(tmp_path, [FlatLoRACallback(sigma=0.1)], rank=rank, **options)
        trainer.train()
        resumed, clean = build(tmp_path, [FlatLoRACallback(sigma=0.1)], rank=rank, **options)
        resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")

        model = tiny_model(rank=rank)
        base = (schedule_free if free else four_bit)(p for p in model.parameters() if p.requires_grad)
        optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, total_steps=STEPS, seed=42, auto=False)
        scheduler = Evaluates(optimizer) if free else get_linear_schedule_with_warmup(optimizer, 0, STEPS)
        windows = trainer.windows.values()
        losses = hand_written_loop(model, optimizer, windows, scheduler=scheduler, max_norm=1.0)
    assert {("train", True), ("backward", True), ("observe", False)} <= set(watch.uses)
    assert ("observe", True) not in watch.uses
    assert watch.is_clean()
    assert_gone(trainer)
    if not free:
        assert any("4bit" in type(v).__name__ for s in base.state.values() for v in s.values())
    assert trainer.losses == losses
    assert identical(adapter(trainer.model), adapter(model))
    assert resumed.losses == losses[4:]
    assert identical(adapter(resumed.model), adapter(model))
    assert clean.is_clean()


@pytest.mark.parametrize("how", ["callbacks=", "add_callback", "attach", "optimizer, then add_callback"])
def test_logs_sigma_and_norm_to_reporters_and_history_at_logging_steps(tmp_path: Path, how: str) -> None:
    reporter, callback = Reporter(), FlatLoRACallback(sigma=0.1)
    measured = []
    if how.startswith("optimizer"):
        model = tiny_model()
        base = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, total_steps="deferred")
        callback = FlatLoRACallback(optimizer)
        trainer = Trainer(
            model,
            arguments(tmp_path, logging_steps=2),
            train_dataset=token_rows(14),
            optimizers=(optimizer, None),
            callbacks=[reporter],
        )
    else:
        given = [reporter, callback] if how == "callbacks=" else [reporter]
        trainer, _ = build(tmp_path, given, Trainer, logging_steps=2)
    if how == "attach":
        callback = attach(trainer, sigma=0.1)
    elif how != "callbacks=":
        trainer.add_callback(callback)
    metrics = FlatLoRAOptimizer.metrics
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlatLoRAOptimizer, "metrics", lambda self: measured.append(0) or metrics(self))
        trainer.train()
    assert "FlatLoRACallback: FlatLoRAOptimizer(\n  perturbed:" in repr(callback)
    assert "step 6 of 6" in repr(callback)
    logged = [entry for entry in reporter.received if "loss" in entry]
    assert [entry["flatlora/sigma"] for entry in logged] == pytest.approx([cosine(1), cosine(3), cosine(5)])
    assert all(entry["flatlora/noise_norm"] > 0 for entry in logged)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["flatlora/noise_norm"] for entry in history] == [
        entry["flatlora/noise_norm"] for entry in logged
    ]
    assert len(measured) == 3


@pytest.mark.parametrize("own", [False, True], ids=["sigma", "optimizer"])
def test_starts_over_with_the_trainer(tmp_path: Path, own: bool) -> None:
    """A second train(), auto_find_batch_size after an OOM, and a resume without optimizer state."""

    class OutOfMemory(Trainer):
        batches = 0

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            self.batches += 1
            if self.batches == 3:  # in the middle of a window
                raise RuntimeError("CUDA out of memory.")
            return loss

    def run(kind: type[Trainer], folder: Path, **options: Any) -> tuple[Trainer, Schedule, Watch]:
        if own:
            model = tiny_model()
            watch = Watch(model)
            base = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
            optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, total_steps="deferred")
            callback = FlatLoRACallback(optimizer)
            trainer = kind(
                model,
                arguments(folder, **options),
                train_dataset=token_rows(14),
                optimizers=(optimizer, None),
                callbacks=[callback],
            )
        else:
            callback = FlatLoRACallback(sigma=0.1)
            trainer, watch = build(folder, [callback], kind, **options)
        trainer.add_callback(schedule := Schedule(callback))
        return trainer, schedule, watch

    once = [pytest.approx((i, cosine(i), 1e-2 * (1 - i / STEPS))) for i in range(STEPS)]
    trainer, schedule, watch = run(Trainer, tmp_path / "twice")
    trainer.train()
    trainer.train()
    assert schedule.seen == once * 2
    assert watch.is_clean()

    trainer, schedule, watch = run(OutOfMemory, tmp_path / "oom", auto_find_batch_size=True)
    trainer.train()
    assert schedule.seen[1:] == once
    assert watch.is_clean()

    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    trainer, schedule, _ = run(Trainer, tmp_path / "saved", **saving)
    trainer.train()
    trainer, schedule, _ = run(Trainer, tmp_path / "saved")
    trainer.train(resume_from_checkpoint=f"{tmp_path}/saved/checkpoint-2")
    assert [row[:2] for row in schedule.seen] == [pytest.approx((i, cosine(i))) for i in range(2, STEPS)]


def test_each_new_model_of_the_trainer_is_wrapped(tmp_path: Path) -> None:
    """As in ``hyperparameter_search``, which builds model and optimizer anew for each trial."""
    watches = []

    def model_init() -> torch.nn.Module:
        model = tiny_model()
        watches.append(Watch(model))
        return model

    callback = FlatLoRACallback(sigma=0.1, schedule="constant")
    trainer = Trainer(
        args=arguments(tmp_path), model_init=model_init, train_dataset=token_rows(14), callbacks=[callback]
    )
    trainer.train()
    trainer.train()
    used = [watch for watch in watches if watch.uses]
    assert len(used) == 2
    assert all(set(watch.uses) == {("train", True), ("backward", True)} for watch in used)
    assert all(watch.is_clean() for watch in watches)


def test_hyperparameter_search(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    watches: dict[int, Watch] = {}
    models: list[torch.nn.Module] = []
    seen: dict[int, list[tuple[float, float]]] = {}
    callback = FlatLoRACallback(sigma=0.1)

    def model_init(trial: Any) -> torch.nn.Module:
        model = tiny_model()
        if trial is not None:
            watches[trial.number] = Watch(model)
            models.append(model)
        return model

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = callback.optimizer
            assert optimizer is not None
            mine = {id(p) for p in models[-1].parameters()}
            assert all(id(p) in mine for group in optimizer.param_groups for p in group["params"])
            row = optimizer.sigma, optimizer.param_groups[0]["lr"]
            seen.setdefault(len(models) - 1, []).append(row)

    class PrunesOne(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return trial.number == 1

    trainer = Trainer(
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=4),
        model_init=model_init,
        train_dataset=token_rows(14),
        eval_dataset=token_rows(4),
        callbacks=[callback, Look()],
    )
    rates = [1e-2, 5e-3, 2e-3]
    trainer.hyperparameter_search(
        backend="optuna",
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        sampler=optuna.samplers.GridSampler({"learning_rate": rates}, seed=0),
        pruner=PrunesOne(),
        n_trials=3,
        direction="minimize",
    )
    assert [len(seen[trial]) for trial in range(3)] == [STEPS, 4, STEPS]
    for rows in seen.values():
        lr = rows[0][1]
        expected = [(cosine(step), lr * (1 - step / STEPS)) for step in range(len(rows))]
        assert rows == [pytest.approx(row) for row in expected]
    assert {rows[0][1] for rows in seen.values()} == set(rates)
    for watch, model in zip(watches.values(), models, strict=True):
        assert {("train", True), ("backward", True), ("observe", False)} <= set(watch.uses)
        assert ("observe", True) not in watch.uses
        assert watch.is_clean()
        assert not any(module._forward_pre_hooks for module in model.modules())
    assert callback.optimizer is None


def test_stopped_in_the_middle_of_a_window(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == 2:
                control.should_training_stop = control.should_epoch_stop = True
            return control

    trainer, watch = build(tmp_path, [FlatLoRACallback(sigma=0.1), Stop()])
    trainer.train()
    assert trainer.state.global_step == 2
    assert watch.is_clean()
    assert_gone(trainer)


def test_a_checkpoint_is_resumed_without_it_and_it_joins_one_without(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    build(tmp_path / "with", [FlatLoRACallback(sigma=0.1)], **saving)[0].train()
    build(tmp_path / "without", [], **saving)[0].train()
    trainer, watch = build(tmp_path / "with", [], **saving)
    trainer.train(resume_from_checkpoint=True)
    assert not any(noisy for _, noisy in watch.uses)
    callback = FlatLoRACallback(sigma=0.1)
    trainer, watch = build(tmp_path, [callback, schedule := Schedule(callback)])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*checkpoint.*")
        trainer.train(resume_from_checkpoint=f"{tmp_path}/without/checkpoint-3")
    assert [row[:2] for row in schedule.seen] == [pytest.approx((i, cosine(i))) for i in range(3, STEPS)]


def test_warns_of_an_optimizer_that_the_trainer_does_not_use(tmp_path: Path) -> None:
    model = tiny_model()
    base = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, total_steps="deferred")
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=token_rows(4), callbacks=[FlatLoRACallback(optimizer)]
    )
    with pytest.raises(RuntimeError, match=r"has dropped the FlatLoRAOptimizer.*AdamW"):
        trainer.train()
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=token_rows(4),
        optimizers=(optimizer, None),
        callbacks=[FlatLoRACallback(sigma=0.1)],
    )
    with pytest.raises(RuntimeError, match="another FlatLoRAOptimizer"):
        trainer.train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either sigma"),
        ({"sigma": 0.1, "optimizer": "both"}, "must be a FlatLoRAOptimizer"),
        ({"sigma": -1}, "sigma must be finite"),
        ({"sigma": 0.1, "shedule": "linear"}, "no option shedule; there are auto, mode"),
        ({"sigma": 0.1, "schedule": "sine"}, "schedule must be one of"),
        ({"sigma": 0.1, "total_steps": 3}, "no option total_steps"),
    ],
)
def test_refuses_wrong_options_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        FlatLoRACallback(**arguments)
