"""The Triton kernels, run by Triton's interpreter on CPU tensors and compiled without a GPU.

The interpreter has to be chosen before Triton is first imported: ``make test-triton`` does, and the first
test starts a process of its own that does.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from counting import counted
from flatlora_optim import FlatLoRAOptimizer, LowRankNoise, NoiseTable
from flatlora_optim.kernels import has_triton, kernels_of, native, part, plain, sum_of, unpacked
from flatlora_optim.kernels.grid import Grid
from flatlora_optim.kernels.part import Keep
from flatlora_optim.kernels.plain import Product
from flatlora_optim.noise import FactoredNoise, GaussianNoise, Noise, NoiseKey, fill_factors
from flatlora_optim.optimizer.param_groups import NORMS
from flatlora_optim.targets.weights import Bnb4bitWeight
from flatlora_optim.targets.weights import quantized as quantized_weights
from helpers import OwnLoRA, fingerprint, flatlora, int_view, lora_gpt2, lora_mlp, loss_of, mlp_batch

triton = pytest.importorskip("triton", minversion="3.2")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@compiled
def test_everything_below_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@compiled
def test_an_interpreter_that_is_switched_off_changes_nothing() -> None:
    code = "import torch\nfrom flatlora_optim.kernels import kernels_of\n"
    code += "print(kernels_of(torch.device('cpu')).name)"
    for value in ("0", "", "false"):
        environment = os.environ | {"TRITON_INTERPRET": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == kernels_of(torch.device("cpu")).name, done.stderr


@compiled
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_kernels_compile(capability: int, dtype: str) -> None:
    import instructions  # of benchmarks/

    for kernel in instructions.KERNELS:
        binary = instructions.compiled(kernel, dtype, capability)
        assert binary.asm["cubin"]
        # One rounding where there should be two would make the journal miss elements.
        assert "fma.rn.f32" not in binary.asm["ptx"] or kernel.startswith("norms")


@compiled
@pytest.mark.parametrize(
    ("version", "capability", "usable"),
    [
        ("3.1.0", (9, 0), False),
        ("3.2.0", (9, 0), True),
        ("3.10.0+git1", (7, 0), True),
        ("3.10.0", (6, 1), False),
    ],
)
def test_where_triton_cannot_compile_the_kernels_they_are_left_alone(
    version: str, capability: tuple[int, int], usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_triton.__wrapped__(torch.device("cuda")) is usable


@compiled
def test_triton_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert has_triton.__wrapped__(torch.device("cuda")) is False


# ---------------------------------------------------------------------- numbers


@interpreted
@pytest.mark.parametrize("key", [NoiseKey(0, 0), NoiseKey(-5, 2**32 - 1, 3)])
def test_the_numbers_are_those_of_native_code(key: NoiseKey) -> None:
    from flatlora_optim.kernels import triton as kernels

    for block in (0, 2**32 - 1):
        ours, native_ones = (each.fill(torch.empty(5000), key, block) for each in (kernels, native))
        assert torch.equal(int_view(ours), int_view(native_ones))


SHAPES = [(1, 1), (3, 700), (2, 5000), (37, 130), (5, 3, 2, 2)]


@interpreted
@settings(max_examples=8)
@given(
    dtype=st.sampled_from(DTYPES),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3),
    row_dim=st.sampled_from([0, 1]),
    first_row=st.sampled_from([0, 31]),
    keep=st.sampled_from(list(Keep)),
    seed=st.integers(0, 2**40),
    spread=st.sampled_from([1e-7, 0.02, 3e4]),
)
def test_weights_get_the_bits_that_native_code_gives_them_and_come_back(
    dtype: torch.dtype,
    shapes: list[tuple[int, ...]],
    row_dim: int,
    first_row: int,
    keep: Keep,
    seed: int,
    spread: float,
) -> None:
    from flatlora_optim.kernels import triton as kernels

    clean, noises = weights_and_noises(dtype, shapes, row_dim, first_row, seed, spread)
    noisy = {}
    for each in (native, kernels):
        weights, parts = parts_of(each, clean, noises, keep)
        each.Part.perturb_all(parts)
        noisy[each] = [weight.clone() for weight in weights]
        for weight, before, part_ in zip(weights, clean, parts, strict=True):
            copy = weight.clone()
            part_.clean(copy)
            if keep is not Keep.NOTHING:
                assert torch.equal(int_view(copy), int_view(before))
        each.Part.restore_all(parts)
        assert not any(part_.is_perturbed for part_ in parts)
        if keep is not Keep.NOTHING:
            assert all(torch.equal(int_view(a), int_view(b)) for a, b in zip(weights, clean, strict=True))
    for ours, theirs in zip(noisy[kernels], noisy[native], strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(int_view(ours)[~ours.isnan()], int_view(theirs)[~ours.isnan()])


def weights_and_noises(
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, ...]],
    row_dim: int,
    first_row: int,
    seed: int,
    spread: float,
) -> tuple[list[Tensor], list[Noise]]:
    torch.manual_seed(seed)
    specials = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-41, 65504.0]).to(dtype)
    weights, noises = [], []
    for shape in shapes:
        weight = (torch.randn(shape) * spread).to(dtype)
        weight.view(-1)[: len(specials)] = specials[: weight.numel()]
        rows, row_size = first_row + shape[0], math.prod(shape[1:])
        scales = torch.rand((rows, row_size)[row_dim]) * spread
        grid = Grid(rows, row_size, "cpu", 7 * len(weights), first_row)
        weights.append(weight)
        noises.append(Noise(GaussianNoise(), NoiseKey(seed, 3), grid, scales, row_dim))
    return weights, noises


def parts_of(
    kernels: Any, clean: Sequence[Tensor], noises: Sequence[Noise], keep: Keep
) -> tuple[list[Tensor], list[Any]]:
    weights = [weight.clone() for weight in clean]
    parts = [
        kernels.Part(w, noise, 0, len(w), keep, torch.empty_like(w) if keep is Keep.COPY else None)
        for w, noise in zip(weights, noises, strict=True)
    ]
    return weights, parts


@interpreted
def test_several_blocks_of_a_shard() -> None:
    from flatlora_optim.kernels import triton as kernels

    shape, grid = (5, 9990), Grid(70, 9990, "cpu", 5, 24)  # blocks of 26 rows
    clean = torch.randn(shape) * 0.02
    noise = Noise(GaussianNoise(), NoiseKey(0, 0), grid, torch.rand(70) * 0.01)
    expected = clean.clone()
    native.Part.perturb_all([native.Part(expected, noise, 0, 5, Keep.NOTHING)])
    (weight,), parts = parts_of(kernels, [clean], [noise], Keep.JOURNAL)
    kernels.Part.perturb_all(parts)
    assert torch.equal(weight, expected)
    kernels.Part.restore_all(parts)
    assert torch.equal(weight, clean)


@interpreted
@pytest.mark.parametrize("keep", [Keep.JOURNAL, Keep.NOTHING])
def test_experts_that_are_stored_transposed(keep: Keep) -> None:
    from flatlora_optim.kernels import triton as kernels

    grid = Grid(3 * 60, 70, "cpu", 5, group=60)
    clean, noise = (
        torch.randn(3 * 60, 70),
        Noise(GaussianNoise(), NoiseKey(0, 0), grid, torch.rand(3 * 70), 1),
    )
    assert kernels.takes(noise, clean)
    expected = clean.clone()
    for lo, hi in grid.spans(len(clean)):
        plain.Part(expected[lo:hi], noise, lo, hi, Keep.NOTHING).perturb()
    (weight,), parts = parts_of(kernels, [clean], [noise], keep)
    kernels.Part.perturb_all(parts)
    assert torch.equal(weight, expected)
    kernels.Part.restore_all(parts)
    assert keep is Keep.NOTHING or torch.equal(weight, clean)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_memory_of_the_journal(dtype: torch.dtype) -> None:
    from flatlora_optim.kernels import triton as kernels

    weight = (torch.randn(24, 1024) * 0.02).to(dtype)
    scales = weight.float().norm(dim=1) * 0.05 / 1024**0.5
    _, parts = parts_of(kernels, [weight], [None], Keep.JOURNAL)
    for step in range(3):  # sigma stays what it is: there is room enough from the first step on
        parts[0].noise = Noise(GaussianNoise(), NoiseKey(1, step), Grid(24, 1024, "cpu"), scales)
        kernels.Part.perturb_all(parts)
        # Of a large weight, what is reserved beyond the share counts for nothing.
        reserved = parts[0].memory.share - 2 * kernels.TILE * (2 + weight.element_size())
        assert 0.05 < reserved / (weight.numel() * weight.element_size()) <= 0.12
        assert parts[0].memory._wanted <= weight.numel() * kernels._ROOM[weight.element_size()]
        kernels.Part.restore_all(parts)


@interpreted
def test_the_room_grows_with_sigma_before_it_is_too_small() -> None:
    from flatlora_optim.kernels import triton as kernels

    clean, noises = weights_and_noises(torch.bfloat16, [(3, 700)], 0, 0, 0, 0.02)
    _, (part_,) = parts_of(kernels, clean, noises, Keep.JOURNAL)
    kernels.Part.perturb_all([part_])
    memory, rooms, wanted = part_.memory, [], 0
    memory._numel = 1 << 20
    memory._expect(20_000, 0, 0)
    for step in range(30):
        wanted = int(20_000 * 1.1**step)
        memory._reserve()
        rooms.append(len(memory._positions))
        assert rooms[-1] >= wanted
        memory._expect(wanted, 0, 0)
    assert 3 < len(set(rooms)) < 12
    assert rooms[-1] < 1.5 * wanted


# ---------------------------------------------------------------------- too little room


@interpreted
def test_with_absurdly_little_room_the_first_step_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatlora_optim.kernels import triton as kernels

    monkeypatch.setattr(kernels, "_ROOM", {2: 0.0, 4: 0.0})
    clean, noises = weights_and_noises(torch.float32, [(9, 5000)], 0, 0, 0, 0.02)
    noises[0].scales.fill_(0.02)  # as large as the weights: half of them are missed
    expected, parts = parts_of(native, clean, noises, Keep.NOTHING)
    native.Part.perturb_all(parts)
    weights, parts = parts_of(kernels, clean, noises, Keep.JOURNAL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.Part.perturb_all(parts)
    numbers = ~clean[0].isnan()
    assert torch.equal(weights[0][numbers], expected[0][numbers])
    kernels.Part.restore_all(parts)
    assert torch.equal(int_view(weights[0]), int_view(clean[0]))


@interpreted
def test_later_tiles_without_room_stay_clean_and_that_is_reported_once() -> None:
    from flatlora_optim.kernels import triton as kernels

    clean, noises = weights_and_noises(torch.bfloat16, [(9, 5000)], 0, 0, 0, 0.02)
    (weight,), parts = parts_of(kernels, clean, noises, Keep.JOURNAL)
    noises[0].scales.fill_(1e-7)
    kernels.Part.perturb_all(parts)
    kernels.Part.restore_all(parts)
    noises[0].scales.fill_(0.02)
    kernels.Part.perturb_all(parts)
    changed = (weight != clean[0]).view(-1).split(kernels.TILE)
    shares = [float(tile.float().mean()) for tile in changed]
    assert all(share == 0 or share > 0.9 for share in shares)
    assert 0 in shares
    with pytest.warns(UserWarning, match="went without noise in this step"):
        kernels.Part.restore_all(parts)
    assert torch.equal(int_view(weight), int_view(clean[0]))
    kernels.Part.perturb_all(parts)  # there is more room now
    assert float((weight != clean[0]).float().mean()) > 0.9
    kernels.Part.restore_all(parts)
    assert torch.equal(int_view(weight), int_view(clean[0]))


# ---------------------------------------------------------------------- norms and checksums


@interpreted
@pytest.mark.parametrize("rank", [1, 40, 256])
def test_the_norms_of_several_weights(rank: int) -> None:
    from flatlora_optim.kernels import triton as kernels

    def factors(rows: int, columns: int, rank: int = rank) -> tuple[Tensor, Tensor, float]:
        return torch.randn(rows, rank), torch.randn(columns, rank).T, 0.5

    def product(rows: int, columns: int, row_dim: int, dtype: torch.dtype, others: int = 0) -> Product:
        shape = (columns, rows) if row_dim else (rows, columns)
        terms = [factors(rows, columns), *[factors(rows, columns, 3) for _ in range(others)]]
        (left, right, scaling), *more = [(b.to(dtype), a.to(dtype), scaling) for b, a, scaling in terms]
        return Product(torch.randn(shape).bfloat16(), left, right, scaling, row_dim, tuple(more))

    experts = [torch.randn(3, 20, rank), torch.randn(3, rank, 7)]
    products = [
        product(70, 90, 0, torch.float32),
        product(70, 90, 1, torch.float32),
        product(3, 130, 0, torch.float32, others=2),
        product(20, 5, 0, torch.bfloat16),
        Product(torch.randn(3 * 20, 7).bfloat16(), *experts, 2.0),
        Product(torch.randn(3 * 7, 20).bfloat16(), *experts, 2.0, 1),
    ]
    for found, each in zip(kernels.squared_norms(products), products, strict=True):
        expected = []
        for left, right, scaling in each.terms:
            left, right = (left.float() * scaling).bfloat16().double(), right.bfloat16().double()
            expected.append(left @ right)
        delta = sum(expected)
        matrix = each.weight.double().view(*delta.shape[:-2], -1, each.weight.shape[1])
        merged = (matrix.mT if each.row_dim else matrix) + delta
        torch.testing.assert_close(found.double(), merged.square().sum(-1).flatten(), rtol=1e-5, atol=0)


@interpreted
@pytest.mark.parametrize("kind", ["strided", "factors of two dtypes"])
def test_norms_of_what_the_kernel_can_not_read(kind: str) -> None:
    from flatlora_optim.kernels import triton as kernels

    weight, factors = torch.randn(20, 15), (torch.randn(20, 3), torch.randn(3, 15), 1.0)
    product = Product(weight, *factors, 0, ((factors[0].bfloat16(), factors[1], 2.0),))
    if kind == "strided":
        product = Product(torch.randn(20, 30)[:, ::2].double(), *factors)
    (found,) = kernels.squared_norms([product])
    torch.testing.assert_close(found, *plain.squared_norms([product]))


@interpreted
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_each_sampled_element_counts(dtype: torch.dtype) -> None:
    from flatlora_optim.kernels import triton as kernels

    weights = [torch.randn(130).to(dtype), torch.randn(5, 8).to(dtype).T]
    before = kernels.checksums(weights)
    for weight in weights:
        place = (0,) * weight.dim()
        int_view(weight)[place] ^= 1
    assert (kernels.checksums(weights) != before).tolist() == [True, True]
    for weight in weights:
        int_view(weight)[(0,) * weight.dim()] ^= 1
    assert torch.equal(kernels.checksums(weights), before)


# ---------------------------------------------------------------------- launches and waits


class Experts(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(shape))


LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(6, 8),
    "linear, two adapters": lambda: nn.Linear(6, 8),
    "Conv1D": lambda: Conv1D(8, 6),
    "convolution": lambda: nn.Conv2d(3, 8, 3),
    "embedding": lambda: nn.Embedding(9, 6),
    "experts": lambda: Experts(3, 6, 8),
}


def adapted(kind: str, layers: int) -> nn.Module:
    """So many layers with LoRA on each."""
    names = [str(i) for i in range(layers)]
    where: dict[str, Any] = {"target_modules": names}
    if kind == "experts":
        where = {"target_modules": [], "target_parameters": [f"{name}.experts" for name in names]}
    config = LoraConfig(r=2, init_lora_weights=False, fan_in_fan_out=kind == "Conv1D", **where)
    model: Any = get_peft_model(nn.Sequential(*[LAYERS[kind]() for _ in names]), config)
    if "two" in kind:
        model.add_adapter("other", LoraConfig(r=3, init_lora_weights=False, **where))
        model.base_model.set_adapter(["default", "other"])
    return model


@interpreted
@pytest.mark.parametrize(
    ("kind", "dtype"), [("linear", torch.bfloat16), *[(kind, torch.float32) for kind in LAYERS]]
)
def test_launches_do_not_grow_with_the_number_of_weights_and_nothing_waits(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for layers in (2, 5):
        optimizer = flatlora(model := adapted(kind, layers).to(dtype))
        before = fingerprint(model)
        optimizer.perturb()  # the first one makes tables
        optimizer.step()
        with counted(monkeypatch) as perturbing:
            optimizer.perturb()
        with counted(monkeypatch) as restoring:
            optimizer.restore()
        assert sorted(name for name in perturbing.operations if name.endswith("kernel")) == [
            "checksum_kernel",
            "norms_kernel",
            "perturb_kernel",
        ]
        assert len(perturbing.operations) <= 16, perturbing.operations
        assert not perturbing.waits
        assert len(restoring.operations) <= 16, restoring.operations
        assert restoring.operations.count("restore_kernel") == 1
        assert restoring.waits == ["read"]
        assert all(torch.equal(now, before[name]) for name, now in fingerprint(model).items())
        counts.append((len(perturbing.operations), len(restoring.operations)))
    assert counts[0] == counts[1]


@interpreted
def test_the_metrics_wait_when_they_are_read_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_mlp()
    optimizer = flatlora(model)
    optimizer.perturb()
    with counted(monkeypatch) as counter:
        assert optimizer.metrics()["noise_norm"] > 0
    assert counter.waits == ["read"]


@interpreted
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_in_4_bits_gets_the_bits_of_bitsandbytes_and_ours(quant_type: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    for size, shape in [(32, (9, 64)), (64, (70, 130)), (256, (3, 1024)), (4096, (2, 8192)), (64, (5, 33))]:
        codes, state = functional.quantize_4bit(
            torch.randn(shape) * 0.02, blocksize=size, compress_statistics=nested, quant_type=quant_type
        )
        layer: Any = nn.Module()
        layer.weight = nn.Parameter(codes, requires_grad=False)
        layer.weight.quant_state = state
        weight, grid = Bnb4bitWeight(layer), Grid(*shape, "cpu", 7)
        noise = Noise(GaussianNoise(), NoiseKey(1, 2), grid, torch.rand(shape[0]) * 0.01)
        with eager():
            packed = weight.packed()
            assert packed is not None
            for dtype in DTYPES:
                found = sum_of(packed, noise, dtype)
                assert found is not None
                assert torch.equal(int_view(found), int_view(noise.add_to(weight.dense(dtype))))


def eager() -> Any:
    """bitsandbytes compiles what its CPU code has no kernels for."""
    stance = getattr(torch.compiler, "set_stance", None)
    return stance("force_eager") if stance else nullcontext()


@interpreted
@pytest.mark.parametrize("change", ["layout", "dtype", "repacked"])
def test_a_weight_in_4_bits_that_is_stored_in_another_way_is_left_to_bitsandbytes(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = quantized(1)[0]
    monkeypatch.setattr(quantized_weights, "_values", {})
    weight, state = Bnb4bitWeight(layer), layer.weight.quant_state
    assert weight.packed() is not None
    quantized_weights._values.clear()
    if change == "layout":  # the two elements of a byte come the other way round
        original = weight._functional.dequantize_4bit
        swapped = lambda codes, state: original(codes >> 4 | codes << 4, state)  # noqa: E731
        monkeypatch.setattr(weight._functional, "dequantize_4bit", swapped)
        weight = Bnb4bitWeight(layer)
    elif change == "dtype":
        state.absmax = state.absmax.double()
    else:
        state.packing_format_for_cpu = True
    assert weight.packed() is None


@interpreted
@pytest.mark.parametrize("nested", [False, True])
def test_the_storage_of_a_weight_in_4_bits_is_checked_once_and_after_each_change(nested: bool) -> None:
    layer, other = quantized(2, compress_statistics=nested)
    weight, state = Bnb4bitWeight(layer), layer.weight.quant_state
    weight._numbers_of = checks = Mock(wraps=weight._numbers_of)
    scales = state.state2 if nested else state
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: setattr(layer.weight, "data", layer.weight.data.clone()),  # as `model.to()` does
        lambda: setattr(scales, "absmax", scales.absmax * 2),
        lambda: setattr(state, "absmax", state.absmax.clone()),
        lambda: setattr(layer, "weight", other.weight),
    ]
    for count, change in enumerate(changes, start=1):
        change()
        for _ in range(2):
            packed = weight.packed()
            assert packed is not None
            assert checks.call_count == count
        with eager():
            assert torch.equal(unpacked(packed, torch.float32), weight.dense(torch.float32))


def quantized(layers: int, columns: int = 64, **options: Any) -> nn.Sequential:
    bnb = pytest.importorskip("bitsandbytes")
    options = {"quant_type": "nf4", "compress_statistics": False, **options}
    model = nn.Sequential(*[bnb.nn.Linear4bit(columns, 64, bias=False, **options) for _ in range(layers)])
    for layer in model:
        layer.support_avx512bf16_for_cpu = False
    return model.to("cpu")


@interpreted
@pytest.mark.parametrize(("packed", "noise"), [(True, "gaussian"), (True, "low_rank"), (False, "low_rank")])
def test_noise_in_the_forward_waits_for_nothing(
    packed: bool, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for layers in (2, 5):
        config = LoraConfig(r=2, target_modules=[str(i) for i in range(layers)], init_lora_weights=False)
        linears = quantized(layers) if packed else nn.Sequential(*[nn.Linear(6, 8) for _ in range(layers)])
        optimizer = flatlora(get_peft_model(linears, config), noise=noise)
        optimizer.perturb()  # the first one makes tables, and checks the layout
        optimizer.step()
        with counted(monkeypatch) as perturbing:
            optimizer.perturb()
        with counted(monkeypatch) as restoring:
            optimizer.restore()
        launched = [name for name in perturbing.operations if name.endswith("kernel")]
        assert launched == ["norms_kernel", *(["factors_kernel"] if noise == "low_rank" else [])]
        assert not perturbing.waits
        assert not restoring.waits
        assert not restoring.operations
        counts.append(len(perturbing.operations))
    assert counts[0] == counts[1] <= 16


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_factors_of_several_weights(rank: int, dtype: torch.dtype) -> None:
    def noise(rows: int, columns: int, row_dim: int, block: int) -> FactoredNoise:
        stored = (rows, columns) if row_dim == 0 else (columns, rows)
        grid = Grid(*stored, "cpu", first_block=block)
        return FactoredNoise(LowRankNoise(rank), NoiseKey(7, 3, 1), grid, torch.rand(rows), row_dim)

    noises = [noise(5, 8, 0, 4), noise(3000, 1500, 0, 9), noise(7, 2, 1, 1 << 31)]
    places = [tuple(torch.full(shape, 9.0, dtype=dtype) for shape in each.shapes) for each in noises]
    fill_factors([(each, *place) for each, place in zip(noises, places, strict=True)])
    for each, place in zip(noises, places, strict=True):
        assert all(map(torch.equal, place, [factor.to(dtype) for factor in each.factors()]))


@interpreted
@pytest.mark.parametrize(
    ("columns", "dtype"), [(64, torch.float32), (130, torch.float32), (64, torch.float64)]
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_norms_of_a_weight_in_4_bits(nested: bool, columns: int, dtype: torch.dtype) -> None:
    weight = Bnb4bitWeight(quantized(1, columns, compress_statistics=nested)[0])
    deltas = [(torch.randn(64, r).to(dtype), torch.randn(r, columns).to(dtype), 0.1) for r in (3, 2)]
    (found,) = kernels_of(weight.device).squared_norms([weight.product(deltas)])
    merged = weight.dense(torch.float32).double()
    for left, right, scaling in deltas:
        if dtype == torch.float32:  # as the kernel rounds them
            left, right = (left * scaling).bfloat16(), right.bfloat16()
            scaling = 1.0
        merged = merged + left.double() @ right.double() * scaling
    torch.testing.assert_close(found.double(), merged.square().sum(1), rtol=1e-5, atol=0)


@interpreted
def test_norms_that_a_checkpoint_kept_are_dropped_where_they_are_read_at_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = get_peft_model(quantized(1), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    with monkeypatch.context() as patch:
        patch.setattr(Bnb4bitWeight, "packed", lambda weight: None)
        optimizer = flatlora(model, auto=False)
        optimizer.perturb()
        optimizer.restore()
        kept = optimizer.state_dict()
    assert NORMS in kept["param_groups"][0]
    optimizer.load_state_dict(kept)
    optimizer.perturb()
    optimizer.restore()
    assert NORMS not in optimizer.state_dict()["param_groups"][0]


@interpreted
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("noise", ["gaussian", "gaussian, unknown layout", "low_rank"])
def test_what_a_quantized_layer_is_given_to_do(
    noise: str, nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(quantized(1, compress_statistics=nested), config)
    if "unknown" in noise:
        monkeypatch.setattr(Bnb4bitWeight, "packed", lambda weight: None)
    optimizer, x = flatlora(model, noise=noise.partition(",")[0], auto=False), torch.randn(3, 64)
    dequantized = ["dequantize_blockwise", "add_"] * nested + ["dequantize_4bit"]
    of_adapter = ["mm", "mm", "mul", "add"]
    expected = {
        "gaussian": ["perturb_kernel", "mm", *of_adapter],
        "gaussian, unknown layout": [*dequantized, "perturb_kernel", "mm", *of_adapter],
        "low_rank": [*dequantized, "mm", "mm", "addmm_", *of_adapter],
    }
    with optimizer.perturbed():
        model(x)  # the first one makes tables
    optimizer.step()
    with counted(monkeypatch) as perturbing:
        optimizer.perturb()
    with counted(monkeypatch) as counter:
        model(x)
    names = [name.removeprefix("bitsandbytes::") for name in counter.operations]
    no_launches = "view", "t", "permute", "detach", "empty"
    assert [name for name in names if name not in no_launches] == expected[noise]
    assert not counter.waits
    # How far the adapters have moved is asked for where norms would take bitsandbytes' own dequantization.
    assert perturbing.waits == ["read"] * ("unknown" in noise)


@interpreted
def test_a_virtual_layer_takes_one_launch_for_its_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_mlp()
    optimizer = flatlora(model, mode="virtual", noise="gaussian", auto=False)
    with optimizer.perturbed():
        loss_of(model, mlp_batch()).backward()
    optimizer.step()
    optimizer.perturb()
    with counted(monkeypatch) as counter:
        loss = loss_of(model, mlp_batch())
    assert counter.operations.count("perturb_kernel") == 2
    assert not {"zeros", "zero_", "fill_"} & set(counter.operations)
    assert not counter.waits
    loss.backward()
    optimizer.step()


# ---------------------------------------------------------------------- guards


@interpreted
@pytest.mark.parametrize("mode", ["in_place", "virtual"])
def test_a_graph_that_is_captured_gets_no_noise(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_mlp()
    optimizer = flatlora(model, mode=mode, noise="gaussian")
    before = fingerprint(model)
    optimizer.perturb()
    with monkeypatch.context() as patch:
        patch.setattr(part, "is_captured", lambda device: True)
        if mode == "virtual":
            with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
                model(mlp_batch()[0])
        else:
            with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
                optimizer.restore()
    optimizer.restore()
    for is_drawn in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(part, "is_captured", lambda device: True)
            with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
                optimizer.step(lambda: loss_of(model, mlp_batch()))
        assert not optimizer.is_perturbed
        # What a capture records is not computed, so it must not be kept.
        assert (optimizer.metrics()["noise_norm"] > 0) is is_drawn
        optimizer.step(lambda: loss_of(model, mlp_batch()))
    assert all(torch.equal(now, before[name]) for name, now in fingerprint(model).items())


@interpreted
def test_autograd_sees_that_the_weight_was_written() -> None:
    layer = OwnLoRA(torch.randn(6, 4))
    optimizer = flatlora(layer, auto=False)
    loss = layer(torch.randn(3, 4, requires_grad=True)).sum()
    optimizer.perturb()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer.restore()


@interpreted
def test_devices_have_launches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What belongs to one launch is told apart by device, dtype and way to restore."""
    from flatlora_optim.kernels import triton as kernels

    launched: list[list[Any]] = []
    monkeypatch.setattr(kernels, "_batch_of", lambda parts: Mock(perturb=launched.append))
    noise = Mock(key=NoiseKey(0, 0))
    parts = [
        Mock(rows=torch.empty(1, device=device, dtype=dtype), keep=keep, noise=noise)
        for keep in (Keep.JOURNAL, Keep.COPY)
        for dtype in (torch.float32, torch.bfloat16)
        for device in ("cpu", "meta", "cpu")
    ]
    kernels.Part.perturb_all(parts)
    assert [len(some) for some in launched] == [2, 1] * 4


