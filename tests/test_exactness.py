"""Restored weights are the ones from before, to the bit, at the promised price."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import flatlora_optim
from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.kernels import native
from flatlora_optim.kernels.journal import Journal, narrowed
from flatlora_optim.kernels.plain import rounded_sum
from helpers import (
    OwnLoRA,
    fingerprint,
    flatlora,
    int_view,
    lora_convnet,
    lora_gpt2,
    lora_mlp,
    same,
    trainable,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BIT_EXACT = ["exact", "snapshot"]
SHAPES = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
    # More than one block of noise, and a last block that is not full.
    st.sampled_from([(300, 300), (3, 70_001), (67_000, 2)]),
)
LAYOUTS = ["contiguous", "transposed", "strided", "channels_last"]


@pytest.fixture(scope="module", params=["native", "plain"])
def either_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "native":
        if not native.is_available():
            pytest.skip("needs a C compiler")
        yield
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "takes", lambda noise, weight: False)
            yield


def weight_values(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Tensor:
    if kind == "ordinary":
        return (torch.randn(shape) * 0.02).to(dtype)
    if kind == "all magnitudes":
        largest = torch.tensor(torch.finfo(dtype).max, dtype=torch.float64).log2()
        exponents = torch.rand(shape, dtype=torch.float64) * 2 * largest - largest
        return (torch.randn(shape) * 2**exponents).to(dtype)
    if kind == "any bits":
        # NaNs of every payload, infinities, subnormals and signed zeros.
        integer = int_view(torch.zeros(1, dtype=dtype)).dtype
        info = torch.iinfo(integer)
        return torch.randint(info.min, info.max, shape, dtype=integer).view(dtype)
    special = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny / 3], dtype=dtype)
    return torch.where(
        torch.rand(shape) < 0.3, special[torch.randint(4, shape)], weight_values(shape, dtype, "ordinary")
    )


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels_last" and values.ndim == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        return torch.stack([values, torch.zeros_like(values)], -1)[..., 0]
    return values


@pytest.mark.usefixtures("either_kernels")
@given(
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["ordinary", "all magnitudes", "any bits", "special"]),
    layout=st.sampled_from(LAYOUTS),
    restore=st.sampled_from(BIT_EXACT),
    sigma=st.floats(0, 100),
    seed=st.integers(-(2**70), 2**70),
    cycles=st.integers(1, 4),
)
@example((300, 300), torch.bfloat16, "ordinary", "contiguous", "exact", 0.05, 0, 20)
@example((300, 300), torch.float16, "ordinary", "transposed", "exact", 0.05, 0, 20)
@example((300, 300), torch.float32, "special", "strided", "exact", 0.05, 0, 20)
@example((64, 16, 3, 3), torch.bfloat16, "ordinary", "channels_last", "exact", 0.15, 0, 20)
def test_every_weight_comes_back(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kind: str,
    layout: str,
    restore: str,
    sigma: float,
    seed: int,
    cycles: int,
) -> None:
    torch.manual_seed(seed % 2**63)  # hypothesis rewinds other generators, not torch's
    layer = OwnLoRA(laid_out(weight_values(shape, dtype, kind), layout))
    strides = layer.weight.stride()
    optimizer = flatlora(layer, sigma=sigma, seed=seed, restore=restore)
    before = int_view(layer.weight).clone()
    for _ in range(cycles):
        optimizer.perturb()
        if kind == "ordinary" and sigma > 0.01 and layer.weight.numel() > 20:
            assert not torch.equal(int_view(layer.weight), before)
        optimizer.restore()
        assert torch.equal(int_view(layer.weight), before)
        optimizer.step()
    assert layer.weight.stride() == strides


@pytest.mark.usefixtures("either_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("restore", BIT_EXACT)
def test_real_adapter_layers_come_back(dtype: torch.dtype, restore: str) -> None:
    for model in (lora_mlp(), lora_convnet(), lora_gpt2()):
        model = model.to(dtype)
        before = fingerprint(model)
        optimizer = flatlora(model, restore=restore)
        perturbed = {name for name in before if name.removesuffix(".base_layer.weight") != name}
        assert len(perturbed) == len(optimizer.targets)
        for _ in range(3):
            with optimizer.perturbed():
                now = fingerprint(model)
                assert {name for name in before if not torch.equal(now[name], before[name])} == perturbed
            now = fingerprint(model)
            assert all(torch.equal(now[name], before[name]) for name in before)
            optimizer.step()


@pytest.mark.usefixtures("either_kernels")
def test_rows_that_are_not_finite_get_no_noise_and_the_others_do() -> None:
    weight = torch.randn(5, 64)
    weight[1, 3], weight[2, 0], weight[3, 5] = float("nan"), float("inf"), float("-inf")
    layer = OwnLoRA(weight.clone())
    optimizer = flatlora(layer)
    optimizer.perturb()
    noisy = (int_view(layer.weight) != int_view(weight)).any(1)
    assert noisy.tolist() == [True, False, False, False, True]
    optimizer.restore()
    assert torch.equal(int_view(layer.weight), int_view(weight))


@pytest.mark.usefixtures("either_kernels")
def test_noise_does_not_overflow_float16() -> None:
    largest = torch.finfo(torch.float16).max
    weight = torch.full((8, 512), largest, dtype=torch.float16) * torch.tensor([1, -1]).repeat(256)
    layer = OwnLoRA(weight.clone())
    optimizer = flatlora(layer, sigma=0.3)
    optimizer.perturb()
    assert layer.weight.isfinite().all()
    assert not torch.equal(layer.weight, weight)
    optimizer.restore()
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_rounded_once_from_float32_or_wider(dtype: torch.dtype) -> None:
    """The journal would make up for any other sum, but the noise would not be the one that was meant."""
    weight = (torch.randn(3, 50, dtype=torch.float64) * 1e4).to(dtype)
    if dtype != torch.float16:
        weight *= 1e6  # beyond the range of float16
    eps = torch.randn(3, 50) * weight.float().abs() * 0.1
    exact = weight.double() + eps.double()
    expected = exact if dtype == torch.float64 else exact.float().to(dtype)
    assert torch.equal(rounded_sum(weight, eps), expected)


def typical_layer(dtype: torch.dtype) -> OwnLoRA:
    layer = OwnLoRA((torch.randn(512, 512) * 0.02).to(dtype))
    nn.init.zeros_(layer.lora_B)
    return layer


@pytest.mark.usefixtures("either_kernels")
@pytest.mark.parametrize(("dtype", "bytes_per_element"), [(torch.bfloat16, 0.20), (torch.float32, 0.45)])
def test_the_journal_is_small_and_freed(dtype: torch.dtype, bytes_per_element: float) -> None:
    layer = typical_layer(dtype)
    optimizer = flatlora(layer, sigma=0.05)
    optimizer.perturb()
    assert 0 < optimizer.memory() <= bytes_per_element * layer.weight.numel()
    optimizer.restore()
    assert optimizer.memory() == 0


@given(
    size=st.sampled_from([0, 1, 999, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 3 << 16, 200_000]),
    dtype=st.sampled_from([torch.int16, torch.int32, torch.int64]),
    missed=st.sampled_from([0.0, 0.05, 1.0]),
    far=st.booleans(),
    seed=st.integers(0, 2**63),
)
def test_a_journal_corrects_any_bits_at_its_price(
    size: int, dtype: torch.dtype, missed: float, far: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    info = torch.iinfo(dtype)
    largest = info.max if far else (1 << 15) - 1
    original = torch.randint(info.min, info.max, (size,), dtype=dtype)
    wrong = torch.rand(size) < missed
    found = torch.where(wrong, original - torch.randint(1, largest, (size,), dtype=dtype), original)
    # The default device has no part in it.
    with torch.device("meta"):
        journal = Journal.of(original, found.clone())
        journal.correct(found)
    assert torch.equal(found, original)
    segments = -(-size // (1 << 16))
    per_entry = 2 + journal.corrections.element_size()
    assert per_entry == 4 or (far and dtype != torch.int16)
    assert journal.nbytes == per_entry * int(wrong.sum()) + (8 * (segments + 1) if segments > 1 else 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("corrections", "fit"),
    [([-(1 << 15), (1 << 15) - 1], True), ([1 << 15, 0], False), ([-(1 << 15) - 1, 0], False)],
)
def test_corrections_are_kept_in_16_bits_if_all_fit(
    corrections: list[int], fit: bool, dtype: torch.dtype
) -> None:
    kept = narrowed(torch.tensor(corrections, dtype=dtype))
    assert kept.dtype == (torch.int16 if fit else dtype)
    assert kept.tolist() == corrections


def test_a_snapshot_fits_a_weight_that_was_cast_between_steps() -> None:
    layer = typical_layer(torch.float32)
    optimizer = flatlora(layer, restore="snapshot")
    optimizer.perturb()
    optimizer.step()
    layer.bfloat16()
    before = layer.weight.clone()
    optimizer.perturb()
    assert optimizer.memory() == layer.weight.numel() * 2
    optimizer.step()
    assert torch.equal(layer.weight, before)


def test_a_snapshot_costs_the_weight() -> None:
    layer = typical_layer(torch.bfloat16)
    optimizer = flatlora(layer, restore="snapshot")
    optimizer.perturb()
    assert optimizer.memory() == layer.weight.numel() * 2


@pytest.mark.usefixtures("either_kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_subtract_holds_nothing_and_drifts_in_the_low_bits(dtype: torch.dtype) -> None:
    layer = typical_layer(dtype)
    before = layer.weight.clone()
    optimizer = flatlora(layer, sigma=0.05, restore="subtract")
    optimizer.perturb()
    assert optimizer.memory() == 0
    optimizer.restore()
    drifted = (layer.weight != before).float().mean().item()
    assert 0.01 < drifted < 0.15
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=4 * torch.finfo(dtype).eps * 0.02)


PEAK_MEMORY = """
import resource, sys, torch
from flatlora_optim import FlatLoRAOptimizer
from helpers import OwnLoRA
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
torch.set_num_threads(2)
layer = OwnLoRA(torch.empty(4096, 11008, dtype=torch.bfloat16).normal_(std=0.02), rank=16)
base = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
optimizer = FlatLoRAOptimizer(base, layer, sigma=0.05, schedule="constant")
small = OwnLoRA(torch.randn(600, 600))
base = torch.optim.SGD([small.lora_A, small.lora_B], lr=0.1)
with FlatLoRAOptimizer(base, small, sigma=0.1, schedule="constant").perturbed():
    pass  # starts the threads
