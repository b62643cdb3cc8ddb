"""Random states, hooks and weights are as before when an optimizer has gone."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import lr_scheduler

from flatlora_optim import FlatLoRAOptimizer, GaussianNoise
from flatlora_optim.noise import NoiseKey
from flatlora_optim.perturbation import states
from helpers import (
    MLP_WEIGHTS,
    OwnLoRA,
    changed_weights,
    fingerprint,
    flatlora,
    int_view,
    lora_mlp,
    loss_of,
    mlp_batch,
    train_automatic,
    train_closure,
    train_explicit,
    trainable,
    untouched_rng,
)

BATCH = mlp_batch()


def test_no_call_touches_a_global_generator(model: nn.Module, tmp_path: Path) -> None:
    base = torch.optim.AdamW(trainable(model), lr=0.01)
    with untouched_rng():
        optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, schedule="constant")
    calls: list[Callable[[], Any]] = [
        optimizer.perturb,
        optimizer.restore,
        lambda: loss_of(model, BATCH).backward(),
        lambda: model.eval()(BATCH[0]),
        model.train,
        optimizer.state_dict,
        model.state_dict,
        optimizer.step,
        optimizer.zero_grad,
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: train_explicit(model, optimizer, BATCH),
        lambda: train_closure(model, optimizer, BATCH),
        optimizer.metrics,
        optimizer.close,
    ]
    for call in calls:
        with untouched_rng():
            call()


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._state_dict_hooks) for m in model.modules()
    )


def test_close_restores_and_removes_every_hook(model: nn.Module, before: dict[str, Tensor]) -> None:
    hooks = hooks_of(model)
    optimizer = flatlora(model)
    assert hooks_of(model) > hooks
    loss_of(model, BATCH)
    optimizer.close()
    assert not changed_weights(model, before)
    assert hooks_of(model) == hooks
    loss_of(model, BATCH).backward()
    assert not changed_weights(model, before)
    optimizer.base.step()
    optimizer.close()


def test_a_closed_optimizer_perturbs_no_more(model: nn.Module, optimizer: FlatLoRAOptimizer) -> None:
    optimizer.close()
    with pytest.raises(RuntimeError, match="was closed"):
        optimizer.perturb()
    with pytest.raises(RuntimeError, match="was closed"):
        train_closure(model, optimizer, BATCH)


def test_a_newer_optimizer_for_the_same_adapters_takes_over(
    model: nn.Module, before: dict[str, Tensor]
) -> None:
    """As when a notebook's cell runs again, while a scheduler keeps the old optimizer alive."""
    hooks = hooks_of(model)
    old = flatlora(model)
    scheduler = lr_scheduler.ExponentialLR(old, 0.5)
    loss_of(model, BATCH)
    new = flatlora(model)
    assert scheduler.optimizer is old
    assert not changed_weights(model, before)
    train_automatic(model, new, BATCH)
    assert not changed_weights(model, before)
    assert new.step_count == 1
    new.close()
    assert hooks_of(model) == hooks


def test_optimizers_for_different_adapters_take_turns(model: nn.Module, before: dict[str, Tensor]) -> None:
    first = flatlora(model)
    model.add_adapter("second", LoraConfig(target_modules=["fc1", "fc2"], r=2))
    model.set_adapter("second")
    second = flatlora(model, seed=2)
    seen = []
    for name, optimizer in (("second", second), ("default", first)):
        model.set_adapter(name)
        loss_of(model, BATCH).backward()
        assert changed_weights(model, before) == MLP_WEIGHTS
        seen.append(fingerprint(model))
        optimizer.step()
        assert not changed_weights(model, before)
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in MLP_WEIGHTS)


@pytest.mark.parametrize("mode", ["in_place", "virtual"])
def test_optimizers_do_not_put_noise_on_the_same_weight_at_once(
    mode: str, model: nn.Module, before: dict[str, Tensor]
) -> None:
    first = flatlora(model, mode=mode)
    model.add_adapter("second", LoraConfig(target_modules=["fc1", "fc2"], r=2))
    model.set_adapter("second")
    second = flatlora(model, seed=2, mode=mode)
    model.set_adapter("default")
    loss_of(model, BATCH).backward()
    noise = changed_weights(model, before)
    model.set_adapter("second")
    with pytest.raises(RuntimeError, match=r"fc1: its weight carries noise already"):
        loss_of(model, BATCH)
    assert not second.is_perturbed
    assert changed_weights(model, before) == noise
    first.step()
    assert not changed_weights(model, before)
    loss_of(model, BATCH).backward()
    second.step()
    assert not changed_weights(model, before)


