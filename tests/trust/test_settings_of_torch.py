"""Modes, wrappers and exits of torch and Python around the optimizer."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flatlora_optim import NoiseTable
from flatlora_optim.kernels import kernels_of
from flatlora_optim.kernels.threads import for_each
from flatlora_optim.targets.scales import _projection
from helpers import OwnLoRA, changed_weights, fingerprint, flatlora, lora_mlp, loss_of, mlp_batch, with_lora

MODES: list[dict[str, Any]] = [
    {"restore": "exact"},
    {"restore": "snapshot"},
    {"restore": "subtract"},
    {"mode": "virtual"},
    {"noise": NoiseTable(1 << 12)},
]


def in_a_new_thread(work: Callable[[], None]) -> None:
    """Where no buffer is there yet."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def named(options: dict[str, Any]) -> str:
    (value,) = options.values()
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize("options", MODES, ids=named)
def test_what_is_made_in_inference_mode_serves_outside_of_it(options: dict[str, Any]) -> None:
    def work() -> None:
        model, batch = lora_mlp(), mlp_batch()
        optimizer = flatlora(model, **options)
        for inference in (True, False, True, False):
            with torch.inference_mode(inference), optimizer.perturbed():
                loss_of(model, batch)
            loss_of(model, batch).backward()
            with torch.inference_mode(inference):
                model(batch[0])
                model.state_dict()
            optimizer.step()

    in_a_new_thread(work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # for C, and for torch operations
@pytest.mark.parametrize("options", [m for m in MODES if m != {"restore": "subtract"}], ids=named)
def test_the_default_device_does_not_matter(options: dict[str, Any], dtype: torch.dtype) -> None:
    def work() -> None:
        model = lora_mlp(dtype)
        clean = fingerprint(model)
        with torch.device("meta"):
            optimizer = flatlora(model, **options)
            with optimizer.perturbed():
                model.state_dict()
        assert not changed_weights(model, clean)

    in_a_new_thread(work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # for C, and for torch operations
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(default: torch.dtype, dtype: torch.dtype) -> None:
    model = lora_mlp(dtype)
    with flatlora(model).perturbed():
        expected = fingerprint(model)

    def work() -> None:
        with defaults(default), flatlora(model).perturbed():
            assert not changed_weights(model, expected)

    in_a_new_thread(work)


def own_layer() -> nn.Module:
    """Is called on random inputs when the optimizer is built."""
    return OwnLoRA(torch.ones(64, 64))


def quantized_layer() -> nn.Module:
    """Has row norms that are kept, and projections of the adapter."""
    return with_lora(nn.Sequential(bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32).to("cpu")), ["0"])


@pytest.mark.parametrize("make", [own_layer, quantized_layer])
@pytest.mark.parametrize("default", [torch.device("meta"), torch.bfloat16, torch.float64], ids=str)
def test_defaults_do_not_matter_to_random_numbers_of_our_own(
    default: torch.device | torch.dtype, make: Callable[[], nn.Module]
) -> None:
    x, outputs = torch.ones(2, 64), []
    for change in (defaults(default), nullcontext()):
        _projection.cache_clear()
        torch.manual_seed(0)
        model = make()
        with change:
            optimizer = flatlora(model, noise="gaussian")
            with optimizer.perturbed():
                outputs.append(model(x))
            optimizer.state_dict()
    assert torch.equal(*outputs)


@contextmanager
def defaults(default: torch.device | torch.dtype) -> Iterator[None]:
    if isinstance(default, torch.device):
        with default:
            yield
        return
    usual = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def test_import_with_another_default_device() -> None:
    run("import torch; torch.set_default_device('meta'); import flatlora_optim")


class ParallelOnOne(nn.DataParallel):
    """What DataParallel does on several GPUs, as far as it can be done without one."""

    def forward(self, *inputs: Tensor) -> Any:
        return self.module._replicate_for_data_parallel()(*inputs)


def test_data_parallel() -> None:
    model, batch = lora_mlp(), mlp_batch()
    optimizer = flatlora(model)
    with pytest.raises(RuntimeError, match="DataParallel copies the weights before the noise comes"):
        loss_of(ParallelOnOne(model), batch)
    assert not optimizer.is_perturbed
    with torch.no_grad():
        loss_of(ParallelOnOne(model), batch)
    with optimizer.perturbed():
        loss_of(ParallelOnOne(model), batch).backward()
    optimizer.step()

    whole = ParallelOnOne(lora_mlp())
    optimizer = flatlora(whole)
    loss = loss_of(whole, batch)
    assert optimizer.is_perturbed
    with flatlora(twin := lora_mlp()).perturbed():
        assert torch.equal(loss, loss_of(twin, batch))


def test_an_exit_in_the_middle_of_a_step_is_quiet() -> None:
    run(
        "import torch; from torch import nn; from flatlora_optim import FlatLoRAOptimizer, register\n"
        "torch.set_num_threads(2)\n"
        "class LoRA(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) + x @ self.a.T @ self.b.T\n"
        "model = LoRA(1024, 1024).requires_grad_(False)\n"
        "model.a, model.b = nn.Parameter(torch.zeros(2, 1024)), nn.Parameter(torch.zeros(1024, 2))\n"
        "register(model, lora_A='a', lora_B='b')\n"
        "base = torch.optim.SGD([model.a, model.b], lr=0.1)\n"
        "optimizer = FlatLoRAOptimizer(base, model, sigma=0.1, schedule='constant')\n"
        "model(torch.ones(1, 1024))\n"
        "assert optimizer.is_perturbed\n"
    )


def test_an_interrupt_while_the_threads_start_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before, threads = set(threading.enumerate()), torch.get_num_threads()
    submit, calls = ThreadPoolExecutor.submit, []

    def interrupted(self: ThreadPoolExecutor, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return submit(self, *args)

    torch.set_num_threads(7)  # no other test has a pool of that size
    try:
        with monkeypatch.context() as patch:
            patch.setattr(ThreadPoolExecutor, "submit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                for_each(str, range(7))
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
            assert not thread.is_alive()
        done: list[int] = []
        for_each(done.append, range(20))
        assert sorted(done) == list(range(20))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("failing", [0, 3])
def test_nothing_runs_on_after_an_exception(failing: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    done: list[int] = []

    def work(item: int) -> None:
        if item == failing:
            raise MemoryError
        time.sleep(0.01)
        done.append(item)

    try:
        with pytest.raises(MemoryError):
            for_each(work, range(100))
    finally:
        torch.set_num_threads(threads)
    count = len(done)
    time.sleep(0.05)
    assert count == len(done) < 10


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


class NoFloat64(TorchDispatchMode):
    """Refuses what MPS refuses."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(isinstance(each, Tensor) and each.dtype == torch.float64 for each in tree_leaves(made)):
            raise TypeError("the MPS framework doesn't support float64")
        return made


@pytest.mark.parametrize("options", MODES, ids=named)
def test_no_float64_is_needed(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_of.cache_clear()
    monkeypatch.setattr("flatlora_optim.kernels.native.is_available", lambda: False)
    try:
        with NoFloat64():
            model = lora_mlp()
            optimizer = flatlora(model, **options)
            for _ in range(2):
                with optimizer.perturbed():
                    loss_of(model, mlp_batch()).backward()
                assert optimizer.metrics()["noise_norm"] > 0
                optimizer.step()
    finally:
        kernels_of.cache_clear()
