"""The three styles give the same run, with the gradient at W + eps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flatlora_optim import FlatLoRAOptimizer
from helpers import (
    MLP_WEIGHTS,
    STYLES,
    assert_equal_tensors,
    changed_weights,
    fingerprint,
    flatlora,
    gradients,
    lora_gpt2,
    lora_mlp,
    loss_of,
    mlp_batch,
    train_automatic,
    trainable,
)

BATCH = mlp_batch()


def losses_of(style: Callable[..., Tensor], seed: int = 1, steps: int = 6, **options: Any) -> list[float]:
    model = lora_mlp()
    optimizer = flatlora(model, seed=seed, base=torch.optim.AdamW, lr=0.01, **options)
    clean = fingerprint(model)
    losses = []
    for step in range(steps):
        losses.append(style(model, optimizer, mlp_batch(step)).item())
        assert not changed_weights(model, clean)
    return losses


def test_the_three_styles_agree_and_depend_on_the_seed_alone() -> None:
    runs = [losses_of(style) for style in STYLES]
    assert runs[0] == runs[1] == runs[2] == losses_of(train_automatic)
    assert losses_of(train_automatic, seed=2) != runs[2]
    assert losses_of(train_automatic, sigma=0.0) != runs[2]


@pytest.mark.parametrize("failing", [False, True])
def test_a_block_in_a_block_leaves_the_noise_to_the_outer_one(
    failing: bool, model: nn.Module, before: dict[str, Tensor]
) -> None:
    optimizer = flatlora(model, auto=False)
    with optimizer.perturbed():
        noisy = fingerprint(model)
        with suppress(ZeroDivisionError), optimizer.perturbed():
            assert not changed_weights(model, noisy)
            _ = 1 / (0 if failing else 1)
        assert not changed_weights(model, noisy)
        with optimizer.clean(), pytest.raises(RuntimeError, match=r"inside clean\(\)"), optimizer.perturbed():
            pass
    assert not changed_weights(model, before)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_step_with_a_closure_ends_the_noise_of_a_perturb_before(
    base: type[torch.optim.Optimizer], model: nn.Module, before: dict[str, Tensor]
) -> None:
    optimizer = flatlora(model, base=base, auto=False)
    optimizer.base.register_step_post_hook(lambda *_: seen.append(changed_weights(model, before)))
    seen: list[set[str]] = []

    def closure() -> Tensor:
        assert changed_weights(model, before) == MLP_WEIGHTS
        optimizer.zero_grad()
        loss = loss_of(model, BATCH)
        loss.backward()
        return loss

    optimizer.perturb()
    optimizer.step(closure)
    assert seen == [set()]


def test_a_functional_call_with_detached_weights_is_like_any_other(
    model: nn.Module, before: dict[str, Tensor], optimizer: FlatLoRAOptimizer
) -> None:
    loss_of(model, BATCH).backward()
    expected = gradients(model)
    optimizer.restore()
    optimizer.zero_grad()
    parameters = {n: p if p.requires_grad else p.detach() for n, p in model.named_parameters()}
    x, y = BATCH
    F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y).backward()
    assert_equal_tensors(gradients(model), expected)
    assert changed_weights(model, before) == MLP_WEIGHTS
    optimizer.step()
    assert not changed_weights(model, before)


@pytest.mark.parametrize("style", STYLES)
def test_the_gradient_is_the_one_at_w_plus_eps(style: Callable[..., Tensor]) -> None:
    model = lora_mlp()
    optimizer = flatlora(model, lr=0.0)
    reference = copy.deepcopy(model)
    with optimizer.perturbed(), torch.no_grad():
        for theirs, ours in zip(reference.parameters(), model.parameters(), strict=True):
            theirs.copy_(ours)
    loss_of(reference, BATCH).backward()
    seen: dict[str, Tensor] = {}
    optimizer.register_step_post_hook(lambda *_: seen.update(gradients(model)))
    style(model, optimizer, BATCH)
    assert_equal_tensors(seen, gradients(reference))


def test_zero_sigma_is_the_base_optimizer_to_the_bit() -> None:
    plain, wrapped = lora_mlp(), lora_mlp()
    base = torch.optim.AdamW(trainable(plain), lr=0.01)
    optimizer = flatlora(wrapped, sigma=0.0, base=torch.optim.AdamW, lr=0.01)
    for step in range(4):
        loss_of(plain, mlp_batch(step)).backward()
        base.step()
        base.zero_grad()
        train_automatic(wrapped, optimizer, mlp_batch(step))
    for ours, theirs in zip(trainable(wrapped), trainable(plain), strict=True):
        assert torch.equal(ours, theirs)


def test_a_base_that_evaluates_the_closure_several_times_sees_one_noise(model: nn.Module) -> None:
    optimizer = FlatLoRAOptimizer(
        torch.optim.LBFGS(trainable(model), lr=0.1, max_iter=5), model, sigma=0.2, schedule="constant"
    )
    noise = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, BATCH)
        loss.backward()
        noise.append(fingerprint(model))
        return loss

    clean = fingerprint(model)
    optimizer.step(closure)
    assert len(noise) > 1
    for other in noise[1:]:
        assert_equal_tensors(other, noise[0])
    assert not changed_weights(model, clean)


def test_accumulation_keeps_one_noise_and_the_next_step_draws_another(
    model: nn.Module, optimizer: FlatLoRAOptimizer
) -> None:
    seen = []
    for step in range(2):
        for micro in range(3):
            (loss_of(model, mlp_batch(3 * step + micro)) / 3).backward()
            seen.append(fingerprint(model))
        optimizer.step()
        optimizer.zero_grad()
    for micro in (1, 2):
        assert_equal_tensors(seen[micro], seen[0])
        assert_equal_tensors(seen[3 + micro], seen[3])
    assert changed_weights(model, seen[0]) == MLP_WEIGHTS
    assert any(not torch.equal(seen[0][name], seen[3][name]) for name in MLP_WEIGHTS)


def test_an_unfinished_accumulation_window_ends_clean(
    model: nn.Module, before: dict[str, Tensor], optimizer: FlatLoRAOptimizer
) -> None:
    loss_of(model, BATCH).backward()
    assert changed_weights(model, before) == MLP_WEIGHTS
    optimizer.restore()
    assert not changed_weights(model, before)


def test_without_auto_a_forward_is_left_alone(model: nn.Module, before: dict[str, Tensor]) -> None:
    optimizer = flatlora(model, auto=False)
    loss_of(model, BATCH)
    assert not changed_weights(model, before)
    with optimizer.perturbed():
        loss_of(model, BATCH)
        assert changed_weights(model, before) == MLP_WEIGHTS


def test_gradients_may_be_zeroed_between_forward_and_backward(
    model: nn.Module, optimizer: FlatLoRAOptimizer
) -> None:
    loss_of(model, BATCH).backward()
    expected = gradients(model)
    loss = loss_of(model, BATCH)
    optimizer.zero_grad()
    loss.backward()
    assert_equal_tensors(gradients(model), expected)


class Checkpointed(nn.Module):
    """Two adapted networks in a row, which are recomputed in backward."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.second = lora_mlp(), lora_mlp(seed=1)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.first, self.second):
            y = (
                part(x)
                if self.use_reentrant is None
                else checkpoint(part, x, use_reentrant=self.use_reentrant)
            )
            x = torch.nn.functional.pad(y, (0, 1))
        return y


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_gives_the_same_gradients(use_reentrant: bool) -> None:
    def run(setting: bool | None) -> tuple[dict[str, Tensor], float]:
        model = Checkpointed(setting)
        optimizer = flatlora(model)
        x, y = BATCH
        loss = loss_of(model, (x.clone().requires_grad_(), y))
        loss.backward()
        assert optimizer.is_perturbed
        return gradients(model), loss.item()

    expected, loss = run(None)
    actual, recomputed = run(use_reentrant)
    assert loss == recomputed
    assert_equal_tensors(actual, expected)


def test_checkpointing_of_transformers_gives_the_same_gradients() -> None:
    tokens = torch.arange(12).view(2, 6)

    def run(**checkpointing: Any) -> dict[str, Tensor]:
        model = lora_gpt2()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(**checkpointing)
        optimizer = flatlora(model.train())
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        return gradients(model)

    expected = run()
    for use_reentrant in (False, True):
        actual = run(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        assert_equal_tensors(actual, expected)
