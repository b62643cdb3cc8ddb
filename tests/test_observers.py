"""Evaluation, saving and logging see clean weights in the middle of a step."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer
from helpers import (
    MLP_WEIGHTS,
    OwnLoRA,
    assert_equal_tensors,
    changed_weights,
    clean_output,
    fingerprint,
    flatlora,
    gradients,
    lora_convnet,
    lora_gpt2,
    lora_lm,
    lora_mlp,
    loss_of,
    mlp_batch,
)

BATCH = mlp_batch()


@pytest.fixture
def pending(
    model: nn.Module, optimizer: FlatLoRAOptimizer, before: dict[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """A forward whose backward comes after the test's body, and must give the undisturbed gradients."""
    loss_of(model, BATCH).backward()
    expected = gradients(model)
    optimizer.zero_grad()
    noisy = fingerprint(model)
    loss = loss_of(model, BATCH)
    yield before
    assert_equal_tensors(fingerprint(model), noisy)
    loss.backward()
    assert_equal_tensors(gradients(model), expected)
    optimizer.step()
    assert not changed_weights(model, before)


def test_eval_forward_is_clean(model: nn.Module, pending: dict[str, Tensor]) -> None:
    model.eval()
    assert torch.equal(model(BATCH[0]), clean_output(pending))
    assert torch.equal(model.base_model.model(BATCH[0]), clean_output(pending))
    model.train()


def test_no_grad_forward_is_clean(model: nn.Module, pending: dict[str, Tensor]) -> None:
    with torch.no_grad():
        assert torch.equal(model(BATCH[0]), clean_output(pending))
    with torch.inference_mode():
        assert torch.equal(model(BATCH[0]), clean_output(pending))


def test_a_reference_pass_without_adapters_is_clean(model: nn.Module, pending: dict[str, Tensor]) -> None:
    plain = lora_mlp()
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(BATCH[0]), plain(BATCH[0]))


def test_the_clean_block_is_clean(
    model: nn.Module, optimizer: FlatLoRAOptimizer, pending: dict[str, Tensor]
) -> None:
    with optimizer.clean():
        assert not optimizer.is_perturbed
        assert not changed_weights(model, pending)
        assert torch.equal(model(BATCH[0]), clean_output(pending))
        with optimizer.clean(), pytest.raises(RuntimeError, match="clean"):
            optimizer.perturb()
    assert optimizer.is_perturbed


def test_a_clean_block_before_the_first_forward_is_clean_as_well(
    model: nn.Module, optimizer: FlatLoRAOptimizer, before: dict[str, Tensor]
) -> None:
    with optimizer.clean():
        loss_of(model, BATCH).backward()
        assert not changed_weights(model, before)
    assert not changed_weights(model, before)
    loss_of(model, BATCH)
    assert changed_weights(model, before) == MLP_WEIGHTS


def test_a_failing_observer_leaves_the_step_as_it_was(model: nn.Module, pending: dict[str, Tensor]) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(torch.randn(3, 7))


def test_an_interrupted_observer_leaves_the_step_usable(
    model: nn.Module, optimizer: FlatLoRAOptimizer, pending: dict[str, Tensor]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.base_model.model.fc2.register_forward_pre_hook(interrupt)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(BATCH[0])
    handle.remove()
    optimizer.perturb()


def test_saving_sees_clean_weights(model: nn.Module, pending: dict[str, Tensor], tmp_path: Path) -> None:
    fresh = lora_mlp()
    assert_equal_tensors(dict(model.state_dict()), dict(fresh.state_dict()))
    assert_equal_tensors(
        dict(model.base_model.model.fc1.state_dict()), dict(fresh.base_model.model.fc1.state_dict())
    )
    assert_equal_tensors(get_peft_model_state_dict(model), get_peft_model_state_dict(fresh))
    model.save_pretrained(tmp_path)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    assert_equal_tensors(torch.load(buffer), dict(fresh.state_dict()))


@pytest.mark.parametrize("make", [lora_convnet, lora_gpt2, lambda: lora_lm(tied=True)])
@pytest.mark.parametrize("restore", ["exact", "snapshot"])
def test_saving_whole_models_sees_clean_weights(make: Callable[[], nn.Module], restore: str) -> None:
    model = make()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = flatlora(model, restore=restore)
    with optimizer.perturbed():
        assert_equal_tensors(dict(model.state_dict()), expected)
        noisy = {n for n, p in model.named_parameters() if not torch.equal(p, expected[n])}
        assert len(noisy) == len(optimizer.targets)
    assert_equal_tensors(dict(model.state_dict()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # for C, and for torch operations
@pytest.mark.parametrize("restore", ["exact", "snapshot"])
def test_saving_a_weight_of_several_parts_sees_it_clean(restore: str, dtype: torch.dtype) -> None:
    layer = OwnLoRA(torch.randn(9, 1 << 17, dtype=dtype))
    clean = layer.weight.clone()
    with flatlora(layer, restore=restore).perturbed():
        assert not torch.equal(layer.weight, clean)
        assert torch.equal(layer.state_dict()["weight"], clean)


def test_explicit_noise_reaches_a_model_in_eval_mode(
    model: nn.Module, optimizer: FlatLoRAOptimizer, before: dict[str, Tensor]
) -> None:
    model.eval()
    clean = model(BATCH[0])
    with optimizer.perturbed():
        assert not torch.equal(model(BATCH[0]), clean)
    assert torch.equal(model(BATCH[0]), clean)
