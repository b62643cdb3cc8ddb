"""What is found, what is skipped and why."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import prune

from flatlora_optim import FlatLoRAOptimizer, find_targets, register
from flatlora_optim.targets.sharding import place_of
from helpers import (
    MLP,
    MLP_WEIGHTS,
    OwnLoRA,
    TinyLM,
    changed_weights,
    fingerprint,
    flatlora,
    int_view,
    lora_convnet,
    lora_gpt2,
    lora_lm,
    lora_mlp,
    loss_of,
    mlp_batch,
    trainable,
    untouched_rng,
    with_lora,
)

FC1, FC2 = "base_model.model.fc1", "base_model.model.fc2"


def names(model: nn.Module) -> list[str]:
    return [target.name.removeprefix("base_model.model.") for target in find_targets(model).targets]


def test_every_kind_of_peft_layer_is_found() -> None:
    assert names(lora_mlp()) == ["fc1", "fc2"]
    assert names(lora_convnet()) == ["conv1", "conv2", "head"]
    assert names(lora_lm()) == ["embed", "mix"]
    block = "transformer.h.0."
    assert names(lora_gpt2(("c_attn", "c_fc", "wte", "lm_head"))) == [
        "transformer.wte",
        f"{block}attn.c_attn",
        f"{block}mlp.c_fc",
    ]  # lm_head shares the weight of wte


def test_the_name_of_the_adapter_does_not_matter() -> None:
    config = LoraConfig(target_modules=["fc1"], r=2)
    model = get_peft_model(MLP(), config, adapter_name="a name with spaces")
    assert names(model) == ["fc1"]
    before = fingerprint(model)
    with flatlora(model).perturbed():
        assert changed_weights(model, before) == {f"{FC1}.base_layer.weight"}


def test_a_single_layer_may_be_the_model() -> None:
    layer = lora_mlp().base_model.model.fc1
    assert [target.name for target in find_targets(layer).targets] == [""]
    before = int_view(layer.base_layer.weight).clone()
    with flatlora(layer).perturbed():
        assert not torch.equal(int_view(layer.base_layer.weight), before)


class Loralib(nn.Linear):
    """A Linear that is its own adapter, as in loralib."""

    def __init__(self, inputs: int, outputs: int, r: int = 2) -> None:
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(r, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, r))
        self.scaling = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scaling


def test_loralib_layers_are_found_without_registration() -> None:
    model = nn.Sequential(Loralib(6, 7), nn.ReLU(), Loralib(7, 5))
    before = fingerprint(model)
    optimizer = flatlora(model)
    loss_of(model, mlp_batch()).backward()
    assert changed_weights(model, before) == {"0.weight", "2.weight"}
    optimizer.step()
    assert not changed_weights(model, before)


def test_loralib_layers_of_unknown_axes_are_skipped() -> None:
    layer = Loralib(6, 6)
    layer.fan_in_fan_out = True
    with pytest.warns(UserWarning, match=r"1: it is no LoralibLinear: on a small input"):
        optimizer = flatlora(nn.ModuleList([Loralib(6, 6), layer]))
    assert list(optimizer.skipped) == ["1"]


class Bottleneck(nn.Module):
    """A hand-written adapter with names of its own, on a weight that is stored transposed."""

    def __init__(self, inner: nn.Module, r: int = 2) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(inner.kernel.shape[0], r, bias=False)
        self.up = nn.Linear(r, inner.kernel.shape[1], bias=False)
        self.strength = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.kernel + self.up(self.down(x)) * self.strength


def bottleneck() -> Bottleneck:
    inner = nn.Module()
    inner.kernel = nn.Parameter(torch.randn(6, 5) * torch.tensor([1.0, 1, 1, 1, 1000]), requires_grad=False)
    return Bottleneck(inner)


def test_any_module_may_be_registered() -> None:
    module = bottleneck()
    with pytest.raises(ValueError, match="no LoRA module"):
        flatlora(module)
    returned = register(
        module,
        weight="inner.kernel",
        lora_A="down.weight",
        lora_B="up.weight",
        scaling="strength",
        transposed=True,
    )
    assert returned is module
    clean = module.inner.kernel.clone()
    optimizer = flatlora(module, lr=1e-6)
    loss_of(module, mlp_batch()).backward()
    noise = (module.inner.kernel - clean).norm(dim=0)
    assert noise[4] > 100 * noise[:4].max() > 0  # an output neuron is a column here
    assert torch.equal(module.state_dict()["inner.kernel"], clean)
    optimizer.step()
    assert torch.equal(module.inner.kernel, clean)


def test_a_registration_outlives_moves_and_copies() -> None:
    layer = OwnLoRA(torch.randn(4, 4))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.double()):
        assert len(find_targets(twin).targets) == 1
        with flatlora(twin).perturbed():
            pass


def skipped_by(optimizer: FlatLoRAOptimizer) -> dict[str, str]:
    return {name.removeprefix("base_model.model."): reason for name, reason in optimizer.skipped.items()}


def test_what_is_skipped_is_reported_once() -> None:
    model = lora_mlp()
    optimized = [p for name, p in model.named_parameters() if "fc1" in name and p.requires_grad]
    with pytest.warns(
        UserWarning, match=r"leaves these adapters unperturbed:\n.*fc2: .*not in the optimizer"
    ) as w:
        optimizer = FlatLoRAOptimizer(
            torch.optim.SGD(optimized, lr=0.1), model, sigma=0.1, schedule="constant"
        )
    assert len(w) == 1
    assert w[0].filename == __file__
    assert skipped_by(optimizer) == {"fc2": "its adapter's parameters are not in the optimizer"}
    assert "not perturbed: 1 (see .skipped)" in repr(optimizer)
    before = fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model, mlp_batch())
    assert changed_weights(model, before) == {f"{FC1}.base_layer.weight"}


@pytest.mark.filterwarnings("ignore:Flat-LoRA leaves:UserWarning")
class TestSkipped:
    def test_grouped_convolutions(self) -> None:
        optimizer = flatlora(lora_convnet(groups=4))
        assert list(skipped_by(optimizer)) == ["conv2"]
        assert "mixes channels" in skipped_by(optimizer)["conv2"]

    def test_other_peft_methods_next_to_lora(self) -> None:
        model = lora_mlp()
        ia3 = get_peft_model(MLP(), IA3Config(target_modules=["fc1"], feedforward_modules=[]))
        both = nn.ModuleDict({"lora": model, "ia3": ia3})
        optimizer = flatlora(both)
        assert len(optimizer.targets) == 2
        assert ["IA3 adds no product" in reason for reason in optimizer.skipped.values()] == [True]

    def test_an_inactive_adapter(self) -> None:
        config = LoraConfig(target_modules=["fc2"], r=2)
        model = lora_mlp()
        model.add_adapter("second", config)
        model.set_adapter("second")
        optimizer = flatlora(model)
        assert skipped_by(optimizer) == {"fc1": "none of its adapters is active"}

    def test_attention_whose_weights_peft_merges_in_each_forward(self) -> None:
        class Attending(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention, self.fc1 = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc1(self.attention(x, x, x)[0])

        model = with_lora(Attending(), ["attention", "fc1"])
        before = fingerprint(model)
        clean = {name: model.get_parameter(name).detach().clone() for name in before}
        optimizer = flatlora(model)
        skipped = skipped_by(optimizer)
        assert "in_proj_weight" in skipped["attention"]
        assert "merges it in each forward" in skipped["attention.base_layer.out_proj"]
        for _ in range(3):
            model(torch.randn(2, 3, 8)).sum().backward()
            assert f"{FC1}.base_layer.weight" in changed_weights(model, before)
            optimizer.step()
            # PEFT's own merging and unmerging rounds.
            assert f"{FC1}.base_layer.weight" not in changed_weights(model, before)
            assert all(torch.allclose(model.get_parameter(name), clean[name], atol=1e-6) for name in before)

    def test_loralib_layers_other_than_linear(self) -> None:
        embedding = nn.Embedding(6, 6).requires_grad_(False)
        embedding.lora_A, embedding.lora_B = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))
        embedding.scaling = 1.0
        merged = Loralib(6, 12)  # of the shapes of loralib's MergedLinear
        merged.lora_A, merged.lora_B = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(12, 2))
        optimizer = flatlora(nn.ModuleList([Loralib(6, 6), embedding, merged]))
        assert [target.name for target in optimizer.targets] == ["0"]
        assert "Embedding" in optimizer.skipped["1"]
        assert "shapes (12, 2) @ (6, 6)" in optimizer.skipped["2"]
        register(embedding, lora_A="lora_A", lora_B="lora_B", transposed=True)
        assert [target.name for target in find_targets(embedding).targets] == [""]

    def test_variants_of_peft_that_are_no_product(self) -> None:
        known = LoraConfig.__dataclass_fields__
        if not {"kasa_config", "use_bdlora"} <= known.keys():
            pytest.skip("new in PEFT 0.21")
        from peft import BdLoraConfig, KasaConfig

        variants = [
            {"kasa_config": KasaConfig()},
            {"use_bdlora": BdLoraConfig(nblocks=2, target_modules_bd_a=["fc2"])},
        ]
        for variant in [*variants, {"use_dora": True}]:
            model = lora_mlp()
            config = LoraConfig(target_modules=["fc2"], r=2, **variant)
            both = nn.ModuleList([model, get_peft_model(nn.ModuleDict({"fc2": nn.Linear(16, 6)}), config)])
            optimizer = flatlora(both)
            assert len(optimizer.targets) == (3 if "use_dora" in variant else 2), variant
            assert all("does not add B @ A" in reason for reason in optimizer.skipped.values())


def test_a_product_that_does_not_fit_any_more_is_an_error() -> None:
    layer = OwnLoRA(torch.randn(7, 5))
    before = fingerprint(layer)
    optimizer = flatlora(layer)
    for lora_A in (torch.randn(3, 5), torch.randn(2, 6)):
        layer.lora_A.data = lora_A
        with pytest.raises(ValueError, match="B @ A has shapes"):
            optimizer.perturb()
        assert not changed_weights(layer, before)


def test_an_adapter_that_is_switched_off_gets_no_noise() -> None:
    model = lora_mlp()
    model.add_adapter("second", LoraConfig(target_modules=["fc2"], r=2))
    before = fingerprint(model)
    optimizer = flatlora(model)
    with optimizer.perturbed():
        assert changed_weights(model, before) == {f"{FC1}.base_layer.weight", f"{FC2}.base_layer.weight"}
    optimizer.step()
    model.set_adapter("second")  # fc1 has no such adapter; fc2's is not in the optimizer
    with optimizer.perturbed():
        assert not changed_weights(model, before)
    optimizer.step()
    model.set_adapter("default")
    with optimizer.perturbed():
        assert changed_weights(model, before) == {f"{FC1}.base_layer.weight", f"{FC2}.base_layer.weight"}


def test_a_registered_adapter_that_is_switched_off_gets_no_noise() -> None:
    layer = OwnLoRA(torch.randn(4, 5))
    layer.disable_adapters = True
    before = fingerprint(layer)
    with flatlora(layer).perturbed():
        assert not changed_weights(layer, before)


@pytest.mark.parametrize("targets", [("embed", "lm_head"), ("embed",), ("lm_head",)])
def test_a_tied_weight_is_perturbed_once(targets: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = with_lora(TinyLM(tied=True), list(targets))
    shared = model.base_model.model.embed.weight
    before = int_view(shared).clone()
    optimizer = flatlora(model, noise=_Ones())
    assert len(optimizer.targets) == 1
    clean = shared.detach().clone()
    tokens = torch.arange(6).view(2, 3)
    model(tokens).square().mean().backward()
    expected = optimizer.sigma * _merged(model, targets[0], clean).norm(dim=1) / clean.shape[1] ** 0.5
    torch.testing.assert_close(shared - clean, expected[:, None].expand_as(clean), rtol=1e-3, atol=1e-6)
    state = model.state_dict()
    for name, value in state.items():
        if name.endswith(
            ("embed.base_layer.weight", "embed.weight", "lm_head.base_layer.weight", "lm_head.weight")
        ):
            assert torch.equal(int_view(value), before), name
    optimizer.step()
    assert torch.equal(int_view(shared), before)


def test_tied_layers_with_parameters_of_their_own_share_the_noise() -> None:
    tied = TinyLM(tied=True)
    tied.load_state_dict(tied.state_dict(), assign=True)
    assert tied.embed.weight is not tied.lm_head.weight
    model = with_lora(tied, ["embed", "lm_head"])
    before = fingerprint(model)
    for restore in ("exact", "snapshot"):
        optimizer = flatlora(model, restore=restore)
        assert len(optimizer.targets) == 1
        for _ in range(3):
            model(torch.arange(6).view(2, 3)).square().mean().backward()
            assert len(changed_weights(model, before)) == 2
            optimizer.step()
            assert not changed_weights(model, before)


@pytest.mark.parametrize("targets", [["embed"], ["lm_head"], ["embed", "lm_head"]])
def test_a_state_dict_is_clean_under_all_names_of_a_tied_weight(targets: list[str]) -> None:
    tied = TinyLM(tied=True)
    tied.load_state_dict(tied.state_dict(), assign=True)  # two parameters in one memory
    model = with_lora(tied, targets)
    before, expected = fingerprint(model), copy.deepcopy(model.state_dict())
    with flatlora(model).perturbed():
        state = model.state_dict()
        assert len(changed_weights(model, before)) == 2
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("restore", ["exact", "snapshot"])
def test_weights_that_are_tied_after_the_optimizer_was_built_are_refused(restore: str) -> None:
    model = lora_lm(tied=False, targets=("embed", "lm_head"))
    optimizer = flatlora(model, restore=restore)
    assert len(optimizer.targets) == 2
    lm = model.base_model.model
    lm.lm_head.base_layer.weight.data = lm.embed.base_layer.weight.data
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match=r"carries noise already.* tied .* build a new one"):
        optimizer.perturb()
    assert not optimizer.is_perturbed
    assert not changed_weights(model, before)


def test_weights_that_are_untied_after_the_optimizer_was_built_are_refused() -> None:
    model = lora_lm(tied=True, targets=("embed", "lm_head"))
    optimizer = flatlora(model)
    lm = model.base_model.model
    lm.lm_head.base_layer.weight = nn.Parameter(lm.embed.base_layer.weight.clone(), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"embed and .*lm_head shared a weight .* build a new"):
        optimizer.perturb()


def pruned() -> nn.Module:
    linear = nn.Linear(6, 6)
    prune.random_unstructured(linear, "weight", 0.5)
    return linear.requires_grad_(False)


def normalized() -> nn.Module:
    return torch.nn.utils.weight_norm(nn.Linear(6, 6)).requires_grad_(False)


@pytest.mark.parametrize("make", [pruned, normalized])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_weight_that_is_made_before_each_forward_is_perturbed_in_the_forward(
    make: Callable[[], nn.Module],
) -> None:
    model = with_lora(nn.Sequential(make()), ["0"])
    x = torch.ones(2, 6)
    clean = model(x)
    optimizer = flatlora(model)
    noisy = model(x)
    assert not torch.equal(noisy, clean)
    noisy.sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="can't be written in place"):
        flatlora(model, mode="in_place")


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Embedding(6, 6, max_norm=1.0), "renormalizes the weight itself"),
        (nn.Linear(6, 6, dtype=torch.complex64), "complex"),
    ],
)
def test_layers_that_no_noise_can_be_put_on_are_skipped(layer: nn.Module, reason: str) -> None:
    optimizer = flatlora(with_lora(nn.Sequential(layer, nn.Linear(6, 6)), ["0", "1"]))
    assert reason in skipped_by(optimizer)["0"]
    assert [target.name for target in optimizer.targets] == ["base_model.model.1"]


def test_a_weight_whose_elements_share_memory_is_skipped() -> None:
    expanded = OwnLoRA(torch.randn(4, 6))
    expanded.weight.data = torch.randn(1, 6).expand(4, 6)
    optimizer = flatlora(nn.Sequential(expanded, OwnLoRA(torch.randn(5, 4))))
    assert "share memory" in optimizer.skipped["0"]


def test_methods_named_like_flags_are_none() -> None:
    class Merging(OwnLoRA):
        def merged(self) -> Tensor:
            return self.weight + self.scaling * self.lora_B @ self.lora_A

        def disable_adapters(self) -> None: ...

    layer = Merging(torch.randn(4, 6))
    before = fingerprint(layer)
    with flatlora(layer).perturbed():
        assert changed_weights(layer, before) == {"weight"}


def test_adapters_whose_parts_are_parametrized_are_active() -> None:
    model = lora_mlp()
    layer = model.base_model.model.fc1
    for part in (layer.lora_A, layer.lora_B):
        torch.nn.utils.parametrizations.weight_norm(part["default"])
    assert names(model) == ["fc1", "fc2"]
    assert "fc1" not in str(flatlora(model).skipped)


@pytest.mark.parametrize("side", ["embed", "lm_head"])
def test_a_tied_weight_keeps_its_noise_while_one_of_its_adapters_is_left(side: str) -> None:
    model = lora_lm(tied=True, targets=("embed", "lm_head"))
    optimizer = flatlora(model)
    inner = model.base_model.model
    setattr(inner, side, getattr(inner, side).base_layer)
    before = fingerprint(model)
    with optimizer.perturbed():
        assert changed_weights(model, before)


def test_a_layer_that_was_set_to_none_is_no_obstacle() -> None:
    model = lora_mlp()
    model.base_model.model.head = nn.Linear(2, 2)
    model.base_model.model.head = None  # which torch keeps among the children
    before = fingerprint(model)
    with flatlora(model).perturbed():
        assert changed_weights(model, before) == MLP_WEIGHTS


def test_tensors_without_memory_share_none() -> None:
    with FakeTensorMode():
        fake = torch.empty(2, 2)
    for tensor in (fake, torch.empty(2, 2, device="meta"), torch.empty(0, 2)):
        assert place_of(tensor) is None


def test_weights_that_overlap_are_refused() -> None:
    memory = torch.randn(12, 6)

    def count(first: Tensor, second: Tensor) -> int:
        layers = [OwnLoRA(first.clone()), OwnLoRA(second.clone())]
        layers[0].weight.data, layers[1].weight.data = first, second
        return len(find_targets(nn.ModuleList(layers)).targets)

    assert count(memory[:6], memory[6:]) == 2
    assert count(memory[:, :2], memory[:, 2:]) == 2  # which interleave
    assert count(memory[:6], memory[:6]) == 1
    for first, second in ((memory[:6], memory[5:]), (memory[:, :3], memory[:, 2:]), (memory, memory[2:4])):
        with pytest.raises(ValueError, match=r"0 and 1 share a part of their memory"):
            count(first, second)


def test_all_adapters_on_a_tied_weight_count() -> None:
    model = lora_lm(tied=True, targets=("embed", "lm_head"))
    head = trainable(model.base_model.model.lm_head)
    embedding = [p for p in trainable(model) if all(p is not other for other in head)]
    groups = [{"params": embedding, "sigma": 0.0}, {"params": head, "sigma": 0.2}]
    optimizer = FlatLoRAOptimizer(torch.optim.SGD(groups, lr=0.1), model, sigma=0.1, schedule="constant")
    with pytest.raises(ValueError, match=r"groups of different sigma \[0.0, 0.2\]"):
        optimizer.perturb()
    groups[0]["sigma"] = optimizer.param_groups[0]["sigma"] = 0.2
    before = fingerprint(model)
    for side, other in (("embed", "lm_head"), ("lm_head", "embed")):
        getattr(model.base_model.model, side).enable_adapters(True)
        getattr(model.base_model.model, other).enable_adapters(False)
        with optimizer.perturbed():
            assert changed_weights(model, before)
        optimizer.step()
    model.base_model.model.lm_head.enable_adapters(False)
    model.base_model.model.embed.enable_adapters(False)
    with optimizer.perturbed():
        assert not changed_weights(model, before)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_dropout_of_ranks_has_no_part_in_the_norms(config: type) -> None:
    """Earlier releases of PEFT drop ranks wherever the product is made, by torch's global generator."""
    model = get_peft_model(MLP(), config(target_modules=["fc1"], r=4, rank_dropout=0.5))
    for parameter in trainable(model):
        nn.init.normal_(parameter)
    optimizer = flatlora(model)
    scales = []
    for _ in range(2):
        with untouched_rng(), optimizer.perturbed():
            scales.append(optimizer._noises[0].scales)
        optimizer.step()
    assert torch.equal(*scales)
    assert model.base_model.model.fc1.training


