"""FSDP2 (``fully_shard``): the same training as of the whole model in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Adam

from flatlora_optim import landscape
from helpers import MLP, flatlora, lora_convnet, lora_gpt2, lora_lm, lora_mlp, with_lora
from launch import launch

STEPS = 3


def one_output() -> nn.Module:
    """One row for two processes: the second holds an empty part."""
    torch.manual_seed(0)
    return with_lora(MLP(outputs=1), ["fc1", "fc2"])


def checkpointed_gpt2() -> nn.Module:
    model = lora_gpt2()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Tensor]]] = {
    "linear": (lora_mlp, lambda g: torch.randn(4, 6, generator=g)),
    "one output": (one_output, lambda g: torch.randn(4, 6, generator=g)),
    "embedding": (lora_lm, lambda g: torch.randint(0, 23, (4, 5), generator=g)),
    "tied": (lambda: lora_lm(tied=True), lambda g: torch.randint(0, 23, (4, 5), generator=g)),
    "grouped convolution": (lambda: lora_convnet(groups=4), lambda g: torch.randn(4, 3, 6, 6, generator=g)),
    "Conv1D, checkpointed": (checkpointed_gpt2, lambda g: torch.randint(0, 29, (2, 5), generator=g)),
}


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Some layers in groups of their own, the rest in that of the root."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and name.endswith(("fc1", "mix", "conv2", "c_attn")):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights(model: nn.Module) -> dict[str, Tensor]:
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return {name: whole(p) for name, p in model.named_parameters() if not p.requires_grad}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    with torch.no_grad():
        yield
    model.train()


def output(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out.logits if hasattr(out, "logits") else out


def check_saved(state: dict[str, Tensor], model: nn.Module, clean: dict[str, Tensor]) -> None:
    """A state dict in the middle of a step: clean, and sharded as the parameters are."""
    for name, parameter in model.named_parameters():
        if name in clean:
            assert torch.equal(whole(state[name]), clean[name]), name
            if isinstance(parameter, DTensor):
                assert isinstance(state[name], DTensor)
                assert state[name].placements == parameter.placements


def train(name: str, prepare: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """Each step with an evaluation and a state dict between forward and backward."""
    build, inputs = MODELS[name]
    model = prepare(build())
    clean = weights(model)
    optimizer = flatlora(model, base=Adam, lr=1e-2)
    record: dict[str, Any] = {"loss": [], "evaluation": [], "noise norm": []}
    for step in range(STEPS):
        x = inputs(torch.Generator().manual_seed(step))
        loss = output(model, x).pow(2).mean()
        record["noise norm"].append(optimizer.metrics()["noise_norm"])
        with evaluating(model):
            record["evaluation"].append(output(model, x).pow(2).mean().item())
        check_saved(model.state_dict(), model, clean)
        record["noisy weights"] = weights(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        record["loss"].append(loss.item())
    after = weights(model)
    assert all(torch.equal(after[name], clean[name]) for name in clean)
    perturbed = [t.name for t in optimizer.targets]
    assert not any(
        torch.equal(record["noisy weights"][f"{n}.base_layer.weight"], clean[f"{n}.base_layer.weight"])
        for n in perturbed
    )
    return record


def train_sharded(reshard_after_forward: bool) -> dict[str, Any]:
    def prepare(model: nn.Module) -> nn.Module:
        return shard(model, reshard_after_forward=reshard_after_forward)

    return {name: train(name, prepare) for name in MODELS}


@pytest.mark.parametrize("reshard_after_forward", [True, False])
def test_same_noise_and_curve_as_the_whole_model(reshard_after_forward: bool) -> None:
    in_one_process = {name: train(name, lambda model: model) for name in MODELS}
    for of_rank in launch(train_sharded, reshard_after_forward):
        torch.testing.assert_close(of_rank, in_one_process, rtol=2e-6, atol=1e-7)


def in_mixed_precision() -> None:
    torch.manual_seed(0)
    model, x = lora_mlp(), torch.randn(4, 6)
    reference = copy.deepcopy(model)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32))
    clean = weights(model)
    optimizer = flatlora(model, base=Adam, lr=1e-2)
    out = model(x)
    noisy = weights(model)
    assert all(w.dtype == torch.float32 for w in noisy.values())
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(noisy.get(name, parameter))
    assert torch.equal(out, reference.bfloat16()(x.bfloat16()))
    out.float().pow(2).mean().backward()
    optimizer.step()
    after = weights(model)
    assert all(torch.equal(after[name], clean[name]) for name in clean)


def test_mixed_precision_gathers_the_noise() -> None:
    launch(in_mixed_precision)


def hybrid(rank_noise: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """One shard on each of two copies of the model."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(lora_mlp(), mesh=mesh)
    optimizer = flatlora(model, rank_noise=rank_noise)
    loss = model(torch.ones(1, 6)).sum()
    noisy = weights(model)
    loss.backward()
    optimizer.step()
    return noisy, [whole(p) for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("rank_noise", ["independent", "shared"])
def test_each_copy_of_a_hybrid_has_noise_of_its_own(rank_noise: str) -> None:
    (noisy, adapters), (noisy_2, adapters_2) = launch(hybrid, rank_noise)
    same = [torch.equal(noisy[name], noisy_2[name]) for name in noisy if name.endswith("weight")]
    assert same == [rank_noise == "shared"] * 2
    assert all(map(torch.equal, adapters, adapters_2))


class Failing(MLP):
    fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc1(x))
        if self.fails:
            raise ValueError("in the middle")
        return self.fc2(x)


