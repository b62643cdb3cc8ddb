"""Experts of a mixture: many matrices in one parameter, adapted by PEFT's ``target_parameters``."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer, LowRankNoise, NoiseKey
from flatlora_optim.landscape import expected_loss, top_eigenvalue
from helpers import (
    NORM_ERROR,
    changed_weights,
    fingerprint,
    flatlora,
    gradients,
    mlp_batch,
    randomize_adapters,
    trainable,
)

pytestmark = pytest.mark.skipif(
    "target_parameters" not in LoraConfig.__dataclass_fields__, reason="new in PEFT 0.17"
)
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 32,
}
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral(dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return adapted(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).to(dtype), **config)


def qwen3(dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return adapted(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts)).to(dtype), **config)


def gpt_oss(dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """Its experts are stored (inputs, outputs)."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "layer_types": ["full_attention"]}
    return adapted(GptOssForCausalLM(GptOssConfig(**SIZES, **experts)).to(dtype), **config)


def adapted(model: nn.Module, **config: Any) -> nn.Module:
    experts = next(module for name, module in model.named_modules() if name.endswith("mlp.experts"))
    if not all(hasattr(experts, name) for name in ("gate_up_proj", "down_proj")):
        pytest.skip("before transformers 5, each expert had layers of its own")
    with torch.no_grad():  # rows, experts and axes that can be told apart
        for parameter in (experts.gate_up_proj, experts.down_proj):
            scales = torch.rand(parameter.shape[0], *parameter.shape[1:2], 1) + 0.2
            parameter.mul_(scales.mT if scales.shape[1] == parameter.shape[2] else scales)
            parameter.mul_(torch.rand(parameter.shape[0], 1, parameter.shape[2]) + 0.2)
    config = {"target_modules": ["q_proj"], "target_parameters": TARGETS, **config}
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, **config))
    randomize_adapters(adapted)
    return adapted.train()


MODELS = {"Mixtral": mixtral, "Qwen3-MoE": qwen3, "GPT-OSS": gpt_oss}


def loss_of(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, labels=TOKENS).loss


def experts_of(model: nn.Module) -> nn.Module:
    return next(
        m for n, m in model.named_modules() if hasattr(m, "gate_up_proj") and "gate_up_proj" in m._parameters
    )


def merged_rows(model: nn.Module, name: str) -> Tensor:
    """The norms of the rows of each expert's merged matrix, by PEFT's own merging; (experts, outputs)."""
    merged = experts_of(copy.deepcopy(model).merge_and_unload())
    dim = 1 if getattr(merged, "is_transposed", False) else 2
    return merged.get_parameter(name).norm(dim=dim)


class Ones:
    def block(self, key: NoiseKey, number: int, out: Tensor) -> Tensor:
        return out.fill_(1.0)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_each_expert_has_rows_and_norms_of_its_own(make: Any) -> None:
    model = make()
    experts = experts_of(model)
    expected = {name: merged_rows(model, name) for name in ("gate_up_proj", "down_proj")}
    optimizer = flatlora(model, noise=Ones(), sigma=0.1)
    assert not optimizer.skipped
    assert [target.weight.kind for target in optimizer.targets].count("experts") == 2
    clean = {name: experts.get_parameter(name).clone() for name in expected}
    before = fingerprint(model)
    loss_of(model).backward()
    for name, norms in expected.items():
        dim = 1 if getattr(experts, "is_transposed", False) else 2
        inputs = clean[name].shape[dim]
        noise = (experts.get_parameter(name) - clean[name]).detach()
        scales = 0.1 * norms / inputs**0.5
        torch.testing.assert_close(noise, scales.unsqueeze(dim).expand_as(noise), rtol=0.01, atol=1e-6)
    state = model.state_dict()
    for name, value in clean.items():
        (key,) = [key for key in state if key.endswith(name)]
        assert torch.equal(state[key], value)
    optimizer.step()
    assert not changed_weights(model, before)


ALL_LINEAR = {"target_modules": "all-linear", "target_parameters": None}
WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{f"{name}, target_parameters": (make, {}) for name, make in MODELS.items()},
    "Mixtral, all-linear": (mixtral, ALL_LINEAR),
    "Qwen3-MoE, all-linear": (qwen3, ALL_LINEAR),
}
"""PEFT's all-linear leaves the experts of GPT-OSS out."""


