"""Stand-ins of the structure of other libraries' layers; ``make test-zoo`` meets the libraries themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer, find_targets, register
from helpers import NORM_ERROR, fingerprint, int_view, scales_of, trainable

SIGMA = 0.2


def uneven(weight: Tensor, dim: int = 0) -> nn.Parameter:
    """Frozen, with rows of different norms, so that a wrong axis shows."""
    shape = [1] * weight.ndim
    shape[dim] = weight.shape[dim]
    scales = torch.linspace(0.3, 3, weight.shape[dim]).view(shape)
    return nn.Parameter(weight.detach() * scales, requires_grad=False)


class MergedLinear(nn.Linear):
    """loralib's: A and B for some of the slices of a fused projection."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__(8, 24)
        self.enable_lora, self.fan_in_fan_out, self.scaling = [True, False, True], transposed, 0.5
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(16, 2))
        self.weight = uneven(self.weight.T.contiguous(), 1) if transposed else uneven(self.weight)
        self.bias.requires_grad_(False)

    def merge_AB(self) -> Tensor:  # noqa: N802
        product = F.conv1d(self.lora_A[None], self.lora_B[..., None], groups=2)[0]
        whole = torch.cat([product[:8], torch.zeros_like(product[:8]), product[8:]])
        return whole.T if self.fan_in_fan_out else whole

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.scaling * self.merge_AB()
        return F.linear(x, weight.T if self.fan_in_fan_out else weight, self.bias)

    def whole(self) -> Tensor:
        return self.weight + self.scaling * self.merge_AB()


class Tokens(nn.Embedding):
    """loralib's Embedding."""

    def __init__(self) -> None:
        super().__init__(9, 6)
        self.weight, self.scaling = uneven(self.weight), 2.0
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 9)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scaling * F.embedding(x, self.lora_A.T) @ self.lora_B.T

    def whole(self) -> Tensor:
        return self.weight + self.scaling * (self.lora_B @ self.lora_A).T