def failing() -> None:
    """In the middle of a forward, the root's weights are gathered."""
    for explicit in (True, False):
        for inner in (True, False):
            model = with_lora(Failing(), ["fc1", "fc2"])
            if inner:
                fully_shard(model.base_model.model.fc1)
            fully_shard(model)
            clean = weights(model)
            optimizer = flatlora(model, auto=not explicit)
            model.base_model.model.fails = True
            noise = optimizer.perturbed() if explicit else nullcontext()
            with pytest.raises(ValueError, match="in the middle"), noise:
                model(torch.ones(1, 6))
            model.base_model.model.fails = False
            assert not optimizer.is_perturbed
            after = weights(model)
            assert all(torch.equal(after[name], clean[name]) for name in clean)
            with optimizer.perturbed() if explicit else nullcontext():
                model(torch.ones(1, 6)).sum().backward()
                with pytest.raises(ValueError, match="sharded"):
                    landscape.expected_loss(model, lambda model: model(torch.ones(1, 6)).sum(), sigma=0.1)
            optimizer.step()
            after = weights(model)
            assert all(torch.equal(after[name], clean[name]) for name in clean)


def ignoring() -> None:
    """Parameters that FSDP2 leaves alone must not look as if they were gathered."""
    model = lora_mlp()
    layer = model.base_model.model.fc1.base_layer
    fully_shard(layer, ignored_params={layer.bias})
    fully_shard(model)
    optimizer = flatlora(model)
    for _ in range(2):
        loss = model(torch.ones(1, 6)).sum()
        assert isinstance(layer.weight, DTensor)  # resharded after its forward
        loss.backward()
        optimizer.step()


def test_layers_go_on_to_be_resharded() -> None:
    launch(ignoring)


def test_an_exception_in_a_forward_leaves_clean_shards() -> None:
    launch(failing)


def sharded_later(late: bool, reshard_after_forward: bool | None) -> list[float]:
    """As Accelerate does: builds the optimizer, then shards and puts the new parameters into it."""
    model = lora_mlp()
    if not late:
        fully_shard(model, reshard_after_forward=reshard_after_forward)
    optimizer = flatlora(model, base=Adam, lr=1e-2)
    if late:
        names = {id(p): name for name, p in model.named_parameters()}
        fully_shard(model, reshard_after_forward=reshard_after_forward)
        new = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [new[names[id(p)]] for p in group["params"]]
    losses = []
    for _ in range(STEPS):
        loss = model(torch.ones(1, 6)).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def early_and_late() -> list[tuple[list[float], list[float]]]:
    return [(sharded_later(False, reshard), sharded_later(True, reshard)) for reshard in (None, True)]


def test_sharding_after_the_optimizer_was_built() -> None:
    for early, late in launch(early_and_late)[0]:
        assert early == late
