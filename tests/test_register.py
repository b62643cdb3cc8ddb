"""Modules that users describe: what can be said, and that lies are noticed."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer, find_targets, register
from flatlora_optim.perturbation.choice import choose_perturbations
from helpers import (
    NORM_ERROR,
    OwnLoRA,
    changed_weights,
    fingerprint,
    flatlora,
    int_view,
    trainable,
    untouched_rng,
)

SIGMA = 0.2


class FusedQV(nn.Module):
    """LoRA on the q and v slices of a fused projection, as on a timm ViT."""

    def __init__(self, dim: int = 8, rank: int = 2) -> None:
        super().__init__()
        self.dim = dim
        self.qkv = nn.Linear(dim, 3 * dim).requires_grad_(False)
        self.a_q, self.a_v = (nn.Linear(dim, rank, bias=False) for _ in "qv")
        self.b_q, self.b_v = (nn.Linear(rank, dim, bias=False) for _ in "qv")

    def forward(self, x: Tensor) -> Tensor:
        q, v = self.b_q(self.a_q(x)), self.b_v(self.a_v(x))
        return self.qkv(x) + torch.cat([q, torch.zeros_like(q), v], -1)

    def product(self) -> Tensor:
        q, v = (b.weight @ a.weight for a, b in ((self.a_q, self.b_q), (self.a_v, self.b_v)))
        return torch.cat([q, torch.zeros_like(q), v])

    @property
    def down(self) -> Tensor:
        return torch.cat([self.a_q.weight, self.a_v.weight])

    def up(self) -> Tensor:
        b = torch.block_diag(self.b_q.weight, self.b_v.weight)
        return torch.cat([b[: self.dim], torch.zeros_like(b[: self.dim]), b[self.dim :]])


def product_of(module: FusedQV) -> Tensor:
    return module.product()


def factors_of(module: FusedQV) -> tuple[Tensor, Tensor]:
    return module.up(), module.down


DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "a method": {"delta": "product"},
    "a function": {"delta": product_of},
    "a pair": {"delta": factors_of, "parameters": ["a_q", "a_v", "b_q.weight", "b_v.weight"]},
    "a property and a method": {"lora_A": "down", "lora_B": "up"},
}


@pytest.mark.parametrize("parts", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_slices_of_a_fused_projection(parts: dict[str, Any]) -> None:
    module = register(FusedQV(), weight="qkv.weight", **parts)
    (target,) = find_targets(module).targets
    assert {id(p) for p in target.adapter_parameters()} == {id(p) for p in trainable(module)}
    merged = (module.qkv.weight + module.product()).detach()
    clean, before = module.qkv.weight.detach().clone(), fingerprint(module)
    squared, draws = torch.zeros(24), 100
    expected = SIGMA * merged.norm(dim=1) / 8**0.5
    optimizer = flatlora(module, sigma=SIGMA, lr=0.0)
    for _ in range(draws):
        with optimizer.perturbed():
            squared += (module.qkv.weight.detach() - clean).square().mean(1)
        torch.testing.assert_close(optimizer._noises[0].scales, expected, rtol=10 * NORM_ERROR, atol=0)
        optimizer.step()
    assert ((squared / draws).sqrt() / expected - 1).abs().max() < 0.12  # 2.5 % standard error
    module(torch.randn(2, 8)).square().sum().backward()
    assert changed_weights(module, before) == {"qkv.weight"}
    optimizer.step()
    assert not changed_weights(module, before)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert len(find_targets(twin).targets) == 1


class Holder:
    """No module."""

    def __init__(self, layer: nn.Module) -> None:
        self.layers = [layer]
        self.strength = 0.5


class Scattered(nn.Module):
    """Parts in lists, dicts and objects that are no modules."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(6, 5).requires_grad_(False)
        self.holder = Holder(layer)
        self.pairs = nn.ModuleDict({"x": nn.ParameterList([torch.randn(2, 6), torch.randn(5, 2)])})

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.pairs["x"]
        return self.holder.layers[0](x) + 0.5 * x @ a.T @ b.T


def test_paths_lead_through_anything() -> None:
    module = register(
        Scattered(),
        weight="holder.layers.0.weight",
        lora_A="pairs.x.0",
        lora_B="pairs.x.1",
        scaling="holder.strength",
    )
    layer = module.holder.layers[0]
    clean = int_view(layer.weight).clone()
    optimizer = flatlora(module)
    module(torch.randn(2, 6)).sum().backward()
    assert not torch.equal(int_view(layer.weight), clean)
    optimizer.step()
    assert torch.equal(int_view(layer.weight), clean)


def test_a_delta_may_be_switched_off() -> None:
    module = FusedQV()
    module.enabled = True
    register(module, weight="qkv.weight", delta=lambda m: m.product() if m.enabled else None)
    before = fingerprint(module)
    optimizer = flatlora(module)
    module.enabled = False
    with optimizer.perturbed():
        assert not changed_weights(module, before)


# ---------------------------------------------------------------------------- lies


def square(**parts: Any) -> nn.Module:
    layer = OwnLoRA(torch.randn(6, 6))
    layer.lora_A = nn.Parameter(torch.randn(6, 6))
    layer.lora_B = nn.Parameter(torch.zeros(6, 6))  # a fresh adapter, which adds nothing yet
    return register(layer, **{"lora_A": "lora_A", "lora_B": "lora_B", "scaling": "scaling", **parts})


def unused_weight() -> nn.Module:
    layer = square()
    layer.other = nn.Parameter(torch.randn(6, 6), requires_grad=False)
    return register(layer, weight="other", lora_A="lora_A", lora_B="lora_B", scaling="scaling")