class Convolution(nn.Module):
    """loralib's, which reads the weight of the convolution inside, and merges in ``eval()``."""

    def __init__(self, merges: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).requires_grad_(False)
        self.conv.weight = uneven(self.conv.weight)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(6, 9) / 4), nn.Parameter(torch.randn(24, 6) / 4)
        self.scaling, self.merge_weights, self.merged = 0.5, merges, False

    def product(self) -> Tensor:
        return self.scaling * (self.lora_B @ self.lora_A).view(self.conv.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv._conv_forward(x, self.conv.weight + self.product(), self.conv.bias)

    def whole(self) -> Tensor:
        return self.conv.weight + self.product()


class Litgpt(nn.Module):
    """LitGPT's LoRALinear and LoRAQKVLinear."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12).requires_grad_(False)
        self.linear.weight = uneven(self.linear.weight)
        self.scaling = 0.5
        self.lora_A = nn.Parameter(torch.randn(4 if fused else 2, 8))
        self.lora_B = nn.Parameter(torch.randn(8 if fused else 12, 2))
        if fused:
            self.enable_lora = (True, False, True)

    def get_lora_AB(self) -> Tensor:  # noqa: N802
        if not hasattr(self, "enable_lora"):
            return self.scaling * self.lora_B @ self.lora_A
        product = F.conv1d(self.lora_A[None], self.lora_B[..., None], groups=2)[0]
        return self.scaling * torch.cat([product[:4], torch.zeros_like(product[:4]), product[4:]])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.get_lora_AB().T

    def whole(self) -> Tensor:
        return self.linear.weight + self.get_lora_AB()


class Torchtune(nn.Module):
    """torchtune's LoRALinear, or DoRALinear."""

    def __init__(self, dora: bool) -> None:
        super().__init__()
        self.weight = uneven(torch.randn(5, 8))
        self.lora_a, self.lora_b = nn.Linear(8, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.rank, self.disabled = 2, False
        if dora:
            self.scaling = 1.5
            self.magnitude = nn.Parameter(torch.ones(5))
        else:
            self.alpha = 3.0

    def adapter_params(self) -> list[str]:
        return ["lora_a.weight", "lora_b.weight"]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.disabled else self.whole()
        if hasattr(self, "magnitude"):
            weight = weight * (self.magnitude / weight.norm(dim=1).detach())[:, None]
        return x @ weight.T

    def whole(self) -> Tensor:
        return self.weight + 1.5 * self.lora_b.weight @ self.lora_a.weight


class Setup(list[str]):
    """AdapterHub's composition of adapters."""

    def flatten(self) -> set[str]:
        return set(self)


class Average(Setup):
    weights = (0.75, 0.25)


class AdapterHub(nn.Linear):
    """AdapterHub's LoRALinear, which is its own frozen layer."""

    location_key = "selfattn_lora"

    def __init__(self, setup: Setup | None = None) -> None:
        super().__init__(8, 5)
        self.weight = uneven(self.weight)
        self.bias.requires_grad_(False)
        self.fan_in_fan_out, self.merged, self.setup = False, None, setup or Setup("x")
        self.loras = nn.ModuleDict()
        for name in ("x", "y"):
            lora = nn.Module()
            lora.lora_A, lora.lora_B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(5, 2))
            lora.scaling, lora.use_gating, lora.composition_mode = 0.5, False, "add"
            self.loras[name] = lora.requires_grad_(name in self.setup)

    def get_active_setup(self) -> Any:
        return self.setup

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.setup is None else y + x @ self.product().T

    def product(self) -> Tensor:
        active = [self.loras[name] for name in self.setup]
        products = [lora.scaling * lora.lora_B @ lora.lora_A for lora in active]
        if len(products) == 1:
            return products[0]
        return torch.stack([w * each for w, each in zip(self.setup.weights, products, strict=True)]).mean(0)

    def whole(self) -> Tensor:
        return self.weight + self.product()


class Kohya(nn.Module):
    """A LoRA module of a network outside the model, in place of the forward of the layer it adapts."""

    def __init__(self, layer: Any, multiplier: float = 0.7) -> None:
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            self.lora_down = nn.Conv2d(layer.in_channels, 2, layer.kernel_size, bias=False)
            self.lora_up = nn.Conv2d(2, layer.out_channels, 1, bias=False)
        else:
            self.lora_down = nn.Linear(layer.in_features, 2, bias=False)
            self.lora_up = nn.Linear(2, layer.out_features, bias=False)
        self.scale, self.multiplier = 2.0, multiplier
        self.org_forward, layer.forward = layer.forward, self.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.org_forward(x) + self.lora_up(self.lora_down(x)) * self.multiplier * self.scale

    def product(self) -> Tensor:
        up, down = self.lora_up.weight.flatten(1), self.lora_down.weight.flatten(1)
        return self.multiplier * self.scale * up @ down


class Split(Kohya):
    """One with a pair for each slice of a fused projection, as for FLUX."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        sizes = layer.weight.shape[0] // 4, layer.weight.shape[0] - layer.weight.shape[0] // 4
        inputs = layer.weight.shape[1]
        self.lora_down = nn.ModuleList(nn.Linear(inputs, 2, bias=False) for _ in sizes)
        self.lora_up = nn.ModuleList(nn.Linear(2, size, bias=False) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        parts = [up(down(x)) for up, down in zip(self.lora_up, self.lora_down, strict=True)]
        return self.org_forward(x) + torch.cat(parts, -1) * self.multiplier * self.scale

    def product(self) -> Tensor:
        pairs = zip(self.lora_up, self.lora_down, strict=True)
        return self.multiplier * self.scale * torch.cat([up.weight @ down.weight for up, down in pairs])


class Product(nn.Module):
    """LyCORIS' LoHa (a product of products), or LoKr (a Kronecker product), attached like kohya's."""

    def __init__(self, layer: Any, kronecker: bool) -> None:
        super().__init__()
        is_linear = hasattr(layer, "in_features")  # whose weight may be packed
        self.shape = torch.Size((layer.out_features, layer.in_features)) if is_linear else layer.weight.shape
        self.multiplier, self.kronecker = 0.7, kronecker
        rows, columns = self.shape[0], self.shape[1:].numel()
        if kronecker:
            self.use_w1 = True
            self.lokr_w1 = nn.Parameter(torch.randn(2, 1) / 4)
            self.lokr_w2 = nn.Parameter(torch.randn(rows // 2, columns) / 4)
        else:
            self.hada_w1_a, self.hada_w2_a = (nn.Parameter(torch.randn(rows, 2) / 4) for _ in "12")
            self.hada_w1_b, self.hada_w2_b = (nn.Parameter(torch.randn(2, columns) / 4) for _ in "12")
        self.layer = [layer]  # which is no part of the network
        self.org_forward, layer.forward = layer.forward, self.forward

    def get_weight(self, shape: torch.Size) -> Tensor:
        weight = (self.product() / self.multiplier).view(shape)
        return weight * torch.rand(()) if self.training else weight  # as rank dropout does

    def product(self) -> Tensor:
        if self.kronecker:
            return self.multiplier * torch.kron(self.lokr_w1, self.lokr_w2)
        return self.multiplier * (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)

    def forward(self, x: Tensor) -> Tensor:
        added, (layer,) = self.product().view(self.shape), self.layer
        more = layer._conv_forward(x, added, None) if hasattr(layer, "_conv_forward") else F.linear(x, added)
        return self.org_forward(x) + more


class Variable:
    """One of Keras', which is no parameter but has one."""

    def __init__(self, path: str, value: Tensor, trains: bool = True) -> None:
        self.path, self.value, self.shape = path, nn.Parameter(value, requires_grad=trains), value.shape


class KerasDense(nn.Module):
    """Keras 3 on torch makes its module's parameters when they are first asked for."""

    lora_enabled, lora_alpha, lora_rank, units, fan_in_fan_out = True, 3.0, 2, 5, True

    def __init__(self) -> None:
        super().__init__()
        self._kernel = Variable("dense/kernel", uneven(torch.randn(8, 5), 1).data, trains=False)
        self.lora_kernel_a = Variable("dense/a", torch.randn(8, 2))
        self.lora_kernel_b = Variable("dense/b", torch.randn(2, 5))

    @property
    def torch_params(self) -> nn.ParameterDict:
        if not hasattr(self, "_torch_params"):
            parts = (self._kernel, self.lora_kernel_a, self.lora_kernel_b)
            self._torch_params = nn.ParameterDict({part.path: part.value for part in parts})
        return self._torch_params

    def parameters(self, recurse: bool = True) -> Any:
        return iter(self.torch_params.values())

    def get_parameter(self, path: str) -> nn.Parameter:
        return self.torch_params[path]

    def whole(self) -> Tensor:
        return self._kernel.value + 1.5 * self.lora_kernel_a.value @ self.lora_kernel_b.value

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.whole()


LAYERS: dict[str, tuple[Callable[[], Any], str]] = {
    "loralib's MergedLinear": (MergedLinear, "weight"),
    "loralib's MergedLinear, transposed": (lambda: MergedLinear(transposed=True), "weight"),
    "loralib's Embedding": (Tokens, "weight"),
    "loralib's Conv2d": (lambda: Convolution(merges=False), "conv.weight"),
    "LitGPT's LoRALinear": (lambda: Litgpt(fused=False), "linear.weight"),
    "LitGPT's LoRAQKVLinear": (lambda: Litgpt(fused=True), "linear.weight"),
    "torchtune's LoRALinear": (lambda: Torchtune(dora=False), "weight"),
    "torchtune's DoRALinear": (lambda: Torchtune(dora=True), "weight"),
    "AdapterHub": (AdapterHub, "weight"),
    "AdapterHub's Average": (lambda: AdapterHub(Average("xy")), "weight"),
    "Keras' Dense": (KerasDense, "dense/kernel"),
}


def optimizer_for(parameters: Any, model: nn.Module, **options: Any) -> FlatLoRAOptimizer:
    options = {"sigma": SIGMA, "schedule": "constant", **options}
    return FlatLoRAOptimizer(torch.optim.SGD(list(parameters), lr=0.0), model, **options)


@pytest.mark.parametrize(("make", "path"), LAYERS.values(), ids=LAYERS)
def test_found_by_itself_with_noise_of_the_merged_rows(make: Callable[[], Any], path: str) -> None:
    model = nn.ModuleDict({"layer": make()})
    layer = model["layer"]
    weight, merged, before = layer.get_parameter(path), layer.whole().detach(), fingerprint(model)
    transposed = getattr(layer, "fan_in_fan_out", False)
    clean = weight.detach().clone()
    rows = merged.T if transposed else merged.flatten(1)
    expected = SIGMA * rows.norm(dim=1) / rows.shape[1] ** 0.5
    squared, draws = torch.zeros(len(rows)), 150
    optimizer = optimizer_for(trainable(model), model)
    assert not optimizer.skipped
    for _ in range(draws):
        with optimizer.perturbed():
            noise = weight.detach() - clean
            squared += (noise.T if transposed else noise.flatten(1)).square().mean(1)
        torch.testing.assert_close(scales_of(optimizer), expected, rtol=10 * NORM_ERROR, atol=0)
        optimizer.step()
    # At least 6 * 150 squares of a Gaussian: 2.4 % standard error at most.
    assert ((squared / draws).sqrt() / expected - 1).abs().max() < 0.1
    assert all(torch.equal(int_view(p), before[n]) for n, p in model.named_parameters() if n in before)
    assert len(find_targets(model).targets) == 1


class Packed(Tensor):
    """Codes whose values only `get_original_weight` knows, like torchao's NF4."""

    def get_original_weight(self) -> Tensor:
        return self.as_subclass(Tensor).float() / 9


def test_torchtune_over_packed_codes() -> None:
    layer = Torchtune(dora=False)
    codes = torch.randint(-20, 20, (5, 8), dtype=torch.int8)
    layer.weight = nn.Parameter(codes.as_subclass(Packed), requires_grad=False)
    values = codes / 9
    layer.whole = lambda: values + 1.5 * layer.lora_b.weight @ layer.lora_a.weight
    model = nn.Sequential(layer)
    x = torch.randn(4, 8)
    clean = model(x).detach()
    optimizer = optimizer_for(trainable(model), model)
    noisy = model(x)
    expected = SIGMA * layer.whole().detach().norm(dim=1) / 8**0.5
    torch.testing.assert_close(scales_of(optimizer), expected, rtol=10 * NORM_ERROR, atol=0)
    assert 0.02 < float((noisy - clean).detach().norm() / clean.norm()) < 0.6
    noisy.square().sum().backward()
    assert layer.lora_a.weight.grad.any()
    optimizer.step()
    assert torch.equal(layer.weight.as_subclass(Tensor), codes)
    with torch.no_grad():
        assert torch.equal(model(x), clean)


def test_a_model_of_keras_is_refused_with_the_way_out() -> None:
    model = nn.Module()
    model._flatten_layers = lambda include_self: [KerasDense()]  # in no module tree
    with pytest.raises(
        ValueError, match=r"Keras keeps its layers out .*`nn.ModuleList\(\[\.\.\.\]\)`.* auto=False"
    ):
        optimizer_for([nn.Parameter(torch.zeros(2))], model)


def test_a_convolution_that_merges_by_itself_is_perturbed_in_its_own_forward() -> None:
    layer = Convolution(merges=True)
    model = nn.Sequential(layer)
    x = torch.randn(2, 3, 6, 6)
    clean = layer(x).detach()
    optimizer = optimizer_for(trainable(model), model)
    assert "virtual" in repr(optimizer)
    noisy = model(x)
    assert 0.1 < float((noisy - clean).norm() / clean.norm()) < 0.4
    noisy.sum().backward()
    assert layer.lora_A.grad.any()
    optimizer.step()
    assert torch.equal(layer(x), clean)


def test_torchtune_disabled_and_adapterhub_inactive() -> None:
    for layer, off in ((Torchtune(False), ("disabled", True)), (AdapterHub(), ("setup", None))):
        before = fingerprint(layer)
        optimizer = optimizer_for(trainable(layer), layer)
        setattr(layer, *off)
        with optimizer.perturbed():
            assert all(
                torch.equal(int_view(p), before[n]) for n, p in layer.named_parameters() if n in before
            )


def test_adapters_of_adapterhub_that_have_no_merged_weight_are_refused() -> None:
    gated, scaling, several, stacked = (AdapterHub() for _ in range(4))
    gated.loras["x"].use_gating = True
    scaling.loras["x"].composition_mode = "scale"
    several.loras["x"].lora_B = nn.Parameter(torch.randn(3, 5, 2))  # one for each task
    stacked.setup = Setup("xy")
    for layer, reason in (
        (gated, "gated, .* build it without `use_gating`"),
        (scaling, "Module of AdapterHub adds no product B @ A; its LoRA does"),
        (several, "Module of AdapterHub adds no product B @ A; its LoRA does"),
        (stacked, r"\['x', 'y'\] of AdapterHub composes adapters .* activate one adapter, or an Average"),
    ):
        with pytest.raises(ValueError, match=reason):
            optimizer_for(trainable(layer), layer)


def quantized() -> nn.Module:
    return bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32).to("cpu")


