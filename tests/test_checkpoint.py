"""Training goes on bit for bit after a checkpoint, in another process and with other optimizers."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flatlora_optim import FlatLoRAOptimizer, LowRankNoise, NoiseSource, NoiseTable
from helpers import changed_weights, fingerprint, flatlora, lora_mlp, loss_of, mlp_batch, train, trainable

SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"schedule": "cosine", "total_steps": 8},
    "linear": {"schedule": "linear", "total_steps": 8},
    "constant": {"schedule": "constant"},
    "callable": {"schedule": lambda step: 0.1 * step},
}


def build(
    model: nn.Module, *, seed: int = 11, sigma: float = 0.2, schedule: str = "cosine"
) -> FlatLoRAOptimizer:
    options = {"seed": seed, "sigma": sigma, **SCHEDULES[schedule]}
    return flatlora(model, base=torch.optim.AdamW, lr=0.01, **options)


def resume(path: str | Path, schedule: str) -> list[float]:
    """The second half of a run, started from a checkpoint by objects built with other numbers."""
    model = lora_mlp()
    optimizer = build(model, seed=99, sigma=0.7, schedule=schedule)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return train(model, optimizer, range(4, 8))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[float]]]:
    """Per schedule: a checkpoint after 4 of 8 steps, and the losses of the uninterrupted rest.

    It is taken in the middle of a step, when the weights carry noise.
    """
    found = {}
    for schedule in SCHEDULES:
        model = lora_mlp()
        optimizer = build(model, schedule=schedule)
        train(model, optimizer, range(4))
        optimizer.perturb()
        path = tmp_path_factory.mktemp("checkpoints") / f"{schedule}.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        found[schedule] = path, train(model, optimizer, range(4, 8))
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_run_goes_on_bit_for_bit(schedule: str, checkpoints: dict[str, tuple[Path, list[float]]]) -> None:
    path, expected = checkpoints[schedule]
    assert resume(path, schedule) == expected


def test_the_run_goes_on_bit_for_bit_in_a_fresh_process(
    checkpoints: dict[str, tuple[Path, list[float]]],
) -> None:
    path, expected = checkpoints["cosine"]
    code = "import json, sys, test_checkpoint as t; print(json.dumps(t.resume(sys.argv[1], 'cosine')))"
    process = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(process.stdout.splitlines()[-1]) == expected


def test_what_the_checkpoint_carries() -> None:
    model = lora_mlp()
    optimizer = build(model)
    train(model, optimizer, range(3))
    other = build(lora_mlp(), seed=5, sigma=0.9, schedule="constant")
    other.load_state_dict(optimizer.state_dict())
    assert (other.step_count, other.seed, other.total_steps) == (3, 11, 8)
    assert other.sigma == optimizer.sigma


def test_a_checkpoint_of_the_base_alone_loads_and_keeps_what_it_does_not_know() -> None:
    def two_groups(model: nn.Module) -> torch.optim.Optimizer:
        first, *rest = [
            [p for n, p in model.named_parameters() if p.requires_grad and layer in n]
            for layer in ("fc1", "fc2")
        ]
        return torch.optim.AdamW([{"params": first, "lr": 0.5}, {"params": rest[0]}], lr=0.01)

    plain_model, model = lora_mlp(), lora_mlp()
    plain = two_groups(plain_model)
    loss_of(plain_model, mlp_batch()).backward()
    plain.step()
    base = two_groups(model)
    base.param_groups[1]["sigma"] = 0.3
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, total_steps=8, seed=4)
    train(model, optimizer, range(2))
    optimizer.load_state_dict(plain.state_dict())
    assert [group["sigma"] for group in optimizer.param_groups] == [0.1, 0.3]
    assert (optimizer.step_count, optimizer.seed, optimizer.total_steps) == (2, 4, 8)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.01]
    for ours, theirs in zip(trainable(model), trainable(plain_model), strict=True):
        assert torch.equal(optimizer.state[ours]["exp_avg"], plain.state[theirs]["exp_avg"])
    train(model, optimizer, range(2))


def test_a_state_may_be_loaded_into_the_base_alone() -> None:
    model = lora_mlp()
    optimizer = build(model)
    optimizer.base.load_state_dict(torch.optim.AdamW(trainable(lora_mlp()), lr=0.5).state_dict())
    train(model, optimizer, range(2))
    assert (optimizer.step_count, optimizer.param_groups[0]["lr"]) == (2, 0.5)


class OneMomentPerTensor(torch.optim.SGD):
    """As NovoGrad keeps them."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            self.state[p]["exp_avg_sq"] = p.grad.square().sum()
        return super().step(closure)


def test_moments_that_are_not_kept_for_each_element_are_loaded() -> None:
    def build_one() -> tuple[nn.Module, FlatLoRAOptimizer]:
        model = lora_mlp()
        return model, flatlora(model, base=OneMomentPerTensor)

    model, optimizer = build_one()
    train(model, optimizer, range(2))
    _, other = build_one()
    other.load_state_dict(optimizer.state_dict())
    assert other.step_count == 2


