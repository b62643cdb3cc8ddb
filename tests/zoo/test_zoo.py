"""The libraries themselves, in an environment of their own: ``make test-zoo``.

Of each: noise on the right weight, with the strength of the merged rows, by the library's own merging or its
own output; the base bit-identical after a step, and evaluation clean.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer, register

SIGMA, DRAWS = 0.1, 100


def shake(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Gives adapters values that change the rows' norms, and returns them."""
    known = list(parameters)
    with torch.no_grad():
        for parameter in known:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return known


def only(model: nn.Module, *names: str) -> list[nn.Parameter]:
    """Freezes all but the parameters whose names have one of these in them."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(each in name for each in names))
    return shake(p for p in model.parameters() if p.requires_grad)


def check(
    model: nn.Module,
    parameters: list[nn.Parameter],
    weights: dict[Tensor, Tensor],
    forward: Callable[[], Tensor],
    **options: Any,
) -> FlatLoRAOptimizer:
    """``weights``: the merged matrix ``W'`` (outputs first) of each perturbed weight."""
    clean = {weight: weight.detach().clone() for weight in weights}

    base = torch.optim.SGD(parameters, lr=0.0)
    optimizer = FlatLoRAOptimizer(base, model, sigma=SIGMA, schedule="constant", **options)
    assert len(optimizer.targets) == len(weights)
    squared: dict[Tensor, Any] = dict.fromkeys(weights, 0.0)
    for _ in range(DRAWS):
        with optimizer.perturbed():
            for weight, merged in weights.items():
                noise = weight.detach() - clean[weight]
                rows = noise.T if noise.shape != merged.shape else noise
                squared[weight] = squared[weight] + rows.flatten(1).square().mean(1)
        optimizer.step()
    for weight, merged in weights.items():
        expected = SIGMA * merged.flatten(1).norm(dim=1) / merged[0].numel() ** 0.5
        ratio = (squared[weight] / DRAWS).sqrt() / expected
        assert (ratio - 1).abs().max() < 0.15, ratio
    model.eval()
    with torch.no_grad():
        quiet = forward()
    model.train()
    noisy = forward()
    noisy.square().mean().backward()
    assert any(not torch.equal(weight, clean[weight]) for weight in weights)
    model.eval()
    with torch.no_grad():
        assert torch.equal(forward(), quiet)
    model.train()
    optimizer.step()
    assert all(torch.equal(weight, clean[weight]) for weight in weights)
    return optimizer


def stood_still(make: Callable[[], nn.Module], weight: str = "weight") -> tuple[nn.Module, Tensor]:
    """A layer, and its weight after loralib's own merging in ``eval()``."""
    layer = make()
    shake(p for n, p in layer.named_parameters() if "lora_" in n)
    merged = copy.deepcopy(layer)
    merged.train()
    merged.merge_weights = True
    merged.eval()
    return layer, merged.get_parameter(weight).detach()


def test_loralib() -> None:
    loralib = pytest.importorskip("loralib")
    fused = {"r": 2, "enable_lora": [True, False, True], "merge_weights": False}
    for make, x, weight in (
        (lambda: loralib.Linear(16, 8, r=2, merge_weights=False), torch.randn(3, 16), "weight"),
        (lambda: loralib.MergedLinear(16, 24, **fused), torch.randn(3, 16), "weight"),
        (lambda: loralib.Embedding(10, 6, r=2, merge_weights=False), torch.arange(4), "weight"),
        (
            lambda: loralib.Conv2d(3, 8, 3, r=2, merge_weights=False),
            torch.randn(2, 3, 6, 6),
            "conv.weight",
        ),
    ):
        layer, merged = stood_still(make, weight)
        loralib.mark_only_lora_as_trainable(layer)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        model = nn.Sequential(layer)
        check(model, parameters, {layer.get_parameter(weight): merged}, functools.partial(model, x))


def test_loralib_transposed() -> None:
    loralib = pytest.importorskip("loralib")
    layer, merged = stood_still(lambda: loralib.Linear(16, 8, r=2, fan_in_fan_out=True, merge_weights=False))
    loralib.mark_only_lora_as_trainable(layer)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    x = torch.randn(3, 16)
    check(layer, parameters, {layer.weight: merged.T}, lambda: layer(x))