@pytest.mark.parametrize("mode", ["in_place", "virtual"])
def test_a_model_whose_adapters_were_taken_away_gets_no_noise(mode: str, model: nn.Module) -> None:
    old = flatlora(model, mode=mode)
    train_automatic(model, old, BATCH)
    bare = model.unload()
    clean = lora_mlp().unload()
    assert torch.equal(loss_of(bare, BATCH), loss_of(clean, BATCH))
    assert not old.is_perturbed
    renewed = get_peft_model(bare, LoraConfig(target_modules=["fc1", "fc2"], r=2))
    before = fingerprint(renewed)
    new = flatlora(renewed, mode=mode)
    with pytest.raises(RuntimeError, match="closed"):
        old.perturb()
    train_automatic(renewed, new, BATCH)
    assert not changed_weights(renewed, before)


def test_garbage_collection_restores_and_removes_every_hook(
    model: nn.Module, before: dict[str, Tensor]
) -> None:
    hooks = hooks_of(model)
    optimizer = flatlora(model)
    loss_of(model, BATCH)
    assert changed_weights(model, before) == MLP_WEIGHTS
    del optimizer
    gc.collect()
    assert not changed_weights(model, before)
    assert hooks_of(model) == hooks


def test_garbage_collection_restores_what_is_left(model: nn.Module, before: dict[str, Tensor]) -> None:
    optimizer = flatlora(model)
    loss_of(model, BATCH)
    del model.base_model.model.fc1.base_layer.weight
    del optimizer
    gc.collect()
    name = "base_model.model.fc2.base_layer.weight"
    assert not changed_weights(model, {name: before[name]})


class FailsOnce(GaussianNoise):
    error: type[BaseException] | None = None

    def block(self, key: NoiseKey, number: int, out: Tensor) -> Tensor:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return super().block(key, number, out)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_garbage_collection_restores_whatever_comes_in_between(
    error: type[BaseException], model: nn.Module, before: dict[str, Tensor]
) -> None:
    noise = FailsOnce()
    optimizer = flatlora(model, noise=noise)
    loss_of(model, BATCH)
    noise.error = error
    del optimizer
    gc.collect()
    assert noise.error is None
    assert not changed_weights(model, before)


def test_garbage_collection_writes_nothing_over_new_weights(model: nn.Module) -> None:
    optimizer = flatlora(model)
    loss_of(model, BATCH)
    other = lora_mlp(seed=4)
    model.load_state_dict(other.state_dict())
    del optimizer
    gc.collect()
    assert not changed_weights(model, fingerprint(other))


def test_a_copy_of_a_clean_model_is_free_of_the_optimizer(
    model: nn.Module, optimizer: FlatLoRAOptimizer, before: dict[str, Tensor]
) -> None:
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loss_of(twin, BATCH).backward()
        assert not changed_weights(twin, before)
        assert not optimizer.is_perturbed
        twin.state_dict()


@pytest.mark.parametrize("auto", [True, False])
def test_a_perturbed_model_refuses_to_be_copied(auto: bool, model: nn.Module) -> None:
    optimizer = flatlora(model, auto=auto)
    with optimizer.perturbed():
        with pytest.raises(RuntimeError, match=r"can't copy.*optimizer\.restore"):
            copy.deepcopy(model)
        with pytest.raises(RuntimeError, match=r"can't pickle.*optimizer\.restore"):
            pickle.dumps(model)


