"""Whole training steps of SmolLM2-135M: time per step and peak memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from layers import RANK, adapted_weights, flatlora, frozen_bytes, trainable, twin
from measure import add_untracked, interleave, peak_memory
from transcription import Transcription

PLAIN = "plain LoRA"
SAM = "LoRA with SAM"
TRANSCRIPTION = "transcription"
OURS: dict[str, dict[str, Any]] = {
    "exact, gaussian": {},
    "exact, table": {"noise": "table"},
    "snapshot, table": {"restore": "snapshot", "noise": "table"},
    "subtract, gaussian": {"restore": "subtract"},
    "virtual, gaussian": {"mode": "virtual", "noise": "gaussian"},
    "virtual, table": {"mode": "virtual", "noise": "table"},
    "virtual, low rank": {"mode": "virtual", "noise": "low_rank"},
}
NF4 = "nf4"
_FOR_NF4 = (PLAIN, "virtual, gaussian", "virtual, low rank")
"""What runs on quantized weights."""
_SAM_RADIUS = 0.05

Gradient = Callable[[], None]
Step = Callable[[Gradient], None]


def run(quick: bool) -> list[dict[str, Any]]:
    base = _tiny() if quick else smollm2()
    name = "2 layers of SmolLM2-135M" if quick else "SmolLM2-135M"
    half = with_lora(copy.deepcopy(base).to(torch.bfloat16))
    packed = with_lora(in_nf4(copy.deepcopy(base)))
    model = with_lora(base)
    # (tokens, rounds): bf16 for its memory alone, which depends little on the number of tokens.
    plan = [(model, 32, 2), (half, 32, 0), (packed, 32, 2)]
    if not quick:
        plan = [(model, 256, 4), (model, 1024, 4), (half, 16, 0), (packed, 256, 8), (packed, 1024, 4)]
    return [{"model": name, **_measure(m, tokens, rounds)} for m, tokens, rounds in plan]


def _measure(model: nn.Module, tokens: int, rounds: int) -> dict[str, Any]:
    is_packed = any(hasattr(p, "quant_state") for p in model.parameters())
    frozen = next(p for p in model.parameters() if not p.requires_grad)
    dtype = NF4 if is_packed else str(frozen.dtype).removeprefix("torch.")
    print(f"  {tokens} tokens, {dtype}", flush=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 40000, (1, tokens), generator=generator)
    steps: dict[str, Callable[[], None]] = {}
    memory: dict[str, int] = {}
    for variant, build in VARIANTS.items():
        if is_packed and variant not in _FOR_NF4:
            continue
        own = copy.deepcopy(model) if is_packed else twin(model)

        def first_step(
            variant: str = variant, build: Callable[[nn.Module], Step] = build, own: nn.Module = own
        ) -> None:
            step = build(own)
            steps[variant] = lambda: step(lambda: own(input_ids=ids, labels=ids).loss.backward())
            steps[variant]()

        memory[variant] = peak_memory(first_step, "cpu")
    return {
        "tokens": tokens,
        "dtype": dtype,
        "bytes": frozen_bytes(model),
        "largest": max(a.weight.numel() * a.weight.element_size() for a in adapted_weights(model)),
        "memory": memory,
        "seconds": interleave(steps, rounds, "cpu") if rounds else {},
    }


# ---------------------------------------------------------------------- one step of each


def plain(model: nn.Module) -> Step:
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-4)

    def step(gradient: Gradient) -> None:
        gradient()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(**options: Any) -> Callable[[nn.Module], Step]:
    def build(model: nn.Module) -> Step:
        optimizer = flatlora(model, **options)

        def step(gradient: Gradient) -> None:
            with optimizer.perturbed():
                gradient()
                add_untracked(optimizer)
            optimizer.step()
            optimizer.zero_grad()

        return step

    return build


def transcription(model: nn.Module) -> Step:
    finish, published = plain(model), Transcription(model)

    def step(gradient: Gradient) -> None:
        def perturbed() -> None:
            published.perturb()
            gradient()
            published.restore()

        finish(perturbed)

    return step


def sam(model: nn.Module) -> Step:
    """SAM on A and B (Foret et al. 2021): the gradient at the worst point within a radius."""
    parameters, finish = trainable(model), plain(model)

    def step(gradient: Gradient) -> None:
        gradient()
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        ascent: list[Tensor] = []
        with torch.no_grad():
            for p in parameters:
                assert p.grad is not None
                ascent.append(p.grad * (_SAM_RADIUS / norm))
                p.add_(ascent[-1])
                p.grad = None

        def at_the_worst_point() -> None:
            gradient()
            with torch.no_grad():
                for p, e in zip(parameters, ascent, strict=True):
                    p.sub_(e)

        finish(at_the_worst_point)

    return step


VARIANTS: dict[str, Callable[[nn.Module], Step]] = {
    PLAIN: plain,
    **{name: ours(**options) for name, options in OURS.items()},
    TRANSCRIPTION: transcription,
    SAM: sam,
}

# ---------------------------------------------------------------------- the model


def smollm2() -> nn.Module:
    from transformers import AutoModelForCausalLM

    import packages

    path = packages.smollm2()
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model


def in_nf4(model: nn.Module) -> nn.Module:
    """All Linear layers but the output's in 4 bits, computing in float32, as bitsandbytes has them."""
    import bitsandbytes as bnb

    for name, child in list(model.named_children()):
        if not isinstance(child, nn.Linear):
            in_nf4(child)
        elif name != "lm_head":
            layer = bnb.nn.Linear4bit(
                child.in_features, child.out_features, False, compute_dtype=torch.float32, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(
                child.weight.detach(), requires_grad=False, quant_type="nf4", module=layer
            )
            # On some CPUs, it would repack the weights for a kernel without gradients.
            layer.support_avx512bf16_for_cpu = False
            setattr(model, name, layer.to(child.weight.device))
    return model


def _tiny() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=49152))
    return model


def with_lora(base: nn.Module) -> nn.Module:
    """Adapters on all Linear layers of the blocks, with a B that is not zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: nn.Module = get_peft_model(base, config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1e-3)
    return model.train()