class _Ones:
    def block(self, key: Any, number: int, out: Tensor) -> Tensor:
        return out.fill_(1)


def _merged(model: nn.Module, layer: str, weight: Tensor) -> Tensor:
    return weight + getattr(model.base_model.model, layer).get_delta_weight("default").detach()


def test_nested_adapters_perturb_their_weight_once() -> None:
    inner = get_peft_model(MLP(), LoHaConfig(target_modules=["fc1", "fc2"], r=2))
    model = get_peft_model(inner, LoraConfig(target_modules=["fc1"], r=2))
    weights = {name for name, _ in model.named_parameters() if name.endswith("base_layer.weight")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name or "hada" in name)
    before = fingerprint(model)
    optimizer = flatlora(model)
    assert len(optimizer.targets) == len(weights) == 2
    with optimizer.perturbed():
        assert changed_weights(model, before) == weights
    assert not changed_weights(model, before)


def test_a_trainable_weight_elsewhere_is_none_of_our_business() -> None:
    model = with_lora(MLP(), ["fc1"], modules_to_save=["fc2"])
    optimizer = flatlora(model)
    assert len(optimizer.targets) == 1
    head = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    old = [p.detach().clone() for p in head]
    loss_of(model, mlp_batch()).backward()
    assert all(torch.equal(p, o) for p, o in zip(head, old, strict=True))
    optimizer.step()
    assert all(not torch.equal(p, o) for p, o in zip(head, old, strict=True))
    assert set(map(id, head)) <= set(map(id, trainable(model)))