@interpreted
def test_memory_that_another_stream_reads_is_kept_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatlora_optim.kernels import triton as kernels

    recorded: dict[int, str] = {}
    monkeypatch.setattr(
        Tensor, "record_stream", lambda tensor, stream: recorded.update({id(tensor): stream}), raising=False
    )
    clean, noises = weights_and_noises(torch.float32, [(3, 70)], 0, 0, 0, 0.02)
    _, (part_,) = parts_of(kernels, clean, noises, Keep.JOURNAL)
    monkeypatch.setattr(kernels, "_stream", lambda device: "first")
    kernels.Part.perturb_all([part_])
    assert not recorded
    monkeypatch.setattr(kernels, "_stream", lambda device: "second")
    kernels.Part.restore_all([part_])
    memory = part_.memory
    tables = memory._table, memory._entries, memory._scales
    journal = memory._positions, memory._originals, memory._starts, memory._counts
    assert recorded == {id(tensor): "second" for tensor in (*tables, *journal)}


@interpreted
def test_a_table_of_noise_is_for_the_cpu() -> None:
    with pytest.raises(ValueError, match="for weights on the CPU"):
        NoiseTable(1 << 10).block(NoiseKey(0, 0), 0, torch.empty(16, device="meta"))


# ---------------------------------------------------------------------- whole optimizers


