"""Tiny real models with real adapters, and ways to look at bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer, register
from flatlora_optim.noise import FactoredNoise

NORM_ERROR = 5e-4
"""How exact row norms are in the tests: native kernels round the factors of an adapter to bfloat16."""

INT_VIEWS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MLP(nn.Module):
    """Two Linear layers and no dropout."""

    def __init__(self, inputs: int = 6, hidden: int = 16, outputs: int = 5) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


class ConvNet(nn.Module):
    """Two convolutions, of which one may be grouped, and a Linear head, for images of (3, 6, 6)."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv2(torch.tanh(self.conv1(x))))
        return self.head(x.mean((2, 3)))


class TinyLM(nn.Module):
    """Embedding, a Linear and an output layer, which may share its weight with the embedding."""

    def __init__(self, tied: bool = False, vocabulary: int = 23, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.mix(self.embed(tokens))))


class OwnLoRA(nn.Module):
    """A hand-written LoRA layer in the style of loralib, around any weight of two or more dims."""

    def __init__(self, weight: Tensor, rank: int = 2, scaling: float = 1.5) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.lora_B = nn.Parameter(torch.randn(rows, rank) * 0.02)
        self.scaling = scaling
        register(self, lora_A="lora_A", lora_B="lora_B", scaling="scaling")

    def forward(self, x: Tensor) -> Tensor:
        update = self.scaling * (x @ self.lora_A.T) @ self.lora_B.T
        return F.linear(x, self.weight.flatten(1).to(x.dtype)) + update


def with_lora(
    model: nn.Module, targets: list[str], *, seed: int = 0, dtype: torch.dtype | None = None, **config: Any
) -> nn.Module:
    """Wraps ``model`` with PEFT LoRA whose B is not zero, so that W' differs from W."""
    config = {"r": 2, "lora_alpha": 3, **config}
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, **config))
    randomize_adapters(adapted, seed)
    return adapted if dtype is None else adapted.to(dtype)


def randomize_adapters(model: nn.Module, seed: int = 0, std: float = 0.1) -> None:
    """Gives all adapter parameters values that depend on ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def lora_mlp(dtype: torch.dtype = torch.float32, *, seed: int = 0, **config: Any) -> nn.Module:
    torch.manual_seed(seed)
    return with_lora(MLP(), ["fc1", "fc2"], seed=seed, dtype=dtype, **config)


def lora_convnet(groups: int = 1, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return with_lora(ConvNet(groups), ["conv1", "conv2", "head"], r=4, **config)


def lora_lm(tied: bool = False, targets: tuple[str, ...] = ("embed", "mix"), **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return with_lora(TinyLM(tied), list(targets), **config)


def lora_gpt2(targets: tuple[str, ...] = ("c_attn", "c_proj"), **config: Any) -> nn.Module:
    """A GPT-2 of one block, whose ``Conv1D`` stores its weights transposed; no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 29, "n_positions": 16, "bos_token_id": 0}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, eos_token_id=0))
    return with_lora(model, list(targets), fan_in_fan_out=True, **config)


MLP_WEIGHTS = {"base_model.model.fc1.base_layer.weight", "base_model.model.fc2.base_layer.weight"}
"""The weights of :func:`lora_mlp` that carry noise."""


def mlp_batch(seed: int = 0, dtype: torch.dtype = torch.float32, size: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs and targets for :func:`lora_mlp`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator).to(dtype)
    return x, torch.randint(0, 5, (size,), generator=generator)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x).float(), y)


def clean_output(before: dict[str, Tensor]) -> Tensor:
    """What a fresh :func:`lora_mlp` makes of the first batch."""
    model = lora_mlp()
    assert not changed_weights(model, before)
    return model(mlp_batch()[0]).detach()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def flatlora(
    model: nn.Module, *, lr: float = 0.1, base: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any
) -> FlatLoRAOptimizer:
    """The optimizer under test, with constant noise that is easy to see unless told otherwise."""
    options = {"sigma": 0.1, "schedule": "constant", "seed": 1, **options}
    return FlatLoRAOptimizer(base(trainable(model), lr=lr), model, **options)


def scales_of(optimizer: FlatLoRAOptimizer) -> Tensor:
    """The standard deviation of this step's noise in each row of the first weight.

    Noise of low rank has let go of it, but its weight is clean: drawn anew, it is the same.
    """
    (noise, *_) = optimizer._noises
    if isinstance(noise, FactoredNoise):
        sigmas = [sigma * optimizer._factor for sigma in optimizer._sigmas(optimizer.targets)]
        (noise, *_) = optimizer._weights.draw(noise.key, sigmas)
    return noise.scales


def train(model: nn.Module, optimizer: FlatLoRAOptimizer, steps: range) -> list[float]:
    """Trains :func:`lora_mlp` on the batches of these steps; returns their losses."""
    losses = []
    for step in steps:
        loss = loss_of(model, mlp_batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_closure(model: nn.Module, optimizer: FlatLoRAOptimizer, batch: Any) -> Tensor:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return optimizer.step(closure)


def train_explicit(model: nn.Module, optimizer: FlatLoRAOptimizer, batch: Any) -> Tensor:
    optimizer.zero_grad()
    with optimizer.perturbed():
        loss = loss_of(model, batch)
        loss.backward()
    optimizer.step()
    return loss


def train_automatic(model: nn.Module, optimizer: FlatLoRAOptimizer, batch: Any) -> Tensor:
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


STYLES = [train_closure, train_explicit, train_automatic]


def int_view(tensor: Tensor) -> Tensor:
    """The bit patterns of a floating-point tensor."""
    return tensor.detach().view(INT_VIEWS[tensor.element_size()])


def fingerprint(model: nn.Module) -> dict[str, Tensor]:
    """The bits of every frozen parameter."""
    return {n: int_view(p).clone() for n, p in model.named_parameters() if not p.requires_grad}


def changed_weights(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """The names of the parameters whose bits are no longer those of ``before``."""
    now = {name: int_view(parameter) for name, parameter in model.named_parameters()}
    return {n for n, old in before.items() if now[n].dtype != old.dtype or not torch.equal(now[n], old)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in actual if not torch.equal(actual[name], expected[name])]
    assert not different, f"not bit-identical: {different}"


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Fails if the block draws from any global generator."""
    before = _rng_states()
    yield
    for name, state in _rng_states().items():
        assert state == before[name], f"the global {name} generator was touched"


def _rng_states() -> dict[str, Any]:
    numpy_state = np.random.get_state()
    states = {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state],
        "random": random.getstate(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state().tolist()
    return states


def philox(calls: Tensor, words: tuple[int, int, int, int] = (0, 0, 0, 0), block: int = 0) -> list[Tensor]:
    """The four words of Philox-4x32-10 (Salmon et al. 2011), in 64-bit torch arithmetic.

    Args:
        calls: The first word of the counter.
        words: The two words of the key, and the last two of the counter.
        block: The second word of the counter.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = (calls.long(), *(torch.full_like(calls.long(), word) for word in (block, *words[2:])))
    k0, k1 = words[:2]

    def multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
        # 32 x 32 bits overflow a signed 64-bit integer: multiply in halves of 16.
        low = word * (constant & 0xFFFF)
        high = word * (constant >> 16) + (low >> 16)
        return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)

    for _ in range(10):
        high0, low0 = multiply(c0, 0xD2511F53)
        high2, low2 = multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