def test_loralib_merges_in_the_middle_of_a_step() -> None:
    loralib = pytest.importorskip("loralib")
    for layer, x in (
        (loralib.Linear(16, 8, r=2), torch.randn(3, 16)),
        (loralib.MergedLinear(16, 24, r=2, enable_lora=[True, False, True]), torch.randn(3, 16)),
        (loralib.Embedding(10, 6, r=2), torch.arange(4)),
        (loralib.Conv2d(3, 8, 3, r=2), torch.randn(2, 3, 6, 6)),
    ):
        loralib.mark_only_lora_as_trainable(layer)
        parameters = shake(p for p in layer.parameters() if p.requires_grad)
        clean = copy.deepcopy(layer)
        base = torch.optim.SGD(parameters, lr=0.0)
        optimizer = FlatLoRAOptimizer(base, layer, sigma=SIGMA, schedule="constant")
        noisy = layer(x)
        assert not torch.equal(noisy, clean(x))
        layer.eval()
        clean.eval()
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), clean.parameters(), strict=True))
        layer.train()
        clean.train()
        noisy.sum().backward()
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), clean.parameters(), strict=True))


@pytest.mark.parametrize("groups", [4, 2])
def test_litgpt(groups: int) -> None:
    lora = pytest.importorskip("litgpt.lora")
    config = lora.Config(
        n_layer=1,
        n_head=4,
        n_query_groups=groups,
        n_embd=16,
        block_size=8,
        vocab_size=32,
        padded_vocab_size=32,
        lora_r=2,
        lora_alpha=4,
        lora_query=True,
        lora_value=True,
        lora_projection=True,
        lora_mlp=True,
    )
    model = lora.GPT(config)
    parameters = only(model, "lora_")
    merged = copy.deepcopy(model)
    lora.merge_lora_weights(merged)
    names = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    weights = {
        model.get_submodule(name).linear.weight: merged.get_submodule(name).linear.weight.detach()
        for name in names
    }
    tokens = torch.randint(0, 32, (2, 6))
    check(model, parameters, weights, lambda: model(tokens))


@pytest.mark.parametrize("dora", [False, True])
def test_torchtune(dora: bool) -> None:
    peft = pytest.importorskip("torchtune.modules.peft")
    layer = (peft.DoRALinear if dora else peft.LoRALinear)(64, 32, rank=4, alpha=8.0)
    parameters = only(layer, "lora_")
    if dora:
        layer.initialize_dora_magnitude()
    merged = (layer.weight + 2.0 * layer.lora_b.weight @ layer.lora_a.weight).detach()
    x = torch.randn(3, 64)
    model = nn.Sequential(layer)
    check(model, parameters, {layer.weight: merged}, lambda: model(x))
    layer.disabled = True
    base = torch.optim.SGD(parameters, lr=0.0)
    with pytest.raises(ValueError, match="none of its adapters is active"):
        FlatLoRAOptimizer(base, model, sigma=SIGMA, schedule="constant")


def test_torchtune_nf4() -> None:
    peft = pytest.importorskip("torchtune.modules.peft")
    layer = peft.LoRALinear(128, 128, rank=4, alpha=8.0, quantize_base=True)
    parameters = only(layer, "lora_")
    merged = layer.weight.get_original_weight() + 2.0 * layer.lora_b.weight @ layer.lora_a.weight
    model = nn.Sequential(layer)
    base = torch.optim.SGD(parameters, lr=0.0)
    optimizer = FlatLoRAOptimizer(base, model, sigma=SIGMA, schedule="constant", noise="gaussian")
    eye = torch.eye(128)
    with torch.no_grad():
        clean = layer.forward(eye)
        with optimizer.perturbed():
            noise = (layer.forward(eye) - clean).T
    expected = SIGMA * merged.detach().norm(dim=1) / 128**0.5
    # 128 squares of a Gaussian: 6 % standard error.
    assert (noise.square().mean(1).sqrt() / expected - 1).abs().max() < 0.3
    model(eye).square().mean().backward()
    assert all(p.grad is not None for p in parameters)
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(model.eval()(eye), clean)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 8, 3), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.conv(x)).mean((2, 3)))


