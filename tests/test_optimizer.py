"""The state machine: three styles, the torch.optim contract, clean observers, misuse."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from flatlora_optim import FlatLoRAOptimizer, GaussianNoise, WeightChangedError, noisy_weights
from flatlora_optim.noise import NoiseKey
from helpers import (
    assert_equal_tensors,
    changed_weights,
    fingerprint,
    flatlora,
    gradients,
    lora_convnet,
    lora_gpt2,
    lora_lm,
    lora_mlp,
    loss_of,
    mlp_batch,
    trainable,
    untouched_rng,
)

BATCH = mlp_batch()


def train_closure(model: nn.Module, optimizer: FlatLoRAOptimizer, batch: Any) -> Tensor:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return optimizer.step(closure)


def train_explicit(model: nn.Module, optimizer: FlatLoRAOptimizer, batch: Any) -> Tensor:
    optimizer.zero_grad()
    with optimizer.perturbed():
        loss = loss_of(model, batch)
        loss.backward()
    optimizer.step()
    return loss


def train_automatic(model: nn.Module, optimizer: FlatLoRAOptimizer, batch: Any) -> Tensor:
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


STYLES = [train_closure, train_explicit, train_automatic]


@pytest.fixture
def model() -> nn.Module:
    return lora_mlp()


@pytest.fixture
def before(model: nn.Module) -> dict[str, Tensor]:
    return fingerprint(model)


@pytest.fixture
def optimizer(model: nn.Module) -> FlatLoRAOptimizer:
    return flatlora(model)


BOTH = {"base_model.model.fc1.base_layer.weight", "base_model.model.fc2.base_layer.weight"}


# ---------------------------------------------------------------------- styles


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
    assert changed_weights(model, seen[0]) == BOTH
    assert any(not torch.equal(seen[0][name], seen[3][name]) for name in BOTH)


def test_an_unfinished_accumulation_window_ends_clean(
    model: nn.Module, before: dict[str, Tensor], optimizer: FlatLoRAOptimizer
) -> None:
    loss_of(model, BATCH).backward()
    assert changed_weights(model, before) == BOTH
    optimizer.restore()
    assert not changed_weights(model, before)


def test_without_auto_a_forward_is_left_alone(model: nn.Module, before: dict[str, Tensor]) -> None:
    optimizer = flatlora(model, auto=False)
    loss_of(model, BATCH)
    assert not changed_weights(model, before)
    with optimizer.perturbed():
        loss_of(model, BATCH)
        assert changed_weights(model, before) == BOTH


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


# ---------------------------------------------------------------------- the torch.optim contract


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
    clean = [p.detach().clone() for n, p in model.named_parameters() if n in BOTH]
    loss_of(model, BATCH).backward()
    noisy = [p.detach().clone() for n, p in model.named_parameters() if n in BOTH]
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


# ---------------------------------------------------------------------- clean observers


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


def clean_output(before: dict[str, Tensor]) -> Tensor:
    model = lora_mlp()
    assert not changed_weights(model, before)
    return model(BATCH[0]).detach()


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
    assert changed_weights(model, before) == BOTH


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


def test_explicit_noise_reaches_a_model_in_eval_mode(
    model: nn.Module, optimizer: FlatLoRAOptimizer, before: dict[str, Tensor]
) -> None:
    model.eval()
    clean = model(BATCH[0])
    with optimizer.perturbed():
        assert not torch.equal(model(BATCH[0]), clean)
    assert torch.equal(model(BATCH[0]), clean)


# ---------------------------------------------------------------------- misuse


def test_backward_after_the_step_is_caught_by_autograd(
    model: nn.Module, optimizer: FlatLoRAOptimizer
) -> None:
    loss = loss_of(model, BATCH)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_outside_of_the_block_is_caught_by_autograd(
    model: nn.Module, optimizer: FlatLoRAOptimizer
) -> None:
    with optimizer.perturbed():
        loss = loss_of(model, BATCH)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_on_clean_weights_is_invalid_under_noise(
    model: nn.Module, optimizer: FlatLoRAOptimizer
) -> None:
    optimizer.perturb()
    with optimizer.clean():
        loss = loss_of(model, BATCH)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_loaded_in_a_clean_block_invalidate_the_pending_graph(
    model: nn.Module, optimizer: FlatLoRAOptimizer
) -> None:
    loss = loss_of(model, BATCH)
    ours = model.base_model.model.fc2.base_layer
    other = lora_mlp(seed=5).base_model.model.fc2.base_layer
    with optimizer.clean():
        ours.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.step()
    assert torch.equal(ours.weight, other.weight)


def test_a_skipped_step_keeps_the_noise_for_the_next_one(
    model: nn.Module, optimizer: FlatLoRAOptimizer, before: dict[str, Tensor]
) -> None:
    loss_of(model, BATCH).backward()
    noise = fingerprint(model)
    optimizer.zero_grad()  # GradScaler found an inf and leaves step() out
    loss_of(model, BATCH).backward()
    assert_equal_tensors(fingerprint(model), noise)
    optimizer.step()
    assert not changed_weights(model, before)
    assert optimizer.step_count == 1


def test_a_repeated_forward_and_a_double_perturb_add_no_noise_twice(
    model: nn.Module, optimizer: FlatLoRAOptimizer, before: dict[str, Tensor]
) -> None:
    loss_of(model, BATCH)
    noise = fingerprint(model)
    loss_of(model, BATCH)
    optimizer.perturb()
    optimizer.perturb()
    assert_equal_tensors(fingerprint(model), noise)
    optimizer.restore()
    assert not changed_weights(model, before)
    optimizer.perturb()
    assert_equal_tensors(fingerprint(model), noise)


def test_restoring_what_is_clean_does_nothing(
    model: nn.Module, optimizer: FlatLoRAOptimizer, before: dict[str, Tensor]
) -> None:
    optimizer.restore()
    optimizer.perturb()
    optimizer.restore()
    optimizer.restore()
    assert not changed_weights(model, before)


def test_a_step_without_noise_warns_once(model: nn.Module, optimizer: FlatLoRAOptimizer) -> None:
    model.eval()
    loss_of(model, BATCH).backward()
    with pytest.warns(UserWarning, match="without a perturbed forward") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_step_without_noise_warns_whichever_group_is_meant_to_have_it(model: nn.Module) -> None:
    first, *others = trainable(model)
    base = torch.optim.SGD([{"params": [first], "sigma": 0.0}, {"params": others}], lr=0.1)
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, schedule="constant")
    with pytest.warns(UserWarning, match="without a perturbed forward"):
        optimizer.step()


@pytest.mark.parametrize("options", [{"sigma": 0.0}, {"schedule": "cosine", "total_steps": 5}])
def test_a_step_that_has_no_noise_by_schedule_does_not_warn(
    model: nn.Module, options: dict[str, Any]
) -> None:
    optimizer = flatlora(model, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_automatic(model, optimizer, BATCH)


def load(model: nn.Module) -> None:
    other = lora_mlp(seed=3).base_model.model.fc1.base_layer.state_dict()
    model.base_model.model.fc1.base_layer.load_state_dict(other)


def write_through_data(model: nn.Module) -> None:
    model.base_model.model.fc1.base_layer.weight.data += 1


def cast(model: nn.Module) -> None:
    model.base_model.model.fc1.bfloat16()


def replace(model: nn.Module) -> None:
    model.base_model.model.fc1.base_layer.weight = nn.Parameter(torch.zeros(16, 6), requires_grad=False)


def merge(model: nn.Module) -> None:
    model.base_model.model.fc1.merge()


@pytest.mark.parametrize("restore", ["exact", "snapshot", "subtract"])
@pytest.mark.parametrize("change", [load, write_through_data, cast, replace, merge])
def test_a_weight_that_somebody_else_wrote_is_left_to_them(
    change: Callable[[nn.Module], None], restore: str, model: nn.Module, before: dict[str, Tensor]
) -> None:
    optimizer = flatlora(model, restore=restore)
    loss_of(model, BATCH).backward()
    change(model)
    theirs = model.base_model.model.fc1.base_layer.weight.detach().clone()
    with pytest.raises(WeightChangedError, match=r"fc1.*load it again.*optimizer\.restore"):
        optimizer.step()
    assert torch.equal(model.base_model.model.fc1.base_layer.weight, theirs)
    if restore != "subtract":
        assert {name for name in changed_weights(model, before) if "fc1" not in name} == set()
    assert not optimizer.is_perturbed
    optimizer.step()  # goes on as soon as the user has dealt with it
    assert optimizer.step_count == 1


@pytest.mark.parametrize("changed", [3, 4])
def test_at_most_three_changed_weights_are_named(changed: int) -> None:
    optimizer = flatlora(Checkpointed(None))
    optimizer.perturb()
    for target in optimizer.targets[:changed]:
        target.owner.weight.data += 1
    names = ", ".join(target.name for target in optimizer.targets[:3])
    with pytest.raises(
        WeightChangedError, match=f"weight of {names}{' …' if changed > 3 else ''} was written"
    ):
        optimizer.restore()


def test_merging_an_adapter_that_is_still_zero_is_noticed(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.zero_()
    optimizer = flatlora(model)
    optimizer.perturb()
    model.base_model.model.fc1.merge()
    with pytest.raises(WeightChangedError, match="fc1"):
        optimizer.restore()


def test_a_merged_model_is_left_alone(model: nn.Module, optimizer: FlatLoRAOptimizer) -> None:
    model.merge_adapter()
    merged = fingerprint(model)
    loss_of(model, BATCH)
    assert not changed_weights(model, merged)
    model.unmerge_adapter()
    optimizer.step()
    with optimizer.perturbed():
        assert changed_weights(model, merged) >= BOTH


# ---------------------------------------------------------------------- exceptions


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["forward", "backward", "closure"])
@pytest.mark.parametrize("style", [train_closure, train_explicit])
@pytest.mark.parametrize("restore", ["exact", "snapshot"])
def test_an_exception_leaves_the_weights_as_they_were(
    style: Callable[..., Tensor],
    place: str,
    error: type[BaseException],
    restore: str,
    model: nn.Module,
    before: dict[str, Tensor],
) -> None:
    optimizer = flatlora(model, restore=restore)
    old = [p.detach().clone() for p in trainable(model)]

    def fail(*_: Any) -> None:
        assert optimizer.is_perturbed
        raise error

    layer = model.base_model.model.fc2
    if place == "closure":
        batch = (BATCH[0], type("Failing", (), {"__torch_function__": classmethod(fail)})())
    else:
        batch = BATCH
        (layer.register_forward_pre_hook if place == "forward" else layer.register_full_backward_hook)(fail)
    with pytest.raises(error):
        style(model, optimizer, batch)
    assert not changed_weights(model, before)
    assert not optimizer.is_perturbed
    assert restore == "snapshot" or optimizer.memory() == 0
    assert optimizer.step_count == 0
    assert all(torch.equal(p, o) for p, o in zip(trainable(model), old, strict=True))


def test_a_failed_forward_of_the_automatic_style_leaves_the_weights_as_they_were(
    model: nn.Module, optimizer: FlatLoRAOptimizer, before: dict[str, Tensor]
) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(3, 7))
    assert not changed_weights(model, before)
    train_automatic(model, optimizer, BATCH)
    assert not changed_weights(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_backward_of_the_automatic_style_is_over_with_the_next_step_or_restore(
    error: type[BaseException], model: nn.Module, optimizer: FlatLoRAOptimizer, before: dict[str, Tensor]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    handle = model.base_model.model.fc2.register_full_backward_hook(fail)
    with pytest.raises(error):
        train_automatic(model, optimizer, BATCH)
    handle.remove()
    assert_equal_tensors(dict(model.state_dict()), dict(lora_mlp().state_dict()))
    optimizer.zero_grad()
    train_automatic(model, optimizer, BATCH)
    assert not changed_weights(model, before)


def test_an_interrupted_forward_does_not_confuse_the_next_one(
    model: nn.Module, optimizer: FlatLoRAOptimizer, before: dict[str, Tensor]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.base_model.model.fc2.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(BATCH[0])
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(BATCH[0]), clean_output(before))
    train_automatic(model, optimizer, BATCH)
    assert not changed_weights(model, before)


def test_an_interrupted_forward_leaves_evaluation_clean_wherever_it_begins(
    model: nn.Module, optimizer: FlatLoRAOptimizer, before: dict[str, Tensor]
) -> None:
    inner = model.base_model.model  # as `generate` calls it
    seen: list[Tensor] = []

    def look_around(*_: Any) -> None:
        handle.remove()
        with torch.no_grad():
            seen.append(inner(BATCH[0]))
        raise KeyboardInterrupt

    handle = inner.fc2.register_forward_pre_hook(look_around)
    with pytest.raises(KeyboardInterrupt):
        model(BATCH[0])
    assert not torch.equal(seen[0], clean_output(before))  # the outermost forward decides, and was under way
    with torch.no_grad():
        assert torch.equal(inner(BATCH[0]), clean_output(before))
    train_automatic(model, optimizer, BATCH)
    assert not changed_weights(model, before)


# ---------------------------------------------------------------------- randomness and lifetime


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
        assert changed_weights(model, before) == BOTH
        seen.append(fingerprint(model))
        optimizer.step()
        assert not changed_weights(model, before)
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in BOTH)


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
    with pytest.raises(RuntimeError, match=r"fc1: another FlatLoRAOptimizer has its noise on this weight"):
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
    assert changed_weights(model, before) == BOTH
    del optimizer
    gc.collect()
    assert not changed_weights(model, before)
    assert hooks_of(model) == hooks


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
    monkeypatch.setattr(noisy_weights, "remove_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.restore()
    assert not optimizer.is_perturbed
    assert not changed_weights(model, before)
