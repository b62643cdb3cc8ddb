"""What the tests of whole trainers share. They need packages of other versions than the rest of the tests:
``make test-trainers`` makes an environment for each."""

import json
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from flatlora_optim import FlatLoRAOptimizer
from words import WORDS, tokenizer


def tiny_model(folder: Path) -> str:
    """A folder with an untrained Llama and a tokenizer of words."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=len(WORDS), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


class Spy:
    """Notes of each step its noise norm, and whether the weights are clean after it."""

    def __init__(self, monkeypatch: Any) -> None:
        self.norms: list[float] = []
        self.clean: list[bool] = []
        step = FlatLoRAOptimizer.step

        def spied(optimizer: FlatLoRAOptimizer, *args: Any, **kwargs: Any) -> Any:
            self.norms.append(optimizer.metrics()["noise_norm"])
            result = step(optimizer, *args, **kwargs)
            self.clean.append(not optimizer.is_perturbed)
            return result

        monkeypatch.setattr(FlatLoRAOptimizer, "step", spied)

    def assert_noise_grew(self, steps: int) -> None:
        """From 0 on, as the cosine does, once in each step."""
        assert len(self.norms) == steps
        assert self.norms[0] == 0
        assert self.norms == sorted(set(self.norms))
        assert all(self.clean)
