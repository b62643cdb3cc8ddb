"""The native kernels: the same bits as torch operations, on every processor, or not at all."""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from flatlora_optim.kernels import build, kernels_of, native, parts_of, perturb, plain, restore
from flatlora_optim.kernels.grid import Grid
from flatlora_optim.kernels.part import Keep, Part
from flatlora_optim.kernels.plain import Product
from flatlora_optim.kernels.threads import for_each
from flatlora_optim.noise import GaussianNoise, Noise, NoiseKey, NoiseSource
from flatlora_optim.noise.table import NoiseTable
from flatlora_optim.perturbation import clean_copy
from helpers import OwnLoRA, flatlora, int_view, lora_mlp, loss_of, mlp_batch, philox

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="needs a C compiler")


def compiler() -> list[str]:
    found = build.find_compiler()
    assert found is not None
    return found


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIALS = [math.nan, math.inf, -math.inf, -0.0, 1e-41, 6e-8, 65504.0, -65504.0]


@pytest.fixture
def fresh_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No library yet, an empty cache folder, and afterwards everything as it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.library_or_none.cache_clear()
    yield tmp_path
    build.library_or_none.cache_clear()


@needs_compiler
@pytest.mark.parametrize(
    "key", [NoiseKey(0, 0), NoiseKey(-5, 12345, 3), NoiseKey(2**64 - 1, 2**32 - 1, 2**32 - 1)]
)
@pytest.mark.parametrize("block", [0, 7, 2**32 - 1])
def test_the_noise_is_box_muller_on_all_words_of_philox(key: NoiseKey, block: int) -> None:
    z = native.fill(torch.empty(3 * 1024 + 5), key, block)
    words = [word.view(4, 256) for word in philox(torch.arange(1024), key.words, block)]

    def pair(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        r = (-2 * (((radius >> 1) + 0.5) / 2**31).double().log()).sqrt()
        turn = angle.double() / 2**32 * 2 * math.pi
        return r * turn.cos(), r * turn.sin()

    parts = [torch.stack(pair(words[i], words[i + 1]), 1).flatten(1) for i in (0, 2)]
    expected = torch.cat(parts, 1).flatten()[: len(z)]
    torch.testing.assert_close(z.double(), expected, rtol=2e-6, atol=1e-6)


@needs_compiler
def test_the_noise_is_gaussian_far_into_its_tails() -> None:
    z = torch.cat([native.fill(torch.empty(1 << 20), NoiseKey(0, 0), block) for block in range(16)])
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

    perturbed = {}
    for kernels, blocks in ((plain, 1), (native, 1), (native, 4)):
        for keep in Keep:
            weight, copy = before.clone(), torch.empty_like(before) if keep is Keep.COPY else None
            parts = [
                kernels.Part(weight[lo:hi], noise, lo, hi, keep, None if copy is None else copy[lo:hi])
                for lo, hi in grid.spans(shape[0], blocks)
            ]
            kernels.Part.perturb_all(parts)
            assert all(part.is_perturbed for part in parts)
            perturbed[kernels.name, keep] = weight.clone()
            cleaned = weight.clone()
            for part in parts:
                part.clean(cleaned[part.lo : part.hi])
            assert torch.equal(int_view(weight)[numbers], int_view(perturbed[kernels.name, keep])[numbers])
            kernels.Part.restore_all(parts)
            assert not any(part.is_perturbed for part in parts)
            assert torch.equal(int_view(cleaned)[numbers], int_view(weight)[numbers])
            if keep is not Keep.NOTHING:
                assert torch.equal(int_view(weight)[numbers], int_view(before)[numbers])
    one, *others = perturbed.values()
    assert torch.equal(one.isnan(), ~numbers)
    for other in others:
        assert torch.equal(int_view(other)[numbers], int_view(one)[numbers])
        assert torch.equal(other.isnan(), ~numbers)


@needs_compiler
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.sampled_from([1, 3, 4, 70, 600]),
    columns=st.sampled_from([1, 15, 16, 32, 513, 1100, 5000]),
    rank=st.sampled_from([1, 2, 7, 16, 17, 64]),
)
def test_the_norms_are_those_of_a_matrix_product(
    dtype: torch.dtype, rows: int, columns: int, rank: int
) -> None:
    matrix, left, right = (
        torch.randn(rows, columns).to(dtype),
        torch.randn(rows, rank),
        torch.randn(rank, columns),
    )
    for stored in (matrix, matrix.T.contiguous().T):
        for kernels in (native, plain):
            rounds = kernels is native and stored.is_contiguous()
            factors = [
                each.to(torch.bfloat16 if rounds else torch.float32).double() for each in (left, right)
            ]
            delta = factors[0] @ factors[1]
            expected = (matrix.double() + delta).square().sum(1)
            scale = float(matrix.double().norm() * delta.norm()) * 1e-6
            (found,) = kernels.squared_norms([Product(stored, left, right)])
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=scale)