def test_a_checkpoint_does_not_replace_what_was_asked_for_in_silence() -> None:
    saved = build(lora_mlp()).state_dict()
    longer = build(lora_mlp())
    longer.total_steps = 50
    with pytest.warns(UserWarning, match=r"from now on total_steps is 8 \(not 50\)\."):
        longer.load_state_dict(saved)
    longer.total_steps = 50
    others = flatlora(lora_mlp(), base=torch.optim.AdamW, schedule="constant", sigma=0.3, seed=8)
    with pytest.warns(UserWarning, match=r"sigma is 0.2 \(not 0.3\), schedule is 'cosine' .*, seed is 11"):
        others.load_state_dict(saved)
    custom = build(lora_mlp(), schedule="callable")
    with pytest.raises(ValueError, match=r"schedule 'cosine', and the optimizer has a callable"):
        custom.load_state_dict(saved)


def test_going_on_with_other_noise_is_reported() -> None:
    def with_noise(noise: str) -> tuple[nn.Module, FlatLoRAOptimizer]:
        model = lora_mlp()
        return model, flatlora(model, base=torch.optim.AdamW, noise=noise)

    model, optimizer = with_noise("gaussian")
    _, other = with_noise("table")
    other.load_state_dict(optimizer.state_dict())  # a run that has not begun
    train(model, optimizer, range(2))
    with pytest.warns(UserWarning, match=r"came from GaussianNoise, .*; .* from NoiseTable\("):
        other.load_state_dict(optimizer.state_dict())
    _, again = with_noise("table")
    again.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            NoiseTable(1 << 12),
            NoiseTable(1 << 13),
            r"NoiseTable\(size=4096\), .* from NoiseTable\(size=8192\)",
        ),
        (LowRankNoise(4), LowRankNoise(2), r"LowRankNoise\(rank=4\), .* from LowRankNoise\(rank=2\)"),
    ],
    ids=["table", "low rank"],
)
def test_noise_of_another_size_is_other_noise(before: NoiseSource, now: NoiseSource, message: str) -> None:
    def with_noise(noise: NoiseSource) -> tuple[nn.Module, FlatLoRAOptimizer]:
        model = lora_mlp()
        return model, flatlora(model, base=torch.optim.AdamW, noise=noise)

    model, optimizer = with_noise(before)
    train(model, optimizer, range(2))
    with pytest.warns(UserWarning, match=message):
        with_noise(now)[1].load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("searches", [(None, "strong_wolfe"), ("strong_wolfe", None)])
def test_an_option_that_is_a_name_or_none_is_loaded(searches: tuple[str | None, str | None]) -> None:
    def with_search(search: str | None) -> FlatLoRAOptimizer:
        model = lora_mlp()
        base = torch.optim.LBFGS(trainable(model), line_search_fn=search)
        return FlatLoRAOptimizer(base, model, sigma=0.1, schedule="constant")

    saved, other = map(with_search, searches)
    other.load_state_dict(saved.state_dict())
    assert other.param_groups[0]["line_search_fn"] == searches[0]


def test_our_checkpoint_loads_into_the_base_alone() -> None:
    model = lora_mlp()
    optimizer = build(model)
    train(model, optimizer, range(3))
    plain_model = lora_mlp()
    plain = torch.optim.AdamW(trainable(plain_model), lr=1.0)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert plain.param_groups[0]["lr"] == 0.01
    loss_of(plain_model, mlp_batch()).backward()
    plain.step()
    # ... and from there back to us.
    again = build(lora_mlp(), seed=1, sigma=0.5)
    again.load_state_dict(plain.state_dict())
    assert (again.step_count, again.seed) == (3, 11)


def test_loading_ends_the_current_step() -> None:
    model = lora_mlp()
    before = fingerprint(model)
    optimizer = build(model, schedule="constant")
    state = copy.deepcopy(optimizer.state_dict())
    adapters = copy.deepcopy(model.state_dict())
    with optimizer.perturbed():
        first = fingerprint(model)
    train(model, optimizer, range(2))
    loss_of(model, mlp_batch())
    assert changed_weights(model, before)
    optimizer.load_state_dict(state)
    assert not optimizer.is_perturbed
    assert not changed_weights(model, before)
    model.load_state_dict(adapters)
    with optimizer.perturbed():
        assert not changed_weights(model, first)


def test_seeds_beyond_64_bits_survive() -> None:
    optimizer = build(lora_mlp(), seed=-(2**70))
    other = build(lora_mlp())
    other.load_state_dict(optimizer.state_dict())
    assert other.seed == -(2**70)


def test_a_callable_schedule_resumes_with_the_same_callable_only(
    checkpoints: dict[str, tuple[Path, list[float]]],
) -> None:
    saved = torch.load(checkpoints["callable"][0], weights_only=True)["optimizer"]
    optimizer = build(lora_mlp(), schedule="cosine")
    with pytest.raises(ValueError, match="same callable as `schedule`"):
        optimizer.load_state_dict(saved)
    assert optimizer.step_count == 0
