"""Layers whose own forward has the adapter in it, or another forward than their class's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer, LowRankNoise, find_targets, register
from flatlora_optim.landscape import expected_loss
from helpers import (
    NORM_ERROR,
    changed_weights,
    fingerprint,
    flatlora,
    gradients,
    int_view,
    lora_mlp,
    mlp_batch,
    scales_of,
    trainable,
    with_lora,
)

SIGMA = 0.2


class Inside:
    """A and B beside a weight of whatever kind, and a forward that adds their product."""

    def add_lora(self, inputs: int, outputs: int, rank: int = 3) -> None:
        self.lora_A = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.lora_B = nn.Parameter(torch.randn(outputs, rank) * 0.3)
        self.scaling = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)

    def product(self) -> Tensor:
        return (self.scaling * self.lora_B @ self.lora_A).detach()


class In4Bit(Inside, bnb.nn.Linear4bit):
    def __init__(self) -> None:
        super().__init__(64, 32, quant_type="nf4", compute_dtype=torch.float32)
        self.add_lora(64, 32)

    def values(self) -> Tensor:
        return bnb.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)


class In8Bit(Inside, bnb.nn.Linear8bitLt):
    def __init__(self) -> None:
        super().__init__(64, 32, has_fp16_weights=False)
        self.add_lora(64, 32)

    def values(self) -> Tensor:
        state = self.state if self.state.SCB is not None else self.weight
        codes = self.weight.data if self.state.CB is None else self.state.CB
        return codes.float() * (state.SCB / 127)[:, None]


class InTorchao(Inside, nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 32)
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(self, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: True)
        self.weight.requires_grad_(False)
        self.add_lora(64, 32)

    def values(self) -> Tensor:
        return self.weight.dequantize()


class InFloat8(Inside, nn.Linear):
    """The weight is stored in float8 and cast in each forward."""

    def __init__(self) -> None:
        super().__init__(64, 32)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        self.add_lora(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype), self.bias)
        return y + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)

    def values(self) -> Tensor:
        return self.weight.float()


class InDense(Inside, nn.Linear):
    def __init__(self) -> None:
        super().__init__(64, 32)
        self.weight.requires_grad_(False)
        self.add_lora(64, 32)

    def values(self) -> Tensor:
        return self.weight.detach()


def noise_of(layer: nn.Module, optimizer: FlatLoRAOptimizer) -> Tensor:
    """eps, shape (outputs, inputs), from what the layer adds to its output."""
    eye = torch.eye(64)
    with torch.no_grad():  # which shows the layer clean to whoever calls it
        clean = layer.forward(eye)
        with optimizer.perturbed():
            return (layer.forward(eye) - clean).T


# Each row has 64 * 60 squares of a Gaussian, 2.3 % standard error, or 60 sums of 4: 4.6 %.
@pytest.mark.parametrize(
    ("noise", "tolerance"), [("gaussian", 0.08), (LowRankNoise(4), 0.2)], ids=["gaussian", "low_rank"]
)
@pytest.mark.parametrize("kind", [In4Bit, In8Bit, InTorchao, InFloat8, InDense])
def test_the_adapter_keeps_running_and_noise_has_the_strength_of_the_merged_rows(
    kind: type, noise: Any, tolerance: float
) -> None:
    layer = kind().to("cpu")
    layer.bias.requires_grad_(False)
    expected = SIGMA * (layer.values() + layer.product()).norm(dim=1) / 8
    squared, draws = torch.zeros(32), 60
    optimizer = flatlora(layer, sigma=SIGMA, mode="virtual", noise=noise, lr=0.0)
    for _ in range(draws):
        squared += noise_of(layer, optimizer).square().sum(1)
        torch.testing.assert_close(scales_of(optimizer), expected, rtol=10 * NORM_ERROR, atol=0)
        optimizer.step()
    ratio = (squared / (64 * draws)).sqrt() / expected
    assert (ratio - 1).abs().max() < tolerance
    before = [int_view(p).clone() for p in (layer.weight,) if type(p) is nn.Parameter and p.ndim == 2]
    x = torch.randn(5, 64, requires_grad=True)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (layer.lora_A, layer.lora_B))
    optimizer.step()
    assert all(torch.equal(int_view(layer.weight), bits) for bits in before)


@pytest.mark.parametrize("kind", [In4Bit, InDense])
def test_gradients_are_those_of_the_weight_with_noise(kind: type) -> None:
    """Measured against a twin whose weight is W + eps."""
    layer = kind().to("cpu")
    layer.bias.requires_grad_(False)
    optimizer = flatlora(layer, sigma=SIGMA, mode="virtual")
    eps = noise_of(layer, optimizer)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    x = torch.randn(5, 64, requires_grad=True)
    twin = x @ (layer.values() + eps + 2.0 * B @ A).T + layer.bias
    expected = torch.autograd.grad(twin.square().sum(), (x, A, B))
    with optimizer.perturbed():
        actual = torch.autograd.grad(layer(x).square().sum(), (x, layer.lora_A, layer.lora_B))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", [In4Bit, InDense])
@pytest.mark.parametrize("wrap", [lambda layer: layer, lambda layer: nn.ModuleList([layer])])
def test_the_layer_itself_may_be_what_is_called(kind: type, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Its call has looked up its forward when the noise comes."""
    layer = kind().to("cpu")
    layer.bias.requires_grad_(False)
    x = torch.randn(5, 64)
    clean = layer(x).detach()
    optimizer = flatlora(wrap(layer), sigma=SIGMA, mode="virtual", lr=0.0)
    for _ in range(2):
        outputs = [layer(x), layer(x=x), layer(x)]  # the first of a step, and later ones
        assert all(torch.allclose(output, outputs[0]) for output in outputs)
        assert 0.1 < float((outputs[0] - clean).norm() / clean.norm()) < 0.4
        sum(outputs).sum().backward()
        with torch.no_grad():
            assert torch.equal(layer(x), clean)
        optimizer.step()
    assert not layer._forward_hooks or not optimizer.is_perturbed


