"""What the framework tests share: a tiny model, a watch on its weights, a hand-written loop."""

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from flatlora_optim import FlatLoRAOptimizer

VOCABULARY = 64


def tiny_model(vocabulary: int = VOCABULARY, rank: int = 4) -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    lora = LoraConfig(
        r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(LlamaForCausalLM(config), lora)


def flat_optimizer(model: nn.Module, base: Any = torch.optim.AdamW, **options: Any) -> FlatLoRAOptimizer:
    options = {"sigma": 0.1, "schedule": "constant", "seed": 7, **options}
    return FlatLoRAOptimizer(
        base((p for p in model.parameters() if p.requires_grad), lr=1e-2), model, **options
    )


class Averaging(torch.optim.AdamW):
    """What DDP does to the gradients, at the step."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        super().step()


def token_batches(count: int, batch_size: int = 2, length: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (count, batch_size, length), generator=generator)
    return [{"input_ids": batch, "labels": batch.clone()} for batch in ids]


def token_rows(count: int) -> list[dict[str, list[int]]]:
    """The same data as a dataset of single examples."""
    return [{k: v[0].tolist() for k, v in batch.items()} for batch in token_batches(count, batch_size=1)]


def adapter(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def identical(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Watch:
    """Notes at each use of a frozen weight by its layer whether it carried noise."""

    def __init__(self, model: nn.Module) -> None:
        self.uses: Counter[tuple[str, bool]] = Counter()
        self._clean = {p: p.detach().clone() for p in model.parameters() if not p.requires_grad}
        for module in model.modules():
            if hasattr(module, "base_layer"):
                module.base_layer.register_forward_hook(self._used)

    def _used(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        trains = layer.training and torch.is_grad_enabled()
        self._note("train" if trains else "observe", layer)
        if output.requires_grad:
            output.register_hook(lambda _: self._note("backward", layer))

    def _note(self, when: str, layer: nn.Module) -> None:
        self.uses[when, not torch.equal(layer.weight, self._clean[layer.weight])] += 1

    def is_clean(self) -> bool:
        """Whether all frozen parameters are what they were, bit for bit."""
        return identical(self._clean, self._clean.values())

    def assert_noise_only_in_training(self) -> None:
        assert set(self.uses) == {("train", True), ("backward", True), ("observe", False)}, self.uses


class Recording:
    """For subclasses of Trainer: keeps what each training batch was and what loss it gave."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.windows: dict[int, list[dict[str, Any]]] = {}
        """The batches of each optimizer step, ready to be arguments of the model."""
        self.losses: list[float] = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            batch = {"num_items_in_batch": kwargs.get("num_items_in_batch"), **inputs}
            self.windows.setdefault(self.state.global_step, []).append(batch)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


Loss = Callable[..., Tensor]


def loss_of_model(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(**batch).loss


def hand_written_loop(
    model: nn.Module,
    optimizer: FlatLoRAOptimizer,
    windows: Iterable[list[dict[str, Any]]],
    *,
    loss_of: Loss = loss_of_model,
    scheduler: Any = None,
    max_norm: float | None = None,
    mean: bool = False,
) -> list[float]:
    """Trains in the explicit style on windows of accumulated batches.

    Args:
        mean: Whether the loss is divided by the window's length before backward.

    Returns:
        The loss of each batch, as it goes into backward.
    """
    model.train()
    losses = []
    for window in windows:
        with optimizer.perturbed():
            for batch in window:
                loss = loss_of(model, batch) / (len(window) if mean else 1)
                loss.backward()
                losses.append(loss.item())
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
    return losses


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a module-level function in a fresh interpreter."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(function, *args).result()