def lycoris_on(model: nn.Module, algorithm: str, **options: Any) -> nn.Module:
    lycoris = pytest.importorskip("lycoris")
    lycoris.LycorisNetwork.apply_preset(
        {"enable_conv": True, "target_module": ["Linear", "Linear4bit", "Conv2d"]}
    )
    network = lycoris.create_lycoris(
        model, 1.0, linear_dim=2, linear_alpha=1.0, algo=algorithm, conv_dim=2, **options
    )
    network.apply_to()
    return network


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
def test_lycoris(algorithm: str) -> None:
    model = Net().requires_grad_(False)
    network = lycoris_on(model, algorithm)
    parameters = shake(network.parameters())
    x = torch.randn(2, 4, 6, 6)
    probes = {model.conv: torch.randn(1, 4, 3, 3), model.fc: torch.eye(8)}
    weights = {}
    for layer in probes:  # by what the layer answers to a basis
        numel = layer.weight[0].numel()
        basis = torch.eye(numel).view(numel, *([4, 3, 3] if layer is model.conv else [8]))
        zero = torch.zeros_like(basis[:1])
        with torch.no_grad():
            answer = (layer(basis) - layer(zero)).flatten(1)
        weights[layer.weight] = answer.T.reshape(layer.weight.shape)
    check(model, parameters, weights, lambda: model(x))


REFUSED = {
    "boft": "Butterfly",
    "diag-oft": "DiagOFT",
    "dylora": "DyLora",
    "full": "Full",
    "glora": "GLoRA",
    "ia3": "IA3",
    "tlora": "TLora",
}


@pytest.mark.parametrize("algorithm", REFUSED)
def test_lycoris_refused(algorithm: str) -> None:
    model = Net().requires_grad_(False)
    network = lycoris_on(model, algorithm, block_size=1)
    base = torch.optim.SGD(network.parameters(), lr=0.1)
    message = f"fc: {REFUSED[algorithm]}.* adds no product that we know; LoRA, LoCon, LoHa and LoKr do"
    with pytest.raises(ValueError, match=message):
        FlatLoRAOptimizer(base, model, sigma=SIGMA, schedule="constant")
    with pytest.raises(ValueError, match="LycorisNetwork adapts the layers of another model"):
        FlatLoRAOptimizer(base, network, sigma=SIGMA, schedule="constant")


def test_lycoris_on_a_quantized_base() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
    model = nn.Sequential(layer).requires_grad_(False)
    network = lycoris_on(model, "lora", bypass_mode=True)
    parameters = shake(network.parameters())
    base = torch.optim.SGD(parameters, lr=0.0)
    optimizer = FlatLoRAOptimizer(base, model, sigma=SIGMA, schedule="constant")
    x = torch.randn(4, 64)
    with torch.no_grad():
        clean = model(x)
    noisy = model(x)
    assert 0.02 < float((noisy - clean).norm() / clean.norm()) < 0.3
    noisy.square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in parameters)
    optimizer.step()


def adapterhub(model: nn.Module, **options: Any) -> nn.Module:
    adapters = pytest.importorskip("adapters")
    adapters.init(model)
    model.add_adapter("x", config=adapters.LoRAConfig(r=2, alpha=4, **options))
    model.train_adapter("x")
    shake(p for n, p in model.named_parameters() if "loras.x" in n)
    return model.train()


@pytest.mark.parametrize("fused", [False, True])
def test_adapterhub(fused: bool) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("adapters")
    if fused:
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 32, "n_positions": 16}
        dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropouts))
    else:
        config = transformers.BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model = transformers.BertForSequenceClassification(config)
    model = adapterhub(model, intermediate_lora=not fused)
    parameters = [p for n, p in model.named_parameters() if p.requires_grad and "loras" in n]
    merged = copy.deepcopy(model)
    merged.merge_adapter("x")
    names = [name for name, module in model.named_modules() if len(getattr(module, "loras", ()))]
    weights = {}
    for name in names:
        layer, whole = model.get_submodule(name), merged.get_submodule(name).weight.detach()
        weights[layer.weight] = whole.T if layer.fan_in_fan_out else whole
    tokens = torch.randint(0, 32, (2, 6))
    check(model, parameters, weights, lambda: model(input_ids=tokens).logits)