@pytest.mark.parametrize(("make", "config"), WAYS.values(), ids=WAYS)
def test_statistics_over_draws_on_all_that_is_adapted(make: Any, config: dict[str, Any]) -> None:
    """Each row's noise against sigma ||W'_i|| / sqrt(n), W' by PEFT's own merging."""
    model = make(**config)
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    adapted = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = flatlora(model, sigma=0.1, lr=0.0)
    kinds = [target.weight.kind for target in optimizer.targets]
    assert len(optimizer.targets) == len(adapted)
    assert kinds.count("experts") >= 2
    before, draws = fingerprint(model), 100
    places = [
        target.weight.tensor if kind == "dense" else target.weight.parameter
        for target, kind in zip(optimizer.targets, kinds, strict=True)
    ]
    clean = [place.detach().clone() for place in places]
    dims = [1 if target.weight.row_dim else -1 for target in optimizer.targets]
    squared: list[Any] = [0.0] * len(places)
    for _ in range(draws):
        with optimizer.perturbed():
            for k, place in enumerate(places):
                noise = place.detach() - clean[k]
                assert noise.ne(0).float().mean() > 0.99
                squared[k] = squared[k] + noise.square().mean(dims[k])
        optimizer.step()
    for k, target in enumerate(optimizer.targets):
        name = target.name.removeprefix("base_model.model.").replace(".base_layer", "")
        whole = merged[f"{name}.{target.weight.name}"].detach()
        expected = 0.1 * whole.norm(dim=dims[k]) / whole.shape[dims[k]] ** 0.5
        # At least 16 * 100 squares of a Gaussian: 1.8 % standard error.
        assert ((squared[k] / draws).sqrt() / expected - 1).abs().max() < 0.09, name
    assert not changed_weights(model, before)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("restore", ["exact", "snapshot"])
def test_the_base_is_bit_identical_after_each_step(make: Any, dtype: torch.dtype, restore: str) -> None:
    model = make(dtype)
    before = fingerprint(model)
    optimizer = flatlora(model, restore=restore, lr=1e-3)
    for _ in range(3):
        for _ in range(2):  # micro-batches
            loss_of(model).backward()
            assert any("experts" in name for name in changed_weights(model, before))
        with torch.no_grad():
            model.eval()
            loss_of(model)
            model.train()
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not changed_weights(model, before)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_evaluation_in_the_middle_is_clean_and_leaves_the_graph_valid(make: Any) -> None:
    model = make()
    model.eval()
    with torch.no_grad():
        clean = loss_of(model)
    model.train()
    optimizer = flatlora(model, sigma=0.3)
    loss = loss_of(model)
    assert loss != clean
    model.eval()
    with torch.no_grad():
        assert torch.equal(loss_of(model), clean)
    model.train()
    loss.backward()  # through the attention's weights, too
    assert len(gradients(model)) == len(trainable(model))
    optimizer.step()


def test_gradients_are_those_of_the_noisy_experts() -> None:
    model = mixtral()
    optimizer = flatlora(model, sigma=0.3, lr=0.0)
    loss_of(model).backward()
    actual = gradients(model)
    optimizer.zero_grad()
    twin = mixtral()
    with optimizer.perturbed():
        noisy = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if not parameter.requires_grad:
                parameter.copy_(noisy[name])
    loss_of(twin).backward()
    for name, gradient in gradients(twin).items():
        assert torch.equal(actual[name], gradient), name


def test_somebody_else_who_writes_an_expert_is_noticed() -> None:
    model = mixtral()
    optimizer = flatlora(model)
    loss_of(model).backward()
    with torch.no_grad():
        experts_of(model).gate_up_proj.mul_(2)
    with pytest.raises(RuntimeError, match="was written while it carried noise"):
        optimizer.step()


def test_norms_follow_what_is_loaded_and_are_kept_otherwise() -> None:
    model = mixtral(target_modules=[])
    randomize_adapters(model, std=0.0)
    optimizer = flatlora(model, lr=0.0)
    loss_of(model).backward()
    expected = optimizer.metrics()["noise_norm"] * 10
    known = [norms._base for norms in optimizer._weights.norms]
    optimizer.step()
    loss_of(model).backward()
    assert all(a is norms._base for a, norms in zip(known, optimizer._weights.norms, strict=True))
    optimizer.step()
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            experts_of(model).get_parameter(name).mul_(10)
    loss_of(model).backward()
    assert optimizer.metrics()["noise_norm"] == pytest.approx(expected, rel=1e-3)


def test_a_matrix_as_a_bare_parameter() -> None:
    from helpers import MLP

    model = get_peft_model(MLP(), LoraConfig(r=2, target_modules=[], target_parameters=["fc2.weight"]))
    randomize_adapters(model)
    merged = copy.deepcopy(model).merge_and_unload().fc2.weight
    before = fingerprint(model)
    optimizer = flatlora(model, sigma=0.1)
    for _ in range(2):
        model(mlp_batch()[0]).square().mean().backward()
        (noise,) = optimizer._noises
        expected = 0.1 * merged.norm(dim=1).detach() / 4
        torch.testing.assert_close(noise.scales, expected, rtol=10 * NORM_ERROR, atol=0)
        assert changed_weights(model, before)
        optimizer.step()
        assert not changed_weights(model, before)
        optimizer.zero_grad()
        merged = copy.deepcopy(model).merge_and_unload().fc2.weight


