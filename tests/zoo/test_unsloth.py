"""unsloth itself, which patches much of its process: a run of its own (``make test-zoo``).

On a CPU its fused kernels for attention run as they are. That of the MLP calls Triton for one elementwise
operation and its backward, which stand here in torch.
"""

from __future__ import annotations

import types
from functools import partial
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from unsloth.kernels import fast_lora
from unsloth.models.llama import FastLlamaModel
from unsloth_zoo.tiled_mlp import patch_mlp

from flatlora_optim import FlatLoRAOptimizer

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o"}


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def loop() -> None: ...

    loop.__name__ = "_fast_inner_training_loop"  # unsloth asks for it, and this is no training
    monkeypatch.setattr(Trainer, "_inner_training_loop", loop)
    monkeypatch.setattr(fast_lora, "swiglu_fg_kernel", lambda e, g: F.silu(e) * g)
    monkeypatch.setattr(fast_lora, "swiglu_DWf_DW_dfg_kernel", backward_of_swiglu)


def backward_of_swiglu(d: Tensor, e: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate = torch.sigmoid(e)
    return e * gate * g, d * e * gate, d * g * gate * (1 + e * (1 - gate))


def llama(quantized: bool = False, tiled: bool = False, **options: Any) -> Any:
    """A tiny one in bfloat16, with PEFT's LoRA on each projection, and patched by unsloth."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, use_cache=False)).bfloat16()
    for name, layer in list(model.named_modules()) if quantized else ():
        if name.endswith(tuple(NAMES)):
            packed = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
            packed.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, packed.to("cpu"))
    options = {"r": 4, "target_modules": NAMES, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(model, LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        module.max_seq_length = 32
    if tiled:
        patch_mlp(decoder_of(model).mlp)
    FastLlamaModel.patch_peft_model(model, use_gradient_checkpointing=False)
    return model.train()


def decoder_of(model: Any) -> Any:
    return model.base_model.model.model.layers[0]


def optimizer_for(model: nn.Module, **options: Any) -> FlatLoRAOptimizer:
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    return FlatLoRAOptimizer(base, model, sigma=0.3, schedule="constant", **options)


def fused(layer: Any, x: Tensor) -> list[Tensor]:
    """What unsloth's kernels make of x; they may write to it."""
    attention = layer.self_attn
    q, k, v = attention.apply_qkv(attention, x.clone(), inplace=False)
    return [q, k, v, attention.apply_o(attention, x.clone()), layer.mlp(x.clone())]


def by_peft(layer: Any, x: Tensor) -> list[Tensor]:
    attention, mlp = layer.self_attn, layer.mlp
    outputs = [getattr(attention, name)(x) for name in NAMES[:4]]
    return [*outputs, mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))]


def test_kernels_see_the_noise_in_dense_weights() -> None:
    model = llama()
    layer = decoder_of(model)
    assert layer.self_attn.apply_qkv is fast_lora.apply_lora_qkv
    assert layer.self_attn.apply_o is fast_lora.apply_lora_o
    assert layer.mlp.forward.__func__ is fast_lora.apply_lora_mlp_swiglu
    optimizer = optimizer_for(model)
    assert len(optimizer.targets) == 7
    x = torch.randn(1, 5, 64).bfloat16()
    before = {target.name: target.weight.tensor.clone() for target in optimizer.targets}
    with torch.no_grad():
        clean = fused(layer, x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with optimizer.perturbed():
        gradients = []
        for make in (fused, by_peft):
            for output, quiet in zip(outputs := make(layer, x), clean, strict=True):
                assert 0.15 < float((output - quiet).detach().norm() / quiet.norm()) < 0.8
            loss = sum(output.float().square().sum() for output in outputs)
            gradients.append(torch.autograd.grad(loss, parameters))
        for kernel, peft in zip(fused(layer, x), by_peft(layer, x), strict=True):
            assert float((kernel - peft).detach().norm() / peft.norm()) < 0.02  # bfloat16
    for kernel, peft in zip(*gradients, strict=True):
        assert float((kernel - peft).norm() / peft.norm()) < 0.05
    optimizer.step()
    assert all(torch.equal(target.weight.tensor, before[target.name]) for target in optimizer.targets)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(fused(layer, x), clean, strict=True))


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("options", [{}, {"noise": "low_rank"}])
def test_kernels_that_pass_the_noise_by_are_refused(tiled: bool, options: dict[str, Any]) -> None:
    """Over packed weights, and with noise in the forward."""
    model = llama(quantized=not options, tiled=tiled)
    with pytest.raises(ValueError, match="no LoRA module to perturb") as raised:
        optimizer_for(model, **options)
    for name in NAMES:
        kernel = f"apply_lora_{FUSED.get(name, 'mlp_swiglu')}"
        assert f"{name}: a fused kernel ({kernel}) of " in str(raised.value)


def test_a_partial_function_is_no_disguise() -> None:
    """As unsloth has it for Cohere's models."""
    model = llama(quantized=True)
    mlp = decoder_of(model).mlp
    mlp.forward = types.MethodType(partial(fast_lora.apply_lora_mlp_swiglu, inplace=False), mlp)
    with pytest.raises(ValueError, match=r"down_proj: a fused kernel \(apply_lora_mlp_swiglu\)"):
        optimizer_for(model)


def test_without_its_kernels_packed_weights_are_perturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """UNSLOTH_FUSED_LORA_DROPOUT=0 leaves them out where there is dropout."""
    monkeypatch.setattr(fast_lora, "FUSED_LORA_DROPOUT", False)
    model = llama(quantized=True, lora_dropout=1e-6)
    layer = decoder_of(model)
    assert "apply_qkv" not in layer.self_attn.__dict__
    assert "forward" not in layer.mlp.__dict__
    optimizer = optimizer_for(model)
    assert len(optimizer.targets) == 7
    x = torch.randn(1, 5, 64).bfloat16()
    with torch.no_grad():
        clean = by_peft(layer, x)
    with optimizer.perturbed():
        for output, quiet in zip(by_peft(layer, x), clean, strict=True):
            assert 0.15 < float((output - quiet).detach().norm() / quiet.norm()) < 0.8
    optimizer.step()
