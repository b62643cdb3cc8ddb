"""Every base optimizer: its step is its own, taken at W + eps, and its state resumes to the bit."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import bitsandbytes as bnb
import pytest
import schedulefree
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torchao.optim import AdamW8bit

from flatlora_optim import FlatLoRAOptimizer
from helpers import MLP, assert_equal_tensors, flatlora, loss_of, trainable, with_lora

SIZE, RANK = 512, 8  # A and B of 4096 elements: smaller ones get no 8-bit state


def of_trainable(optimizer: Callable[..., Optimizer], **options: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda model: optimizer(trainable(model), **options)


def torch_optimizers() -> Iterator[tuple[str, Callable[[nn.Module], Optimizer]]]:
    variants: dict[str, list[dict[str, Any]]] = {
        "SGD": [{"lr": 0.1, "momentum": 0.9}, {"lr": 0.1, "fused": True}],
        "Adam": [{"lr": 1e-3, "amsgrad": True}],
        "AdamW": [{"lr": 1e-3}, {"lr": 1e-3, "foreach": True}, {"lr": 1e-3, "fused": True}],
        "LBFGS": [
            {"lr": 0.1, "max_iter": 4},
            {"lr": 0.1, "max_iter": 4, "line_search_fn": "strong_wolfe"},
        ],
    }
    for name, cls in vars(torch.optim).items():
        # SparseAdam takes sparse gradients only, which adapters never have.
        if isinstance(cls, type) and issubclass(cls, Optimizer) and name not in ("Optimizer", "SparseAdam"):
            for options in variants.get(name, [{}]):
                label = ", ".join((name, *(k for k in options if k not in ("lr", "max_iter"))))
                yield f"torch {label}", of_trainable(cls, **options)


def loraplus(model: nn.Module) -> Optimizer:
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)


def lorafa(model: nn.Module) -> Optimizer:
    return create_lorafa_optimizer(model, r=RANK, lora_alpha=3, lr=1e-3)


def in_training_mode(model: nn.Module) -> Optimizer:
    optimizer = schedulefree.AdamWScheduleFree(trainable(model), lr=1e-3)
    optimizer.train()
    return optimizer


BASES: dict[str, Callable[[nn.Module], Optimizer]] = {
    **dict(torch_optimizers()),
    "bitsandbytes AdamW8bit": of_trainable(bnb.optim.AdamW8bit, lr=1e-3),
    "bitsandbytes PagedAdamW8bit": of_trainable(bnb.optim.PagedAdamW8bit, lr=1e-3),
    "bitsandbytes Lion8bit": of_trainable(bnb.optim.Lion8bit, lr=1e-4),
    "bitsandbytes AdEMAMix8bit": of_trainable(bnb.optim.AdEMAMix8bit, lr=1e-3),
    "torchao AdamW8bit": of_trainable(AdamW8bit, lr=1e-3),
    "schedulefree AdamWScheduleFree": in_training_mode,
    "peft LoRA+": loraplus,
    "peft LoRA-FA": lorafa,
}


@pytest.fixture(autouse=True)
def _no_compilation() -> Iterator[None]:
    """torchao compiles its step: minutes for nothing here."""
    with torch.compiler.set_stance("force_eager"):
        yield


def adapted() -> nn.Module:
    torch.manual_seed(0)
    return with_lora(MLP(SIZE, SIZE, 5), ["fc1", "fc2"], r=RANK)


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def closure(model: nn.Module, optimizer: Any, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(4, SIZE, generator=generator), torch.randint(0, 5, (4,), generator=generator)
    optimizer.zero_grad()
    with torch.enable_grad():
        loss = loss_of(model, batch)
        loss.backward()
    return loss


def wrapped(base: str, model: nn.Module) -> FlatLoRAOptimizer:
    return FlatLoRAOptimizer(BASES[base](model), model, sigma=0.2, total_steps=4, seed=5)


@pytest.mark.parametrize("base", BASES)
def test_a_step_is_that_of_the_base_alone_at_the_noisy_weights(base: str) -> None:
    model, reference = adapted(), adapted()
    optimizer = wrapped(base, model)
    alone = BASES[base](reference)
    noise = flatlora(reference, lr=0.0, sigma=0.2, schedule="cosine", total_steps=4, seed=5, auto=False)
    start = adapters(model)
    for step in range(3):
        optimizer.step(partial(closure, model, optimizer, step))
        with noise.perturbed():
            alone.step(partial(closure, reference, alone, step))
        noise.step()
        assert_equal_tensors(adapters(model), adapters(reference))
    assert not all(torch.equal(value, start[name]) for name, value in adapters(model).items())


@pytest.mark.parametrize("base", BASES)
def test_a_checkpoint_resumes_to_the_bit(base: str) -> None:
    model = adapted()
    optimizer = wrapped(base, model)
    for step in range(2):
        optimizer.step(partial(closure, model, optimizer, step))
    file = io.BytesIO()
    torch.save({"model": adapters(model), "optimizer": optimizer.state_dict()}, file)

    file.seek(0)
    checkpoint = torch.load(file, weights_only=False)
    resumed = adapted()
    resumed.load_state_dict(checkpoint["model"], strict=False)
    optimizer_resumed = wrapped(base, resumed)
    optimizer_resumed.load_state_dict(checkpoint["optimizer"])
    assert optimizer_resumed.step_count == 2
    for step in range(2, 4):
        optimizer.step(partial(closure, model, optimizer, step))
        optimizer_resumed.step(partial(closure, resumed, optimizer_resumed, step))
    assert_equal_tensors(adapters(resumed), adapters(model))


@pytest.mark.parametrize("base", [name for name in BASES if "8bit" in name])
def test_8bit_bases_really_have_8bit_states(base: str) -> None:
    model = adapted()
    optimizer = wrapped(base, model)
    optimizer.step(partial(closure, model, optimizer, 0))
    big = next(p for p in trainable(model) if p.numel() >= 4096)
    states = [t for t in optimizer.state[big].values() if isinstance(t, Tensor) and t.numel() >= 4096]
    codes = [getattr(t, "codes", t) for t in states]
    assert codes
    assert all(t.dtype == torch.uint8 for t in codes)


def test_schedulefree_is_switched_through_the_wrapper() -> None:
    """``eval()`` swaps in the averaged adapters, and ``train()`` swaps them back."""
    model = adapted()
    optimizer = wrapped("schedulefree AdamWScheduleFree", model)
    for step in range(3):
        optimizer.step(partial(closure, model, optimizer, step))
    training = adapters(model)
    optimizer.eval()
    assert any(not torch.equal(value, training[name]) for name, value in adapters(model).items())
    with pytest.raises(Exception, match="train mode"):
        optimizer.step(partial(closure, model, optimizer, 3))
    assert not optimizer.is_perturbed
    optimizer.train()
    for name, value in adapters(model).items():
        torch.testing.assert_close(value, training[name])


def test_lorafa_leaves_a_alone() -> None:
    model = adapted()
    optimizer = wrapped("peft LoRA-FA", model)
    start = adapters(model)
    optimizer.step(partial(closure, model, optimizer, 0))
    changed = {name for name, value in adapters(model).items() if not torch.equal(value, start[name])}
    assert changed == {name for name in start if "lora_B" in name}


class WithoutClosure(torch.optim.SGD):
    def step(self) -> None:  # type: ignore[override]
        super().step()


def test_a_base_whose_step_takes_no_closure_and_has_a_scheduler() -> None:
    model, twin = adapted(), adapted()
    base = WithoutClosure(trainable(model), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(base, 1)  # wraps `base.step`
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, schedule="constant")
    optimizer.step(partial(closure, model, optimizer, 0))
    scheduler.step()
    expected = flatlora(twin, seed=0)
    expected.step(partial(closure, twin, expected, 0))
    assert_equal_tensors(adapters(model), adapters(twin))