@needs_compiler
def test_factors_between_two_numbers_of_bfloat16_are_rounded_to_the_even_one() -> None:
    halfway = 1 + (2 * torch.arange(40) + 1) * 2.0**-8  # 1.0 and its next neighbour are 2^-7 apart
    factors = torch.ones(1, 1), halfway[None, :]
    for left, right in (factors, tuple(factor.T for factor in reversed(factors))):
        matrix = torch.zeros(left.shape[0], right.shape[1])
        (found,) = native.squared_norms([Product(matrix, left, right)])
        expected = (left.bfloat16().double() @ right.bfloat16().double()).square().sum(1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_weight_that_is_not_finite_has_no_finite_norm(dtype: torch.dtype, value: float) -> None:
    matrix = torch.randn(6, 50).to(dtype)
    matrix[2, 7] = matrix[5, 49] = value
    (found,) = native.squared_norms([Product(matrix, torch.ones(6, 3), torch.ones(3, 50))])
    assert found.isfinite().tolist() == [True, True, False, True, True, False]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", list(Keep))
def test_a_weight_may_begin_anywhere(keep: Keep, dtype: torch.dtype) -> None:
    for first in range(9):  # elements: vectors are aligned, weights need not be
        memory = torch.randn(first + 7 * 11 + 5).to(dtype)
        weight = memory[first : first + 7 * 11].view(7, 11)
        before = memory.clone()
        noise = Noise(GaussianNoise(), NoiseKey(0, 0), Grid(7, 11, "cpu"), torch.ones(7))
        copy = torch.empty_like(weight) if keep is Keep.COPY else None
        (part,) = parts_of(weight, noise, keep, copy)
        assert isinstance(part, native.Part)
        perturb([part])
        assert not torch.equal(weight, before[first : first + 7 * 11].view(7, 11))
        restore([part])
        if keep is not Keep.NOTHING:
            assert torch.equal(int_view(memory), int_view(before))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [5, 64, 1000])
