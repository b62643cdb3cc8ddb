"""PEFT's methods, all of them: found, or refused by name, or none that touches a weight."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftMixedModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer
from helpers import NORM_ERROR, changed_weights, fingerprint, flatlora, mlp_batch, trainable

FOUND: dict[str, dict[str, Any]] = {
    "LORA": {"r": 2},
    "ADALORA": {"init_r": 3, "target_r": 2, "total_step": 100},
    "ADAMSS": {"r": 8, "num_subspaces": 2},
    "C3A": {"block_size": 4},
    "DELORA": {},
    "FOURIERFT": {"n_frequency": 20},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "MISS": {"r": 4},
    "OSF": {"effective_rank": 8},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "UNILORA": {},
    "VBLORA": {"r": 2, "vector_length": 4, "num_vectors": 8, "topk": 2},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 20},
}
"""Those that add to the weight, with options that fit the net below."""

REFUSED: dict[str, dict[str, Any]] = {
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "DEFT": {"r": 2},
    "FROD": {},
    "GLORA": {"r": 2},
    "HIRA": {},
    "HRA": {},
    "IA3": {"feedforward_modules": []},
    "LILY": {"r": 2},
    "LN_TUNING": {},
    "OFT": {"oft_block_size": 4},
    "PEANUT": {"r": 2},
    "POLY": {"r": 2},
    "ROAD": {"group_size": 4},
    "TRAINABLE_TOKENS": {"token_indices": [0, 1]},
}
"""Those that change the weight otherwise, or the activations."""

WITHOUT_LAYERS = {
    "ADAPTION_PROMPT",
    "CARTRIDGE",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "SHADOW",
}
"""Those that put tokens or networks of their own beside the weights: there is no layer to name."""

WITH_OTHERS = {"XLORA"}
"""Those that weigh adapters of another kind."""


class Net(nn.Module):
    """Wide enough for all methods; its rows differ in norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(5, 16), nn.LayerNorm(16)
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.fc2.weight.mul_(torch.linspace(0.2, 3, 16)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def with_method(name: str, options: dict[str, Any], layer: str = "fc2") -> nn.Module:
    if name not in peft.PeftType.__members__:
        pytest.skip(f"this PEFT has no {name}")
    torch.manual_seed(0)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[name]]
    model = peft.get_peft_model(Net(), config(target_modules=[layer], **options))
    with torch.no_grad():
        for parameter in trainable(model):
            parameter += torch.randn_like(parameter) * 0.2
    return model


def test_each_method_of_this_release_is_in_one_of_the_lists() -> None:
    lists = [*FOUND, *REFUSED, *WITHOUT_LAYERS, *WITH_OTHERS]
    assert len(lists) == len(set(lists))
    new = set(peft.PeftType.__members__) - set(lists)
    assert not new, (
        f"PEFT has learned {new}. What adds `get_delta_weight` to the weight needs a marker in PeftAdditive"
    )


@pytest.mark.parametrize("name", FOUND)
def test_methods_that_add_to_the_weight(name: str) -> None:
    model = with_method(name, FOUND[name])
    merged = copy.deepcopy(model).merge_and_unload().fc2.weight.detach()
    layer = model.base_model.model.fc2.base_layer
    clean, before = layer.weight.detach().clone(), fingerprint(model)
    assert not torch.allclose(merged, clean, rtol=1e-3)
    expected = 0.1 * merged.norm(dim=1) / 4
    squared, draws = torch.zeros(16), 100
    optimizer = flatlora(model, sigma=0.1, lr=0.0)
    assert len(optimizer.targets) == 1
    for _ in range(draws):
        with optimizer.perturbed():
            squared += (layer.weight.detach() - clean).square().mean(1)
        (noise,) = optimizer._noises
        torch.testing.assert_close(noise.scales, expected, rtol=10 * NORM_ERROR, atol=0)
        optimizer.step()
    # 1600 squares of a Gaussian: 1.8 % standard error.
    assert ((squared / draws).sqrt() / expected - 1).abs().max() < 0.08
    x = mlp_batch()[0]
    with torch.no_grad():
        quiet = model.eval()(x)
    noisy = model.train()(x)
    noisy.square().mean().backward()
    assert changed_weights(model, before) == {"base_model.model.fc2.base_layer.weight"}
    assert torch.equal(model.state_dict()["base_model.model.fc2.base_layer.weight"], clean)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), quiet)
    optimizer.step()
    assert not changed_weights(model, before)


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_do_otherwise_are_refused_by_name(name: str) -> None:
    layer = {"LN_TUNING": "norm", "TRAINABLE_TOKENS": "tokens"}.get(name, "fc2")
    with pytest.raises(ValueError, match=f"{layer}: {name} adds no product to its weight"):
        flatlora(with_method(name, REFUSED[name], layer))


def test_miss_with_bat_multiplies() -> None:
    with pytest.raises(ValueError, match="fc2: MISS with 'bat' multiplies the weight"):
        flatlora(with_method("MISS", {"r": 4, "init_weights": "bat"}))


PROMPTS: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 8},
    "SHADOW": {"r": 2},
}


@pytest.mark.parametrize("name", sorted(WITHOUT_LAYERS))
def test_methods_without_layers_have_nothing_to_perturb(name: str) -> None:
    model = peft.get_peft_model(llama(), config_of(name, task_type="CAUSAL_LM", **PROMPTS[name]))
    with pytest.raises(ValueError, match="no LoRA module to perturb in PeftModelForCausalLM"):
        flatlora(model)


def test_x_lora_has_no_single_merged_weight(tmp_path: Any) -> None:
    peft.get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    options = {"hidden_size": 8, "adapters": {"one": str(tmp_path)}, "use_trainable_adapters": True}
    model = peft.get_peft_model(llama(), config_of("XLORA", task_type="CAUSAL_LM", **options))
    with pytest.raises(ValueError, match="q_proj: XLoraLinearLayer computes in place of PEFT's own forward"):
        flatlora(model)


def config_of(name: str, **options: Any) -> Any:
    if name not in peft.PeftType.__members__:
        pytest.skip(f"this PEFT has no {name}")
    return PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[name]](**options)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, use_cache=False, **sizes))


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
