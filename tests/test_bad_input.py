"""Bad input raises at once, says what was wrong and how to mend it, and changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flatlora_optim import FlatLoRAOptimizer, NoiseTable, register
from helpers import MLP, OwnLoRA, changed_weights, fingerprint, flatlora, lora_mlp, trainable


def hooks_of(model: nn.Module) -> list[int]:
    return [
        len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._state_dict_hooks) for m in model.modules()
    ]


def refuses(
    error: type[Exception],
    match: str,
    *,
    model: nn.Module | None = None,
    base: Any = None,
    **options: Any,
) -> None:
    """Checks the error, and that the model and the base are as they were."""
    model = lora_mlp() if model is None else model
    base = torch.optim.SGD(model.parameters(), lr=0.1) if base is None else base
    on_meta = any(p.is_meta for p in model.parameters())
    hooks, weights = hooks_of(model), {} if on_meta else fingerprint(model)
    groups = [set(group) for group in getattr(base, "param_groups", [])]
    with pytest.raises(error, match=match):
        FlatLoRAOptimizer(base, model, **{"sigma": 0.1, "total_steps": 10, **options})
    assert hooks_of(model) == hooks
    assert on_meta or not changed_weights(model, weights)
    assert [set(group) for group in getattr(base, "param_groups", [])] == groups


@pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf, -math.inf])
def test_sigma_out_of_range(sigma: float) -> None:
    refuses(ValueError, r"sigma must be finite and >= 0 \(0\.05 is usual", sigma=sigma)
    model = lora_mlp()
    base = torch.optim.SGD([{"params": trainable(model), "sigma": sigma}], lr=0.1)
    refuses(ValueError, "sigma must be finite", model=model, base=base)


@pytest.mark.parametrize("sigma", ["0.1", None, True, [0.1]])
def test_sigma_of_another_type(sigma: Any) -> None:
    refuses(TypeError, "sigma must be a number", sigma=sigma)


def test_numbers_of_numpy_are_numbers() -> None:
    optimizer = flatlora(
        lora_mlp(), sigma=np.float32(0.5), seed=np.int64(3), total_steps=np.int32(7), schedule="linear"
    )
    assert (optimizer.seed, optimizer.total_steps) == (3, 7)
    assert all(type(value) in (int, float, str) for value in (optimizer.seed, optimizer.total_steps))
    with optimizer.perturbed():
        pass


@pytest.mark.parametrize("base", [None, 3, torch.optim.SGD, "adamw", nn.Linear(1, 1)])
def test_a_base_that_is_no_optimizer(base: Any) -> None:
    model = lora_mlp()
    hooks = hooks_of(model)
    with pytest.raises(TypeError, match=r"base must be an optimizer such as torch\.optim\.AdamW"):
        FlatLoRAOptimizer(base, model, sigma=0.1, total_steps=10)
    assert hooks_of(model) == hooks


def test_a_base_that_is_one_of_us() -> None:
    model = lora_mlp()
    refuses(TypeError, "wrap the optimizer inside it", model=model, base=flatlora(model))


def test_a_base_that_was_wrapped_before() -> None:
    model = lora_mlp()
    optimizer = flatlora(model, sigma=0.3)
    refuses(ValueError, "make a new base optimizer", model=model, base=optimizer.base)
    with optimizer.perturbed():  # still in charge
        pass


def test_a_model_that_is_no_module() -> None:
    base = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module or a list of some, got list"):
        FlatLoRAOptimizer(base, [], sigma=0.1, total_steps=10)  # type: ignore[arg-type]


def test_no_targets() -> None:
    refuses(
        ValueError,
        r"no LoRA module to perturb in MLP. Looked for PEFT layers .*loralib-style.*flatlora_optim\.register",
        model=MLP(),
    )


def test_targets_that_are_not_optimized() -> None:
    refuses(
        ValueError,
        r"(?s)no LoRA module to perturb.*Found, but not usable.*fc1: .*not in the optimizer",
        base=torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1),
    )


def test_a_trainable_base_weight() -> None:
    model = lora_mlp()
    model.base_model.model.fc1.base_layer.weight.requires_grad_(True)
    refuses(ValueError, r"fc1: its base weight is trainable.*requires_grad_\(False\)", model=model)


def test_a_weight_on_the_meta_device() -> None:
    refuses(ValueError, "fc1: its weight is on the meta device; load", model=lora_mlp().to("meta"))


def test_a_weight_made_in_inference_mode() -> None:
    with torch.inference_mode():
        weight = torch.randn(4, 4)
    layer = OwnLoRA(torch.randn(4, 4))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    base = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    refuses(ValueError, "inference_mode.*load the model outside", model=layer, base=base)


@pytest.mark.parametrize(
    ("total_steps", "error", "match"),
    [
        (None, ValueError, r"'cosine' schedule needs `total_steps`.*schedule='constant'"),
        (0, ValueError, "total_steps must be at least 1"),
        (-5, ValueError, "total_steps must be at least 1"),
        (2.5, TypeError, "total_steps must be an int, a number of optimizer steps"),
        (True, TypeError, "total_steps must be an int, a number of optimizer steps"),
        ("many", TypeError, "total_steps must be an int, a number of optimizer steps"),
    ],
)
def test_wrong_total_steps(total_steps: Any, error: type[Exception], match: str) -> None:
    refuses(error, match, total_steps=total_steps)


@pytest.mark.parametrize("seed", [None, 1.5, "a", True])
def test_a_seed_that_is_no_integer(seed: Any) -> None:
    refuses(TypeError, "seed must be an int", seed=seed)


@pytest.mark.parametrize("noise", [object(), NoiseTable, 3])
def test_noise_that_is_no_source(noise: Any) -> None:
    refuses(TypeError, "noise must be one of 'gaussian', 'table', 'low_rank', or an object with", noise=noise)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("schedule", "exponential"),
        ("schedule", 3),
        ("mode", "inplace"),
        ("restore", "journal"),
        ("noise", "uniform"),
        ("rank_noise", "same"),
    ],
)
def test_an_unknown_choice(option: str, value: Any) -> None:
    refuses(ValueError, f"{option} must be one of '", **{option: value})


def test_registrations_that_name_nothing_useful() -> None:
    layer = OwnLoRA(torch.randn(4, 5))
    with pytest.raises(AttributeError, match="no_such"):
        register(layer, lora_A="no_such", lora_B="lora_B")
    with pytest.raises(TypeError, match="'scaling' of OwnLoRA is not a tensor"):
        register(layer, lora_A="scaling", lora_B="lora_B")
    for scaling in ("forward", "lora_A"):
        with pytest.raises(TypeError, match="scaling must be a single number"):
            register(layer, lora_A="lora_A", lora_B="lora_B", scaling=scaling)
    with pytest.raises(ValueError, match=r"B @ A has shapes \(4, 2\) @ \(2, 5\).*check lora_A"):
        register(layer, lora_A="lora_A", lora_B="lora_B", transposed=True)
    for parts in ({}, {"lora_A": "lora_A"}, {"lora_A": "lora_A", "lora_B": "lora_B", "delta": "forward"}):
        with pytest.raises(TypeError, match="give either lora_A and lora_B, or delta"):
            register(layer, **parts)
    with pytest.raises(TypeError, match="delta must be the path of a method or a function"):
        register(layer, delta=3)
    for delta, answer in ((lambda m: torch.zeros(5, 4), "as .4, 5"), (lambda m: 3, "delta gave int")):
        with pytest.raises(ValueError, match=answer):
            register(layer, delta=delta)
    with pytest.raises(TypeError, match="must be a list of paths"):
        register(layer, delta=lambda m: None, parameters="lora_A")
    with pytest.raises(TypeError, match="'scaling' of OwnLoRA has no parameters"):
        register(layer, delta=lambda m: None, parameters=["scaling"])
    with pytest.raises(TypeError, match="'scaling' of OwnLoRA is not a tensor that a module holds"):
        register(layer, lora_A="lora_A", lora_B="lora_B", weight="scaling")


# ---------------------------------------------------------------------- state dicts


def trained(rank: int = 2) -> FlatLoRAOptimizer:
    model = lora_mlp(r=rank)
    optimizer = flatlora(model, base=torch.optim.AdamW, sigma=0.1, schedule="cosine", total_steps=10)
    for parameter in trainable(model):
        parameter.grad = torch.ones_like(parameter)
    with optimizer.perturbed():
        pass
    optimizer.step()
    return optimizer


def spoil(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def apply(state: dict[str, Any]) -> dict[str, Any]:
        state["param_groups"][0].update(changes)
        return state

    return apply


def drop(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def apply(state: dict[str, Any]) -> dict[str, Any]:
        del state["param_groups"][0][key]
        return state

    return apply


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda s: None, TypeError, "must be a dict, got NoneType"),
        (lambda s: {"param_groups": s["param_groups"]}, ValueError, "no dict under 'state'"),
        (lambda s: {"state": s["state"]}, ValueError, "no list of dicts under 'param_groups'"),
        (lambda s: {**s, "param_groups": []}, ValueError, "0 param groups, the optimizer has 1"),
        (lambda s: {**s, "param_groups": [3]}, ValueError, "no list of dicts under 'param_groups'"),
        (spoil(params=[0, 1]), ValueError, "has 2 parameters, the optimizer's has 4.*another adapter"),
        (lambda s: {**s, "state": {99: {}}}, ValueError, "parameters in no group"),
        (spoil(sigma=-1.0), ValueError, "sigma must be finite"),
        (spoil(flatlora_step=-1), ValueError, "step counter"),
        (spoil(flatlora_step=1.5), ValueError, "step counter"),
        (spoil(flatlora_seed="x"), TypeError, "seed must be an int"),
        (spoil(flatlora_total_steps=0), ValueError, "total_steps must be at least 1"),
        (spoil(flatlora_schedule="exponential"), ValueError, "schedule must be one of"),
        (spoil(flatlora_schedule=3), TypeError, "schedule must be a name"),
        (spoil(flatlora_schedule="custom"), ValueError, "same callable as `schedule`"),
        (drop("flatlora_seed"), ValueError, "lacks flatlora_seed"),
        (spoil(flatlora_noise=3), TypeError, "noise must be a string"),
    ],
)
def test_a_state_that_does_not_fit(change: Callable[[Any], Any], error: type[Exception], match: str) -> None:
    optimizer = trained()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=match):
        optimizer.load_state_dict(change(copy.deepcopy(before)))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, entries in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in entries.items())


def test_a_refused_state_leaves_a_perturbed_step_as_it_was() -> None:
    optimizer = trained()
    optimizer.perturb()
    with pytest.raises(ValueError, match="no list of dicts"):
        optimizer.load_state_dict({})
    assert optimizer.is_perturbed
    optimizer.restore()


def test_a_registered_weight_of_integers() -> None:
    layer = OwnLoRA(torch.randn(4, 4))
    layer.register_buffer("codes", torch.ones(4, 4, dtype=torch.int8))
    register(layer, weight="codes", lora_A="lora_A", lora_B="lora_B")
    base = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    refuses(ValueError, "'codes' is no floating-point matrix", model=layer, base=base)
