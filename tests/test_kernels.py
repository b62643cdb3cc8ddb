"""The Triton kernels, run by Triton's interpreter on CPU tensors and compiled without a GPU.

The interpreter has to be chosen before Triton is first imported, so these tests run in a process
of their own, which the first test starts.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatlora_optim import find_targets
from flatlora_optim.kernels import has_triton
from flatlora_optim.kernels.grid import Grid
from flatlora_optim.kernels.part import Keep
from flatlora_optim.kernels.plain import rounded_sum
from flatlora_optim.noise import GaussianNoise, Noise, NoiseKey
from flatlora_optim.targets.weights import DenseWeight
from helpers import OwnLoRA, flatlora, int_view, lora_gpt2, lora_mlp, loss_of, mlp_batch

triton = pytest.importorskip("triton", minversion="3.2")

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
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_kernels_compile_for_ampere_and_hopper(capability: int, dtype: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flatlora_optim.kernels import triton as kernels

    journal = {"low": "*i16", "corrections": "*i16", "starts": "*i32", "counts": "*i32"}
    sizes = {"done": "*i32", "numel": "i32", "row_size": "i32", "seed": "i64", "offset": "i32"}
    weight = {"weight": f"*{dtype}", "scales": "*fp32"}
    bits = triton.language.int32 if dtype == "fp32" else triton.language.int16
    flags = {"ROW_DIM": 0, "JOURNAL": True, "BITS": bits, "TILE": kernels.TILE}
    matrices = {"weight": f"*{dtype}", "left": "*fp32", "right": "*fp32", "out": "*fp32"}
    strides = dict.fromkeys(("rows", "columns", "row_stride", "column_stride", "rank"), "i32")
    cases = [
        (kernels.perturb_kernel, weight | journal | {"total": "*i32"} | sizes, flags),
        (kernels.restore_kernel, weight | journal | sizes, flags),
        (kernels.cross_kernel, matrices | strides, {"RANK": 16, "ROWS": 64, "COLUMNS": 64}),
        (kernels.fill_kernel, {"out": "*fp32", "numel": "i32", "seed": "i64"}, {"TILE": kernels.TILE}),
    ]
    for kernel, arguments, constants in cases:
        signature = arguments | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernels._EXACT)
        assert binary.asm["cubin"]
        # One rounding where torch has two would make the journal miss elements.
        assert "fma.rn.f32" not in binary.asm["ptx"] or kernel is kernels.cross_kernel


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


@interpreted
@settings(max_examples=12)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(1, 1), (3, 700), (37, 130), (5, 3, 2, 2)]),
    row_dim=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**40),
)
def test_a_block_equals_the_torch_path_and_comes_back(
    dtype: torch.dtype, shape: tuple[int, ...], row_dim: int, seed: int
) -> None:
    from flatlora_optim.kernels import triton as kernels

    rows, row_size = shape[0], math.prod(shape[1:])
    torch.manual_seed(seed)
    weight = (torch.randn(shape) * 0.02).to(dtype)
    specials = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-41, 65504.0]).to(dtype)
    weight.view(-1)[: len(specials)] = specials[: weight.numel()]
    before = weight.clone()
    scales = torch.rand(rows if row_dim == 0 else row_size) * 0.01
    noise = Noise(GaussianNoise(), NoiseKey(seed, 3), Grid(rows, row_size, "cpu"), scales, row_dim)
    expected = rounded_sum(before, noise.block(0, rows)).clone()

    part = kernels.Part(weight, noise, 0, rows, Keep.JOURNAL)
    part.perturb()
    assert part.is_perturbed
    numbers = ~before.isnan()
    assert torch.equal(int_view(weight)[numbers], int_view(expected)[numbers])

    cut = rows // 2  # a shard of the rows sees the same noise
    shard, grid = before[cut:].clone(), Grid(rows, row_size, "cpu", first_row=cut)
    of_shard = Noise(GaussianNoise(), NoiseKey(seed, 3), grid, scales, row_dim)
    kernels.Part(shard, of_shard, 0, rows - cut, Keep.NOTHING).perturb()
    assert torch.equal(int_view(shard)[numbers[cut:]], int_view(weight[cut:])[numbers[cut:]])

    copy = weight.clone()
    part.clean(copy)
    assert torch.equal(int_view(copy), int_view(before))
    part.restore()
    assert not part.is_perturbed
    assert torch.equal(int_view(weight), int_view(before))


@interpreted
@pytest.mark.parametrize(("dtype", "bar"), [(torch.bfloat16, 0.20), (torch.float32, 0.35)])
def test_the_journal_is_as_small_as_that_of_torch(dtype: torch.dtype, bar: float) -> None:
    from flatlora_optim.kernels import triton as kernels

    weight = (torch.randn(128, 512) * 0.02).to(dtype)
    scales = weight.float().norm(dim=1) * 0.05 / 512**0.5
    noise = Noise(GaussianNoise(), NoiseKey(1, 1), Grid(128, 512, "cpu"), scales)
    part = kernels.Part(weight, noise, 0, 128, Keep.JOURNAL)
    part.perturb()
    assert 0.1 < part.nbytes / weight.numel() <= bar


@interpreted
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_the_norm_increase_of_any_strides(rank: int) -> None:
    from flatlora_optim.kernels import triton as kernels

    matrix, left, right = torch.randn(70, 90).bfloat16(), torch.randn(70, rank), torch.randn(rank, 90)
    expected = (matrix.float() + left @ right).square().sum(1) - matrix.float().square().sum(1)
    for stored in (matrix, matrix.T.contiguous().T):
        (found,) = kernels.norm_increases([(stored, left, right)])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


@interpreted
def test_large_ranks_are_left_to_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatlora_optim.kernels import triton as kernels

    layer = OwnLoRA(torch.randn(70, 90))
    (target,) = find_targets(layer).targets
    by_product: list[int] = []
    norm_increase = kernels.plain.norm_increase

    def noted(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
        by_product.append(len(right))
        return norm_increase(matrix, left, right)

    monkeypatch.setattr(kernels.plain, "norm_increase", noted)
    for rank in (64, 65):
        left, right = torch.randn(70, rank), torch.randn(rank, 90)
        expected = (layer.weight + left @ right).square().sum(1) - layer.weight.square().sum(1)
        (found,) = DenseWeight.norm_increases([target.weight], [(left, right)])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)
    assert by_product == [65]


@interpreted
@pytest.mark.parametrize("restore", ["exact", "snapshot"])
def test_training_with_kernels(restore: str) -> None:
    torch.set_num_threads(1)  # the interpreter is not thread-safe
    model, batch = lora_mlp(torch.bfloat16), mlp_batch(dtype=torch.bfloat16)
    optimizer = flatlora(model, restore=restore)
    before = {name: int_view(p).clone() for name, p in model.named_parameters() if "base_layer" in name}
    for _ in range(3):
        loss_of(model, batch).backward()
        assert optimizer.metrics()["noise_norm"] > 0
        assert any(
            not torch.equal(int_view(p), before[n]) for n, p in model.named_parameters() if n in before
        )
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(int_view(p), before[n]) for n, p in model.named_parameters() if n in before)


@interpreted
def test_transposed_weights_and_a_state_dict_in_the_middle() -> None:
    torch.set_num_threads(1)
    model = lora_gpt2()
    optimizer = flatlora(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "base_layer.weight" in name}
    with optimizer.perturbed():
        assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
        state = model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in before.items())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@interpreted
def test_an_interrupt_right_after_the_launch_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatlora_optim.kernels import triton as kernels

    torch.set_num_threads(1)
    model = lora_mlp()
    optimizer = flatlora(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    write = kernels.Part._write

    def interrupted(part: kernels.Part, launch, is_perturbed: bool) -> None:
        def launch_and_interrupt(done: Tensor) -> None:
            launch(done)
            monkeypatch.setattr(kernels.Part, "_write", write)
            raise KeyboardInterrupt

        write(part, launch_and_interrupt, is_perturbed)

    monkeypatch.setattr(kernels.Part, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.perturb()
    assert not optimizer.is_perturbed
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
