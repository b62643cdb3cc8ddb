"""What only a GPU can show. ``benchmarks/gpu.py`` runs these tests, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flatlora_optim import LowRankNoise
from flatlora_optim.kernels import kernels_of, native, sum_of
from flatlora_optim.kernels.grid import Grid
from flatlora_optim.noise import FactoredNoise, GaussianNoise, Noise, NoiseKey, fill_factors
from flatlora_optim.targets.weights import Bnb4bitWeight
from helpers import OwnLoRA, changed_weights, fingerprint, flatlora, int_view, lora_mlp, loss_of, mlp_batch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, y = mlp_batch(dtype=dtype)
    return x.to(CUDA), y.to(CUDA)


def test_the_numbers_are_those_of_native_code() -> None:
    if not native.is_available():
        pytest.skip("needs a C compiler")
    out = torch.empty(1 << 20, device=CUDA)
    kernels_of(CUDA).fill(out, NoiseKey(-5, 70_000, 3), 2**32 - 1)
    expected = native.fill(torch.empty(1 << 20), NoiseKey(-5, 70_000, 3), 2**32 - 1)
    assert torch.equal(int_view(out.cpu()), int_view(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("restore", ["exact", "snapshot"])
@pytest.mark.parametrize("shape", [(1, 1), (37, 130), (700, 999), (64, 4096), (5, 3, 2, 2), (300, 70_000)])
def test_every_bit_comes_back(shape: tuple[int, ...], restore: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(*[OwnLoRA((torch.randn(shape) * 0.02).to(dtype)) for _ in range(3)]).to(CUDA)
    optimizer = flatlora(model, restore=restore, auto=False)
    before = fingerprint(model)
    for _ in range(5):
        optimizer.perturb()
        assert changed_weights(model, before)
        optimizer.step()
        assert not changed_weights(model, before)


@pytest.mark.parametrize("mode", ["in_place", "virtual"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_training(dtype: torch.dtype, mode: str) -> None:
    model = lora_mlp(dtype).to(CUDA)
    optimizer = flatlora(model, mode=mode)
    before = fingerprint(model)
    for _ in range(3):
        loss_of(model, batch(dtype)).backward()
        assert optimizer.metrics()["noise_norm"] > 0
        optimizer.step()
        optimizer.zero_grad()
        assert not changed_weights(model, before)


def test_nothing_waits_and_launches_do_not_grow() -> None:
    found = []
    for layers in (2, 60):
        model = nn.Sequential(*[OwnLoRA(torch.randn(64, 64)) for _ in range(layers)]).to(CUDA)
        optimizer = flatlora(model, auto=False)
        optimizer.perturb()
        optimizer.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.perturb()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            optimizer.restore()
            torch.cuda.synchronize()
        events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        found.append(len(events))
    assert found[0] == found[1] <= 16


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(64, 4096), (70, 130), (5, 33)])
def test_a_weight_in_4_bits_is_read_as_by_bitsandbytes(
    shape: tuple[int, int], nested: bool, quant_type: str
) -> None:
    bnb, (rows, columns) = pytest.importorskip("bitsandbytes"), shape
    layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type=quant_type, compress_statistics=nested)
    weight = Bnb4bitWeight(layer.to(CUDA))
    packed = weight.packed()
    assert packed is not None
    scales = torch.rand(rows, device=CUDA) * 0.01
    noise = Noise(GaussianNoise(), NoiseKey(1, 2), weight.grid(), scales)
    for dtype in DTYPES:
        found = sum_of(packed, noise, dtype)
        assert found is not None
        assert torch.equal(int_view(found), int_view(noise.add_to(weight.dense(dtype))))
    left, right = torch.randn(rows, 3, device=CUDA), torch.randn(3, columns, device=CUDA)
    (norms,) = kernels_of(CUDA).squared_norms([weight.product([(left, right, 0.1)])])
    merged = weight.dense(torch.float32).double()
    merged += (left * 0.1).bfloat16().double() @ right.bfloat16().double()
    torch.testing.assert_close(norms.double(), merged.square().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_factors_of_low_rank_noise(dtype: torch.dtype) -> None:
    scales = torch.rand(300, device=CUDA)
    noise = FactoredNoise(LowRankNoise(3), NoiseKey(1, 2), Grid(300, 4096, "cuda"), scales)
    places = [torch.empty(shape, dtype=dtype, device=CUDA) for shape in noise.shapes]
    fill_factors([(noise, places[0], places[1])])
    for place, factor in zip(places, noise.factors(), strict=True):
        torch.testing.assert_close(place, factor.to(dtype))


def test_autograd_sees_that_the_weight_was_written() -> None:
    model = lora_mlp().to(CUDA)
    optimizer = flatlora(model, auto=False)
    with optimizer.perturbed():
        loss = loss_of(model, batch())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_perturbed_on_one_stream_and_restored_on_another() -> None:
    model = lora_mlp().to(CUDA)
    optimizer = flatlora(model, auto=False)
    before = fingerprint(model)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(20):
        for work, stream in zip((optimizer.perturb, optimizer.step), streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                work()
            torch.cuda.current_stream().wait_stream(stream)
    assert not changed_weights(model, before)


@pytest.mark.parametrize("mode", ["in_place", "virtual"])
def test_a_graph_of_forward_and_backward_sees_the_noise_of_each_step(mode: str) -> None:
    model = lora_mlp().to(CUDA)
    optimizer = flatlora(model, mode=mode, auto=False)
    x, y = batch()

    def run() -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with optimizer.perturbed(), torch.cuda.graph(graph):
        loss = run()
    losses = []
    for _ in range(2):
        with optimizer.perturbed():
            graph.replay()
            losses.append(loss.item())
            assert loss.item() == pytest.approx(loss_of(model, (x, y)).item())
        optimizer.step()
    assert losses[0] != losses[1]


@pytest.mark.parametrize("mode", ["in_place", "virtual"])
def test_noise_is_not_captured(mode: str) -> None:
    model = lora_mlp().to(CUDA)
    optimizer = flatlora(model, mode=mode)
    before = fingerprint(model)
    x, y = batch()
    loss_of(model, (x, y)).backward()
    optimizer.step()
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        loss_of(model, (x, y))
    torch.cuda.synchronize()
    optimizer.restore()
    assert not changed_weights(model, before)
    assert optimizer.metrics()["noise_norm"] == 0  # what was recorded is not computed, and must not be kept
    loss_of(model, (x, y)).backward()
    optimizer.step()
    assert not changed_weights(model, before)


def test_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="for weights on the CPU"):
        flatlora(lora_mlp().to(CUDA), noise="table")
