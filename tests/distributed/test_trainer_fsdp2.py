"""Hugging Face Trainer with FSDP2, and its callback. Accelerate has FSDP for accelerators only; here it is
told that it is there, and runs on gloo."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common import Recording, tiny_model, token_rows
from launch import launch


def whole(parameter: Any) -> Tensor:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()


def frozen(model: Any) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in model.named_parameters() if not p.requires_grad}


def run(sharded: bool, folder: str, checkpoint: str | None = None) -> list[float]:
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from flatlora_optim.integrations.transformers import FlatLoRACallback

    class ShardingTrainer(Recording, Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            if sharded:
                state = self.accelerator.state
                state.distributed_type = DistributedType.FSDP
                state.fsdp_plugin = FullyShardedDataParallelPlugin(
                    fsdp_version=2,
                    auto_wrap_policy="transformer_based_wrap",
                    transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
                    state_dict_type="SHARDED_STATE_DICT",
                )
                self.is_fsdp_enabled = True

    model = tiny_model()
    clean = frozen(model)
    noisy: list[bool] = []

    class Look(TrainerCallback):
        def on_substep_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            now = frozen(model)
            noisy.append(any(not torch.equal(now[name], clean[name]) for name in clean))

    arguments = TrainingArguments(
        folder,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        optim="adamw_torch",
        logging_steps=1,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    # The same noise on all copies: those of one sharded model always agree.
    trainer = ShardingTrainer(
        model,
        arguments,
        train_dataset=token_rows(32),
        eval_dataset=token_rows(4),
        callbacks=[FlatLoRACallback(sigma=0.1, schedule="constant", rank_noise="shared"), Look()],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    assert ("FSDP" in type(trainer.model).__name__) == sharded
    assert noisy
    assert all(noisy)
    after = frozen(trainer.model)
    assert all(torch.equal(after[name], clean[name]) for name in clean)
    keys = [key for group in trainer.optimizer.param_groups for key in group]
    assert not [key for key in keys if "flatlora" in key]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return trainer.losses


def worker() -> tuple[list[float], list[float], list[float]]:
    rank = str(dist.get_rank())
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # unused: the group is there already
    os.environ.update(address, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(dist.get_world_size()))
    folders = [tempfile.mkdtemp() for _ in range(2)]
    dist.broadcast_object_list(folders)
    losses = run(True, folders[0])
    return losses, run(True, folders[0], f"{folders[0]}/checkpoint-2"), run(False, folders[1])


def test_same_losses_as_with_ddp_and_when_resumed() -> None:
    for losses, resumed, replicated in launch(worker, timeout=200):
        assert all(abs(a - b) < 1e-5 for a, b in zip(losses, replicated, strict=True))
        assert resumed == losses[4:]
