"""Several threads, processes that load data, copies and pickles."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from flatlora_optim import FlatLoRAOptimizer, NoiseTable
from flatlora_optim.noise import GaussianNoise, NoiseKey
from helpers import OwnLoRA, changed_weights, fingerprint, flatlora, int_view, lora_mlp, loss_of, mlp_batch

pytestmark = pytest.mark.usefixtures("two_threads")


def large_layer(seed: int, dtype: torch.dtype = torch.float32) -> OwnLoRA:
    """Its noise has several blocks, which the package's own threads make."""
    torch.manual_seed(seed)
    return OwnLoRA((torch.randn(900, 900) * 0.02).to(dtype))


def train_layer(layer: OwnLoRA, optimizer: FlatLoRAOptimizer, steps: int = 5) -> list[float]:
    x = torch.linspace(-1, 1, 900).expand(2, 900)
    losses = []
    for _ in range(steps):
        loss = layer(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_two_optimizers_in_two_threads() -> None:
    def run(seed: int) -> list[float]:
        dtype = (torch.float32, torch.bfloat16)[seed % 2]
        layer = large_layers[seed]
        before = int_view(layer.weight).clone()
        assert layer.weight.dtype == dtype
        losses = train_layer(layer, flatlora(layer, seed=seed, lr=0.01))
        assert torch.equal(int_view(layer.weight), before)
        return losses

    def layers() -> list[OwnLoRA]:
        return [large_layer(seed, (torch.float32, torch.bfloat16)[seed % 2]) for seed in range(4)]

    large_layers = layers()
    one_after_the_other = [run(seed) for seed in range(4)]
    large_layers = layers()
    with ThreadPoolExecutor(4) as threads:
        at_the_same_time = list(threads.map(run, range(4)))
    assert at_the_same_time == one_after_the_other


# ---------------------------------------------------------------------- threads that die


class FailsAt(GaussianNoise):
    """Raises in whichever thread asks for the n-th block."""

    def __init__(self) -> None:
        self.left = -1
        self.error: type[BaseException] = RuntimeError
        self.lock = threading.Lock()
        self.threads: set[str] = set()

    def block(self, key: NoiseKey, number: int, out: Tensor) -> Tensor:
        with self.lock:
            self.threads.add(threading.current_thread().name)
            self.left -= 1
            if self.left == 0:
                raise self.error
        return super().block(key, number, out)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("restore", ["exact", "snapshot"])
def test_an_exception_in_a_worker(error: type[BaseException], restore: str) -> None:
    layer, noise = large_layer(0), FailsAt()
    before = int_view(layer.weight).clone()
    optimizer = flatlora(layer, noise=noise, restore=restore)
    with optimizer.perturbed():
        noisy = int_view(layer.weight).clone()
    blocks = len(optimizer.targets[0].weight.grid().spans(900))
    assert blocks > 2
    assert all(name.startswith("flatlora") for name in noise.threads)
    noise.error = error
    for number in range(1, 2 * blocks + 1):  # while perturbing, and while restoring
        noise.left = number
        try:
            with optimizer.perturbed():
                assert torch.equal(int_view(layer.weight), noisy)
        except error:
            pass
        else:
            assert restore == "snapshot"
            assert number > blocks
        assert not optimizer.is_perturbed
        assert torch.equal(int_view(layer.weight), before), number


EXIT = """
import sys, threading, torch
from flatlora_optim import FlatLoRAOptimizer
torch.set_num_threads(2)
class LoRA(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T
layer = LoRA(900, 900).requires_grad_(False)
layer.lora_A, layer.lora_B = torch.nn.Parameter(torch.randn(2, 900)), torch.nn.Parameter(torch.randn(900, 2))
layer.scaling = 1.0
before = layer.weight.clone()
base = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
optimizer = FlatLoRAOptimizer(base, layer, sigma=0.1, schedule="constant")
def refuse(thread):
    raise RuntimeError("can't start new thread")
if sys.argv[1] == "no threads":
    threading.Thread.start = refuse
for _ in range(2):
    with optimizer.perturbed():
        assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, before)
optimizer.perturb()
raise SystemExit(3)
"""


@pytest.mark.parametrize("case", ["threads", "no threads"])
def test_an_exit_in_the_middle_of_a_step_is_quiet(case: str) -> None:
    """The interpreter has ended its threads by then; a system at its limits starts none at all."""
    run = subprocess.run([sys.executable, "-c", EXIT, case], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (3, "")


# ---------------------------------------------------------------------- data loaders


class Batches(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, holds: Any = None) -> None:
        self.holds = holds

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = mlp_batch(index, size=1)
        return x[0], y[0]


def train_from(loader: Any, model: nn.Module, optimizer: FlatLoRAOptimizer) -> list[float]:
    losses = []
    for x, y in loader:
        loss = loss_of(model, (x, y))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start: str) -> None:
    large = large_layer(0)
    flatlora(large).perturb()  # the package's threads are there when the workers are forked
    losses = []
    for workers in (0, 2):
        model = lora_mlp()
        optimizer = flatlora(model)
        clean = fingerprint(model)
        # A dataset that holds the model and the optimizer takes them along to a spawned worker.
        loader = DataLoader(
            Batches((model, optimizer)),
            batch_size=2,
            num_workers=workers,
            multiprocessing_context=start if workers else None,
        )
        losses.append(train_from(loader, model, optimizer))
        assert not changed_weights(model, clean)
    assert losses[0] == losses[1]


def test_workers_forked_in_the_middle_of_a_step() -> None:
    model = lora_mlp()
    clean = fingerprint(model)
    optimizer = flatlora(model)
    with optimizer.perturbed():
        noisy = fingerprint(model)
        assert (
            len(list(DataLoader(Batches((model, optimizer)), num_workers=1, multiprocessing_context="fork")))
            == 6
        )
        assert not changed_weights(model, noisy)
    assert not changed_weights(model, clean)


# ---------------------------------------------------------------------- copies


def by_pickle(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


def by_torch(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, by_pickle, by_torch]


def train_on(model: nn.Module, optimizer: FlatLoRAOptimizer, steps: range) -> list[float]:
    return train_from([mlp_batch(step) for step in steps], model, optimizer)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize(
    "noise", ["gaussian", "table", NoiseTable(1 << 16)], ids=["gaussian", "table", "own table"]
)
def test_a_copy_of_model_and_optimizer_goes_on_by_itself(copied: Callable[[Any], Any], noise: Any) -> None:
    model = lora_mlp()
    clean = fingerprint(model)
    options = {"base": torch.optim.AdamW, "lr": 0.01, "schedule": "cosine", "total_steps": 9, "noise": noise}
    optimizer = flatlora(model, **options)
    train_on(model, optimizer, range(3))
    twin, twins_optimizer = copied((model, optimizer))
    assert twins_optimizer.targets[0].layer in list(twin.modules())
    expected = train_on(model, optimizer, range(3, 6))
    assert train_on(twin, twins_optimizer, range(3, 6)) == expected
    assert twins_optimizer.step_count == optimizer.step_count == 6
    assert not changed_weights(model, clean)
    assert not changed_weights(twin, clean)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("what", ["model", "optimizer", "both"])
def test_nothing_is_copied_in_the_middle_of_a_step(copied: Callable[[Any], Any], what: str) -> None:
    model = lora_mlp()
    clean = fingerprint(model)
    optimizer = flatlora(model)
    loss_of(model, mlp_batch()).backward()
    with pytest.raises(RuntimeError, match=r"can't (copy|pickle).*`optimizer\.restore\(\)`"):
        copied({"model": model, "optimizer": optimizer, "both": (model, optimizer)}[what])
    optimizer.step()
    assert not changed_weights(model, clean)


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_made_between_restore_and_step_has_the_same_noise(copied: Callable[[Any], Any]) -> None:
    model = lora_mlp()
    optimizer = flatlora(model)
    loss_of(model, mlp_batch()).backward()
    noisy = fingerprint(model)
    optimizer.restore()
    twin, twins_optimizer = copied((model, optimizer))
    with twins_optimizer.perturbed():
        assert not changed_weights(twin, noisy)


def test_a_closed_optimizer_is_not_copied() -> None:
    optimizer = flatlora(lora_mlp())
    optimizer.close()
    with pytest.raises(RuntimeError, match="was closed"):
        copy.deepcopy(optimizer)


def test_a_callable_schedule_is_copied_and_pickled_as_far_as_it_can_be() -> None:
    model = lora_mlp()
    optimizer = flatlora(model, schedule=lambda step: 0.5)
    _, twin = copy.deepcopy((model, optimizer))
    assert twin.sigma == optimizer.sigma
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(optimizer)
