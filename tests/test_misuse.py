"""What must not be done is an error, or does no harm; exceptions leave clean weights."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer, WeightChangedError
from flatlora_optim.kernels import plain
from helpers import (
    MLP_WEIGHTS,
    OwnLoRA,
    assert_equal_tensors,
    changed_weights,
    clean_output,
    fingerprint,
    flatlora,
    lora_mlp,
    loss_of,
    mlp_batch,
    train_automatic,
    train_closure,
    train_explicit,
    trainable,
)

BATCH = mlp_batch()


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


def test_the_base_is_not_stepped_past_its_wrapper(model: nn.Module, optimizer: FlatLoRAOptimizer) -> None:
    loss_of(model, BATCH).backward()
    old = [p.detach().clone() for p in trainable(model)]
    with pytest.raises(RuntimeError, match="base optimizer was stepped by itself"):
        optimizer.base.step()
    assert all(torch.equal(p, o) for p, o in zip(trainable(model), old, strict=True))
    optimizer.step()
    optimizer.close()
    optimizer.base.step()
    assert not any(torch.equal(p, o) for p, o in zip(trainable(model), old, strict=True))


def test_another_thread_does_not_end_a_forward_that_is_under_way(
    model: nn.Module, optimizer: FlatLoRAOptimizer
) -> None:
    inner = model.base_model.model
    with optimizer.perturbed():
        expected = inner.fc2(torch.tanh(inner.fc1(BATCH[0])))

    def call_from_elsewhere(*_: Any) -> None:
        handle.remove()

        def call() -> None:
            with torch.no_grad():
                inner(BATCH[0])

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    handle = inner.fc2.register_forward_pre_hook(call_from_elsewhere)
    assert torch.equal(model(BATCH[0]), expected)
    assert optimizer.is_perturbed


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
    with pytest.warns(UserWarning, match=r"in eval\(\) mode") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model, BATCH).backward()
        optimizer.step()


def test_a_step_without_noise_warns_whichever_group_is_meant_to_have_it(model: nn.Module) -> None:
    first, *others = trainable(model)
    base = torch.optim.SGD([{"params": [first], "sigma": 0.0}, {"params": others}], lr=0.1)
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, schedule="constant")
    with pytest.warns(UserWarning, match="without a perturbed forward"):
        optimizer.step()


def test_a_step_of_a_closed_optimizer_says_that_it_is_closed(
    model: nn.Module, optimizer: FlatLoRAOptimizer
) -> None:
    flatlora(model)
    loss_of(model, BATCH).backward()
    with pytest.warns(UserWarning, match=r"closed, by close\(\) or by a newer one"):
        optimizer.step()


def test_adapters_that_are_switched_on_in_the_middle_of_a_step_are_reported() -> None:
    model = lora_mlp()
    layers = [model.base_model.model.fc1, model.base_model.model.fc2]
    optimizer = flatlora(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers[1].enable_adapters(False)
        loss_of(model, BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(model, BATCH).backward()
    layers[1].enable_adapters(True)
    loss_of(model, BATCH).backward()
    with pytest.warns(UserWarning, match=r"^base_model.model.fc2: .* active after the first forward"):
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


@pytest.mark.parametrize("restore", ["exact", "snapshot", "subtract"])
@pytest.mark.parametrize("change", [load, write_through_data, cast, replace])
def test_a_weight_that_somebody_else_wrote_is_left_to_them(
    change: Callable[[nn.Module], None], restore: str, model: nn.Module, before: dict[str, Tensor]
) -> None:
    optimizer = flatlora(model, restore=restore)
    loss_of(model, BATCH).backward()
    journaled = optimizer._weights.perturbations[0]._parts
    change(model)
    theirs = model.base_model.model.fc1.base_layer.weight.detach().clone()
    with pytest.raises(WeightChangedError, match=r"fc1.*load it again.*optimizer\.restore"):
        optimizer.step()
    assert torch.equal(model.base_model.model.fc1.base_layer.weight, theirs)
    if restore != "subtract":
        assert {name for name in changed_weights(model, before) if "fc1" not in name} == set()
    assert not optimizer.is_perturbed
    assert [part.nbytes for part in journaled] == [0]  # C memory, which nobody else would free
    optimizer.step()  # goes on as soon as the user has dealt with it
    assert optimizer.step_count == 1


@pytest.mark.parametrize("restore", ["exact", "snapshot", "subtract"])
@pytest.mark.parametrize("change", [load, write_through_data, cast])
def test_a_weight_that_somebody_else_wrote_is_not_saved(
    change: Callable[[nn.Module], None], restore: str, model: nn.Module
) -> None:
    optimizer = flatlora(model, restore=restore)
    loss_of(model, BATCH).backward()
    change(model)
    with pytest.raises(WeightChangedError, match="fc1"):
        model.state_dict()
    assert optimizer.is_perturbed


def test_a_forgotten_optimizer_names_a_weight_that_somebody_else_wrote(model: nn.Module) -> None:
    optimizers = [flatlora(model)]
    loss_of(model, BATCH).backward()
    load(model)
    with pytest.warns(UserWarning, match="fc1.*was written while it carried noise"):
        optimizers.clear()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("through_data", [False, True])
def test_a_single_element_that_somebody_else_wrote_is_noticed(strided: bool, through_data: bool) -> None:
    layer = OwnLoRA(torch.randn(100, 200)[:, ::2] if strided else torch.randn(100, 100))
    if strided:
        layer.weight.data = torch.randn(100, 200)[:, ::2]
    optimizer = flatlora(layer)
    optimizer.perturb()
    if through_data:
        layer.weight.data[0, 0] += 1  # one of those that are looked at
    else:
        with torch.no_grad():
            layer.weight[37, 41] += 1  # any, where autograd counts it
    with pytest.raises(WeightChangedError):
        optimizer.restore()


@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (100, 99)])
def test_torch_operations_look_all_over_a_weight(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    before = plain.checksum(weight)
    quarters = weight.view(-1).chunk(4)
    for part in (weight.view(-1)[:1], weight[:, 1:], *quarters):
        part += 1
        assert not torch.equal(plain.checksum(weight), before)
        before = plain.checksum(weight)
    assert torch.equal(plain.checksum(weight), before)


def test_a_weight_that_is_gone_does_not_keep_the_others(model: nn.Module, before: dict[str, Tensor]) -> None:
    optimizer = flatlora(model)
    optimizer.perturb()
    del model.base_model.model.fc1.base_layer.weight
    with pytest.raises(WeightChangedError, match="fc1"):
        optimizer.restore()
    assert not changed_weights(model, {name: w for name, w in before.items() if "fc1" not in name})


@pytest.mark.parametrize("changed", [3, 4])
def test_at_most_three_changed_weights_are_named(changed: int) -> None:
    optimizer = flatlora(nn.Sequential(*[OwnLoRA(torch.randn(4, 4)) for _ in range(5)]))
    optimizer.perturb()
    for target in optimizer.targets[:changed]:
        target.owner.weight.data += 1
    names = ", ".join(target.name for target in optimizer.targets[:3])
    with pytest.raises(
        WeightChangedError, match=f"weight of {names}{' …' if changed > 3 else ''} was written"
    ):
        optimizer.restore()


@pytest.mark.parametrize("zero", [False, True])
def test_a_merge_in_the_middle_of_a_step_finds_clean_weights(
    zero: bool, model: nn.Module, before: dict[str, Tensor]
) -> None:
    layer = model.base_model.model.fc1
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.mul_(not zero)
    optimizer = flatlora(model)
    loss_of(model, BATCH).backward()
    clean = before["base_model.model.fc1.base_layer.weight"].view(torch.float32)
    right = clean + layer.get_delta_weight("default")
    merged = model.merge_and_unload()
    assert not optimizer.is_perturbed
    assert torch.equal(merged.fc1.weight, right)
    assert torch.equal(merged.state_dict()["fc1.weight"], right)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("look", ["restore", "state_dict", "eval", "step", "close"])
def test_noise_is_subtracted_after_a_merge_that_was_not_seen_coming(
    look: str, safe: bool, model: nn.Module, before: dict[str, Tensor]
) -> None:
    layer = model.base_model.model.fc1
    optimizer = flatlora(model)
    loss_of(model, BATCH).backward()
    clean = before["base_model.model.fc1.base_layer.weight"].view(torch.float32)
    right = clean + layer.get_delta_weight("default").detach()
    type(layer).merge(layer, safe_merge=safe)
    actions: dict[str, Callable[[], object]] = {
        "restore": optimizer.restore,
        "state_dict": model.state_dict,
        "eval": lambda: model.eval()(BATCH[0]),
        "step": optimizer.step,
        "close": optimizer.close,
    }
    with pytest.warns(UserWarning, match="fc1: an adapter was merged into the weight while it carried noise"):
        actions[look]()
    optimizer.close()
    torch.testing.assert_close(layer.base_layer.weight.detach(), right, rtol=1e-5, atol=1e-6)
    assert {name for name in changed_weights(model, before) if "fc1" not in name} == set()


def test_a_merged_model_is_left_alone(model: nn.Module, optimizer: FlatLoRAOptimizer) -> None:
    model.merge_adapter()
    merged = fingerprint(model)
    loss_of(model, BATCH)
    assert not changed_weights(model, merged)
    model.unmerge_adapter()
    optimizer.step()
    with optimizer.perturbed():
        assert changed_weights(model, merged) >= MLP_WEIGHTS


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


@pytest.mark.parametrize("looks", [True, False])
def test_an_interrupted_forward_leaves_evaluation_clean_wherever_it_begins(
    looks: bool, model: nn.Module, optimizer: FlatLoRAOptimizer, before: dict[str, Tensor]
) -> None:
    inner = model.base_model.model  # as `generate` calls it
    seen: list[Tensor] = []

    def look_around(*_: Any) -> None:
        handle.remove()
        if looks:
            with torch.no_grad():
                seen.append(inner(BATCH[0]))
        raise KeyboardInterrupt

    handle = inner.fc2.register_forward_pre_hook(look_around)
    with pytest.raises(KeyboardInterrupt):
        model(BATCH[0])
    for output in seen:  # a pass without gradients is clean, wherever it begins
        assert torch.equal(output, clean_output(before))
    with torch.no_grad():
        assert torch.equal(inner(BATCH[0]), clean_output(before))
    train_automatic(model, optimizer, BATCH)
    assert not changed_weights(model, before)
