"""sentence-transformers and SetFit, with `FlatLoRACallback(sigma=...)`."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import BertConfig, BertModel

from common import adapter, identical
from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.integrations.transformers import FlatLoRACallback
from words import WORDS, sentences, tokenizer

sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers import (  # noqa: E402
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)

OPTIONS: dict[str, Any] = {"sigma": 0.1, "schedule": "constant"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained BERT, as sentence-transformers loads it."""
    path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(**sizes, **dropouts, vocab_size=len(WORDS), pad_token_id=0)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def model_of(folder: Path) -> SentenceTransformer:
    torch.manual_seed(0)
    model = SentenceTransformer(str(folder), device="cpu")
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "dense"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


class Uses:
    """Which passes of the adapted layers saw noise, also those inside of ``backward()``."""

    def __init__(self, model: nn.Module) -> None:
        self.counts: Counter[tuple[str, bool]] = Counter()
        self._clean = {p: p.detach().clone() for p in model.parameters() if not p.requires_grad}
        for module in model.modules():
            if hasattr(module, "base_layer"):
                module.base_layer.register_forward_hook(self._used)

    def _used(self, layer: nn.Module, args: Any, output: Any) -> None:
        when = "in backward" if torch._C._current_graph_task_id() != -1 else "forward"
        if not torch.is_grad_enabled():
            when += ", no grad"
        if not layer.training:
            when = "evaluation"
        self.counts[when, not torch.equal(layer.weight, self._clean[layer.weight])] += 1

    def is_clean(self) -> bool:
        return identical(self._clean, self._clean.values())


def arguments(path: Path) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(
        output_dir=str(path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        optim="adamw_torch",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )


def pairs(count: int) -> Dataset:
    return Dataset.from_dict({"anchor": sentences(count, 1), "positive": sentences(count, 2)})


def trainer_of(folder: Path, path: Path, loss: Any, **options: Any) -> tuple[Any, Uses]:
    model = model_of(folder)
    return (
        SentenceTransformerTrainer(
            model=model,
            args=arguments(path),
            train_dataset=pairs(24),
            eval_dataset=pairs(4),
            loss=loss(model),
            callbacks=[FlatLoRACallback(**OPTIONS)],
            **options,
        ),
        Uses(model),
    )


PLAIN: Any = losses.MultipleNegativesRankingLoss


def cached(model: Any) -> Any:
    return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)


@pytest.mark.parametrize("loss", [PLAIN, cached], ids=["plain", "cached"])
def test_noise_only_in_training_and_resumed(folder: Path, tmp_path: Path, loss: Any) -> None:
    trainer, uses = trainer_of(folder, tmp_path, loss)
    trainer.train()
    passes = [("forward", True)] if loss is PLAIN else [("forward, no grad", True), ("in backward", True)]
    assert set(uses.counts) == {*passes, ("evaluation", False)}
    assert uses.is_clean()
    assert not trainer.loss._forward_pre_hooks
    again, uses = trainer_of(folder, tmp_path, loss)
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    assert identical(adapter(again.model), adapter(trainer.model))
    assert uses.is_clean()


def test_both_passes_of_a_cached_loss_see_the_same_noise(folder: Path, tmp_path: Path) -> None:
    trainer, _ = trainer_of(folder, tmp_path / "cached", cached)
    trainer.train()
    plain, _ = trainer_of(folder, tmp_path / "plain", PLAIN)
    plain.train()
    for found, expected in zip(adapter(trainer.model), adapter(plain.model), strict=True):
        assert torch.allclose(found, expected, atol=1e-4)


def record(trainer: Any) -> list[Any]:
    """What each training batch is made of, filled while the trainer runs."""
    seen: list[Any] = []
    compute = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            seen.append({name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)})
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    return seen


def by_hand(model: Any, trainer: Any, loss_of: Any, batches: list[Any], decay: float = 0.0) -> list[Any]:
    """The adapter after the same batches; the learning rate falls by ``decay`` in each step."""
    base = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.0)
    optimizer = FlatLoRAOptimizer(base, model, seed=42, auto=False, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - decay * step)
    model.train()
    for inputs in batches:
        features, labels = trainer.collect_features(inputs)
        with optimizer.perturbed():
            loss_of(features, labels).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return adapter(model)


def test_the_plain_loss_is_that_of_a_loop_by_hand(folder: Path, tmp_path: Path) -> None:
    trainer, _ = trainer_of(folder, tmp_path, PLAIN)
    batches = record(trainer)
    trainer.train()
    model = model_of(folder)
    assert identical(by_hand(model, trainer, PLAIN(model), batches), adapter(trainer.model))


def setfit_trainer(folder: Path, path: Path) -> tuple[Any, Uses]:
    setfit = pytest.importorskip("setfit")
    from sklearn.linear_model import LogisticRegression

    body = model_of(folder)
    rows = {"text": sentences(8, 1), "label": [0, 1] * 4}
    trainer = setfit.Trainer(
        model=setfit.SetFitModel(model_body=body, model_head=LogisticRegression(), labels=["a", "b"]),
        args=setfit.TrainingArguments(
            output_dir=str(path),
            batch_size=4,
            max_steps=3,
            body_learning_rate=1e-2,
            l2_weight=0.0,
            warmup_proportion=0.0,
            logging_steps=1,
            logging_first_step=False,
            save_steps=2,
            save_total_limit=None,
            eval_strategy="steps",
            eval_steps=2,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict(rows),
        eval_dataset=Dataset.from_dict(rows),
        callbacks=[FlatLoRACallback(**OPTIONS)],
    )
    trainer.st_trainer.args.max_grad_norm = 0
    trainer.st_trainer.args.optim = "adamw_torch"
    return trainer, Uses(body)


def test_setfit(folder: Path, tmp_path: Path) -> None:
    trainer, uses = setfit_trainer(folder, tmp_path)
    batches = record(trainer.st_trainer)
    trainer.train()
    # Also the head is fitted without noise.
    assert set(uses.counts) == {("forward", True), ("evaluation", False)}
    assert uses.is_clean()
    trainer.model.predict(sentences(2, 3))
    assert not uses.counts["evaluation", True]
    logged = [entry for entry in trainer.st_trainer.state.log_history if "learning_rate" in entry]
    assert len(logged) == 3
    assert all(entry["flatlora/noise_norm"] > 0 for entry in logged)

    model = model_of(folder)
    loss = losses.CosineSimilarityLoss(model)
    weights = by_hand(model, trainer.st_trainer, loss, batches, decay=1 / 3)
    assert identical(weights, adapter(trainer.model.model_body))

    # SetFit's own train() takes no checkpoint.
    again, uses = setfit_trainer(folder, tmp_path)
    train = again.st_trainer.train
    again.st_trainer.train = lambda: train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    again.train()
    assert identical(adapter(again.model.model_body), weights)
    assert uses.is_clean()
