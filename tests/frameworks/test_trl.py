"""TRL's SFTTrainer and DPOTrainer, with an optimizer of one's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from common import (
    Recording,
    Watch,
    adapter,
    flat_optimizer,
    hand_written_loop,
    identical,
    in_new_process,
    tiny_model,
)
from flatlora_optim import FlatLoRAOptimizer
from words import sentences, tokenizer


class RecordingSFT(Recording, SFTTrainer):
    pass


class RecordingDPO(Recording, DPOTrainer):
    pass


def texts(count: int) -> Dataset:
    return Dataset.from_dict({"text": sentences(count, 1)})


def preferences(count: int) -> Dataset:
    prompts, chosen, rejected = (sentences(count, seed) for seed in (1, 2, 3))
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})


KINDS = {
    "sft": (RecordingSFT, SFTConfig, texts, {}),
    "dpo": (RecordingDPO, DPOConfig, preferences, {}),
    # Without a "ref" adapter, the reference is the model with its adapter disabled.
    "dpo-disabled-adapter": (RecordingDPO, DPOConfig, preferences, {"disable": True}),
}


def build(kind: str, folder: Path | str, **flat: Any) -> tuple[Any, FlatLoRAOptimizer, Watch]:
    trainer_class, config_class, data, options = KINDS[kind]
    model = tiny_model()
    watch = Watch(model)
    optimizer = flat_optimizer(model, **flat)
    config = config_class(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        logging_steps=1,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = trainer_class(
        model,
        args=config,
        train_dataset=data(12),
        eval_dataset=data(2),
        processing_class=tokenizer(),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )
    if options:
        model.delete_adapter("ref")
    return trainer, optimizer, watch


def loss_by_hand(trainer: Any, optimizer: FlatLoRAOptimizer) -> Any:
    """The trainer's formula alone; its reference pass is made beforehand, on clean weights."""

    def sft(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        items = batch.pop("num_items_in_batch")
        return trainer.compute_loss(model, batch, num_items_in_batch=items)

    def dpo(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        del batch["num_items_in_batch"]
        with optimizer.clean():
            chosen, rejected = trainer.compute_ref_log_probs(model, batch)
        trainer.precompute_ref_logps = True
        return trainer.compute_loss(
            model, {**batch, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        )

    return dpo if isinstance(trainer, DPOTrainer) else sft


def resume(kind: str, folder: str) -> tuple[list[float], list[torch.Tensor], bool]:
    trainer, _, watch = build(kind, folder)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return trainer.losses, adapter(trainer.model), watch.is_clean()


@pytest.mark.parametrize("kind", KINDS)
def test_same_curve_as_by_hand_and_when_resumed(kind: str, tmp_path: Path) -> None:
    trainer, optimizer, watch = build(kind, tmp_path)
    trainer.train()
    watch.assert_noise_only_in_training()
    assert watch.is_clean()
    if kind != "sft":
        # The reference passes of 8 batches; policy and reference in 2 evaluations of one batch.
        assert watch.uses["observe", False] == len(optimizer.targets) * (8 + 2 * 2)

    windows = list(trainer.windows.values())
    assert [len(window) for window in windows] == [2, 2, 2, 2]
    scratch, by_hand, _ = build(kind, tmp_path / "by_hand", auto=False)
    scratch.windows = {}
    losses = hand_written_loop(
        scratch.model,
        by_hand,
        windows,
        loss_of=loss_by_hand(scratch, by_hand),
        max_norm=1.0,
        mean=kind != "sft",
    )
    assert trainer.losses == losses
    assert identical(adapter(trainer.model), adapter(scratch.model))

    if kind != "dpo-disabled-adapter":
        resumed, weights, clean = in_new_process(resume, kind, str(tmp_path))
        assert resumed == trainer.losses[4:]
        assert identical(weights, adapter(trainer.model))
        assert clean
