"""torchtune's ``LoRAFinetuneRecipeSingleDevice``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchtune", reason="make test-trainers")
from omegaconf import OmegaConf
from torchtune.models.llama2 import lora_llama2

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
            import copy

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
        super().__init__(cfg=cfg)

    def _loss_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = super()._loss_step(batch)
        self.losses.append(loss.item())
        return loss


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
    clean = model().state_dict()
    assert all(torch.equal(v, clean[k]) for k, v in recipe._model.state_dict().items() if "lora" not in k)
    resumed = run(tmp_path, resume=True)
    assert resumed.losses == recipe.losses[4:]
