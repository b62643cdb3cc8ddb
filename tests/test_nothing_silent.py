"""Ways to train without noise, or to keep it, that were found in the field: each is an error or a warning."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.optimizer import other_steps
from helpers import (
    MLP_WEIGHTS,
    changed_weights,
    fingerprint,
    flatlora,
    lora_mlp,
    loss_of,
    mlp_batch,
    train,
    trainable,
    with_lora,
)

BATCH = mlp_batch()


@pytest.fixture(autouse=True)
def _nothing_is_left_watching() -> Iterator[None]:
    """An optimizer that outlives its test would refuse the steps of later ones."""
    yield
    other_steps._checks.clear()


# ---------------------------------------------------------------------- other steppers


@pytest.mark.parametrize("fused", [False, True])
def test_another_optimizer_on_the_same_adapters_is_an_error(
    fused: bool, model: nn.Module, optimizer: FlatLoRAOptimizer, before: dict[str, Tensor]
) -> None:
    loss_of(model, BATCH).backward()
    optimizer.step()
    other = torch.optim.AdamW(trainable(model), lr=0.1, fused=fused)
    loss_of(model, BATCH).backward()
    with pytest.raises(RuntimeError, match=r"AdamW steps adapters that belong to .*call its close\(\) first"):
        other.step()
    optimizer.close()
    assert not changed_weights(model, before)
    other.step()


def test_other_optimizers_are_let_alone(model: nn.Module) -> None:
    head = nn.Linear(3, 3)
    explicit = flatlora(model, auto=False)
    silent = flatlora(lora_mlp(), sigma=0.0)
    for free in (head, model, silent._model):
        free(torch.randn(2, 3 if free is head else 6)).sum().backward()
        torch.optim.SGD(trainable(free), lr=0.1).step()
    with explicit.perturbed():
        loss_of(model, BATCH).backward()
        torch.optim.SGD(trainable(model), lr=0.1).step()  # the user's own affair
    with pytest.raises(RuntimeError, match="belong to a FlatLoRAOptimizer"):
        torch.optim.SGD(trainable(model), lr=0.1).step()


class SAM(torch.optim.Optimizer):
    """Two calls a step, with another optimizer inside, as the common implementation has it."""

    def __init__(self, params: list[nn.Parameter], rho: float, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.inner = torch.optim.SGD(self.param_groups, **options)
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["before"] = p.clone()
                p.add_(p.grad, alpha=group["rho"])

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["before"])
        self.inner.step()


def test_the_two_calls_of_sam_are_one_step_with_one_noise(
    model: nn.Module, before: dict[str, Tensor]
) -> None:
    optimizer = FlatLoRAOptimizer(
        SAM(trainable(model), rho=0.05, lr=0.1), model, sigma=0.1, schedule="constant"
    )
    noisy = []
    for step in range(3):
        loss_of(model, BATCH).backward()
        noisy.append(fingerprint(model))
        optimizer.first_step()
        optimizer.zero_grad()
        loss_of(model, BATCH).backward()
        assert not changed_weights(model, noisy[-1])
        optimizer.second_step()
        optimizer.zero_grad()
        assert optimizer.step_count == step + 1
        assert not changed_weights(model, before)
    assert len({str(each[name].tolist()) for each in noisy for name in MLP_WEIGHTS}) == 6


def test_a_forgotten_optimizer_forbids_nothing(model: nn.Module) -> None:
    optimizers = [flatlora(model)]
    optimizers[0].cycle = optimizers[0]  # so that only the collector can find it
    loss_of(model, BATCH).backward()
    optimizers.clear()
    torch.optim.SGD(trainable(model), lr=0.1).step()


def test_a_forgotten_optimizer_is_collected_in_the_middle_of_a_step(model: nn.Module) -> None:
    """Its hook goes while torch iterates over the hooks of all optimizers."""
    optimizer = flatlora(model)
    optimizer.itself = optimizer  # type: ignore[attr-defined]
    base, later = optimizer.base, flatlora(lora_mlp(seed=1))
    gc.disable()
    try:
        loss_of(model, BATCH).backward()
        del optimizer
        base.step()
    finally:
        gc.enable()
    assert later.step_count == 0


def test_an_optimizer_with_an_attribute_of_any_kind_is_let_alone(optimizer: FlatLoRAOptimizer) -> None:
    other = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    other.optimizer = "adam"
    other.step()


def test_what_is_detached_puts_nothing_back(model: nn.Module, optimizer: FlatLoRAOptimizer) -> None:
    base = optimizer.detach()
    assert "step 0 of" in repr(optimizer)
    assert not any(str(key).startswith("flatlora") for group in base.param_groups for key in group)
    FlatLoRAOptimizer(base, model, sigma=0.1, schedule="constant")


def test_a_base_that_accelerate_has_prepared_is_refused(model: nn.Module) -> None:
    _, prepared = Accelerator(cpu=True).prepare(model, torch.optim.SGD(trainable(model), lr=0.1))
    with pytest.raises(TypeError, match=r"made by accelerator\.prepare\(\).*around the SGD first"):
        FlatLoRAOptimizer(prepared, model, sigma=0.1, schedule="constant")


@pytest.mark.parametrize("step", ["step", "second_step"])
def test_adapters_that_were_replaced_are_an_error(step: str, model: nn.Module) -> None:
    base = SAM(trainable(model), rho=0.05, lr=0.1)
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, schedule="constant")
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.requires_grad:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
    loss_of(model, BATCH).backward()
    with pytest.raises(
        RuntimeError, match=r"fc1, .*fc2: the model's adapters are not those in the optimizer.*Build the base"
    ):
        getattr(optimizer, step)()


def test_a_replaced_adapter_among_others_is_an_error(model: nn.Module, optimizer: FlatLoRAOptimizer) -> None:
    factor = model.base_model.model.fc2.lora_A.default
    other = model.base_model.model.fc2.lora_B.default
    for part in (factor, other):
        part.weight = nn.Parameter(part.weight.detach().clone())
    loss_of(model, BATCH).backward()
    with pytest.raises(RuntimeError, match=r"model\.fc2: the model's adapters are not those"):
        optimizer.step()


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_parameters_that_were_exchanged_in_the_groups_as_well_are_no_error(
    schedule: str, model: nn.Module
) -> None:
    """Accelerate does so, when it shards a model whose optimizer exists already."""
    optimizer = flatlora(model, schedule=schedule, total_steps=4)
    new = {}
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.requires_grad:
                new[parameter] = nn.Parameter(parameter.detach().clone())
                setattr(module, name, new[parameter])
    for group in optimizer.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    for _ in range(3):
        loss_of(model, BATCH).backward()
        optimizer.step()
    loss_of(model, BATCH)
    assert optimizer.is_perturbed
    optimizer.close()


# ---------------------------------------------------------------------- several models


class Both(nn.Module):
    """Holds two models, and has no forward."""

    def __init__(self, first: nn.Module, second: nn.Module, in_list: bool) -> None:
        super().__init__()
        if in_list:
            self.models = nn.ModuleList([first, second])
        else:
            self.first, self.second = first, second


@pytest.mark.parametrize(
    "together",
    [
        lambda a, b: [a, b],
        lambda a, b: (a, b),
        lambda a, b: nn.ModuleList([a, b]),
        lambda a, b: nn.ModuleDict({"a": a, "b": b}),
        lambda a, b: Both(a, b, in_list=False),
        lambda a, b: Both(a, b, in_list=True),
    ],
)
def test_several_models_have_noise(together: Any) -> None:
    first, second = lora_mlp(), lora_mlp(seed=1)
    base = torch.optim.SGD([*trainable(first), *trainable(second)], lr=0.1)
    before = fingerprint(first), fingerprint(second)
    optimizer = FlatLoRAOptimizer(base, together(first, second), sigma=0.1, schedule="constant")
    assert len(optimizer.targets) == 4
    for _ in range(2):
        loss_of(first, BATCH).backward()
        loss_of(second, BATCH).backward()
        for model, clean in zip((first, second), before, strict=True):
            assert changed_weights(model, clean) == MLP_WEIGHTS
        with torch.no_grad():
            first.eval()(BATCH[0])
        first.train()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    assert not changed_weights(first, before[0])
    assert not changed_weights(second, before[1])


def test_adapters_of_a_model_that_was_not_given_are_reported() -> None:
    unet, encoder = lora_mlp(), lora_mlp(seed=1)
    base = torch.optim.SGD([*trainable(unet), *trainable(encoder)], lr=0.1)
    with pytest.warns(UserWarning, match=r"2 pairs of matrices.*noise for 4 of 8 trained matrices \(50%\)"):
        optimizer = FlatLoRAOptimizer(base, unet, sigma=0.1, schedule="constant")
    assert "noise for 4 of 8 trained matrices (50%)" in repr(optimizer)


def test_a_head_that_is_trained_beside_the_model_is_not_reported(model: nn.Module) -> None:
    head = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 64), nn.Linear(64, 8), nn.Linear(8, 64))
    base = torch.optim.SGD([*trainable(model), *head.parameters()], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, schedule="constant")
    assert "noise for 4 of 8 trained matrices (50%)" in repr(optimizer)


def test_what_is_frozen_does_not_count_as_trained(model: nn.Module) -> None:
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, schedule="constant")
    assert "noise for 4 of 4 trained matrices (100%)" in repr(optimizer)


def test_training_past_the_end_of_the_schedule_is_reported_once(model: nn.Module) -> None:
    optimizer = flatlora(model, sigma=0.1, schedule="cosine", total_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(2))
    with pytest.warns(UserWarning, match=r"goes on after total_steps=2.*epochs \* ceil") as told:
        train(model, optimizer, range(2, 4))
    assert len(told) == 1


@pytest.mark.filterwarnings("ignore:this optimizer leaves")
def test_two_optimizers_of_one_model_share_no_noise() -> None:
    model = with_lora(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), ["0", "1"])
    noises = []
    for layer in "01":
        own = [p for name, p in model.named_parameters() if f".{layer}.lora" in name]
        weight = model.get_submodule(f"base_model.model.{layer}.base_layer").weight
        optimizer = FlatLoRAOptimizer(torch.optim.SGD(own, lr=0.1), model, sigma=0.1, schedule="constant")
        clean = weight.clone()
        with optimizer.perturbed():
            noises.append((weight - clean).flatten())
    assert abs(torch.corrcoef(torch.stack(noises))[0, 1]) < 0.1


def test_a_sigma_that_no_weight_uses_is_reported(model: nn.Module) -> None:
    groups = [{"params": [], "sigma": 0.3}, {"params": trainable(model)}]
    with pytest.warns(UserWarning, match=r"group 0 has sigma=0.3, but none of its 0 parameters"):
        FlatLoRAOptimizer(torch.optim.SGD(groups, lr=0.1), model, sigma=0.1, schedule="constant")


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_a_sigma_of_a_head_that_changes_nothing_is_not_reported(sigma: float, model: nn.Module) -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(3))], "sigma": sigma}, {"params": trainable(model)}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FlatLoRAOptimizer(torch.optim.SGD(groups, lr=0.1), model, sigma=0.1, schedule="constant")


# ---------------------------------------------------------------------- eval mode


def test_with_auto_grad_models_in_eval_mode_train_with_noise(
    model: nn.Module, before: dict[str, Tensor]
) -> None:
    optimizer = flatlora(model.eval(), auto="grad")
    loss_of(model, BATCH).backward()
    assert changed_weights(model, before) == MLP_WEIGHTS
    with torch.no_grad():
        clean = model(BATCH[0])
    assert torch.equal(clean, lora_mlp()(BATCH[0]))
    optimizer.step()
    assert not changed_weights(model, before)


def test_a_part_in_eval_mode_is_reported_before_autograd_fails() -> None:
    encoder, unet = lora_mlp().eval(), lora_mlp(seed=1)
    base = torch.optim.SGD([*trainable(encoder), *trainable(unet)], lr=0.1)
    optimizer = FlatLoRAOptimizer(base, [encoder, unet], sigma=0.1, schedule="constant")
    encoded = encoder(BATCH[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it may have run for a metric alone
        loss = unet(torch.cat([encoded, encoded[:, :1]], 1)).sum()
        unet(BATCH[0]).sum().backward()
    with (
        pytest.warns(UserWarning, match=r"PeftModel ran in eval\(\) mode, so without noise.*auto=\"grad\""),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        loss.backward()
    optimizer.close()


def test_a_forward_inside_of_a_transform_is_reported(model: nn.Module, optimizer: FlatLoRAOptimizer) -> None:
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, values, (x[None],)).square().mean()

    def gradients() -> dict[str, Tensor]:
        each = vmap(grad(loss), in_dims=(None, 0))({n: p.detach() for n, p in adapters.items()}, BATCH[0])
        return {name: gradient.mean(0) for name, gradient in each.items()}

    without = gradients()
    for name, p in adapters.items():
        p.grad = without[name]
    with pytest.warns(UserWarning, match=r"inside of torch\.func.*with optimizer\.perturbed"):
        optimizer.step()
    with optimizer.perturbed():
        within = gradients()
    assert not any(torch.equal(within[name], without[name]) for name in adapters)


@pytest.mark.parametrize("fails", [False, True])
def test_a_transform_in_the_middle_of_a_step_leaves_the_weights_alone(
    fails: bool, model: nn.Module, optimizer: FlatLoRAOptimizer, before: dict[str, Tensor]
) -> None:
    adapters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor]) -> Tensor:
        output = functional_call(model, values, (BATCH[0][:, 1:] if fails else BATCH[0],))
        return output.square().mean()

    loss_of(model, BATCH).backward()
    with pytest.raises(RuntimeError) if fails else nullcontext():
        grad(loss)(adapters)
    assert optimizer.is_perturbed
    optimizer.step()
    assert not changed_weights(model, before)


# ---------------------------------------------------------------------- passes inside of a forward


class Distill(nn.Module):
    """A student that looks at its own clean outputs in the middle of its forward."""

    def __init__(self, net: nn.Module, how: str) -> None:
        super().__init__()
        self.net, self.how = net, how
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, is_teacher: bool = False) -> Tensor:
        if is_teacher:
            return self.net(x)
        inner = self.net.base_model.model
        if self.how == "checkpointed":
            return checkpoint(self._distilled, x, use_reentrant=False)
        hidden = torch.tanh(inner.fc1(x))
        self.seen.append(self._teacher(x))
        return inner.fc2(hidden)

    def _distilled(self, x: Tensor) -> Tensor:
        inner = self.net.base_model.model
        hidden = torch.tanh(inner.fc1(x))
        self.seen.append(self._teacher(x))
        return inner.fc2(hidden)

    def _teacher(self, x: Tensor) -> Tensor:
        inner = self.net.base_model.model
        with torch.no_grad():
            if self.how == "layers":
                return inner.fc2(torch.tanh(inner.fc1(x)))
            if self.how == "itself":
                return self(x, is_teacher=True)
            return self.net(x)


@pytest.mark.parametrize("how", ["entrance", "layers", "itself", "checkpointed"])
@pytest.mark.parametrize("mode", ["in_place", "virtual"])
def test_a_pass_without_gradients_is_clean_wherever_it_begins(how: str, mode: str, model: nn.Module) -> None:
    expected = lora_mlp()(BATCH[0]).detach()
    student = Distill(model, how)
    optimizer = FlatLoRAOptimizer(
        torch.optim.SGD(trainable(model), lr=0.1), student, sigma=0.3, schedule="constant", mode=mode
    )
    with optimizer.perturbed():
        noisy = model(BATCH[0])
    output = student(BATCH[0])
    torch.testing.assert_close(output, noisy)
    assert optimizer.is_perturbed
    output.sum().backward()
    assert optimizer.is_perturbed
    for seen in student.seen:
        torch.testing.assert_close(seen, expected)
    assert len(student.seen) == (2 if how == "checkpointed" else 1)
    gradients = [p.grad.clone() for p in trainable(model)]
    optimizer.zero_grad()
    with optimizer.perturbed():
        model(BATCH[0]).sum().backward()
    for gradient, p in zip(gradients, trainable(model), strict=True):
        torch.testing.assert_close(gradient, p.grad)
    optimizer.close()


def test_a_reference_pass_without_adapters_is_clean_inside_of_a_forward(model: nn.Module) -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with self.net.disable_adapter():  # gradients on, though nothing has any
                reference = self.net(x)
            return self.net(x), reference

    with model.disable_adapter():
        expected = model(BATCH[0])
    step = Loss()
    optimizer = FlatLoRAOptimizer(
        torch.optim.SGD(trainable(model), lr=0.1), step, sigma=0.3, schedule="constant"
    )
    for _ in range(2):
        output, reference = step(BATCH[0])
        assert torch.equal(reference, expected)
        assert not torch.equal(output, lora_mlp()(BATCH[0]))
        output.sum().backward()
        optimizer.step()


@pytest.mark.parametrize("whole", [False, True])
def test_reentrant_checkpointing_is_no_pass_of_its_own(whole: bool, model: nn.Module) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            inner = self.net.base_model.model
            if whole:
                return inner(x)
            return inner.fc2(checkpoint(inner.fc1, x, use_reentrant=True).tanh())

    net, x = Net(), BATCH[0].clone().requires_grad_()
    optimizer = FlatLoRAOptimizer(
        torch.optim.SGD(trainable(model), lr=0.1), net, sigma=0.3, schedule="constant"
    )
    with optimizer.perturbed():
        expected = model(x)
        expected.sum().backward()
    gradients = [p.grad.clone() for p in trainable(model)]
    optimizer.zero_grad()
    output = checkpoint(net, x, use_reentrant=True) if whole else net(x)
    assert torch.equal(output, expected)
    output.sum().backward()
    for gradient, p in zip(gradients, trainable(model), strict=True):
        torch.testing.assert_close(gradient, p.grad)
    optimizer.close()


def test_reentrant_checkpointing_in_a_teacher_is_clean(model: nn.Module) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            inner = self.net.base_model.model
            hidden = checkpoint(inner.fc1, x, use_reentrant=True).tanh()
            with torch.no_grad():
                self.seen.append(checkpoint(inner.fc1, x, use_reentrant=True))
            return inner.fc2(hidden)

    net, x = Net(), BATCH[0].clone().requires_grad_()
    expected = lora_mlp().base_model.model.fc1(x).detach()
    optimizer = FlatLoRAOptimizer(
        torch.optim.SGD(trainable(model), lr=0.1), net, sigma=0.3, schedule="constant"
    )
    net(x).sum().backward()
    with torch.no_grad():
        checkpoint(net, x, use_reentrant=True)
    for seen in net.seen:
        torch.testing.assert_close(seen, expected)
    assert optimizer.is_perturbed
    optimizer.close()


def test_a_layer_without_an_active_adapter_suspends_nothing(model: nn.Module, monkeypatch: Any) -> None:
    model.base_model.model.fc2.set_adapter([])
    optimizer = flatlora(model)
    loss_of(model, BATCH)
    monkeypatch.setattr(optimizer._weights, "suspend", lambda: pytest.fail("suspended"))
    loss_of(model, BATCH)
    monkeypatch.undo()
    optimizer.close()


def test_a_merged_layer_has_no_noise_in_a_later_forward_of_the_step(
    model: nn.Module, before: dict[str, Tensor]
) -> None:
    optimizer = flatlora(model)
    loss_of(model, BATCH).backward()
    expected = lora_mlp()(BATCH[0])
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.train()(BATCH[0]), expected)
    optimizer.close()
    del before


def test_a_merge_inside_clean_and_back_is_noise_of_nobody(
    model: nn.Module, before: dict[str, Tensor]
) -> None:
    optimizer = flatlora(model)
    loss_of(model, BATCH).backward()
    with optimizer.clean():
        model.merge_adapter()
        assert not optimizer.is_perturbed
    loss_of(model, BATCH)
    model.unmerge_adapter()
    optimizer.step()
    for name, value in fingerprint(model).items():
        torch.testing.assert_close(
            value.view(torch.float32), before[name].view(torch.float32), atol=1e-6, rtol=1e-5
        )


def test_two_optimizers_on_the_same_layers_both_see_a_merge_coming() -> None:
    model = lora_mlp()
    model.add_adapter("b", model.peft_config["default"])
    adapters = {
        name: [p for n, p in model.named_parameters() if f".{name}." in n] for name in ("default", "b")
    }
    optimizers = []
    for name, parameters in adapters.items():
        model.set_adapter(name)
        optimizers.append(
            FlatLoRAOptimizer(torch.optim.SGD(parameters, lr=0.1), model, sigma=0.3, schedule="constant")
        )
    layer = model.base_model.model.fc1
    model.set_adapter("default")
    clean = layer.base_layer.weight.detach().clone()
    optimizers[1].close()
    optimizers[0].perturb()
    layer.merge()
    assert torch.equal(layer.base_layer.weight, clean + layer.get_delta_weight("default"))
    optimizers[0].close()
    assert "merge" not in layer.__dict__


def test_perturbed_that_is_refused_inside_clean_ends_nothing(model: nn.Module) -> None:
    optimizer = flatlora(model, auto=False)
    with optimizer.perturbed():
        with optimizer.clean():
            with pytest.raises(RuntimeError, match=r"inside clean\(\)"), optimizer.perturbed():
                pass
            assert not optimizer.is_perturbed
        assert optimizer.is_perturbed
    assert not optimizer.is_perturbed


# ---------------------------------------------------------------------- bases, checkpoints, imports


class Lookahead(torch.optim.Optimizer):
    """Around another optimizer, whose state it keeps under a name of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.defaults, self.state = inner, {}, {}
        super().__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"slow": {}, "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert set(state_dict) == {"slow", "inner"}
        self.inner.load_state_dict(state_dict["inner"])