def bert_with(*names: str) -> Any:
    """With a LoRA of each name."""
    adapters = pytest.importorskip("adapters")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = transformers.BertModel(transformers.BertConfig(**sizes, **dropouts, vocab_size=32))
    adapters.init(model)
    for name in names:
        model.add_adapter(name, config=adapters.LoRAConfig(r=2, alpha=4))
    return model


def test_average_of_adapterhub() -> None:
    model = bert_with("x", "y")
    from adapters.composition import Average

    model.train_adapter(Average("x", "y", weights=[0.75, 0.25]))
    parameters = shake(p for n, p in model.named_parameters() if "loras" in n)
    layers = [layer for layer in model.modules() if len(getattr(layer, "loras", ()))]
    weights, eye = {}, torch.eye(16)
    for layer in layers:  # by what the layer answers to a basis
        with torch.no_grad():
            weights[layer.weight] = (layer(eye[None]) - layer(torch.zeros(1, 1, 16)))[0].T
    tokens = torch.randint(0, 32, (2, 6))
    check(model, parameters, weights, lambda: model(input_ids=tokens)[0])


@pytest.mark.parametrize("composition", ["Stack", "Parallel", "BatchSplit"])
def test_compositions_of_adapterhub_without_a_merged_weight(composition: str) -> None:
    model = bert_with("x", "y")
    import adapters.composition

    options = {"batch_sizes": [1, 1]} if composition == "BatchSplit" else {}
    model.train_adapter(getattr(adapters.composition, composition)("x", "y", **options))
    parameters = [p for n, p in model.named_parameters() if "loras" in n]
    with pytest.raises(ValueError, match=rf"{composition}\[x, y\] of AdapterHub composes .* activate one"):
        FlatLoRAOptimizer(torch.optim.SGD(parameters, lr=0.1), model, sigma=SIGMA, schedule="constant")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("IA3Config", "IA3 of AdapterHub adds no product B @ A"),
        ("VeraConfig", "Vera of AdapterHub adds no product B @ A"),
        ("LoRAConfig", "its LoRA is gated, .* build it without `use_gating`"),
    ],
)
def test_adapterhub_refused(config: str, message: str) -> None:
    model = bert_with()
    import adapters

    options = {"use_gating": True} if config == "LoRAConfig" else {}
    model.add_adapter("x", config=getattr(adapters, config)(**options))
    model.train_adapter("x")
    parameters = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=message):
        FlatLoRAOptimizer(torch.optim.SGD(parameters, lr=0.1), model, sigma=SIGMA, schedule="constant")


class LoRAqkv(nn.Module):
    """LoRA on the q and v slices of a ViT's fused projection, as SAMed has it around SAM's, too."""

    def __init__(self, qkv: nn.Linear, rank: int) -> None:
        super().__init__()
        dim = qkv.in_features
        self.qkv = qkv
        self.linear_a_q, self.linear_a_v = (nn.Linear(dim, rank, bias=False) for _ in "qv")
        self.linear_b_q, self.linear_b_v = (nn.Linear(rank, dim, bias=False) for _ in "qv")
        parts = ["linear_a_q", "linear_a_v", "linear_b_q", "linear_b_v"]
        register(self, weight="qkv.weight", delta="product", parameters=parts)

    def product(self) -> Tensor:
        q, v = (b.weight @ a.weight for a, b in self.pairs())
        return torch.cat([q, torch.zeros_like(q), v])

    def pairs(self) -> tuple[tuple[nn.Linear, nn.Linear], ...]:
        return (self.linear_a_q, self.linear_b_q), (self.linear_a_v, self.linear_b_v)

    def forward(self, x: Tensor) -> Tensor:
        q, v = (b(a(x)) for a, b in self.pairs())
        qkv = self.qkv(x).clone()
        qkv[..., : q.shape[-1]] += q
        qkv[..., -v.shape[-1] :] += v
        return qkv


def test_a_vit_of_timm() -> None:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.models.vision_transformer.VisionTransformer(**sizes).requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv = LoRAqkv(block.attn.qkv, rank=2)
    parameters = shake(p for p in model.parameters() if p.requires_grad)
    assert len(parameters) == 8
    weights, eye = {}, torch.eye(24)
    for block in model.blocks:
        with torch.no_grad():
            layer = block.attn.qkv
            weights[layer.qkv.weight] = (layer(eye) - layer(torch.zeros(1, 24))).T
    x = torch.randn(2, 3, 16, 16)
    check(model, parameters, weights, lambda: model(x))