@pytest.mark.parametrize("kernels", [native, plain], ids=["native", "plain"])
def test_each_sampled_element_counts(kernels: Any, dtype: torch.dtype, numel: int) -> None:
    weight = torch.randn(numel).to(dtype)
    bits, before = int_view(weight), kernels.checksums([weight])
    stride = max(1, numel // plain.SAMPLES)
    for i in range(0, min(plain.SAMPLES, numel) * stride, stride):
        for bit in (1, torch.iinfo(bits.dtype).min):
            bits[i] ^= bit
            assert list(kernels.checksums([weight])) != list(before)
            bits[i] ^= bit
    assert list(kernels.checksums([weight])) == list(before)


@needs_compiler
@pytest.mark.parametrize("rank", [1, 3])
def test_the_norms_know_nothing_of_the_product_before(rank: int) -> None:
    matrix, left, right = torch.randn(6, 40), torch.randn(6, rank), torch.randn(rank, 40)
    (expected,) = native.squared_norms([Product(matrix, left, right)])
    for value in (math.nan, math.inf):
        native.squared_norms(
            [Product(matrix, torch.full((6, rank + 1), value), torch.full((rank + 1, 40), value))]
        )
        (found,) = native.squared_norms([Product(matrix, left, right)])
        assert torch.equal(found, expected)


@needs_compiler
@pytest.mark.parametrize("flags", [(), ("-O0",), ("-mavx2", "-mfma"), ("-march=native", "-funroll-loops")])
def test_the_numbers_are_the_same_with_any_vectors(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if "-mavx2" in flags and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs AVX2")
    products = [
        Product(torch.randn(7, 530).to(dtype), torch.randn(7, rank), torch.randn(rank, 530))
        for dtype in DTYPES
        for rank in (1, 5, 8, 200)
    ]
    products[0][1][2], products[0][2][0, 3], products[1][0][4, 4] = math.inf, 1e38, -math.inf

    def numbers() -> list[Tensor]:
        filled = [native.fill(torch.empty(5000), NoiseKey(0, step), 1) for step in range(50)]
        return filled + native.squared_norms(products)

    expected = numbers()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, *flags))
    monkeypatch.setattr(build, "_VECTOR_FLAGS", {})
    built = build.load(compiler())
    monkeypatch.setattr(native, "library", lambda: built)
    for again, before in zip(numbers(), expected, strict=True):
        torch.testing.assert_close(again, before, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------------- interrupts and lack of memory


@pytest.fixture
def block() -> tuple[Tensor, Noise]:
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    return weight, Noise(GaussianNoise(), NoiseKey(1, 1), Grid(40, 100, "cpu"), torch.full((40,), 0.01))


@needs_compiler
@pytest.mark.parametrize("granted", [0, 1, 2])
def test_a_part_for_whose_journal_there_is_no_memory_stays_clean(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, granted: int
) -> None:
    refusing = fresh_build / "refusing.c"
    refusing.write_text(
        "#include <stddef.h>\nvoid *__real_malloc(size_t);\n"
        f"void *__wrap_malloc(size_t n) {{ static int left = {granted};"
        " return left-- > 0 ? __real_malloc(n) : NULL; }\n"
    )
    monkeypatch.setattr(build, "_SOURCES", (*build._SOURCES, refusing))
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-Wl,--wrap=malloc"))
    weight = torch.randn(40, 5000)  # of four segments
    before = weight.clone()
    noise = Noise(GaussianNoise(), NoiseKey(1, 1), Grid(40, 5000, "cpu"), torch.full((40,), 0.5))
    part = native.Part(weight, noise, 0, 40, Keep.JOURNAL)
    with pytest.raises(MemoryError, match="journal"):
        native.Part.perturb_all([part])
    assert not part.is_perturbed
    assert part.nbytes == 0
    assert torch.equal(weight, before)


@needs_compiler
@pytest.mark.parametrize("has_team", [True, False], ids=["threads of torch", "threads of our own"])
@pytest.mark.parametrize("restoring", [False, True])
def test_an_interrupt_between_two_calls(
    monkeypatch: pytest.MonkeyPatch, two_threads: None, has_team: bool, restoring: bool
) -> None:
    model = nn.Sequential(*[OwnLoRA(torch.randn(8, 8)) for _ in range(6)])
    optimizer = flatlora(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.perturb()
    if not restoring:
        optimizer.restore()  # the next time, the noise is drawn already
    team, noisy = native._torch_team(), []

    def parts() -> Iterator[Any]:
        return (part for each in optimizer._weights.perturbations for part in each._parts)

    def interrupted(work: Any, task: Any, threads: int, flags: int) -> None:
        if has_team and team is not None:
            team(work, task, threads, flags)
        else:
            for_each(lambda _: work(task), range(threads))
        noisy.append(sum(part.is_perturbed for part in parts()))
        if len(noisy) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(native, "_MOST", 1)  # one part in each call of each thread
    monkeypatch.setattr(native, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(native, "_torch_team", lambda: interrupted)
    with pytest.raises(KeyboardInterrupt):
        (optimizer.restore if restoring else optimizer.perturb)()
    assert 0 < noisy[0] < 6
    assert not optimizer.is_perturbed
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@needs_compiler
def test_threads_of_our_own_do_the_same_where_torch_has_none(
    monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    def perturbed() -> list[Tensor]:
        model = lora_mlp()
        with flatlora(model).perturbed():
            return [parameter.detach().clone() for parameter in model.parameters()]

    monkeypatch.setattr(native, "_WORTH_A_THREAD", 1)
    expected = perturbed()
    monkeypatch.setattr(native, "_torch_team", lambda: None)
    for mine, others in zip(perturbed(), expected, strict=True):
        assert torch.equal(mine, others)


@needs_compiler
@pytest.mark.skipif(
    sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info(), reason="another library"
)
def test_the_threads_of_torch_are_found() -> None:
    assert native._torch_team() is not None


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_that_flush_subnormal_numbers_make_no_difference(
    dtype: torch.dtype, two_threads: None
) -> None:
    model = nn.Sequential(*[OwnLoRA((torch.randn(512, 512) * 1e-3).to(dtype)) for _ in range(4)])
    with torch.no_grad():
        for layer in model:
            layer.weight[::2] *= 1e-36 if dtype != torch.float16 else 1e-3
    optimizer = flatlora(model)
    before = [layer.weight.clone() for layer in model]
    torch.ones(1 << 20).add_(1)  # torch's threads are there, and keep their mode

    def flushes() -> bool:
        return bool(torch.tensor([1e-30]).mul_(1e-10) == 0)

    try:
        torch.set_flush_denormal(True)
        for _ in range(4):
            optimizer.perturb()
            assert flushes()
            assert clean_copy(model[0].weight) is not None
            assert flushes()
            optimizer.step()
            assert flushes()
    finally:
        torch.set_flush_denormal(False)
    assert all(
        torch.equal(int_view(layer.weight), int_view(w)) for layer, w in zip(model, before, strict=True)
    )


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_goes_on() -> None:
    code = (
        "import os, signal, torch\n"
        "from flatlora_optim.kernels import native\n"
        "from helpers import OwnLoRA, flatlora\n"
        "torch.set_num_threads(2)\n"
        "model = torch.nn.Sequential(*[OwnLoRA(torch.randn(300, 300)) for _ in range(4)])\n"
        "optimizer = flatlora(model)\n"
        "optimizer.perturb(); optimizer.step()\n"
        "if os.fork() == 0:\n"
        "    signal.alarm(60)\n"
        "    torch.set_num_threads(1)\n"  # as data loaders do: torch's own operations would wait for ever
        "    optimizer.perturb(); optimizer.step()\n"
        "    os._exit(7 if native._torch_team() is None else 8)\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    tests = str(Path(__file__).parent)
    assert run_python(code, {"PYTHONPATH": os.pathsep.join([tests, *sys.path])}).strip() == "7"


@needs_compiler
@pytest.mark.parametrize("kernels", [native, plain], ids=["native", "plain"])
def test_a_forgotten_part_stays_noisy_and_gives_its_journal_back(
    kernels: Any, block: tuple[Tensor, Noise]
) -> None:
    weight, noise = block
    part = kernels.Part(weight, noise, 0, 40, Keep.JOURNAL)
    kernels.Part.perturb_all([part])
    perturbed = weight.clone()
    assert part.nbytes > 0
    part.forget()
    kernels.Part.restore_all([part])
    assert (part.nbytes, part.is_perturbed) == (0, False)
    assert torch.equal(weight, perturbed)


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
    for owner, slow in ((plain.Part, "perturb"), (GaussianNoise, "block")):
        monkeypatch.setattr(owner, slow, lambda *_, **__: pytest.fail("took a detour"))
    assert torch.equal(noise.add_to(weight), expected)


# ---------------------------------------------------------------------- with and without a compiler


@needs_compiler
def test_the_library_is_built_once(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.is_available()
    (kept,) = (fresh_build / "cache" / "flatlora-optim").iterdir()
    build.library_or_none.cache_clear()
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: pytest.fail("was built again"))
    assert native.is_available()
    assert kept.exists()


@needs_compiler
def test_the_library_is_built_with_the_optimizer(fresh_build: Path) -> None:
    kernels_of.cache_clear()
    flatlora(lora_mlp())
    assert list((fresh_build / "cache" / "flatlora-optim").iterdir())


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
    (kept,) = (fresh_build / "cache" / "flatlora-optim").iterdir()
    kept.unlink()  # not overwritten: it is mapped into this process
    kept.write_bytes(b"cut off")
    build.library_or_none.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.is_available()


@needs_compiler
@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("library", "group may write"),
        ("library", "of another user"),
        ("folder", "others may write"),
        ("folder", "of another user"),
    ],
)
def test_a_library_that_others_can_write_is_not_loaded(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, what: str, how: str
) -> None:
    assert native.is_available()
    folder = fresh_build / "cache" / "flatlora-optim"
    (kept,) = folder.iterdir()
    kept.unlink()
    kept.write_bytes(planted := b"whatever somebody else has put there")
    kept.chmod(0o600)
    suspect = kept if what == "library" else folder
    if how == "of another user" and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    elif how == "of another user":
        os.chown(suspect, 65534, -1)
    else:
        suspect.chmod(0o770 if how == "group may write" else 0o707)
    loaded, load = [], ctypes.CDLL
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: loaded.append(Path(path)) or load(path))
    build.library_or_none.cache_clear()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert native.is_available()
    assert kept not in loaded
    assert len(loaded) == 1
    if what == "library":  # a folder of our own is safe, so the next process finds a library there
        assert not caught
        assert kept.read_bytes() != planted
    else:
        assert [str(folder) in str(warning.message) for warning in caught] == [True]
        assert kept.read_bytes() == planted


@needs_compiler
def test_what_is_kept_belongs_to_the_user_alone(fresh_build: Path) -> None:
    mask = os.umask(0)
    try:
        assert native.is_available()
    finally:
        os.umask(mask)
    folder = fresh_build / "cache" / "flatlora-optim"
    assert [path.stat().st_mode & 0o077 for path in (folder, *folder.iterdir())] == [0, 0]


@needs_compiler
def test_a_user_without_a_home_builds_each_time(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
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
def test_an_assembler_that_knows_no_pairs_is_no_obstacle(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = Product(torch.randn(5, 70), torch.randn(5, 3), torch.randn(3, 70))
    (expected,) = native.squared_norms([product])
    older = fresh_build / "cc"
    older.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f'*WITHOUT_PAIRS*) exec {shlex.join(compiler())} "$@" ;;\n'
        "*) echo no such instruction >&2; exit 1 ;;\nesac\n"
    )
    older.chmod(0o755)
    monkeypatch.setenv("CC", str(older))
    build.library_or_none.cache_clear()
    assert native.is_available()
    (found,) = native.squared_norms([product])
    assert torch.equal(found, expected)


@needs_compiler
def test_a_compiler_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    # In a process of its own: merely loading such a library makes subnormal numbers zero.
    code = (
        "import sys, warnings; from flatlora_optim.kernels import build, native\n"
        "build._FLAGS += ('-ffast-math', '-mfma')\n"
        "with warnings.catch_warnings(record=True) as caught: print(native.is_available())\n"
        "print(caught[0].message)"
    )
    output = run_python(code, {"XDG_CACHE_HOME": str(tmp_path)})
    assert output.startswith("False\n")
    assert "computes wrong numbers" in output


@pytest.mark.parametrize("environment", [{"PATH": "", "CC": ""}, {"FLATLORA_NATIVE": "0"}])
def test_without_a_compiler_torch_does_the_work(environment: dict[str, str]) -> None:
    code = (
        "import torch, warnings; warnings.simplefilter('error')\n"
        "from flatlora_optim.kernels import kernels_of; print(kernels_of(torch.device('cpu')).name)"
    )
    assert run_python(code, environment).strip() == "torch operations"


@needs_compiler
def test_the_compiler_may_be_a_command_with_options(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", shlex.join(["env", "LANG=C", *compiler()]))
    build.library_or_none.cache_clear()
    assert native.is_available()


def test_a_compiler_that_is_not_there_is_reported(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc -m64")
    with pytest.warns(UserWarning, match="there is no compiler CC='/nowhere/cc -m64'"):
        assert not native.is_available()


def run_python(code: str, environment: dict[str, str]) -> str:
    command, environment = [sys.executable, "-c", code], os.environ | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@needs_compiler
def test_only_what_is_on_the_cpu_is_for_native_code() -> None:
    assert kernels_of(torch.device("cpu")) is native
    assert kernels_of(torch.device("meta")) is plain


@needs_compiler
@pytest.mark.parametrize("restore", ["exact", "snapshot", "subtract"])
def test_both_train_alike(restore: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same numbers, a run without a compiler ends with the same bits."""

    def run(kind: type[Part]) -> list[Tensor]:
        model, batch = lora_mlp(torch.bfloat16), mlp_batch(dtype=torch.bfloat16)
        optimizer = flatlora(model, restore=restore)
        for _ in range(3):
            loss_of(model, batch).backward()
            assert {type(part) for p in optimizer._weights.perturbations for part in p._parts} == {kind}
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    with_compiler = run(native.Part)
    monkeypatch.setattr(native, "takes", lambda noise, part: False)
    without = run(plain.Part)
    assert all(torch.equal(a, b) for a, b in zip(with_compiler, without, strict=True))