LIES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a wrong scaling": (lambda: square(scaling=1.0), r"the adapter adds 1\.5 times scaling"),
    "a swapped axis": (lambda: square(transposed=True), r"changes the output by .* the two differ by"),
    "A for B": (lambda: square(lora_A="lora_B", lora_B="lora_A"), r"changes the output by .* differ by"),
    "a transposed A": (
        lambda: square(lora_A=None, lora_B=None, delta=lambda m: 1.5 * m.lora_B @ m.lora_A.T),
        r"changes the output by .* differ by",
    ),
    "another weight": (unused_weight, r"merged into the weight by 0; "),
}


@pytest.mark.parametrize(("make", "message"), LIES.values(), ids=LIES)
def test_lies_are_errors_with_numbers(make: Callable[[], nn.Module], message: str) -> None:
    layer = make()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    versions = {name: p._version for name, p in layer.named_parameters()}
    with untouched_rng(), pytest.raises(ValueError, match=message):
        FlatLoRAOptimizer(
            torch.optim.SGD([layer.lora_A, layer.lora_B]), layer, sigma=0.1, schedule="constant"
        )
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter._version == versions[name]
        assert parameter.grad is None
    assert layer.training


class Block(nn.Module):
    """More than a layer: what it computes is not linear, and it has dropout."""

    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(0.5)
        self.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(6, 2))
        register(self, weight="fc.weight", lora_A="a", lora_B="b", **more)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + torch.tanh(self.fc(x) + self.drop(x) @ self.a.T @ self.b.T))


class Unusual(Block):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x) + y


class InTraining(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_truth_is_believed_also_of_what_is_not_linear(dtype: torch.dtype) -> None:
    block = Block().to(dtype)
    with untouched_rng():
        assert flatlora(block).targets
    with pytest.raises(ValueError, match=r"0\.5 times|differ by"):
        flatlora(Block(scaling=2.0).to(dtype))


@pytest.mark.parametrize("kind", [Unusual, InTraining])
def test_what_can_not_be_tried_is_believed(kind: type[nn.Module]) -> None:
    assert flatlora(kind(scaling=2.0)).targets


@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_what_has_a_packed_layer_inside_is_believed(scaling: float) -> None:
    block = Block()
    block.fc = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32).to("cpu").requires_grad_(False)
    block.norm = nn.LayerNorm(64)
    block.a, block.b = nn.Parameter(torch.ones(2, 64)), nn.Parameter(torch.ones(64, 2))
    register(block, weight="fc", lora_A="a", lora_B="b", scaling=scaling)
    assert flatlora(block).targets
    layer = TwoLinears(block.fc)
    layer.p, layer.q = nn.Linear(64, 3, bias=False), nn.Linear(3, 64, bias=False)
    register(layer, weight="fc", lora_A="p.weight", lora_B="q.weight", scaling=scaling)
    if scaling == 1:
        assert flatlora(layer).targets
    else:
        with pytest.raises(ValueError, match=r"the adapter adds 0\.5 times"):
            flatlora(layer)


def test_the_probe_needs_no_mode_and_leaves_merging_layers_alone() -> None:
    layer = square()
    layer.train = lambda mode=True: pytest.fail("eval() may merge")  # type: ignore[method-assign]
    assert flatlora(layer).targets


# ---------------------------------------------------------------------------- what nobody recognizes


class TwoLinears(nn.Module):
    """LoRA with names that say nothing."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.fc = inner or nn.Linear(12, 10).requires_grad_(False)
        self.p, self.q = nn.Linear(12, 3, bias=False), nn.Linear(3, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.q(self.p(x))


class NamedLoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.zeros(4, dtype=torch.int8))
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 12)), nn.Parameter(torch.zeros(10, 2))


def unrecognized_in(model: nn.Module) -> dict[str, str]:
    optimized = {id(p) for p in trainable(model)}
    return choose_perturbations(model, optimized, "auto", "exact", None)[1].unrecognized


def test_what_looks_like_lora_and_is_of_no_known_type_is_named() -> None:
    known = OwnLoRA(torch.randn(6, 6))
    model = nn.ModuleDict(
        {
            "known": known,
            "silent": TwoLinears(),
            "named": NamedLoRA(),
            "fused": FusedQV(),
            "head": nn.Linear(6, 3),
            "mlp": nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)),
        }
    )
    found = unrecognized_in(model)
    assert set(found) == {"silent", "named", "fused"}
    assert "shapes of (3, 12) and (10, 3), beside (10, 12)" in found["silent"]
    assert "lora_A is named like an adapter's" in found["named"]
    assert all("describe it by `flatlora_optim.register`" in reason for reason in found.values())


def test_the_lines_in_the_docs_run() -> None:
    text = (Path(__file__).parent.parent / "docs/adapters.md").read_text(encoding="utf-8")
    *_, example = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    space: dict[str, Any] = {}
    exec(example, space)
    layer, optimizer = space["layer"], space["optimizer"]
    before = fingerprint(layer)
    layer(torch.randn(2, 8)).sum().backward()
    assert changed_weights(layer, before) == {"qkv.weight"}
    optimizer.step()
    assert not changed_weights(layer, before)


def test_nothing_is_named_where_all_is_known() -> None:
    from helpers import lora_lm, lora_mlp

    for model in (lora_mlp(bias="all"), lora_mlp(use_dora=True), lora_lm()):
        assert unrecognized_in(model) == {}