def test_keras() -> None:
    keras = pytest.importorskip("keras")
    inputs = keras.Input((16,))
    dense = keras.layers.Dense(8)
    model = keras.Model(inputs, dense(inputs))
    dense.enable_lora(2, lora_alpha=4)
    parameters = shake(variable.value for variable in (dense.lora_kernel_a, dense.lora_kernel_b))
    base = torch.optim.SGD(parameters, lr=0.1)
    with pytest.raises(ValueError, match=r"Keras keeps its layers .* `nn.ModuleList"):
        FlatLoRAOptimizer(base, model, sigma=SIGMA, schedule="constant")
    layers = nn.ModuleList([dense])
    optimizer = FlatLoRAOptimizer(base, layers, sigma=SIGMA, schedule="constant", auto=False)
    kernel, x = dense._kernel.value, torch.randn(4, 16)
    clean = kernel.detach().clone()
    merged = dense.kernel.detach().clone()
    with optimizer.perturbed():
        noise = kernel.detach() - clean
        model(x).square().mean().backward()
    assert torch.equal(kernel, clean)
    (drawn,) = optimizer._noises
    torch.testing.assert_close(drawn.scales, SIGMA * merged.norm(dim=0) / 4, rtol=0.01, atol=0)
    assert noise.any()
    optimizer.step()


def test_keras_fit_with_a_train_step_of_ones_own() -> None:
    keras = pytest.importorskip("keras")

    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.top = keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)

        def call(self, x: Any) -> Any:
            return self.top(self.hidden(x))

        def train_step(self, data: Any) -> dict[str, Any]:
            x, y = data
            with optimizer.perturbed():
                noisy.extend(
                    not torch.equal(kernel, frozen) for kernel, frozen in zip(kernels, clean, strict=True)
                )
                loss = self.compute_loss(x, y, self(x, training=True))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
            return {"loss": loss}

    x, y = torch.randn(32, 6), torch.randn(32, 2)
    model, noisy, losses = Model(), [], []
    model(x)
    for layer in (model.hidden, model.top):
        layer.enable_lora(2)
    model.compile(loss="mse")
    layers = nn.ModuleList(
        [layer for layer in model._flatten_layers() if getattr(layer, "lora_enabled", False)]
    )
    kernels = [layer._kernel.value for layer in layers]
    clean = [kernel.detach().clone() for kernel in kernels]
    base = torch.optim.AdamW([variable.value for variable in model.trainable_variables], lr=1e-2)
    optimizer = FlatLoRAOptimizer(base, layers, sigma=SIGMA, schedule="constant", auto=False)
    model.fit(x.numpy(), y.numpy(), epochs=10, batch_size=8, verbose=0)
    assert len(noisy) == 2 * 40
    assert all(noisy)
    assert optimizer.step_count == 40
    assert sum(losses[-4:]) < sum(losses[:4])
    assert all(torch.equal(kernel, frozen) for kernel, frozen in zip(kernels, clean, strict=True))


def test_keras_around_a_torch_module() -> None:
    keras = pytest.importorskip("keras")
    loralib = pytest.importorskip("loralib")
    inner = nn.Sequential(loralib.Linear(16, 8, r=2, merge_weights=False))
    loralib.mark_only_lora_as_trainable(inner)
    parameters = shake(p for p in inner.parameters() if p.requires_grad)
    wrapped = keras.layers.TorchModuleWrapper(inner)
    optimizer = FlatLoRAOptimizer(
        torch.optim.SGD(parameters, lr=0.0), inner, sigma=SIGMA, schedule="constant", auto=False
    )
    x, clean = torch.randn(4, 16), inner[0].weight.detach().clone()
    quiet = wrapped(x)
    with optimizer.perturbed():
        noisy = wrapped(x)
        noisy.square().mean().backward()
    assert not torch.equal(noisy, quiet)
    optimizer.step()
    assert torch.equal(inner[0].weight, clean)