def nested_run(steps: range, state: dict[str, Any] | None = None) -> tuple[FlatLoRAOptimizer, list[float]]:
    model = lora_mlp()
    base = Lookahead(torch.optim.AdamW(trainable(model), lr=0.05))
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, total_steps=9, seed=4)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    losses = []
    for step in steps:
        loss = loss_of(model, mlp_batch(step))
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    return optimizer, losses


def test_a_nested_state_is_saved_and_loaded() -> None:
    first, losses = nested_run(range(3))
    state = copy.deepcopy({"model": first._model.state_dict(), "optimizer": first.state_dict()})
    again, later = nested_run(range(3, 6), state)
    assert again.step_count == 6
    assert losses + later == nested_run(range(6))[1]
    state["optimizer"]["flatlora"][0]["flatlora_step"] = -1
    with pytest.raises(ValueError, match="step counter"):
        again.load_state_dict(state["optimizer"])
    with pytest.raises(ValueError, match="no list of dicts under 'flatlora'"):
        again.load_state_dict({**state["optimizer"], "flatlora": 3})


def test_accelerate_prepares_a_nested_base(model: nn.Module) -> None:
    base = Lookahead(torch.optim.AdamW(trainable(model), lr=0.05))
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, total_steps=9)
    Accelerator(cpu=True).prepare(model, optimizer)


def test_the_step_may_be_set(model: nn.Module, before: dict[str, Tensor]) -> None:
    optimizer = flatlora(model, schedule="cosine", total_steps=4)
    loss_of(model, BATCH).backward()
    optimizer.step_count = 2
    assert optimizer.sigma == pytest.approx(0.5 * optimizer.param_groups[0]["sigma"])
    loss_of(model, BATCH)
    assert optimizer.is_perturbed
    optimizer.step_count = 0
    assert not changed_weights(model, before)
    with pytest.raises(ValueError, match="step counter"):
        optimizer.step_count = -1


def test_the_import_brings_no_compiler() -> None:
    code = (
        "import sys, torch; old = set(sys.modules); import flatlora_optim; new = set(sys.modules) - old\n"
        "print(sorted(m for m in new if m.split('.')[0] not in ('flatlora_optim', '_ctypes', 'ctypes')))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    new = set(eval(output))
    assert not [m for m in new if m.startswith(("torch._dynamo", "torch._inductor", "sympy", "torch.onnx"))]
    assert len(new) < 20, new
