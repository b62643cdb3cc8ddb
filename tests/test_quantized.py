"""Noise on quantized bases: bitsandbytes 4-bit and 8-bit, torchao, HQQ and anything with a forward."""

from __future__ import annotations

import copy
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from flatlora_optim import FlatLoRAOptimizer, LowRankNoise
from helpers import NORM_ERROR, flatlora, gradients, randomize_adapters, trainable, with_lora

INPUTS, OUTPUTS = 64, 96
ROUNDING = {torch.float32: NORM_ERROR, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Net(nn.Module):
    """One layer, which PEFT takes for a part of a quantized model."""

    def __init__(self, layer: nn.Module, **loaded: bool) -> None:
        super().__init__()
        self.layer = layer
        vars(self).update(loaded)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def dense(inputs: int = INPUTS, outputs: int = OUTPUTS, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


def linear4bit(source: nn.Linear | None = None, **options: Any) -> nn.Module:
    source = source or dense()
    options = {"quant_type": "nf4", "compute_dtype": torch.float32, "compress_statistics": True, **options}
    dtype = options.pop("weight_dtype", torch.float32)
    layer = bnb.nn.Linear4bit(source.in_features, source.out_features, source.bias is not None, **options)
    layer.weight = bnb.nn.Params4bit(
        source.weight.detach().to(dtype),
        requires_grad=False,
        quant_type=options["quant_type"],
        compress_statistics=options["compress_statistics"],
        quant_storage=layer.quant_storage,
        module=layer,
    )
    layer.bias = None if source.bias is None else nn.Parameter(source.bias.detach().clone(), False)
    return layer.to("cpu")


def linear8bit(source: nn.Linear | None = None, **options: Any) -> nn.Module:
    source = source or dense()
    layer = bnb.nn.Linear8bitLt(
        source.in_features, source.out_features, source.bias is not None, has_fp16_weights=False, **options
    )
    layer.load_state_dict(source.state_dict())
    return layer.requires_grad_(False).to("cpu")


def adapted(layer: nn.Module, **config: Any) -> nn.Module:
    loaded = {
        "is_loaded_in_4bit": isinstance(layer, bnb.nn.Linear4bit),
        "is_loaded_in_8bit": isinstance(layer, bnb.nn.Linear8bitLt),
    }
    return with_lora(Net(layer, **loaded), ["layer"], **config)


def base_layer(model: nn.Module) -> nn.Module:
    return model.base_model.model.layer.base_layer


def dequantized(layer: Any) -> Tensor:
    """The weight as bitsandbytes' public functions give it."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    codes = layer.weight.data if layer.state.CB is None else layer.state.CB
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return bnb.functional.int8_vectorwise_dequant(codes, scales).float()


def noisy_twin(
    weight: Tensor, bias: Tensor | None, sigma: float, noise: str = "gaussian"
) -> tuple[Tensor, Tensor | None]:
    """``W + eps`` as in-place mode makes it for a dense layer of the same values and the same seed."""
    twin = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).requires_grad_(False)
    twin.weight.copy_(weight)
    model = adapted(twin)
    with flatlora(model, sigma=sigma, mode="in_place", noise=noise).perturbed():
        return base_layer(model).weight.clone(), bias


def check_noise(model: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    """Output is ``F.linear(x, W + eps, bias)`` and the input's gradient ``g @ (W + eps)``."""
    for noise in ("gaussian", "low_rank"):
        check_noise_of(noise, model, weight, bias, dtype)


def check_noise_of(
    noise: str, model: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> None:
    sigma = 0.3
    noisy, _ = noisy_twin(weight, bias, sigma, noise)
    x = torch.randn(2, 5, weight.shape[1]).to(dtype).requires_grad_()
    g = torch.randn(2, 5, weight.shape[0]).to(dtype)
    optimizer = flatlora(model, sigma=sigma, noise=noise)
    with optimizer.perturbed():
        output = base_layer(model)(x)
        (gradient,) = torch.autograd.grad(output, x, g)
    assert output.dtype == gradient.dtype == dtype
    x, g, bias = x.detach().float(), g.float(), None if bias is None else bias.float()
    for actual, expected, clean in (
        (output.detach(), nn.functional.linear(x, noisy, bias), nn.functional.linear(x, weight, bias)),
        (gradient, g @ noisy, g @ weight),
    ):
        largest = expected.abs().max()
        assert (actual.float() - expected).abs().max() < ROUNDING[dtype] * largest
        assert (actual.float() - clean).abs().max() > 0.1 * largest


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit(quant_type: str, double: bool, dtype: torch.dtype) -> None:
    layer = linear4bit(quant_type=quant_type, compress_statistics=double, compute_dtype=dtype)
    check_noise(adapted(layer), dequantized(layer), layer.bias, dtype)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_4bit_storage(storage: torch.dtype) -> None:
    layer = linear4bit(quant_storage=storage, weight_dtype=torch.bfloat16)
    assert layer.weight.dtype == storage
    # Dequantized in the compute dtype, as bitsandbytes' forward does, not in the dtype it came in.
    layer.weight.quant_state.dtype = torch.float32
    check_noise(adapted(layer), dequantized(layer), layer.bias, torch.float32)


def test_4bit_compute_dtype_of_its_own() -> None:
    """The layer computes in ``compute_dtype`` and answers in the dtype of its input."""
    layer = linear4bit(compute_dtype=torch.float32)
    check_noise(adapted(layer), dequantized(layer), layer.bias, torch.float16)
    with flatlora(adapted(layer), noise="gaussian").perturbed():
        x = torch.randn(5, INPUTS).bfloat16()
        assert torch.equal(layer(x), layer(x.float()).bfloat16())
    for dtype in (torch.bfloat16, torch.float16):
        layer = linear4bit(compute_dtype=None)
        check_noise(adapted(layer), dequantized(layer), layer.bias, dtype)


def test_4bit_takes_its_compute_dtype_from_the_first_input_as_it_does_without_noise() -> None:
    noisy, alone = linear4bit(compute_dtype=None), linear4bit(compute_dtype=None)
    with flatlora(adapted(noisy)).perturbed():
        for dtype in (torch.bfloat16, torch.float32):
            for layer in (noisy, alone):
                layer(torch.randn(3, INPUTS).to(dtype))
            assert noisy.compute_dtype == alone.compute_dtype
            assert noisy.compute_type_is_set == alone.compute_type_is_set


@pytest.mark.parametrize("make", [linear4bit, linear8bit])
def test_without_a_bias(make: Callable[..., Any]) -> None:
    layer = make(dense(bias=False))
    check_noise(adapted(layer), dequantized(layer), None, torch.float32)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_8bit(threshold: float, dtype: torch.dtype) -> None:
    layer = linear8bit(threshold=threshold)
    check_noise(adapted(layer), dequantized(layer), layer.bias, dtype)


@pytest.mark.parametrize("make", [linear4bit, linear8bit])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_no_noise_is_bit_identical_to_the_layer_alone(make: Callable[[], Any], dtype: torch.dtype) -> None:
    def run(noise: bool) -> list[Tensor]:
        model = adapted(make()).to(dtype)
        optimizer = flatlora(model, schedule="cosine", total_steps=3) if noise else None
        x = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        output = model(x)
        output.sum().backward()
        if optimizer is not None:
            assert optimizer.sigma == 0
            assert "forward" not in vars(base_layer(model))
        return [output.detach(), x.grad, *gradients(model).values()]

    for ours, own in zip(run(noise=True), run(noise=False), strict=True):
        assert torch.equal(ours, own)


@pytest.mark.parametrize("make", [linear4bit, linear8bit])
def test_gradient_of_a_trainable_bias(make: Callable[[], Any]) -> None:
    model = adapted(make(), bias="all")
    bias = base_layer(model).bias
    assert bias.requires_grad
    g = torch.randn(2, 5, OUTPUTS)
    with flatlora(model).perturbed():
        model(torch.randn(2, 5, INPUTS)).backward(g)
    torch.testing.assert_close(bias.grad, g.sum((0, 1)))


# ---------------------------------------------------------------------------- what it costs


class Matmuls(TorchDispatchMode):
    """Counts matrix products, bitsandbytes' fused one included."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "gemm_4bit", "gemv_4bit")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that come into being, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage.data_ptr() not in old and storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return output

    def _freed(self, nbytes: int) -> None:
        self.now -= nbytes


@pytest.mark.parametrize("make", [linear4bit, linear8bit])
def test_no_extra_matmul(make: Callable[[], Any]) -> None:
    model = adapted(make())
    x = torch.randn(4, INPUTS, requires_grad=True)

    def count() -> int:
        with Matmuls() as matmuls:
            base_layer(model)(x).sum().backward()
        return matmuls.count

    own = count()
    with flatlora(model, noise="gaussian").perturbed():
        assert count() == own == 2


@pytest.mark.parametrize("make", [linear4bit, linear8bit])
def test_memory_is_one_layer_and_a_chunk(make: Callable[..., Any]) -> None:
    model = adapted(make(dense(1024, 1024)))
    layer, chunk = 1024 * 1024 * 4, 64 * 1024 * 4
    x = torch.randn(4, 1024, requires_grad=True)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    optimizer = flatlora(model, noise="gaussian")
    with LiveBytes() as registration:
        optimizer.perturb()
    assert registration.peak < layer + 6 * chunk
    base_layer(model)(x)  # each thread keeps the memory of its chunk
    with LiveBytes() as memory, saved_tensors_hooks(pack, lambda tensor: tensor):
        output = base_layer(model)(x)
        assert layer <= memory.peak
        assert memory.now < layer / 20
        output.sum().backward()
    assert memory.peak < layer + chunk
    assert max(saved, default=0) < layer / 4 / 20
    optimizer.restore()


# ---------------------------------------------------------------------------- whole models


def tiny_llama(folder: Path, **quantization: Any) -> nn.Module:
    """A random Llama of two blocks, quantized by transformers as it is loaded."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 50, "num_hidden_layers": 2}
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
        LlamaForCausalLM(config).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(**quantization) if quantization else None,
    )
    if quantization:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
FP4_DOUBLE = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
    "bnb_4bit_quant_storage": torch.bfloat16,
}
INT8 = {"load_in_8bit": True}
PROJECTIONS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


def lora_llama(folder: Path, quantization: dict[str, Any] = NF4, **config: Any) -> nn.Module:
    return with_lora(tiny_llama(folder, **quantization), PROJECTIONS, **config).train()


def tokens(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def quantized_bytes(model: nn.Module) -> dict[str, bytes]:
    """Codes and everything that dequantization needs, byte by byte."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            tensors = {"codes": module.weight.data, **state.as_dict(packed=True)}
        elif isinstance(module, bnb.nn.Linear8bitLt):
            tensors = {"codes": module.weight.data, "scales": module.state.SCB}
        else:
            continue
        for key, tensor in tensors.items():
            found[f"{name}.{key}"] = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return found


def train(model: nn.Module, sigma: float, steps: int = 4, **options: Any) -> tuple[list[float], Tensor]:
    """Two micro-batches per step. Returns the losses and all adapter values."""
    optimizer = flatlora(model, sigma=sigma, lr=0.05, **options)
    losses = []
    for step in range(steps):
        for micro in range(2):
            loss = model(**tokens(2 * step + micro)).loss
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, torch.cat([p.detach().flatten() for p in trainable(model)])


@pytest.mark.parametrize("quantization", [NF4, FP4_DOUBLE, INT8], ids=["nf4", "fp4-double", "int8"])
def test_a_training_run_changes_no_byte_of_the_base(folder: Path, quantization: dict[str, Any]) -> None:
    model = lora_llama(folder, quantization)
    model(**tokens(0))  # int8 layers move their scales in their first forward
    before = quantized_bytes(model)
    assert len(before) > 20
    noisy, _ = train(model, sigma=0.2)
    assert quantized_bytes(model) == before
    clean, _ = train(lora_llama(folder, quantization), sigma=0.0)
    assert all(abs(a - b) > 1e-3 for a, b in zip(noisy, clean, strict=True))
    assert train(lora_llama(folder, quantization), sigma=0.2)[0] == noisy


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(folder: Path, use_reentrant: bool) -> None:
    expected = train(lora_llama(folder), sigma=0.2)
    model = lora_llama(folder)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    actual = train(model, sigma=0.2)
    assert actual[0] == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(actual[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [linear4bit, linear8bit])
def test_autocast(make: Callable[[], Any], dtype: torch.dtype) -> None:
    """The same noise as without, to the rounding of the autocast dtype, also in backward."""

    def run(autocast: bool, sigma: float = 0.3) -> Tensor:
        model = adapted(make())
        optimizer = flatlora(model, sigma=sigma)
        x = torch.randn(8, INPUTS, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", dtype, enabled=autocast):
            model(x).float().square().mean().backward()
        optimizer.restore()
        return torch.cat([x.grad.flatten(), *(g.flatten() for g in gradients(model).values())])

    expected = run(autocast=False)
    assert (run(autocast=True) - expected).norm() < 0.03 * expected.norm()
    assert (run(autocast=True, sigma=0.0) - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("make", [linear4bit, linear8bit])
def test_compiled_model(make: Callable[[], Any]) -> None:
    def run(compiled: bool) -> list[Tensor]:
        model = adapted(make())
        optimizer = flatlora(model, lr=0.01)
        called = torch.compile(model, backend="aot_eager") if compiled else model
        x = torch.randn(4, INPUTS, generator=torch.Generator().manual_seed(0))
        outputs = []
        for _ in range(4):
            output = called(x)
            output.square().mean().backward()
            outputs.append(output.detach())
            optimizer.step()
            optimizer.zero_grad()
        return outputs

    torch._dynamo.reset()
    for actual, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(actual, expected)


def test_dense_and_quantized_layers_in_one_model(folder: Path) -> None:
    model = tiny_llama(folder, **NF4, llm_int8_skip_modules=["v_proj", "lm_head"])
    model = with_lora(model, PROJECTIONS)
    before = quantized_bytes(model)
    optimizer = flatlora(model)
    assert "4 bnb-4bit" not in repr(optimizer)
    assert "6 bnb-4bit virtual, low rank" in repr(optimizer)
    assert "2 dense in place, exact" in repr(optimizer)
    dense_weight = model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj").weight
    clean = dense_weight.clone()
    with optimizer.perturbed():
        assert not torch.equal(dense_weight, clean)
    assert torch.equal(dense_weight, clean)
    assert quantized_bytes(model) == before
    with pytest.raises(ValueError, match="bnb-4bit and can't be written in place"):
        flatlora(model, mode="in_place")


@pytest.mark.parametrize("noise", ["gaussian", "low_rank"])
def test_dora_on_a_quantized_base(noise: str) -> None:
    """PEFT takes DoRA's norms from the clean weight, and scales the noisy output by them.

    So ``eps`` is scaled like the rest of its row: ``m / ||W + s BA|| * (W + eps + s BA)``.
    """
    layer = linear4bit()
    weight, bias = dequantized(layer), layer.bias
    model = adapted(layer, use_dora=True)
    with torch.no_grad():
        dict(model.named_parameters())["base_model.model.layer.lora_magnitude_vector.default.weight"].mul_(
            1.5
        )
    lora = model.base_model.model.layer
    x = torch.randn(4, INPUTS)
    with flatlora(model, sigma=0.3, noise=noise).perturbed():
        output = model(x)
        # The twin has the same adapter, so the same row norms of W' = W + s BA.
        noisy, _ = noisy_twin(weight, bias, 0.3, noise)
    product = lora.get_delta_weight("default")
    scale = lora.lora_magnitude_vector["default"].weight / (weight + product).norm(dim=1)
    expected = x @ (scale[:, None] * (noisy + product)).T + bias
    torch.testing.assert_close(output, expected, rtol=NORM_ERROR, atol=NORM_ERROR)


# ---------------------------------------------------------------------------- repacking on the CPU


@pytest.mark.skipif(
    not hasattr(bnb.functional, "_convert_weight_packed_for_cpu"), reason="new in bitsandbytes 0.49"
)
@pytest.mark.parametrize("noise", ["gaussian", "low_rank"])
@pytest.mark.parametrize("double", [False, True])
def test_after_bitsandbytes_has_repacked_the_weight(double: bool, noise: str) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes does so in evaluation, and rounds scales to bfloat16."""
    source = dense(128, OUTPUTS)
    source.weight[:, :64] *= 4  # two blocks per row, of different scales: their order changes
    model = adapted(linear4bit(source, compress_statistics=double))
    layer = base_layer(model)
    weight = dequantized(layer)
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    state = layer.weight.quant_state
    assert state.packing_format_for_cpu
    before = layer.weight.data.clone(), copy.deepcopy(vars(state))
    noisy, bias = noisy_twin(weight, layer.bias, 0.3, noise)
    x = torch.randn(5, 128, requires_grad=True)
    with flatlora(model, sigma=0.3, noise=noise).perturbed():
        output = layer(x)
        (gradient,) = torch.autograd.grad(output.sum(), x)
    expected = nn.functional.linear(x, noisy, bias)
    assert (output - expected).abs().max() < 1e-2 * expected.abs().max()
    assert (gradient - noisy.sum(0)).abs().max() < 1e-2 * noisy.sum(0).abs().max()
    assert torch.equal(layer.weight.data, before[0])
    assert state.packing_format_for_cpu
    assert torch.equal(state.absmax, before[1]["absmax"])
    assert state.dtype == before[1]["dtype"]


# ---------------------------------------------------------------------------- other quantizers


class Ternary(nn.Module):
    """A stand-in for quantizers that aren't known here: packed buffers and a working forward."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        step = source.weight.abs().mean(1, keepdim=True)
        self.register_buffer("codes", (source.weight / step).round().clamp(-1, 1).to(torch.int8))
        self.register_buffer("step", step)
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.step.to(x.dtype), self.bias)


def torchao_int8() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    return torchao_linear(torchao.Int8WeightOnlyConfig())


def torchao_int4() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    granularity = torchao.PerGroup(32)
    return torchao_linear(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity))


def torchao_linear(config: Any) -> nn.Module:
    from torchao.quantization import quantize_

    net = nn.Sequential(dense(128, 96))
    quantize_(net, config)
    return net[0]


def hqq_linear() -> nn.Module:
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
    return hqq.HQQLinear(dense(128, 96), config, compute_dtype=torch.float32, device="cpu")


def ternary() -> nn.Module:
    return Ternary(dense(128, 96))


def peft_or_own_lora(layer: nn.Module) -> nn.Module:
    """PEFT knows torchao and HQQ; around any other quantizer stands a layer of the same shape."""
    return adapted_by_hand(layer) if isinstance(layer, Ternary) else adapted(layer)


def adapted_by_hand(layer: nn.Module) -> nn.Module:
    net = Net(OwnAround(layer))
    randomize_adapters(net)
    return net


class OwnAround(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})
        self.scaling, self.active_adapters = {"default": 1.5}, ["default"]

    def forward(self, x: Tensor) -> Tensor:
        update = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + self.scaling["default"] * update


@pytest.mark.parametrize("noise", ["gaussian", "low_rank"])
@pytest.mark.parametrize("make", [torchao_int8, torchao_int4, hqq_linear, ternary])
def test_any_quantizer_with_a_forward(make: Callable[[], nn.Module], noise: str) -> None:
    layer = make()
    model = peft_or_own_lora(layer)
    lora = model.base_model.model.layer if hasattr(model, "base_model") else model.layer
    bias = layer.bias.detach().float()
    with torch.no_grad():
        weight = (layer(torch.eye(128)) - bias).T
    optimizer = flatlora(model, sigma=0.3, noise=noise)
    kind = "opaque" if isinstance(layer, Ternary) else "read-only"
    assert f"1 {kind} virtual" in repr(optimizer)
    noisy, _ = noisy_twin(weight, None, 0.3, noise)
    x = torch.randn(2, 5, 128, requires_grad=True)
    g = torch.randn(2, 5, 96)
    with optimizer.perturbed():
        output = lora.base_layer(x)
        (gradient,) = torch.autograd.grad(output, x, g)
    torch.testing.assert_close(output, x @ noisy.T + bias, rtol=NORM_ERROR, atol=4 * NORM_ERROR)
    torch.testing.assert_close(gradient, g @ noisy, rtol=NORM_ERROR, atol=4 * NORM_ERROR)
    with torch.no_grad():
        torch.testing.assert_close((layer(torch.eye(128)) - bias).T, weight, rtol=0, atol=0)


def test_a_quantizer_whose_dtype_computes_nothing_is_read_in_another() -> None:
    class Float8(nn.Module):
        def __init__(self, source: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = source.in_features, source.out_features
            weight = source.weight.to(torch.float8_e4m3fn)
            self.weight, self.bias = nn.Parameter(weight, requires_grad=False), source.bias

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    layer = Float8(dense(128, 96))
    optimizer = flatlora(adapted_by_hand(layer), sigma=0.3)
    with optimizer.perturbed():
        assert optimizer.metrics()["noise_norm"] == pytest.approx(
            0.3 * float(layer.weight.float().norm()), rel=0.2
        )


@pytest.mark.parametrize("noise", ["gaussian", "low_rank"])
def test_a_quantizer_that_answers_in_another_dtype(noise: str) -> None:
    class InHalf(Ternary):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float()).bfloat16()

    layer = InHalf(dense(1024, 600))  # three blocks of noise
    model = peft_or_own_lora(layer)
    bias = layer.bias.detach()
    weight = layer(torch.eye(1024)).T - bias[:, None]
    noisy, _ = noisy_twin(weight, None, 0.3, noise)
    x, g = torch.randn(5, 1024, requires_grad=True), torch.randn(5, 600).bfloat16()
    with flatlora(model, sigma=0.3, noise=noise).perturbed():
        output = model.layer.base_layer(x)
        (gradient,) = torch.autograd.grad(output, x, g)
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(model.layer.base_layer(x), output)
    assert output.dtype == torch.bfloat16
    for actual, expected in (
        (output.detach().float(), nn.functional.linear(x.detach(), noisy, bias)),
        (gradient, g.float() @ noisy),
    ):
        assert (actual - expected).abs().max() < ROUNDING[torch.bfloat16] * expected.abs().max()


def test_a_quantizer_that_writes_to_its_input_does_not_write_to_the_adapter() -> None:
    class Careless(Ternary):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            if not x.requires_grad:
                x.zero_()
            return output

    model = peft_or_own_lora(Careless(dense(128, 96)))
    before = [p.clone() for p in trainable(model)]
    with flatlora(model, sigma=0.3).perturbed():
        pass
    assert all(torch.equal(p, b) for p, b in zip(trainable(model), before, strict=True))


# ---------------------------------------------------------------------------- clear errors


def test_bitsandbytes_missing() -> None:
    script = """
import sys
sys.modules["bitsandbytes"] = None
import torch
from torch import nn
from flatlora_optim import FlatLoRAOptimizer

class Params4bit(nn.Parameter):
    pass

layer = nn.Module()
layer.weight = Params4bit(torch.zeros(8, 1), requires_grad=False)
layer.weight.quant_state = object()
lora = nn.Module()
lora.base_layer, lora.scaling, lora.active_adapters = layer, {"a": 1.0}, ["a"]
lora.lora_A = nn.ModuleDict({"a": nn.Linear(4, 2, bias=False)})
lora.lora_B = nn.ModuleDict({"a": nn.Linear(2, 4, bias=False)})
adapters = [*lora.lora_A.parameters(), *lora.lora_B.parameters()]
try:
    FlatLoRAOptimizer(torch.optim.SGD(adapters, lr=0.1), lora, sigma=0.1, schedule="constant")
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'flatlora-optim[qlora]'" in result.stdout


def fp16_linear8bit() -> nn.Module:
    return bnb.nn.Linear8bitLt(INPUTS, OUTPUTS, has_fp16_weights=True).requires_grad_(False)


def unquantized_linear4bit() -> nn.Module:
    return bnb.nn.Linear4bit(INPUTS, OUTPUTS).requires_grad_(False)


def unquantized_linear8bit() -> nn.Module:
    return bnb.nn.Linear8bitLt(INPUTS, OUTPUTS, has_fp16_weights=False).requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (fp16_linear8bit, "has_fp16_weights"),
        (unquantized_linear4bit, "not quantized yet"),
        (unquantized_linear8bit, "not quantized yet"),
    ],
)
def test_what_cannot_be_perturbed_is_never_left_without_noise(
    make: Callable[[], nn.Module], reason: str
) -> None:
    model = adapted(make())
    with pytest.raises(ValueError, match=reason):
        flatlora(model)


