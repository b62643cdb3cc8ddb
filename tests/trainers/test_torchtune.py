"""torchtune's ``LoRAFinetuneRecipeSingleDevice``."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchtune", reason="make test-trainers")
from omegaconf import OmegaConf
from torchtune.models.llama2 import lora_llama2
from torchtune.training import get_cosine_schedule_with_warmup, scale_grads

from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.integrations.torchtune import FlatLoRARecipe, load_recipe

VOCABULARY = 50
LoRAFinetuneRecipeSingleDevice = load_recipe("lora_finetune_single_device").LoRAFinetuneRecipeSingleDevice


def model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 32}
    return lora_llama2(
        ["q_proj", "v_proj"], apply_lora_to_mlp=True, **sizes, max_seq_len=32, lora_rank=4, lora_alpha=8
    )


class Checkpointer:
    """Keeps what the recipe saves."""

    saved: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, resume: bool, **kwargs: Any) -> None:
        self.resume = resume

    def load_checkpoint(self) -> dict[str, Any]:
        base = {name: value for name, value in model().state_dict().items() if "lora" not in name}
        return {**(self.saved if self.resume else {}), "model": base}

    def save_checkpoint(self, state: dict[str, Any], epoch: int, **kwargs: Any) -> None:
        if "optimizer" in state:
            type(self).saved = copy.deepcopy({k: v for k, v in state.items() if k != "model"})


class TokenizerPart:
    pad_id = 0


class Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    def __init__(self, tokenizer: Any) -> None:
        self.rows = torch.randint(1, VOCABULARY, (12, 8), generator=torch.Generator().manual_seed(1)).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"tokens": self.rows[index], "labels": self.rows[index]}


class Recipe(FlatLoRARecipe, LoRAFinetuneRecipeSingleDevice):
    def __init__(self, cfg: Any) -> None:
        self.losses: list[float] = []
        self.batches: list[dict[str, torch.Tensor]] = []
        self.noisy: list[bool] = []
        self.saved_clean: list[bool] = []
        super().__init__(cfg=cfg)

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.first = copy.deepcopy(self._model.state_dict())

    def is_clean(self) -> bool:
        now = self._model.state_dict()
        return all(torch.equal(now[name], value) for name, value in self.first.items() if "lora" not in name)

    def _loss_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.batches.append(dict(batch))
        loss = super()._loss_step(batch)
        self.losses.append(loss.item())
        weights = [(self._model.get_parameter(name), value) for name, value in self.first.items()]
        self.noisy.append(any(not torch.equal(p, v) for p, v in weights if not p.requires_grad))
        return loss

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.saved_clean.append(self.is_clean())
        super().save_checkpoint(*args, **kwargs)


def run(folder: Path, resume: bool = False) -> Recipe:
    here = __name__
    cfg = OmegaConf.create(
        {
            "flatlora": {"sigma": 0.1},
            "model": {
                "_component_": f"{here}.model",
                "apply_lora_to_mlp": True,
                "lora_rank": 4,
                "lora_alpha": 8,
                "lora_attn_modules": ["q_proj", "v_proj"],
            },
            "tokenizer": {"_component_": f"{here}.TokenizerPart"},
            "checkpointer": {"_component_": f"{here}.Checkpointer", "resume": resume},
            "dataset": {"_component_": f"{here}.Rows"},
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.01},
            "lr_scheduler": {
                "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
                "num_warmup_steps": 1,
            },
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "metric_logger": {"_component_": "torchtune.training.metric_logging.StdoutLogger"},
            "resume_from_checkpoint": resume,
            "save_adapter_weights_only": True,
            "output_dir": str(folder),
            "device": "cpu",
            "dtype": "fp32",
            "seed": 7,
            "epochs": 2,
            "max_steps_per_epoch": 2,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "shuffle": False,
            "compile": False,
            "log_every_n_steps": 1,
            "log_peak_memory_stats": False,
            "enable_activation_checkpointing": False,
        }
    )
    recipe = Recipe(cfg)
    recipe.setup(cfg)
    recipe.train()
    return recipe


def test_recipe_and_its_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    recipe = run(tmp_path)
    optimizer = recipe._optimizer
    assert isinstance(optimizer, FlatLoRAOptimizer)
    assert optimizer.total_steps == optimizer.step_count == 4
    assert len(optimizer.targets) == 5
    assert recipe.noisy == [False] * 2 + [True] * 6  # the first step of the cosine has none
    assert recipe.saved_clean == [True, True]
    assert recipe.is_clean()
    resumed = run(tmp_path, resume=True)
    assert resumed.losses == recipe.losses[4:]
    assert resumed.is_clean()
    losses = list(recipe.losses)
    assert by_hand(recipe) == losses


def by_hand(recipe: Recipe) -> list[float]:
    """The recipe's loss, in the explicit style."""
    recipe._optimizer.detach()
    model = recipe._model
    model.load_state_dict(recipe.first)
    base = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, total_steps=4, seed=7, auto=False)
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=1, num_training_steps=4)
    batches, losses = list(recipe.batches), []
    for window in zip(batches[::2], batches[1::2], strict=True):
        tokens = sum((batch["labels"] != recipe._loss_fn.ignore_index).sum() for batch in window)
        with optimizer.perturbed():
            for batch in window:
                own = (batch["labels"] != recipe._loss_fn.ignore_index).sum()
                loss = recipe._loss_step(batch)
                (loss * own).backward()
                losses.append(loss.item())
        scale_grads(model, 1 / tokens)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return losses
