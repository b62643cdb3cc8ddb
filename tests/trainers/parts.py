"""What the tests of whole trainers share. They need packages of other versions than the rest of the tests:
``make test-trainers`` makes an environment for each."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from common import Watch, adapter, identical
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
    """Follows one run of any trainer that is built on transformers', and goes through it again by hand."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.losses: list[float] = []
        self._batches: dict[int, list[Any]] = {}
        self._rates: list[list[float]] = []
        adopt = FlatLoRAOptimizer.adopt.__func__
        step, training_step = FlatLoRAOptimizer.step, Trainer.training_step

        def adopted(cls: Any, base: Any, model: Any, **options: Any) -> Any:
            self._watch, self._first = Watch(model), adapter(model)
            self._optimizer, self._options = adopt(cls, base, model, **options), options
            return self._optimizer

        def stepped(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            self._rates.append([group["lr"] for group in optimizer.param_groups])
            return step(optimizer, *args, **kwargs)

        def trained(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            self._trainer = trainer
            window = self._batches.setdefault(trainer.state.global_step, [])
            window.append(copy.deepcopy((inputs, args, kwargs)))
            loss = training_step(trainer, model, inputs, *args, **kwargs)
            self.losses.append(loss.item())
            return loss

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FlatLoRAOptimizer, "adopt", classmethod(adopted))
            patch.setattr(FlatLoRAOptimizer, "step", stepped)
            patch.setattr(Trainer, "training_step", trained)
            run()
        self.last = adapter(self._trainer.model)
        assert self._watch.is_clean()
        assert not [key for group in self._optimizer.param_groups for key in group if "flatlora" in key]

    def assert_noise_only_in_training(self) -> None:
        """It grows from 0 on, as the cosine does."""
        uses = {
            ("train", False),
            ("backward", False),
            ("train", True),
            ("backward", True),
            ("observe", False),
        }
        seen = dict(self._watch.uses)
        # Reentrant checkpoints run each layer without gradients first, as noisy as it runs again.
        assert seen.pop(("observe", True), 0) in (0, seen["train", True])
        assert set(seen) == {*uses, ("observe", False)}
        logged = [entry for entry in self._trainer.state.log_history if "learning_rate" in entry]
        norms = [entry["flatlora/noise_norm"] for entry in logged]
        assert len(norms) == len(self._batches)
        assert norms[0] == 0
        assert norms == sorted(set(norms))

    def assert_same_as_by_hand(self) -> None:
        """The trainer's loss, in the explicit style."""
        trainer, losses = self._trainer, []
        model = trainer.model
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter, first in zip(trained, self._first, strict=True):
                parameter.copy_(first)
        base = torch.optim.AdamW([dict(group) for group in self._optimizer.param_groups])
        options = {**self._options, "total_steps": len(self._rates), "auto": False}
        optimizer = FlatLoRAOptimizer(base, model, **options)
        for window, rates in zip(self._batches.values(), self._rates, strict=True):
            with optimizer.perturbed():
                for inputs, args, kwargs in window:
                    losses.append(trainer.training_step(model, inputs, *args, **kwargs).item())
            torch.nn.utils.clip_grad_norm_(trained, trainer.args.max_grad_norm)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        assert losses == self.losses
        assert identical(trained, self.last)

    def assert_resumed(self, whole: "Spy") -> None:
        """From the second of four steps of two batches on."""
        assert self.losses == whole.losses[4:]
        assert identical(self.last, whole.last)
