"""TRL's trainers with `FlatLoRACallback(sigma=...)` and, where they take one, `peft_config=`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from common import Recording, Watch, adapter, hand_written_loop, identical
from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.integrations.transformers import FlatLoRACallback
from test_trl import preferences, texts
from words import WORDS, sentences, tokenizer

STEPS = 3
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def reward_model() -> nn.Module:
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1))


def gpt2() -> nn.Module:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": len(WORDS), "n_positions": 64}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def completions(count: int) -> Dataset:
    prompts, answers = sentences(count, 1), sentences(count, 2)
    return Dataset.from_dict({"prompt": prompts, "completion": answers})


def labelled(count: int) -> Dataset:
    return completions(count).add_column("label", [i % 2 == 0 for i in range(count)])


def prompts(count: int) -> Dataset:
    return Dataset.from_dict({"prompt": sentences(count, 1)})


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


ONLINE = {"num_generations": 2, "max_completion_length": 4, "temperature": 1.0}
CASES: dict[str, tuple[Any, Any, Any, Any, dict[str, Any]]] = {
    "sft": (SFTTrainer, SFTConfig, llama, texts, {}),
    "sft, packing": (SFTTrainer, SFTConfig, llama, texts, {"packing": True, "max_length": 16}),
    "sft, completion only": (SFTTrainer, SFTConfig, llama, completions, {"completion_only_loss": True}),
    "dpo": (DPOTrainer, DPOConfig, llama, preferences, {}),
    "kto": (KTOTrainer, KTOConfig, llama, labelled, {}),
    "orpo": (ORPOTrainer, ORPOConfig, llama, preferences, {"max_length": 32}),
    "reward": (RewardTrainer, RewardConfig, reward_model, preferences, {}),
    "grpo": (GRPOTrainer, GRPOConfig, llama, prompts, {**ONLINE, "beta": 0.1}),
    "grpo, gpt2": (GRPOTrainer, GRPOConfig, gpt2, prompts, ONLINE),
    "rloo": (RLOOTrainer, RLOOConfig, llama, prompts, ONLINE),
}


def build(case: str, folder: Path | str, callbacks: Any = None) -> tuple[Any, Watch]:
    trainer_class, config_class, model, data, options = CASES[case]
    kind = type(f"Recording{trainer_class.__name__}", (Recording, trainer_class), {})
    torch.manual_seed(0)
    targets = ["c_attn", "c_proj"] if model is gpt2 else ["q_proj", "v_proj", "down_proj"]
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        task_type="SEQ_CLS" if model is reward_model else "CAUSAL_LM",
        fan_in_fan_out=model is gpt2,
    )
    config = config_class(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        optim="adamw_torch",
        logging_steps=1,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    online = {"reward_funcs": reward} if config_class in (GRPOConfig, RLOOConfig) else {}
    trainer = kind(
        model=model(),
        args=config,
        train_dataset=data(12),
        eval_dataset=data(2),
        processing_class=tokenizer(),
        peft_config=lora,
        callbacks=callbacks or [FlatLoRACallback(sigma=0.1, schedule="constant")],
        **online,
    )
    return trainer, Watch(trainer.model)


@pytest.mark.parametrize("case", CASES)
def test_noise_only_in_training_same_losses_as_by_hand_and_resumed(case: str, tmp_path: Path) -> None:
    trainer, watch = build(case, tmp_path)
    trainer.train()
    watch.assert_noise_only_in_training()
    assert watch.is_clean()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS
    assert all(entry["flatlora/noise_norm"] > 0 for entry in logged)
    assert trainer.losses == losses_by_hand(case, trainer, tmp_path / "by_hand")
    resumed, watch = build(case, tmp_path)
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    assert resumed.losses == trainer.losses[sum(len(trainer.windows[step]) for step in (0, 1)) :]
    assert identical(adapter(resumed.model), adapter(trainer.model))
    assert watch.is_clean()


def losses_by_hand(case: str, trainer: Any, folder: Path) -> list[float]:
    """In the explicit style: the trainer's formula alone, on what it was given as batches. Passes without
    gradients, such as the reference's, see clean weights."""
    scratch, _ = build(case, folder)
    scratch.current_gradient_accumulation_steps = 2
    base = torch.optim.AdamW(
        (p for p in scratch.model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0
    )
    optimizer = FlatLoRAOptimizer(base, scratch.model, sigma=0.1, schedule="constant", seed=42, auto=False)

    forward = scratch.model.forward

    def clean_without_gradients(*args: Any, **kwargs: Any) -> Any:
        with nullcontext() if torch.is_grad_enabled() else optimizer.clean():
            return forward(*args, **kwargs)

    def loss_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
        return scratch.compute_loss(model, batch, num_items_in_batch=batch["num_items_in_batch"])

    scratch.model.forward = clean_without_gradients
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    losses = hand_written_loop(
        scratch.model,
        optimizer,
        trainer.windows.values(),
        loss_of=loss_of,
        scheduler=scheduler,
        max_norm=1.0,
        mean=case in ("dpo", "kto", "orpo", "reward", "rloo"),
    )
    assert identical(adapter(trainer.model), adapter(scratch.model))
    return losses


def test_what_noise_adds_to_the_ratio_and_kl_of_grpo(tmp_path: Path) -> None:
    """The old policy's log-probabilities are made without noise, the new one's with it."""
    trainer, _ = build("grpo", tmp_path, [FlatLoRACallback(sigma=0.05, schedule="constant")])
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]

    assert 0 < max(kl) < 1e-4