@pytest.mark.parametrize("block", ["clean", "restore"])
def test_norms_are_those_of_weights_loaded_in_the_middle_of_a_step(block: str) -> None:
    model, twin = lora_mlp(), lora_mlp()
    heavy = {name: 10 * value for name, value in model.state_dict().items()}
    twin.load_state_dict(heavy)
    optimizer, expected = flatlora(model, lr=0.0), flatlora(twin)
    loss_of(model, BATCH)
    if block == "clean":
        with optimizer.clean():
            model.load_state_dict(heavy)
    else:
        optimizer.restore()
        model.load_state_dict(heavy)
        optimizer.perturb()
    optimizer.step()
    with optimizer.perturbed(), expected.perturbed():
        assert optimizer.metrics()["noise_norm"] == expected.metrics()["noise_norm"]


class SometimesOutOfMemory(GaussianNoise):
    def __init__(self) -> None:
        self.left = math.inf

    def block(self, key: NoiseKey, number: int, out: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise MemoryError
        return super().block(key, number, out)


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_restore_that_failed_can_be_repeated(blocks: int) -> None:
    model, noise = lora_mlp(), SometimesOutOfMemory()
    clean = fingerprint(model)
    optimizer = flatlora(model, noise=noise)
    loss_of(model, BATCH).backward()
    noise.left = blocks
    for _ in range(2 + blocks):
        with pytest.raises(MemoryError):
            optimizer.step()
        assert optimizer.is_perturbed
        assert optimizer.step_count == 0
    noise.left = math.inf
    optimizer.step()
    assert not changed_weights(model, clean)
    assert optimizer.step_count == 1


def test_a_restore_that_failed_in_the_middle_of_a_weight_can_be_repeated() -> None:
    layer, noise = OwnLoRA(torch.randn(3, 1 << 17)), SometimesOutOfMemory()  # two blocks
    clean = fingerprint(layer)
    optimizer = flatlora(layer, noise=noise)
    optimizer.perturb()
    noise.left = 1
    with pytest.raises(MemoryError):  # what it has written itself is not taken for somebody else's
        optimizer.restore()
    noise.left = math.inf
    assert torch.equal(int_view(layer.state_dict()["weight"]), clean["weight"])
    optimizer.restore()
    assert not changed_weights(layer, clean)


class NoMemoryForTheFirstBlock(GaussianNoise):
    is_full = False

    def block(self, key: NoiseKey, number: int, out: Tensor) -> Tensor:
        if self.is_full and number == 0:
            raise MemoryError
        return super().block(key, number, out)


def test_a_weight_that_can_not_be_restored_does_not_keep_the_others(
    model: nn.Module, before: dict[str, Tensor]
) -> None:
    noise = NoMemoryForTheFirstBlock()
    optimizer = flatlora(model, noise=noise)
    optimizer.perturb()
    noise.is_full = True
    with pytest.raises(MemoryError):
        optimizer.restore()
    assert changed_weights(model, before) == {"base_model.model.fc1.base_layer.weight"}
    noise.is_full = False
    optimizer.restore()
    assert not changed_weights(model, before)


def test_a_clean_block_that_can_not_begin_leaves_the_step_as_it_was(
    model: nn.Module, before: dict[str, Tensor]
) -> None:
    noise = SometimesOutOfMemory()
    optimizer = flatlora(model, noise=noise)
    optimizer.perturb()
    noisy = fingerprint(model)
    noise.left = 0
    with pytest.raises(MemoryError), optimizer.clean():
        pass
    assert optimizer.is_perturbed
    assert not changed_weights(model, noisy)
    noise.left = math.inf
    optimizer.step()
    assert not changed_weights(model, before)


def test_a_perturb_that_failed_is_taken_back() -> None:
    model, noise = lora_mlp(), SometimesOutOfMemory()
    clean = fingerprint(model)
    optimizer = flatlora(model, noise=noise, restore="snapshot")
    noise.left = 1  # one of the two weights
    with pytest.raises(MemoryError):
        optimizer.perturb()
    assert not optimizer.is_perturbed
    assert not changed_weights(model, clean)


def test_an_interrupt_delays_a_restore_but_does_not_prevent_it(
    model: nn.Module, optimizer: FlatLoRAOptimizer, before: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(perturbations: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    optimizer.perturb()
    monkeypatch.setattr(states, "remove_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.restore()
    assert not optimizer.is_perturbed
    assert not changed_weights(model, before)
