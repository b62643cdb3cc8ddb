"""Taking over an optimizer that is in use, and giving it back: `adopt`, `install`, `detach`."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from common import Watch, adapter, flat_optimizer, identical, tiny_model, token_batches
from flatlora_optim import FlatLoRAOptimizer

OPTIONS: dict[str, Any] = {"sigma": 0.1, "schedule": "constant", "seed": 7}


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)


def train(model: nn.Module, optimizer: Any, batches: Any) -> list[float]:
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._state_dict_hooks) for m in model.modules()
    )


def test_goes_on_from_a_checkpoint_that_was_loaded_into_the_base() -> None:
    batches = token_batches(6)
    model = tiny_model().train()
    optimizer = flat_optimizer(model, schedule="cosine", total_steps=6)
    train(model, optimizer, batches[:3])
    saved, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    expected = train(model, optimizer, batches[3:])

    resumed = tiny_model().train()
    resumed.load_state_dict(weights)
    base = adamw(resumed)
    base.load_state_dict(saved)
    with pytest.warns(UserWarning, match=r"sigma is 0\.1 \(not 0\.2\).*seed is 7 \(not 0\)"):
        optimizer = FlatLoRAOptimizer.adopt(base, resumed, sigma=0.2, total_steps=6)
    assert optimizer.step_count == 3
    assert train(resumed, optimizer, batches[3:]) == expected
    assert identical(adapter(resumed), adapter(model))


def test_refuses_a_malformed_state_and_leaves_the_groups_as_they_were() -> None:
    model = tiny_model()
    base = adamw(model)
    base.load_state_dict(flat_optimizer(model).state_dict())
    base.param_groups[0]["flatlora_step"] = -1
    before = dict(base.param_groups[0])
    with pytest.raises(ValueError, match="step counter"):
        FlatLoRAOptimizer.adopt(base, model, **OPTIONS)
    assert base.param_groups[0] == before


@pytest.mark.parametrize("with_scaler", [False, True])
def test_takes_the_place_of_its_base_inside_accelerate_and_gives_it_back(with_scaler: bool) -> None:
    accelerator = Accelerator(cpu=True)
    if with_scaler:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    model = tiny_model().train()
    watch = Watch(model)
    base = adamw(model)
    accelerated = accelerator.prepare_optimizer(base)
    scheduler = torch.optim.lr_scheduler.LinearLR(accelerated, 1.0, 0.1, total_iters=8)
    keys, hooks = [set(group) for group in base.param_groups], hooks_of(model)
    batches = token_batches(9)

    def step(batch: Any, factor: float = 1.0) -> None:
        loss = model(**batch).loss * factor
        (accelerator.scaler.scale(loss) if with_scaler else loss).backward()
        accelerated.step()
        scheduler.step()
        accelerated.zero_grad()

    step(batches[0])  # binds the base's step method, with a scaler
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in base.state.items()}
    watch.uses.clear()
    optimizer = FlatLoRAOptimizer.adopt(accelerated, model, **OPTIONS)
    assert accelerated.optimizer is optimizer
    for p, before in state.items():  # loading it a second time would have made copies
        assert all(torch.equal(base.state[p][key], before[key]) for key in before)
    step(batches[1])
    step(batches[2])
    assert optimizer.step_count == 2
    if with_scaler:
        step(batches[3], float("inf"))
        assert accelerated.step_was_skipped
        assert optimizer.step_count == 2
    assert set(watch.uses) == {("train", True), ("backward", True)}

    model(**batches[4]).loss.backward()  # in the middle of a step
    assert not watch.is_clean()
    assert optimizer.detach() is base
    assert accelerated.optimizer is base
    assert watch.is_clean()
    assert hooks_of(model) == hooks
    assert [set(group) for group in base.param_groups] == keys
    accelerated.zero_grad()
    watch.uses.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(batches[5])
        step(batches[6])
    assert set(watch.uses) == {("train", False), ("backward", False)}
    again = FlatLoRAOptimizer.adopt(accelerated, model, **OPTIONS)
    step(batches[7])
    assert again.step_count == 1


def test_a_sigma_of_a_group_outlives_it() -> None:
    model = tiny_model()
    base = adamw(model)
    base.param_groups[0]["sigma"] = 0.3
    optimizer = FlatLoRAOptimizer.adopt(base, model, **OPTIONS)
    assert optimizer.sigma == 0.3
    optimizer.detach()
    assert base.param_groups[0]["sigma"] == 0.3


def test_refuses_a_wrapper_of_another_optimizer() -> None:
    Accelerator(cpu=True)
    model = tiny_model()
    stranger = AcceleratedOptimizer(adamw(model))
    with pytest.raises(ValueError, match="AcceleratedOptimizer does not hold this AdamW"):
        flat_optimizer(model).install(stranger)
