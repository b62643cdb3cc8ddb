"""The system itself refuses memory, or room on the disk, in the middle of a step.

Each try is a fork of one small process, and has a limit of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer
from helpers import MLP, flatlora, int_view, loss_of, trainable, with_lora

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and Linux' resource limits")

WIDTH = 1024
CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "exact, float32": (torch.float32, {"restore": "exact"}),
    "exact, bfloat16": (torch.bfloat16, {"restore": "exact"}),
    "exact, float64": (torch.float64, {"restore": "exact"}),
    "table": (torch.float32, {"noise": "table"}),
    "snapshot, float32": (torch.float32, {"restore": "snapshot"}),
    "snapshot, bfloat16": (torch.bfloat16, {"restore": "snapshot"}),
    "virtual": (torch.float32, {"mode": "virtual"}),
}


class Run:
    def __init__(self, case: str) -> None:
        torch.manual_seed(0)
        dtype, options = CASES[case]
        self.case = case
        self.model: nn.Module = with_lora(MLP(WIDTH, WIDTH), ["fc1"]).to(dtype)
        self.optimizer: FlatLoRAOptimizer = flatlora(self.model, **options)
        self.batch = torch.randn(4, WIDTH).to(dtype), torch.tensor([0, 1, 2, 3])

    def attempt(self) -> None:
        with self.optimizer.perturbed():
            if self.batch[0].dtype != torch.bfloat16:  # whose products crash without memory
                loss_of(self.model, self.batch).backward()

    def step(self) -> None:
        self.optimizer.zero_grad()
        with self.optimizer.perturbed():
            loss_of(self.model, self.batch).backward()
        self.optimizer.step()

    def frozen_bits(self) -> str:
        return digest([p for p in self.model.parameters() if not p.requires_grad])


def digest(tensors: list[nn.Parameter]) -> str:
    """sha256 of all bits, without a copy of them."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(int_view(tensor).numpy())
    return total.hexdigest()


@contextmanager
def limited(kind: int, size: int) -> Iterator[None]:
    import resource

    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def forked(work: Callable[..., str], *args: Any) -> str:
    """What ``work`` returns, or its traceback, or how the process died."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = work(*args)
        except BaseException:
            answer = traceback.format_exc()
        os.write(write, answer[-60_000:].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    status = os.waitpid(child, 0)[1]
    return answer if status == 0 else f"died with status {status}"


def adapters_after_a_step(run: Run) -> str:
    run.step()
    return digest(trainable(run.model))


def check_goes_on(run: Run, before: str, expected: str) -> None:
    run.optimizer.restore()
    assert run.frozen_bits() == before
    assert adapters_after_a_step(run) == expected
    assert run.frozen_bits() == before


# ---------------------------------------------------------------------- memory


def fill_memory() -> list[Tensor]:
    filling: list[Tensor] = []
    for size in (1 << 20, 1 << 16, 1 << 12):
        with suppress(RuntimeError):
            while True:
                filling.append(torch.empty(size, dtype=torch.uint8))
    return filling


def with_little_memory(run: Run, expected: str, free: int) -> str:
    import resource

    before, answer = run.frozen_bits(), "enough"
    with limited(resource.RLIMIT_AS, address_space() + free + (1 << 21)):
        kept_free = torch.empty(free, dtype=torch.uint8)
        filling = fill_memory()
        del kept_free
        try:
            run.attempt()
        except (MemoryError, RuntimeError):
            answer = "refused"
        if run.optimizer.is_perturbed:
            answer = "refused, also to restore"
        else:
            assert run.frozen_bits() == before
    filling.clear()
    check_goes_on(run, before, expected)
    return answer


def try_with_little_memory(case: str) -> str:
    run = Run(case)
    expected = forked(adapters_after_a_step, run)
    from_scratch = try_with_more_and_more(run, expected)
    run.attempt()  # from now on, the same noise again needs a journal and nothing else
    return json.dumps([from_scratch, try_with_more_and_more(run, expected)])


def try_with_more_and_more(run: Run, expected: str) -> list[str]:
    answers, free = [""], 1 << 14
    while answers[-1] != "enough" and free < 1 << 30:
        answers.append(forked(with_little_memory, run, expected, free))
        free += free // 2
    return answers[1:]


# ---------------------------------------------------------------------- disk


def save(run: Run, path: Path) -> None:
    """As everybody should: a file that can't be finished doesn't replace an older one."""
    unfinished = path.with_suffix(".new")
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, unfinished)
    unfinished.replace(path)


def with_little_disk(run: Run, expected: str, path: Path, size: int) -> str:
    import resource

    path.write_text("an older checkpoint")
    before, answer = run.frozen_bits(), "enough"
    run.optimizer.perturb()
    noisy = run.frozen_bits()
    with limited(resource.RLIMIT_FSIZE, size):
        try:
            save(run, path)
        except (OSError, RuntimeError):
            answer = "refused"
            assert path.read_text() == "an older checkpoint"
    with pytest.raises((OSError, RuntimeError)):
        torch.save(run.optimizer.state_dict(), "/dev/full")
    assert run.optimizer.is_perturbed
    assert run.frozen_bits() == noisy
    save(run, path)
    run.optimizer.restore()
    run.model.load_state_dict(torch.load(path)["model"])
    check_goes_on(run, before, expected)
    return answer


def try_with_little_disk(case: str) -> str:
    run = Run(case)
    expected = forked(adapters_after_a_step, run)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        save(run, path)
        size = path.stat().st_size
        sizes = (0, 100, size // 2, size - 1, size)
        return json.dumps([forked(with_little_disk, run, expected, path, size) for size in sizes])


# ---------------------------------------------------------------------- the tests


def try_all() -> None:
    """What the small process does."""
    torch.set_num_threads(1)  # a fork has no other
    print(json.dumps([{case: forked(test, case) for case in CASES} for test in TESTS]))


TESTS = (try_with_little_memory, try_with_little_disk)


Answers = list[dict[str, str]]


@pytest.fixture(scope="module")
def answers() -> Answers:
    process = subprocess.run(
        [sys.executable, "-c", "import test_limits; test_limits.try_all()"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: Answers = json.loads(process.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", CASES)
def test_out_of_memory(case: str, answers: Answers) -> None:
    """Where it is too little for restoring, too, that works as soon as there is more."""
    from_scratch, again = json.loads(answers[0][case])
    assert set(from_scratch + again) <= {"enough", "refused", "refused, also to restore"}
    assert from_scratch.count("refused") > 5
    assert from_scratch[-1] == again[-1] == "enough"
    if case.startswith("snapshot"):
        assert "refused, also to restore" not in from_scratch + again
    if case.startswith("exact"):
        assert again.count("refused") > 5


@pytest.mark.parametrize("case", CASES)
def test_a_full_disk(case: str, answers: Answers) -> None:
    assert json.loads(answers[1][case]) == ["refused"] * 4 + ["enough"]