def test_a_quantizer_of_unknown_shape_is_reported() -> None:
    layer = ternary()
    model = peft_or_own_lora(layer)
    del layer.in_features
    with pytest.raises(ValueError, match="Ternary can't be read"):
        flatlora(model)


@pytest.mark.parametrize("source", ["gaussian", LowRankNoise(64)], ids=["gaussian", "low_rank"])
def test_embedding_in_4_bits(source: Any) -> None:
    layer = bnb.nn.EmbeddingNF4(32, 64).to("cpu")
    net = Net(layer)
    lora = OwnAround.__new__(OwnAround)
    nn.Module.__init__(lora)
    lora.base_layer, lora.scaling, lora.active_adapters = net.layer, {"default": 1.0}, ["default"]
    lora.lora_embedding_A = nn.ParameterDict({"default": torch.zeros(2, 32)})
    lora.lora_embedding_B = nn.ParameterDict({"default": torch.zeros(64, 2)})
    net.layer = lora
    adapters = [lora.lora_embedding_A["default"], lora.lora_embedding_B["default"]]
    base = torch.optim.SGD(adapters, lr=0.1)
    optimizer = FlatLoRAOptimizer(base, net, sigma=0.3, schedule="constant", seed=1, noise=source)
    tokens = torch.tensor([[3, 1], [4, 3]])
    clean = layer(tokens)
    with optimizer.perturbed():
        noise = layer(tokens) - clean
    assert torch.equal(noise[0, 0], noise[1, 1])  # a token's own
    assert float(noise.norm() / clean.norm()) == pytest.approx(0.3, rel=0.3)
    assert torch.equal(layer(tokens), clean)
