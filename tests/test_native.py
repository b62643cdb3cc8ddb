"""The kernels of native.c: the same bits as torch operations, on every processor, or not at all."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from flatlora_optim.kernels import Kernels, kernels_of, native, plain
from flatlora_optim.kernels.journal import Journal
from flatlora_optim.noise import GaussianNoise, Grid, Noise, NoiseKey, NoiseSource
from flatlora_optim.table import NoiseTable
from helpers import flatlora, int_view, lora_mlp, loss_of, mlp_batch, philox

needs_compiler = pytest.mark.skipif(native._compiler() is None, reason="needs a C compiler")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIALS = [math.nan, math.inf, -math.inf, -0.0, 1e-41, 6e-8, 65504.0, -65504.0]


@needs_compiler
@pytest.mark.parametrize("seed", [0, 12345, (1 << 32) - 1])
def test_the_noise_is_box_muller_on_all_words_of_philox(seed: int) -> None:
    z = native.fill(torch.empty(3 * 1024 + 5), seed)
    counters = torch.arange(1024)
    words = [word.view(4, 256) for word in philox(seed, counters)]

    def pair(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        r = (-2 * (((radius >> 1) + 0.5) / 2**31).double().log()).sqrt()
        turn = angle.double() / 2**32 * 2 * math.pi
        return r * turn.cos(), r * turn.sin()

    parts = [torch.stack(pair(words[i], words[i + 1]), 1).flatten(1) for i in (0, 2)]
    expected = torch.cat(parts, 1).flatten()[: len(z)]
    torch.testing.assert_close(z.double(), expected, rtol=2e-6, atol=1e-6)


@needs_compiler
def test_the_noise_is_gaussian_far_into_its_tails() -> None:
    z = torch.cat([native.fill(torch.empty(1 << 20), seed) for seed in range(16)])
    for bound in (0.5, 1.0, 2.0, 3.0, 4.0, 5.0):
        expected = 2 * stats.norm.sf(bound)
        error = (expected * (1 - expected) / len(z)) ** 0.5
        assert abs(float((z.abs() > bound).double().mean()) - expected) < 5 * error
    assert abs(float(z.mean())) < 5 / len(z) ** 0.5
    assert 5.2 < float(z.abs().max()) < 6.67


@needs_compiler
@settings(max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(1, 1), (3, 700), (37, 130), (5, 3, 2, 2), (700, 999)]),
    row_dim=st.sampled_from([0, 1]),
    first_row=st.sampled_from([0, 1, 31]),
    source=st.sampled_from([GaussianNoise(), NoiseTable()]),
    seed=st.integers(0, 2**40),
    spread=st.sampled_from([1e-7, 0.02, 3e4]),
)
def test_a_block_has_the_bits_of_torch_operations_and_comes_back(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    row_dim: int,
    first_row: int,
    source: NoiseSource,
    seed: int,
    spread: float,
) -> None:
    rows, row_size = first_row + shape[0], math.prod(shape[1:])
    torch.manual_seed(seed)
    weight = (torch.randn(shape) * spread).to(dtype)
    weight.view(-1)[: len(SPECIALS)] = torch.tensor(SPECIALS).to(dtype)[: weight.numel()]
    before = weight.clone()
    scales = torch.rand(rows if row_dim == 0 else row_size) * spread
    grid = Grid(rows, row_size, "cpu", first_row=first_row)
    noise = Noise(source, NoiseKey(seed, 3), grid, scales, row_dim)
    numbers = ~before.isnan()

    def perturb(kernels: Kernels, blocks: int) -> tuple[Tensor, dict[tuple[int, int], Any]]:
        perturbed, journals = before.clone(), {}
        for lo, hi in grid.spans(shape[0], blocks):
            note = partial(journals.__setitem__, (lo, hi))
            kernels.perturb(perturbed[lo:hi], noise, lo, hi, journal=True, note=note)
        return perturbed, journals

    def assert_comes_back(kernels: Kernels, perturbed: Tensor, journals: dict[tuple[int, int], Any]) -> None:
        restored = perturbed.clone()
        for (lo, hi), journal in journals.items():
            kernels.restore(restored[lo:hi], noise, lo, hi, journal=journal, note=lambda: None)
        assert torch.equal(int_view(restored)[numbers], int_view(before)[numbers])

    by_torch, by_block, at_once = perturb(plain, 1), perturb(native, 1), perturb(native, 4)
    for perturbed, journals in (by_block, at_once):
        assert torch.equal(int_view(perturbed)[numbers], int_view(by_torch[0])[numbers])
        assert torch.equal(perturbed.isnan(), ~numbers)
        assert_comes_back(native, perturbed, journals)
    # Each takes back what the other has put on.
    assert_comes_back(native, *by_torch)
    assert_comes_back(plain, *by_block)


@needs_compiler
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.sampled_from([1, 3, 4, 70, 600]),
    columns=st.sampled_from([1, 15, 16, 512, 513, 1100]),
    rank=st.sampled_from([1, 7, 16, 17, 64]),
)
def test_the_norm_increase_is_that_of_a_matrix_product(
    dtype: torch.dtype, rows: int, columns: int, rank: int
) -> None:
    matrix, left, right = (
        torch.randn(rows, columns).to(dtype),
        torch.randn(rows, rank),
        torch.randn(rank, columns),
    )
    delta = left.double() @ right.double()
    expected = (matrix.double() + delta).square().sum(1) - matrix.double().square().sum(1)
    scale = float(matrix.double().norm() * delta.norm()) * 1e-6
    for stored in (matrix, matrix.T.contiguous().T):
        for kernels in (native, plain):
            found = kernels.norm_increase(stored, left, right).double()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=scale)


@needs_compiler
@pytest.mark.parametrize("flags", [(), ("-O0",), ("-mavx2", "-mfma"), ("-march=native", "-funroll-loops")])
def test_the_numbers_are_the_same_with_any_vectors(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if "-mavx2" in flags and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs AVX2")
    expected = [native.fill(torch.empty(5000), seed) for seed in range(50)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, *flags))
    monkeypatch.setattr(native, "_VECTOR_FLAGS", {})
    library = native._load(str(native._compiler()))
    for seed, numbers in enumerate(expected):
        again = torch.empty(5000)
        library.flatlora_fill(again.data_ptr(), again.numel(), seed)
        assert torch.equal(again, numbers)


# ---------------------------------------------------------------------- interrupts and lack of memory


@pytest.fixture
def block() -> tuple[Tensor, Noise]:
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    return weight, Noise(GaussianNoise(), NoiseKey(1, 1), Grid(40, 100, "cpu"), torch.full((40,), 0.01))


@needs_compiler
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_block_whose_journal_can_not_be_kept_stays_clean(
    block: tuple[Tensor, Noise], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    weight, noise = block
    before, journals = weight.clone(), []
    monkeypatch.setattr(native, "Journal", fails)
    with pytest.raises(error):
        native.perturb(weight, noise, 0, 40, journal=True, note=journals.append)
    assert not journals
    assert torch.equal(int_view(weight), int_view(before))


@needs_compiler
def test_an_interrupt_right_after_the_write_is_told_apart(block: tuple[Tensor, Noise]) -> None:
    weight, noise = block
    before = weight.clone()
    journals: list[Journal] = []

    def interrupted(journal: Journal) -> None:
        journals.append(journal)
        if len(journals) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        native.perturb(weight, noise, 0, 40, journal=True, note=interrupted)
    assert len(journals) == 2  # noted again, to be sure
    native.restore(weight, noise, 0, 40, journal=journals[-1], note=lambda: None)
    assert torch.equal(int_view(weight), int_view(before))


@needs_compiler
def test_autograd_sees_that_the_weight_was_written(block: tuple[Tensor, Noise]) -> None:
    weight, noise = block
    x = torch.ones(100, requires_grad=True)
    loss = (weight @ x).sum()
    noise.add_to(weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_compiler
def test_gaussian_noise_is_made_while_it_is_added(
    block: tuple[Tensor, Noise], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, noise = block
    expected = plain.rounded_sum(weight, noise.block(0, 40)).clone()
    for owner, slow in ((plain, "perturb"), (GaussianNoise, "block"), (native, "_JournalMemory")):
        monkeypatch.setattr(owner, slow, lambda *_, **__: pytest.fail("took a detour"))
    assert torch.equal(noise.add_to(weight), expected)


# ---------------------------------------------------------------------- with and without a compiler


@pytest.fixture
def fresh_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No library yet, an empty cache folder, and afterwards everything as it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native._library.cache_clear()
    yield tmp_path
    native._library.cache_clear()


@needs_compiler
def test_the_library_is_built_once(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.is_available()
    (kept,) = (fresh_build / "cache" / "flatlora_optim").iterdir()
    native._library.cache_clear()
    monkeypatch.setattr(native.subprocess, "run", lambda *_, **__: pytest.fail("was built again"))
    assert native.is_available()
    assert kept.exists()


@needs_compiler
def test_the_library_is_built_with_the_optimizer(fresh_build: Path) -> None:
    kernels_of.cache_clear()
    flatlora(lora_mlp())
    assert list((fresh_build / "cache" / "flatlora_optim").iterdir())


@needs_compiler
def test_a_home_that_can_not_be_written_is_no_obstacle(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = fresh_build / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert native.is_available()


@needs_compiler
def test_a_damaged_library_is_built_again(fresh_build: Path) -> None:
    assert native.is_available()
    (kept,) = (fresh_build / "cache" / "flatlora_optim").iterdir()
    kept.unlink()  # not overwritten: it is mapped into this process
    kept.write_bytes(b"cut off")
    native._library.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.is_available()


@pytest.mark.parametrize("result", ["exit 1", "exit 0"])
def test_a_compiler_that_fails_is_reported(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, result: str
) -> None:
    broken = fresh_build / "cc"
    broken.write_text(f"#!/bin/sh\necho something is missing >&2\n{result}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.warns(UserWarning, match="could not be built") as caught:
        assert not native.is_available()
    assert ("something is missing" in str(caught[0].message)) == (result == "exit 1")


@needs_compiler
def test_a_compiler_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    # In a process of its own: merely loading such a library makes subnormal numbers zero.
    code = (
        "import sys, warnings; from flatlora_optim.kernels import native\n"
        "native._FLAGS += ('-ffast-math', '-mfma')\n"
        "with warnings.catch_warnings(record=True) as caught: print(native.is_available())\n"
        "print(caught[0].message)"
    )
    output = run_python(code, {"XDG_CACHE_HOME": str(tmp_path)})
    assert output.startswith("False\n")
    assert "computes other numbers" in output


@pytest.mark.parametrize("environment", [{"CC": "/nowhere/cc"}, {"FLATLORA_NATIVE": "0"}])
def test_without_a_compiler_torch_does_the_work(environment: dict[str, str]) -> None:
    code = (
        "import torch, warnings; warnings.simplefilter('error')\n"
        "from flatlora_optim.kernels import kernels_of; print(kernels_of(torch.device('cpu')).name)"
    )
    assert run_python(code, environment).strip() == "torch operations"


def run_python(code: str, environment: dict[str, str]) -> str:
    command, environment = [sys.executable, "-c", code], os.environ | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@needs_compiler
@pytest.mark.parametrize("restore", ["exact", "snapshot", "subtract"])
def test_both_train_alike(restore: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same numbers, a run without a compiler ends with the same bits."""

    def run() -> list[Tensor]:
        model, batch = lora_mlp(torch.bfloat16), mlp_batch(dtype=torch.bfloat16)
        optimizer = flatlora(model, restore=restore)
        assert "noise made by: native C" in repr(optimizer)
        for _ in range(3):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    with_compiler = run()
    monkeypatch.setattr(native, "takes", lambda noise, part: False)
    without = run()
    assert all(torch.equal(a, b) for a, b in zip(with_compiler, without, strict=True))