@interpreted
@pytest.mark.parametrize("restore", ["exact", "snapshot"])
def test_training_with_kernels(restore: str) -> None:
    model, batch = lora_mlp(torch.bfloat16), mlp_batch(dtype=torch.bfloat16)
    optimizer = flatlora(model, restore=restore)
    before = fingerprint(model)
    for _ in range(3):
        loss_of(model, batch).backward()
        assert optimizer.metrics()["noise_norm"] > 0
        assert any(not torch.equal(now, before[n]) for n, now in fingerprint(model).items())
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(now, before[n]) for n, now in fingerprint(model).items())


@interpreted
def test_transposed_weights_and_a_state_dict_in_the_middle() -> None:
    model = lora_gpt2()
    optimizer = flatlora(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer.weight" in name}
    with optimizer.perturbed():
        assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
        state = model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in before.items())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@interpreted
def test_the_same_run_as_in_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the norms, whose sums have another order."""

    def run() -> FlatLoRAOptimizer:
        model = lora_mlp()
        optimizer = flatlora(model)
        optimizer.perturb()
        return optimizer

    def weights(optimizer: FlatLoRAOptimizer) -> list[Tensor]:
        return [target.weight.tensor.detach().clone() for target in optimizer.targets]

    ours = weights(run())
    kernels_of.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("flatlora_optim.kernels.has_triton", lambda device: False)
        theirs = weights(run())
    kernels_of.cache_clear()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("restoring", [False, True])
def test_an_interrupt_around_a_launch(when: str, restoring: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatlora_optim.kernels import triton as kernels

    optimizer = flatlora(model := lora_mlp())
    before = fingerprint(model)
    optimizer.perturb()
    if not restoring:
        optimizer.restore()
    launch = kernels._launch

    def interrupted(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(kernels, "_launch", launch)
        if when == "after":
            launch(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "_launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        (optimizer.restore if restoring else optimizer.perturb)()
    assert not optimizer.is_perturbed
    assert all(torch.equal(now, before[name]) for name, now in fingerprint(model).items())