before = peak()
optimizer.perturb()
journal = optimizer.memory()
optimizer.restore()
print(peak() - before - journal, layer.weight.numel() * 2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="measures with `resource`")
def test_peak_memory_of_a_large_weight() -> None:
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY], cwd=here, capture_output=True, text=True, check=True
    )
    extra, weight = map(int, run.stdout.split())
    assert weight == 4096 * 11008 * 2
    assert extra < 64 * 2**20


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that the package executes."""

    def __init__(self, line: int) -> None:
        self.left = line
        self.tracer = sys.gettrace()  # that of a coverage run
        self.package = str(Path(flatlora_optim.__file__).parent)

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.package):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(self.tracer)
                raise KeyboardInterrupt
        return self

    def interrupts(self, optimizer: FlatLoRAOptimizer) -> bool:
        sys.settrace(self)
        try:
            with optimizer.perturbed():
                pass
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(self.tracer)
        return False


@pytest.mark.parametrize("noise", ["gaussian", "table"])
@pytest.mark.parametrize("restore", BIT_EXACT)
def test_an_interrupt_at_any_line_can_be_restored(
    restore: str, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # keeps all work on the traced thread
    # float64 is left to torch operations everywhere
    dtypes = torch.bfloat16, torch.float64
    model = nn.Sequential(*[OwnLoRA((torch.randn(200, 200) * 0.02).to(dtype)) for dtype in dtypes])
    optimizer = flatlora(model, restore=restore, noise=noise)

    def patterns() -> list[Tensor]:
        return [layer.weight.detach().clone().view(torch.int16) for layer in model]

    before = patterns()
    with optimizer.perturbed():
        noisy = patterns()
    line = 1
    while Interrupt(line).interrupts(optimizer):
        optimizer.restore()
        assert not optimizer.is_perturbed
        assert same(patterns(), before), line
        with optimizer.perturbed():
            assert same(patterns(), noisy), line
        line += 1
    assert line > 50


def test_only_adapters_learn() -> None:
    model = lora_mlp(torch.bfloat16)
    before = fingerprint(model)
    adapters = [p.detach().clone() for p in trainable(model)]
    optimizer = flatlora(model, base=torch.optim.AdamW, sigma=0.15)
    x = torch.randn(4, 6).bfloat16()
    for _ in range(20):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    now = fingerprint(model)
    assert all(torch.equal(now[name], before[name]) for name in before)
    assert all(not torch.equal(p, old) for p, old in zip(trainable(model), adapters, strict=True))