def convolution() -> nn.Module:
    return nn.Conv2d(3, 8, 3)


def linear() -> nn.Module:
    return nn.Linear(64, 32)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[Callable[[Any], nn.Module]]]] = {
    "kohya's on a linear layer": (linear, [Kohya]),
    "kohya's on a convolution": (convolution, [Kohya]),
    "kohya's on a packed layer": (quantized, [Kohya]),
    "two of kohya's": (linear, [Kohya, Kohya]),
    "two of kohya's on a packed layer": (quantized, [Kohya, Kohya]),
    "one for each slice": (linear, [Split]),
    "LoHa": (linear, [partial(Product, kronecker=False)]),
    "LoHa on a convolution": (convolution, [partial(Product, kronecker=False)]),
    "LoKr": (linear, [partial(Product, kronecker=True)]),
    "LoKr on a packed layer": (quantized, [partial(Product, kronecker=True)]),
    "LoHa around kohya's": (linear, [Kohya, partial(Product, kronecker=False)]),
}


@pytest.mark.parametrize(("make", "kinds"), NETWORKS.values(), ids=NETWORKS)
def test_networks_outside_the_model(
    make: Callable[[], nn.Module], kinds: list[Callable[[Any], nn.Module]]
) -> None:
    unet = nn.Sequential(make()).requires_grad_(False)
    layer = unet[0]
    is_quantized = isinstance(layer, bnb.nn.Linear4bit)
    values = (
        bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        if is_quantized
        else layer.weight.detach().flatten(1)
    )
    network = nn.ModuleList(kind(layer) for kind in kinds)
    merged = (values + sum(each.product() for each in network)).detach()
    x = torch.randn(2, 3, 6, 6) if values.shape[1] == 27 else torch.randn(4, 64)
    clean = unet(x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = optimizer_for(network.parameters(), unet)
    before = layer.weight.detach().clone()
    noisy = unet(x)
    expected = SIGMA * merged.norm(dim=1) / merged.shape[1] ** 0.5
    torch.testing.assert_close(scales_of(optimizer), expected, rtol=10 * NORM_ERROR, atol=0)
    assert 0.05 < float((noisy - clean).norm() / clean.norm()) < 0.5
    noisy.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    optimizer.step()
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer.forward(x), clean)
    layer.forward = network[0].org_forward  # the network is taken away
    with optimizer.perturbed():
        assert torch.equal(layer.weight, before)