def test_landscape_measures_the_model_with_its_adapter() -> None:
    model = nn.Sequential(In4Bit().to("cpu"))
    x = torch.randn(5, 64)
    expected = float(model(x).square().mean().detach())
    around = expected_loss(model, lambda model: model(x).square().mean(), sigma=0.05, samples=2)
    assert around.at_minimum == pytest.approx(expected, rel=1e-4)


def test_a_weight_that_only_the_adapted_forward_can_read_is_refused() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features = self.out_features = 8
            self.register_buffer("weight", torch.randint(-9, 9, (8, 8), dtype=torch.int8))
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))
            self.scaling = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight.float() / 9 + self.lora_B @ self.lora_A).T

    with pytest.raises(ValueError, match=r"keep the frozen layer as a submodule \(`self.base_layer`\)"):
        flatlora(Packed())


# ---------------------------------------------------------------------------- a forward somebody replaced


class Outside(nn.Module):
    """An adapter that is no part of the model: it takes the place of the layer's forward (kohya)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(64, 3, bias=False), nn.Linear(3, 32, bias=False)
        self.org_forward, layer.forward = layer.forward, self.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.org_forward(x) + self.up(self.down(x))


@pytest.mark.parametrize("quantized", [False, True])
def test_a_forward_that_was_replaced_keeps_running(quantized: bool) -> None:
    layer: Any = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32) if quantized else nn.Linear(64, 32)
    layer.to("cpu").requires_grad_(False)
    adapter = Outside(layer)
    register(adapter, weight="org_forward.__self__.weight", lora_A="down.weight", lora_B="up.weight")
    optimizer = flatlora(adapter, sigma=SIGMA, mode="virtual")
    x = torch.randn(4, 64)
    clean = layer(x).detach()
    noisy = layer.forward
    with optimizer.perturbed():
        output = layer(x)
    assert 0.1 < float((output - clean).norm() / clean.norm()) < 0.4
    output.square().sum().backward()
    assert adapter.down.weight.grad.any()
    assert adapter.up.weight.grad.any()
    assert layer.forward == noisy


def test_a_forward_that_is_put_around_the_noisy_one_outlives_it() -> None:
    model = lora_mlp()
    layer = model.base_model.model.fc1.base_layer
    x = mlp_batch()[0]
    clean = layer(x)
    with flatlora(model, mode="virtual").perturbed():
        inner = layer.forward
        layer.forward = lambda x: inner(x) + 1
        assert not torch.allclose(layer(x), clean + 1)
    assert torch.equal(layer(x), clean + 1)


# ---------------------------------------------------------------------------- layers that merge by themselves


class Merging(InDense):
    """Writes B A into its weight in ``eval()``, and takes it out again in ``train()``, as loralib does."""

    def __init__(self) -> None:
        super().__init__()
        self.bias.requires_grad_(False)
        self.merge_weights, self.merged = True, False

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += self.product() * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x) if self.merged else super().forward(x)


def test_eval_in_the_middle_of_a_step_merges_a_clean_weight() -> None:
    layer = Merging()
    merged = layer.weight + layer.product()
    optimizer = flatlora(layer, sigma=SIGMA, lr=0.0)
    assert "1 dense virtual" in repr(optimizer)
    x = torch.randn(4, 64)
    layer(x).square().sum().backward()
    layer.eval()
    assert torch.equal(layer.weight, merged)
    layer.train()
    noisy = layer(x)
    torch.testing.assert_close(layer.weight, merged - layer.product(), rtol=0, atol=1e-6)
    optimizer.step()
    assert not torch.allclose(layer(x), x @ layer.weight.T + layer.bias)  # the next step's noise
    optimizer.restore()
    clean = F.linear(x, layer.weight + layer.product(), layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), clean)
        assert not torch.allclose(noisy, clean)


# ---------------------------------------------------------------------------- what is written meanwhile


def write_in_place(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.mul_(-3)


def assign_another(layer: nn.Module) -> None:
    weight = layer.weight.detach() * -3
    del layer.weight  # its memory, and its id, may be taken by the next
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)


@pytest.mark.parametrize("write", [write_in_place, assign_another])
@pytest.mark.parametrize("convolution", [False, True])
def test_a_weight_that_is_written_before_backward_is_noticed(
    write: Callable[[nn.Module], None], convolution: bool
) -> None:
    layer = nn.Conv1d(6, 6, 1) if convolution else nn.Linear(6, 6)
    model = with_lora(nn.Sequential(layer), ["0"])
    optimizer = flatlora(model, mode="virtual", noise="gaussian")
    x = torch.randn(2, 6, 6, requires_grad=True)
    loss = model(x).square().sum()
    assert optimizer.is_perturbed
    write(layer)
    with pytest.raises(
        RuntimeError, match=r"modified by an inplace operation.* between forward and backward"
    ):
        loss.backward()


def test_another_write_is_no_concern_of_backward() -> None:
    model = with_lora(nn.Sequential(nn.Linear(6, 6)), ["0"])
    optimizer = flatlora(model, mode="virtual")
    x = torch.randn(2, 6, requires_grad=True)
    model(x).square().sum().backward()
    optimizer.step()
    write_in_place(model.base_model.model[0].base_layer)
    model(x).square().sum().backward()
    assert gradients(model)


class Codes(nn.Module):
    """A quantizer that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 64, 32
        self.register_buffer("codes", torch.randint(-9, 9, (32, 64), dtype=torch.int8))
        self.register_buffer("step", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes.to(x.dtype) * self.step).T


