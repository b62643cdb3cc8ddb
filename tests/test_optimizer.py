"""It is a torch.optim.Optimizer that shares everything with the base."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from flatlora_optim import FlatLoRAOptimizer
from helpers import (
    MLP_WEIGHTS,
    changed_weights,
    flatlora,
    lora_mlp,
    loss_of,
    mlp_batch,
    train_automatic,
    trainable,
)

BATCH = mlp_batch()


def test_it_is_an_optimizer_that_shares_everything_with_the_base(model: nn.Module) -> None:
    base = torch.optim.AdamW(trainable(model), lr=0.01)
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, total_steps=10)
    assert isinstance(optimizer, torch.optim.Optimizer)
    train_automatic(model, optimizer, BATCH)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    assert "step 1 of 10" in repr(optimizer)


def schedulers() -> Iterator[Any]:
    """Every learning-rate scheduler of torch, with the least arguments it takes."""
    arguments: dict[str, dict[str, Any]] = {
        "LambdaLR": {"lr_lambda": lambda step: 0.5**step},
        "MultiplicativeLR": {"lr_lambda": lambda step: 0.5},
        "StepLR": {"step_size": 1},
        "MultiStepLR": {"milestones": [1, 2]},
        "ExponentialLR": {"gamma": 0.5},
        "CosineAnnealingLR": {"T_max": 5},
        "CosineAnnealingWarmRestarts": {"T_0": 5},
        "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1},
        "OneCycleLR": {"max_lr": 0.1, "total_steps": 10},
        "ReduceLROnPlateau": {"patience": 0},
    }
    combined = {
        "SequentialLR": lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[1]
        ),
        "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.5)], o),
    }
    for name in lr_scheduler.__all__:
        cls = getattr(lr_scheduler, name)
        if name in combined:
            yield pytest.param(combined[name], id=name)
        elif name != "LRScheduler" and isinstance(cls, type):
            kwargs = arguments.get(name, {})
            yield pytest.param(lambda o, cls=cls, kwargs=kwargs: cls(o, **kwargs), id=name)
    yield pytest.param(lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01), id="SWALR")


@pytest.mark.parametrize("make", schedulers())
def test_every_lr_scheduler_works(make: Callable[[Any], Any]) -> None:
    def rates(wrap: bool) -> list[float]:
        model = lora_mlp()
        base = torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9)
        optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, total_steps=9) if wrap else base
        scheduler = make(optimizer)
        plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        found = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns if it believes that step() was left out
            warnings.filterwarnings("ignore", "The epoch parameter", UserWarning)
            for _ in range(6):
                loss_of(model, BATCH).backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step(*[1.0] if plateau else [])
                found.append(base.param_groups[0]["lr"])
        return found

    wrapped = rates(wrap=True)
    assert wrapped == rates(wrap=False)
    assert len(set(wrapped)) > 1


def test_a_scheduler_on_the_base_works_as_well(model: nn.Module, optimizer: FlatLoRAOptimizer) -> None:
    scheduler = lr_scheduler.ExponentialLR(optimizer.base, 0.5)
    train_automatic(model, optimizer, BATCH)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_step_hooks_run_with_clean_weights(
    model: nn.Module, before: dict[str, Tensor], optimizer: FlatLoRAOptimizer
) -> None:
    calls = []
    optimizer.base.register_step_pre_hook(lambda *_: calls.append(("base", changed_weights(model, before))))
    optimizer.register_step_pre_hook(lambda *_: calls.append(("pre", set())))
    optimizer.register_step_post_hook(lambda *_: calls.append(("post", changed_weights(model, before))))
    train_automatic(model, optimizer, BATCH)
    assert calls == [("pre", set()), ("base", set()), ("post", set())]


def test_state_dict_hooks_run(optimizer: FlatLoRAOptimizer) -> None:
    calls = []
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", "load"]


def test_groups_carry_their_own_sigma(model: nn.Module, before: dict[str, Tensor]) -> None:
    def of(layer: str) -> list[nn.Parameter]:
        return [p for name, p in model.named_parameters() if p.requires_grad and layer in name]

    base = torch.optim.SGD([{"params": of("fc1"), "sigma": 0.0}, {"params": of("fc2")}], lr=0.1)
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, schedule="constant")
    with optimizer.perturbed():
        assert changed_weights(model, before) == {"base_model.model.fc2.base_layer.weight"}
    optimizer.param_groups[0]["sigma"] = 0.2
    optimizer.param_groups[1]["sigma"] = 0.0
    optimizer.step()
    with optimizer.perturbed():
        assert changed_weights(model, before) == {"base_model.model.fc1.base_layer.weight"}


def test_a_group_may_be_added(model: nn.Module, before: dict[str, Tensor]) -> None:
    a, *rest = trainable(model)
    optimizer = FlatLoRAOptimizer(torch.optim.SGD(rest, lr=0.1), model, sigma=0.1, schedule="constant")
    optimizer.add_param_group({"params": [a], "lr": 0.5})
    assert [group["sigma"] for group in optimizer.base.param_groups] == [0.1, 0.1]
    old = a.detach().clone()
    train_automatic(model, optimizer, BATCH)
    assert not torch.equal(a, old)
    with pytest.raises(ValueError, match="sigma"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "sigma": -1.0})
    assert len(optimizer.param_groups) == 2


def test_groups_that_disagree_on_one_layer_are_an_error(model: nn.Module, before: dict[str, Tensor]) -> None:
    a, *rest = trainable(model)
    base = torch.optim.SGD([{"params": [a], "sigma": 0.2}, {"params": rest}], lr=0.1)
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, schedule="constant")
    with pytest.raises(ValueError, match=r"fc1.*different sigma"):
        loss_of(model, BATCH)
    assert not changed_weights(model, before)
    assert not optimizer.is_perturbed


def test_the_base_s_own_methods_are_reachable(model: nn.Module) -> None:
    class Averaging(torch.optim.SGD):
        def eval(self) -> str:
            return "averaged"

    optimizer = flatlora(model, base=Averaging)
    assert optimizer.eval() == "averaged"
    with pytest.raises(AttributeError, match="nonsense"):
        optimizer.nonsense  # noqa: B018


def test_metrics_report_the_current_step(model: nn.Module) -> None:
    optimizer = flatlora(model, sigma=0.2, schedule="cosine", total_steps=2)
    train_automatic(model, optimizer, BATCH)
    clean = [p.detach().clone() for n, p in model.named_parameters() if n in MLP_WEIGHTS]
    loss_of(model, BATCH).backward()
    noisy = [p.detach().clone() for n, p in model.named_parameters() if n in MLP_WEIGHTS]
    actual = sum((b - a).square().sum().item() for a, b in zip(clean, noisy, strict=True)) ** 0.5
    metrics = optimizer.metrics()
    assert metrics["sigma"] == optimizer.sigma == pytest.approx(0.1)
    assert metrics["noise_norm"] == pytest.approx(actual, rel=0.25)
    assert metrics["seconds"] > 0


def test_seconds_count_all_that_is_done_for_the_noise(optimizer: FlatLoRAOptimizer) -> None:
    start, seconds = time.perf_counter(), [optimizer.metrics()["seconds"]]
    for call in (optimizer.perturb, optimizer.restore, optimizer.perturb):  # the last draws nothing
        call()
        seconds.append(optimizer.metrics()["seconds"])
    assert seconds == sorted(set(seconds))
    assert seconds[-1] < time.perf_counter() - start


class Prepared(torch.optim.Optimizer):
    """As Accelerate's: another one from outside, for which torch's constructor was never called."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)
    defaults = property(lambda self: self.inner.defaults)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def test_a_prepared_optimizer_may_be_the_base(model: nn.Module) -> None:
    base = Prepared(torch.optim.AdamW(trainable(model), lr=0.01))
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, schedule="constant")
    train_automatic(model, optimizer, BATCH)
    assert optimizer.step_count == 1


def test_without_sigma_the_length_of_the_run_does_not_matter(model: nn.Module) -> None:
    optimizer = flatlora(model, sigma=0.0, schedule="cosine", total_steps="deferred", auto=False)
    train_automatic(model, optimizer, BATCH)
    assert optimizer.step_count == 1


def test_a_base_without_a_learning_rate_is_not_stepped_past_its_wrapper(model: nn.Module) -> None:
    from transformers import Adafactor

    base = Adafactor(trainable(model))
    assert base.param_groups[0]["lr"] is None
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, schedule="constant")
    train_automatic(model, optimizer, BATCH)
    loss_of(model, BATCH).backward()
    with pytest.raises(RuntimeError, match="stepped by itself"):
        base.step()