def test_a_network_of_an_unknown_kind_is_named() -> None:
    class Other(Kohya):
        def __init__(self, layer: Any) -> None:
            super().__init__(layer)
            self.down, self.up = self.lora_down, self.lora_up
            del self.lora_down, self.lora_up

    unet = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)
    network = Other(unet[0])
    with pytest.raises(ValueError, match="0: Other adds no product that we know; LoRA, LoCon"):
        optimizer_for(network.parameters(), unet)


def test_a_network_without_its_model_is_refused_unless_its_modules_are_described() -> None:
    unet = nn.Sequential(nn.Linear(6, 5)).requires_grad_(False)
    network = nn.ModuleList([Kohya(unet[0])])
    with pytest.raises(ValueError, match=r"ModuleList adapts the layers of another model\. Give"):
        optimizer_for(network.parameters(), network)
    parts = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "scaling": 2.0 * 0.7}
    register(network[0], weight="org_forward.__self__.weight", **parts)
    weight = unet[0].weight
    clean = weight.detach().clone()
    optimizer = optimizer_for(network.parameters(), network)
    with optimizer.perturbed():
        assert not torch.equal(weight, clean)
        for state in (unet.state_dict(), unet[0].state_dict(prefix="0.")):  # of a model that was not given
            assert torch.equal(state["0.weight"], clean)
    assert torch.equal(weight, clean)