def test_a_parametrized_weight_is_perturbed_in_the_forward() -> None:
    """It is computed anew at each look, so that noise written to it would be lost."""
    module = nn.Module()
    module.linear = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)).requires_grad_(False)
    module.down, module.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(5, 2))
    register(module, weight="linear.weight", lora_A="down", lora_B="up")
    x = torch.randn(3, 6)
    clean = module.linear(x)
    optimizer = flatlora(module)
    (target,) = optimizer.targets
    assert target.weight.kind == "read-only"
    with optimizer.perturbed():
        difference = (module.linear(x) - clean).norm() / clean.norm()
        assert 0.02 < difference < 0.5
    assert torch.equal(module.linear(x), clean)
    optimizer.step()
    module.bfloat16()
    with optimizer.perturbed():
        assert module.linear(x.bfloat16()).dtype == torch.bfloat16


def test_a_parametrized_convolution_is_perturbed_in_the_forward() -> None:
    model = lora_convnet()
    layer = model.base_model.model.conv1.base_layer
    nn.utils.parametrizations.weight_norm(layer)
    layer.requires_grad_(False)
    x = torch.randn(2, 3, 6, 6)
    clean = layer(x)
    optimizer = flatlora(model)
    assert [target.weight.kind for target in optimizer.targets] == ["read-only", "dense", "dense"]
    with optimizer.perturbed():
        assert 0.02 < (layer(x) - clean).norm() / clean.norm() < 0.5
    assert torch.equal(layer(x), clean)


@torch.no_grad()
def test_factors_are_seen_where_they_lie_by_now() -> None:
    model: Any = lora_lm(targets=("embed",))
    (target,) = find_targets(model).targets
    layer = model.base_model.model.embed
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    for write in (lambda p: p.mul_(2), lambda p: setattr(p, "data", p.data + 1)):
        for factor in (a, b):
            write(factor)
            left, right, _ = target.delta()
            assert torch.equal(left, a.T)
            assert torch.equal(right, b.T)
    a.data, b.data = a.data[:1], b.data[:, :1]  # a smaller rank, where they were
    assert [factor.shape for factor in target.delta()[:2]] == [a.T.shape, b.T.shape]