def test_two_adapters_add_up() -> None:
    model = mixtral()
    config = LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj"], target_parameters=TARGETS)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    randomize_adapters(model)
    merged = experts_of(copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"]))
    optimizer = flatlora(model, sigma=0.1)
    with optimizer.perturbed():
        pass
    for target, noise in zip(optimizer.targets, optimizer._noises, strict=True):
        if target.weight.kind == "experts":
            rows = merged.get_parameter(target.weight.name).norm(dim=2).flatten().detach()
            expected = 0.1 * rows / target.weight.columns**0.5
            torch.testing.assert_close(noise.scales, expected, rtol=0.01, atol=0)


def test_virtual_mode_refuses_them_if_the_noise_is_of_full_rank() -> None:
    with pytest.raises(ValueError, match="perturb it in place, or by noise of low rank"):
        flatlora(mixtral(), mode="virtual", noise="gaussian")


def test_landscape() -> None:
    model = gpt_oss()
    around = expected_loss(model, loss_of, sigma=0.05, samples=2)
    assert around.mean != around.at_minimum
    with pytest.raises(ValueError, match="computes its weight in each forward"):
        top_eigenvalue(model, loss_of)
    assert isinstance(flatlora(model), FlatLoRAOptimizer)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_low_rank_noise_has_the_strength_of_full_noise(make: Any) -> None:
    model = make()
    experts = experts_of(model)
    merged = merged_rows(model, "down_proj")
    before = fingerprint(model)
    optimizer = flatlora(model, noise=LowRankNoise(4), mode="in_place", sigma=0.5)
    clean = experts.down_proj.detach().clone()
    with optimizer.perturbed():
        eps = (experts.down_proj - clean).detach()
    assert not changed_weights(model, before)
    dim = 1 if getattr(experts, "is_transposed", False) else 2
    z = eps / (0.5 * merged / eps.shape[dim] ** 0.5).unsqueeze(dim)
    assert all(torch.linalg.matrix_rank(each, rtol=1e-4) == 4 for each in z)
    assert float(z.square().mean()) == pytest.approx(1, rel=0.5)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("adapters", ["one", "two", "none"])
@pytest.mark.parametrize("grad", [True, False])
def test_low_rank_noise_comes_with_the_weight_that_peft_makes(make: Any, adapters: str, grad: bool) -> None:
    def run(mode: str) -> tuple[Tensor, dict[str, Tensor]]:
        model = make()
        if adapters == "two":
            config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=TARGETS)
            model.add_adapter("second", config)
            model.base_model.set_adapter(["default", "second"])
            randomize_adapters(model)
        before, experts = fingerprint(model), experts_of(model)
        kind = type(experts)
        optimizer = flatlora(model, noise="low_rank", mode=mode, sigma=0.5, auto=False)
        with optimizer.perturbed(), torch.set_grad_enabled(grad):
            if adapters == "none":  # a pass that the user wants with noise
                with model.disable_adapter():
                    loss = loss_of(model)
            else:
                loss = loss_of(model)
            if mode == "virtual":
                assert not changed_weights(model, before)
            if grad and adapters != "none":
                loss.backward()
        assert type(experts) is kind
        assert experts_of(model) is experts
        assert not changed_weights(model, before)
        assert all(p.was_seen for p in optimizer._weights.perturbations)
        return loss.detach(), gradients(model)

    (loss, found), (written, expected) = run("virtual"), run("in_place")
    torch.testing.assert_close(loss, written, rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_low_rank_noise(checkpointing: bool) -> None:
    """In the automatic style, with evaluations in between, as with the noise in place."""

    def run(mode: str) -> list[float]:
        model = gpt_oss()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = flatlora(model, noise="low_rank", mode=mode, sigma=0.3)
        losses = []
        for _ in range(3):
            loss = loss_of(model)
            model.eval()
            with torch.no_grad():
                losses.append(loss_of(model).item())
            model.train()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    assert run("virtual") == pytest.approx(run("in_place"), rel=1e-5)


def test_low_rank_noise_on_a_matrix_as_a_bare_parameter() -> None:
    from helpers import MLP

    def run(mode: str) -> Tensor:
        torch.manual_seed(0)
        model = get_peft_model(MLP(), LoraConfig(r=2, target_modules=[], target_parameters=["fc2.weight"]))
        randomize_adapters(model)
        with flatlora(model, noise="low_rank", mode=mode, sigma=0.5).perturbed():
            return model(mlp_batch()[0]).detach()

    torch.testing.assert_close(run("virtual"), run("in_place"))


def test_low_rank_noise_that_16_bits_round_away_is_told() -> None:
    with pytest.warns(UserWarning, match="rounds the noise away"):
        flatlora(mixtral(torch.bfloat16), noise="low_rank", mode="virtual", sigma=1e-6).perturb()


@pytest.mark.parametrize("how", ["8 bits", "not contiguous"])
def test_experts_that_can_not_be_written_are_refused_by_name(how: str) -> None:
    model = mixtral(target_parameters=None).unload()
    experts = experts_of(model)
    if how == "8 bits":
        experts.gate_up_proj.data = experts.gate_up_proj.data.to(torch.float8_e4m3fn)
    else:
        experts.gate_up_proj.data = experts.gate_up_proj.data.mT.contiguous().mT
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=TARGETS)
    message = r"experts.*: gate_up_proj of MixtralExperts is packed, .* load it in 16 or 32 bits"
    with pytest.warns(UserWarning, match=message):
        optimizer = flatlora(get_peft_model(model, config))
    assert [target.weight.name for target in optimizer.targets] == ["weight", "down_proj"]
