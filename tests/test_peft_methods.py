"""PEFT's other methods: those that add to the weight are perturbed, the others refused by name."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftMixedModel
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer
from helpers import changed_weights, fingerprint, flatlora, mlp_batch, trainable

ADDITIVE: dict[str, dict[str, Any]] = {
    "VeraConfig": {"r": 4},
    "VBLoRAConfig": {"r": 2, "vector_length": 4, "num_vectors": 8, "topk": 2},
    "FourierFTConfig": {"n_frequency": 20},
    "RandLoraConfig": {"r": 4},
    "C3AConfig": {"block_size": 4},
    "WaveFTConfig": {"n_frequency": 20},
    "DeloraConfig": {},
    "GraloraConfig": {"r": 4, "gralora_k": 2},
    "PveraConfig": {"r": 4},
    "ShiraConfig": {"r": 2},
    "UniLoraConfig": {},
    "TinyLoraConfig": {},
    "SupertuningConfig": {},
}
OTHERS: dict[str, dict[str, Any]] = {
    "OFTConfig": {"oft_block_size": 4},
    "BOFTConfig": {"boft_block_size": 4},
    "IA3Config": {"feedforward_modules": []},
    "HRAConfig": {},
    "HiraConfig": {},
}


class Net(nn.Module):
    """Wide enough for all methods; its rows differ in norm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.fc2.weight.mul_(torch.linspace(0.2, 3, 16)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def with_method(name: str, options: dict[str, Any], seed: int = 0) -> nn.Module:
    if not hasattr(peft, name):
        pytest.skip(f"this PEFT has no {name}")
    torch.manual_seed(seed)
    model = peft.get_peft_model(Net(), getattr(peft, name)(target_modules=["fc2"], **options))
    with torch.no_grad():
        for parameter in trainable(model):
            parameter += torch.randn_like(parameter) * 0.2
    return model


@pytest.mark.parametrize("name", ADDITIVE)
def test_methods_that_add_to_the_weight(name: str) -> None:
    model = with_method(name, ADDITIVE[name])
    merged = copy.deepcopy(model).merge_and_unload().fc2.weight.detach()
    layer = model.base_model.model.fc2.base_layer
    clean, before = layer.weight.detach().clone(), fingerprint(model)
    assert not torch.allclose(merged, clean, rtol=1e-3)
    expected = 0.1 * merged.norm(dim=1) / 4
    squared, draws = torch.zeros(16), 100
    optimizer = flatlora(model, sigma=0.1, lr=0.0)
    for _ in range(draws):
        with optimizer.perturbed():
            squared += (layer.weight.detach() - clean).square().mean(1)
        (noise,) = optimizer._noises
        torch.testing.assert_close(noise.scales, expected, rtol=1e-3, atol=1e-6)
        optimizer.step()
    # 1600 squares of a Gaussian: 1.8 % standard error.
    assert ((squared / draws).sqrt() / expected - 1).abs().max() < 0.08
    model(mlp_batch()[0]).square().mean().backward()
    assert changed_weights(model, before) == {"base_model.model.fc2.base_layer.weight"}
    optimizer.step()
    assert not changed_weights(model, before)


@pytest.mark.parametrize("name", OTHERS)
def test_methods_that_multiply_are_refused_by_name(name: str) -> None:
    method = name.removesuffix("Config").upper()
    with pytest.raises(ValueError, match=f"fc2: {method} adds no product to its weight"):
        flatlora(with_method(name, OTHERS[name]))


def test_lora_and_loha_on_one_weight_add_up() -> None:
    torch.manual_seed(0)
    model = PeftMixedModel(Net(), LoraConfig(r=2, target_modules=["fc2"]), "lora")
    model.add_adapter("loha", LoHaConfig(r=2, target_modules=["fc2"]))
    model.set_adapter(["lora", "loha"])
    with torch.no_grad():
        for parameter in trainable(model):
            parameter += torch.randn_like(parameter) * 0.5
    x = mlp_batch()[0]
    plain = copy.deepcopy(model)
    merged = plain.merge_and_unload().fc2.weight.detach()
    optimizer = FlatLoRAOptimizer(torch.optim.SGD(trainable(model)), model, sigma=0.1, schedule="constant")
    before = fingerprint(model)
    model(x).square().mean().backward()
    (noise,) = optimizer._noises
    torch.testing.assert_close(noise.scales, 0.1 * merged.norm(dim=1) / 4, rtol=1e-3, atol=0)
    optimizer.step()
    assert not changed_weights(model, before)