class Around(nn.Module):
    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 64)), nn.Parameter(torch.zeros(32, 2))
        self.out_features, self.in_features = 32, 64
        register(self, weight="base_layer", lora_A="down", lora_B="up")

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("mode", ["in_place", "virtual"])
@pytest.mark.parametrize("change", ["assigned", "loaded", "written"])
def test_norms_follow_a_new_weight(mode: str, change: str) -> None:
    model = Around(nn.Linear(64, 32, bias=False))
    optimizer = flatlora(model, mode=mode, lr=0.0)
    with optimizer.perturbed():
        expected = optimizer.metrics()["noise_norm"] * 10
    optimizer.step()
    layer = model.base_layer
    if change == "assigned":
        weight = layer.weight.detach() * 10
        del layer.weight
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    elif change == "loaded":
        layer.load_state_dict({"weight": layer.weight * 10}, assign=True)
        layer.requires_grad_(False)
    else:
        with torch.no_grad():
            layer.weight *= 10
    with optimizer.perturbed():
        assert optimizer.metrics()["noise_norm"] == pytest.approx(expected, rel=1e-3)


def test_norms_of_an_unknown_quantizer_follow_its_buffers() -> None:
    model = Around(Codes())
    optimizer = flatlora(model, lr=0.0)
    assert optimizer.targets[0].weight.kind == "opaque"
    with optimizer.perturbed():
        expected = optimizer.metrics()["noise_norm"] * 10
    optimizer.step()
    state = copy.deepcopy(model.state_dict())
    state["base_layer.step"] *= 10
    model.load_state_dict(state)
    with optimizer.perturbed():
        assert optimizer.metrics()["noise_norm"] == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------------------- float8 under autocast


@pytest.mark.parametrize("convolution", [False, True])
def test_frozen_float8_weights_under_autocast(convolution: bool) -> None:
    layer = nn.Conv2d(3, 8, 3) if convolution else nn.Linear(64, 32)
    model = with_lora(nn.Sequential(layer), ["0"])
    layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    before = layer.weight.detach().view(torch.int8).clone()
    with pytest.raises(ValueError, match="can't be written in place"):
        flatlora(model, mode="in_place")
    optimizer = flatlora(model, sigma=SIGMA, lr=0.0)
    x = torch.randn(4, 3, 6, 6) if convolution else torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            clean = model(x).float()
        noisy = model(x).float()
    assert 0.1 < float((noisy - clean).norm() / clean.norm()) < 0.4
    noisy.square().mean().backward()
    assert all(p.grad is not None for p in trainable(model))
    optimizer.step()
    assert torch.equal(layer.weight.view(torch.int8), before)
    (target,) = find_targets(model).targets
    assert target.weight.kind == "read-only"
    assert not changed_weights(lora_mlp(), fingerprint(lora_mlp()))