def test_a_fused_kernel_that_would_pass_the_noise_is_refused() -> None:
    """As unsloth and Axolotl put them into attention and MLP modules."""
    from helpers import with_lora

    def apply_lora(self: Any, x: Tensor, inplace: bool = True) -> Tensor:
        return x

    # (where the kernel is, as what, and which of the projections it reads)
    own = partial(apply_lora, inplace=False)
    cases: list[tuple[str, Callable[[nn.Module], Any], set[str]]] = [
        ("", lambda module: {"apply_qkv": apply_lora}, {"q_proj"}),
        ("", lambda module: {"apply_o": MethodType(apply_lora, module)}, {"o_proj"}),
        ("", lambda module: {"forward": MethodType(own, module)}, {"q_proj", "o_proj"}),
        ("", lambda module: {"_unsloth_forward": MethodType(apply_lora, module)}, {"q_proj", "o_proj"}),
        ("", lambda module: {"_old_forward": MethodType(apply_lora, module)}, {"q_proj", "o_proj"}),
        ("q_proj", lambda module: {"forward": MethodType(apply_lora, module)}, {"q_proj"}),
    ]
    for place, kernel, read in cases:
        net = nn.Module()
        net.attention = nn.ModuleDict({"q_proj": quantized(), "o_proj": quantized(), "k_proj": nn.Identity()})
        model = with_lora(net, ["q_proj", "o_proj"])
        attention = model.base_model.model.attention
        module = attention[place] if place else attention
        module.__dict__.update(kernel(module))
        message = (
            r"_proj: a fused kernel \(apply_lora\) of .*attention.* reads its weight without calling its"
        )
        if read == {"q_proj", "o_proj"}:
            with pytest.raises(ValueError, match=message):
                optimizer_for(trainable(model), model)
            continue
        with pytest.warns(UserWarning, match=message):
            optimizer = optimizer_for(trainable(model), model)
        assert {name.rpartition(".")[2] for name in optimizer.skipped} == read


