"""An exception at every boundary that the package's code has: weights come back, training goes on."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatlora_optim
from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.noise import GaussianNoise, NoiseKey
from helpers import changed_weights, fingerprint, flatlora, lora_mlp, loss_of, mlp_batch, same, trainable

PACKAGE = str(Path(flatlora_optim.__file__).parent)


class InjectedError(Exception):
    """What nobody else raises."""


ERRORS = (InjectedError, KeyboardInterrupt, SystemExit)


class Fault:
    """Raises an exception at the n-th boundary: each line of the package, each call that the
    package receives or makes (torch's C functions included), on its way in and on its way out.
    """

    def __init__(self, number: int, error: type[BaseException]) -> None:
        self.number = number
        self.left = number
        self.error = error
        self.place = ""
        self.tracer, self.profiler = sys.gettrace(), sys.getprofile()  # those of a coverage run

    @contextmanager
    def armed(self) -> Iterator[None]:
        sys.settrace(self._on_line)
        sys.setprofile(self._on_call)
        try:
            yield
        finally:
            self._disarm()

    def _disarm(self) -> None:
        sys.settrace(self.tracer)
        sys.setprofile(self.profiler)

    def _on_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not _is_ours(frame):
            return None
        if event == "line":
            self._boundary(frame, event)
        return self._on_line

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> None:
        # An `__exit__` that never begins, as torch.no_grad's, is beyond anybody's power.
        is_theirs = event in ("call", "return") and frame.f_code.co_name != "__exit__"
        if _is_ours(frame) or (is_theirs and frame.f_back is not None and _is_ours(frame.f_back)):
            self._boundary(frame, event)

    def _boundary(self, frame: FrameType, event: str) -> None:
        self.left -= 1
        if self.left == 0:
            self._disarm()
            self.place = f"{event} in {frame.f_code.co_name}:{frame.f_lineno}"
            raise self.error

    @property
    def happened(self) -> bool:
        return self.left <= 0


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(PACKAGE)


# ---------------------------------------------------------------------- one step, with all there is


def observe(model: nn.Module, optimizer: FlatLoRAOptimizer) -> None:
    """What may happen in the middle of a step."""
    with torch.no_grad():
        model(mlp_batch(9)[0])
    with optimizer.clean():
        model(mlp_batch(9)[0])
    model.state_dict()
    optimizer.state_dict()


def closure_style(model: nn.Module, optimizer: FlatLoRAOptimizer, step: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, mlp_batch(step))
        observe(model, optimizer)
        loss.backward()
        return loss

    optimizer.step(closure)


def explicit_style(model: nn.Module, optimizer: FlatLoRAOptimizer, step: int) -> None:
    optimizer.zero_grad()
    with optimizer.perturbed():
        loss = loss_of(model, mlp_batch(step))
        observe(model, optimizer)
        loss.backward()
    optimizer.step()


def automatic_style(model: nn.Module, optimizer: FlatLoRAOptimizer, step: int) -> None:
    optimizer.zero_grad()
    loss = loss_of(model, mlp_batch(step))
    observe(model, optimizer)
    loss.backward()
    optimizer.step()


Style = Callable[[nn.Module, FlatLoRAOptimizer, int], None]
STYLES = (closure_style, explicit_style, automatic_style)
MODES: dict[str, dict[str, str]] = {
    "exact": {"restore": "exact"},
    "snapshot": {"restore": "snapshot"},
    "virtual": {"mode": "virtual"},
}


class Run:
    """Two steps of training, of which the first may be hit."""

    def __init__(self, style: Style, options: dict[str, str]) -> None:
        self.model = lora_mlp()
        self.optimizer = flatlora(self.model, **options)
        self.style = style
        self.clean = fingerprint(self.model)
        self.start = [p.detach().clone() for p in trainable(self.model)]

    def step(self, number: int) -> list[Tensor]:
        self.style(self.model, self.optimizer, number)
        return self.adapters()

    def adapters(self) -> list[Tensor]:
        return [p.detach().clone() for p in trainable(self.model)]

    def begin_again(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(trainable(self.model), self.start, strict=True):
                parameter.copy_(value)
        for group in self.optimizer.param_groups:
            group["flatlora_step"] = 0
        self.optimizer.load_state_dict(self.optimizer.state_dict())


STRIDE = int(os.environ.get("FLATLORA_FAULT_STRIDE", "41"))
"""1 visits every boundary, about 6000 for each case."""


@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mode", MODES)
def test_a_fault_at_any_boundary(style: Style, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # keeps all work on the traced thread
    undisturbed, run = Run(style, MODES[mode]), Run(style, MODES[mode])
    after = [undisturbed.step(0), undisturbed.step(1)]
    visited = 0
    for number in count(1, STRIDE):
        fault = Fault(number, ERRORS[visited % 3])
        try:
            with fault.armed():
                run.step(0)
        except ERRORS:
            pass
        if not fault.happened:
            break
        visited += 1
        check_run_goes_on(run, after, fault.place)
        run.begin_again()
    assert visited > 1000 / STRIDE


def check_run_goes_on(run: Run, after: list[list[Tensor]], place: str) -> None:
    if run.style is automatic_style or "in perturbed" in place:
        # A generator that a tracer stops at its own `yield` never reaches its `finally`. A signal
        # can't do that.
        run.optimizer.restore()
    assert not changed_weights(run.model, run.clean), place
    assert not run.optimizer.is_perturbed, place
    if same(run.adapters(), run.start):
        assert run.optimizer.step_count == 0, place
        assert same(run.step(0), after[0]), place
    else:
        # The base has made its step. If the fault came before it was counted, the next step has
        # the same noise once more.
        assert same(run.adapters(), after[0]), place
        assert run.optimizer.step_count in (0, 1), place
    if run.optimizer.step_count == 1:
        assert same(run.step(1), after[1]), place
    assert not changed_weights(run.model, run.clean), place


# ---------------------------------------------------------------------- real signals


@contextmanager
def alarms() -> Iterator[None]:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


SIGNALS = int(os.environ.get("FLATLORA_SIGNALS", "30"))


@pytest.mark.timeout(3600, method="thread")  # the other method has an alarm of its own
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that sends signals")
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mode", MODES)
def test_a_signal_at_any_time(style: Style, mode: str) -> None:
    undisturbed, run = Run(style, MODES[mode]), Run(style, MODES[mode])
    after, start = [undisturbed.step(0)], time.perf_counter()
    after.append(undisturbed.step(1))
    duration, interrupted = time.perf_counter() - start, 0
    with alarms():
        for _ in range(SIGNALS):
            try:
                start = time.perf_counter()
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, duration))
                run.step(0)
                signal.setitimer(signal.ITIMER_REAL, 0)
                # The first one may have been slow, and all signals would come too late then.
                duration = min(duration, time.perf_counter() - start)
            except KeyboardInterrupt:
                interrupted += 1
            torch.set_grad_enabled(True)  # the `__exit__` of a no_grad may have been interrupted
            if any(same(run.adapters(), whole) for whole in (run.start, after[0])):
                check_run_goes_on(run, after, "a signal")
            else:  # torch's SGD has updated some of them
                run.optimizer.restore()
                assert not changed_weights(run.model, run.clean)
            run.begin_again()
    assert interrupted > SIGNALS / 10


# ---------------------------------------------------------------------- blocks that never end


class Forgets(GaussianNoise):
    """Drops what it keeps when it is asked for the n-th block."""

    def __init__(self) -> None:
        self.left = 0
        self.keeps: list[Any] = []

    def block(self, key: NoiseKey, number: int, out: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            self.keeps.clear()
        return super().block(key, number, out)


def interrupted(block: Any) -> Any:
    """What an interrupt leaves that comes just before the body: the traceback keeps it for a while."""
    block.__enter__()
    return block


@pytest.mark.parametrize("mode", MODES)
def test_a_block_that_never_ended_ends_no_later_one(mode: str) -> None:
    run = Run(explicit_style, MODES[mode])
    clean_loss = loss_of(run.model.eval(), mlp_batch()).item()
    kept = [interrupted(run.optimizer.perturbed())]
    run.optimizer.step()
    with run.optimizer.perturbed():
        loss = loss_of(run.model, mlp_batch()).item()
        kept.clear()
        assert run.optimizer.is_perturbed
        assert loss_of(run.model, mlp_batch()).item() == loss != clean_loss
        kept.append(interrupted(run.optimizer.clean()))
        run.optimizer.restore()
        run.optimizer.perturb()
        with run.optimizer.clean():
            kept.clear()
            assert not run.optimizer.is_perturbed
            assert loss_of(run.model, mlp_batch()).item() == clean_loss
    assert not changed_weights(run.model, run.clean)


@pytest.mark.parametrize("mode", MODES)
def test_a_block_that_never_ended_ends_when_collected(mode: str) -> None:
    run = Run(explicit_style, MODES[mode])
    clean_loss = loss_of(run.model.eval(), mlp_batch()).item()
    kept = [interrupted(run.optimizer.perturbed())]
    assert loss_of(run.model, mlp_batch()).item() != clean_loss
    kept.clear()
    assert not run.optimizer.is_perturbed
    assert loss_of(run.model, mlp_batch()).item() == clean_loss
    assert not changed_weights(run.model, run.clean)


@pytest.mark.parametrize("restore", ["exact", "snapshot"])
def test_a_block_that_never_ended_is_collected_while_others_come_and_go(restore: str) -> None:
    model, noise = lora_mlp(), Forgets()
    clean = fingerprint(model)
    optimizer = flatlora(model, restore=restore, noise=noise)
    for number in range(1, 1 + len(optimizer.targets)):
        noise.keeps.append(interrupted(optimizer.perturbed()))
        optimizer.step()
        noise.left = number
        with optimizer.perturbed():
            assert not noise.keeps
            assert optimizer.is_perturbed
            assert len(changed_weights(model, clean)) == len(optimizer.targets)
        assert not changed_weights(model, clean), number