def test_a_fused_kernel_that_reads_a_dense_weight_sees_the_noise() -> None:
    """In its forward and in its backward, which reads the weight once more."""
    from helpers import lora_mlp

    class Fused(torch.autograd.Function):
        """W past the forward of its layer, and not saved by autograd, as unsloth's LoRA_W has it."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
            ctx.weight = weight
            ctx.save_for_backward(x, a, b)
            return x @ (weight + 1.5 * b @ a).T

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            x, a, b = ctx.saved_tensors
            product = grad.T @ x
            whole = ctx.weight + 1.5 * b @ a
            return grad @ whole, None, 1.5 * b.T @ product, 1.5 * product @ a.T

    def apply_lora_mlp(self: Any, x: Tensor) -> Tensor:
        for layer in (self.fc1, self.fc2):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            x = Fused.apply(x, layer.base_layer.weight, a, b)
        return x

    model = lora_mlp()
    mlp = model.base_model.model
    mlp.forward = MethodType(apply_lora_mlp, mlp)
    x = torch.randn(4, 6, requires_grad=True)
    clean = model(x).detach()
    before = fingerprint(model)
    optimizer = optimizer_for(trainable(model), model)
    output = model(x)
    noisy = [layer.base_layer.weight.detach().clone() for layer in (mlp.fc1, mlp.fc2)]
    assert 0.05 < float((output - clean).norm() / clean.norm()) < 0.5
    with torch.no_grad():
        assert torch.equal(model(x), clean)
    output.square().sum().backward()
    whole = [
        weight + 1.5 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        for weight, layer in zip(noisy, (mlp.fc1, mlp.fc2), strict=True)
    ]
    torch.testing.assert_close(x.grad, 2 * output.detach() @ whole[1] @ whole[0])
    optimizer.step()
    assert all(torch.equal(int_view(p), before[n]) for n, p in model.named_parameters() if n in before)
