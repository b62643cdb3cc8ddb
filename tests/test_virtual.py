"""Virtual mode on dense weights: the two modes check each other, for both kinds of noise in the forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import helpers
from flatlora_optim import FlatLoRAOptimizer, register
from helpers import (
    OwnLoRA,
    assert_equal_tensors,
    changed_weights,
    fingerprint,
    gradients,
    lora_convnet,
    lora_gpt2,
    lora_lm,
    lora_mlp,
    loss_of,
    mlp_batch,
    trainable,
    with_lora,
)

NOISES = ["gaussian", "low_rank"]


class Chosen:
    noise = ""


@pytest.fixture(params=NOISES, autouse=True)
def _noise(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chosen, "noise", request.param)


def flatlora(model: nn.Module, **options: Any) -> FlatLoRAOptimizer:
    return helpers.flatlora(model, **{"noise": Chosen.noise, **options})


TOKENS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


def mlp_loss(model: nn.Module) -> Tensor:
    return loss_of(model, mlp_batch())


def conv_loss(model: nn.Module) -> Tensor:
    images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return F.cross_entropy(model(images).float(), torch.tensor([0, 3]))


def lm_loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(TOKENS).flatten(0, 1).float(), TOKENS.flatten())


def gpt2_loss(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, labels=TOKENS).loss


CASES = {
    "Linear": (lora_mlp, mlp_loss),
    "Conv2d, plain and grouped": (lora_convnet, conv_loss),
    "Embedding": (lora_lm, lm_loss),
    "Conv1D": (lora_gpt2, gpt2_loss),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", ["none", "all"])
def test_the_two_modes_agree(case: str, bias: str) -> None:
    make, loss_fn = CASES[case]

    def run(mode: str, sigma: float = 0.3) -> tuple[list[float], dict[str, Tensor]]:
        model = make(bias=bias)
        optimizer = flatlora(model, mode=mode, sigma=sigma)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_fn(model)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        return losses, gradients(model)

    virtual, in_place, clean = run("virtual"), run("in_place"), run("virtual", sigma=0.0)
    assert virtual[0] == pytest.approx(in_place[0], rel=5e-6)
    assert virtual[0] != pytest.approx(clean[0], rel=1e-4)
    assert virtual[1].keys() == in_place[1].keys()
    assert any("bias" in name for name in virtual[1]) == (bias == "all")
    for name, gradient in virtual[1].items():
        torch.testing.assert_close(gradient, in_place[1][name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_never_written_and_forwards_come_back(case: str) -> None:
    make, loss_fn = CASES[case]
    model = make()
    before = fingerprint(model)
    optimizer = flatlora(model, mode="virtual")
    versions = {n: p._version for n, p in model.named_parameters() if not p.requires_grad}
    clean = loss_fn(model.eval())
    with optimizer.perturbed():
        assert loss_fn(model) != clean
        assert optimizer.memory() == 0
    assert {n: p._version for n, p in model.named_parameters() if not p.requires_grad} == versions
    assert not changed_weights(model, before)
    assert loss_fn(model) == clean
    assert not any({"forward", "flatlora_forward"} & vars(module).keys() for module in model.modules())


class ReadsTheWeight(OwnLoRA):
    """Computes with the weight itself, as fused kernels do."""

    def __init__(self) -> None:
        super().__init__(torch.randn(4, 4))
        self.linear = nn.Linear(4, 4).requires_grad_(False)
        register(self, weight="linear.weight", lora_A="lora_A", lora_B="lora_B")

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.linear.weight + self.lora_B @ self.lora_A).T


class CallsTheLayer(ReadsTheWeight):
    """Sees the noise."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ (self.lora_B @ self.lora_A).T


def test_noise_that_no_forward_sees_is_reported_once() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.reads, self.unused = CallsTheLayer(), ReadsTheWeight(), ReadsTheWeight()

        def forward(self, x: Tensor) -> Tensor:
            return self.reads(self.calls(x))

    model = Model()
    optimizer = flatlora(model, mode="virtual")
    nn.init.zeros_(model.reads.lora_B)  # a fresh adapter: its A has no gradient yet
    model.unused.lora_A.grad = torch.zeros_like(model.unused.lora_A)  # as after zero_grad(set_to_none=False)
    for warns in (True, False):
        model(torch.randn(2, 4)).square().sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        complaints = [str(w.message).partition(" because")[0] for w in caught]
        assert complaints == (["reads: the adapters learn without noise,"] if warns else [])
    optimizer = flatlora(model, mode="in_place")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()


def test_a_layer_that_is_to_have_no_noise_is_not_missed() -> None:
    model = lora_mlp()
    quiet, noisy = (trainable(layer) for layer in (model.base_model.model.fc1, model.base_model.model.fc2))
    base = torch.optim.SGD([{"params": quiet, "sigma": 0.0}, {"params": noisy}], lr=0.1)
    optimizer = FlatLoRAOptimizer(
        base, model, sigma=0.1, schedule="constant", mode="virtual", noise=Chosen.noise
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mlp_loss(model).backward()
        optimizer.step()


@pytest.mark.parametrize("before", [True, False])
def test_hooks_of_accelerate_may_come_and_go_in_the_middle_of_a_step(before: bool) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = lora_mlp()
    layer = model.base_model.model.fc1.base_layer
    clean = mlp_loss(model).item()

    def change() -> None:
        if before:
            hooks.remove_hook_from_module(layer)
        else:
            hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))

    if before:
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    optimizer = flatlora(model, mode="virtual", lr=0.0)
    loss = mlp_loss(model)
    loss.backward()
    assert loss.item() != clean
    change()
    optimizer.step()
    assert mlp_loss(model.eval()).item() == clean
    assert "flatlora_forward" not in vars(layer)
    before = not before
    change()
    assert mlp_loss(model).item() == clean


def test_hooks_of_accelerate_are_called_around_the_noise() -> None:
    """They bring the weights of an offloaded layer, for one."""
    hooks = pytest.importorskip("accelerate.hooks")
    calls = []

    class Noted(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    model = lora_mlp()
    clean = mlp_loss(model).item()
    layer = model.base_model.model.fc1.base_layer
    hooks.add_hook_to_module(layer, Noted())
    with flatlora(model, mode="virtual").perturbed():
        assert mlp_loss(model).item() != clean
    assert calls == [layer]


@pytest.mark.parametrize("hooked", [False, True])
def test_a_forward_that_somebody_replaced_comes_back(hooked: bool) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = lora_mlp()
    layer = model.base_model.model.fc1.base_layer
    layer.forward = theirs = lambda x: F.linear(x, layer.weight, layer.bias)
    if hooked:
        hooks.add_hook_to_module(layer, hooks.ModelHook())
    place = "_old_forward" if hooked else "forward"
    with flatlora(model, mode="virtual").perturbed():
        assert vars(layer)[place] is not theirs
    assert vars(layer)[place] is theirs


@pytest.mark.parametrize("had_another", [False, True])
def test_a_forward_that_is_replaced_in_the_middle_of_a_step_stays(had_another: bool) -> None:
    model = lora_mlp()
    layer = model.base_model.model.fc1.base_layer
    if had_another:
        layer.forward = lambda x: x
    with flatlora(model, mode="virtual").perturbed():
        layer.forward = theirs = lambda x: F.linear(x, layer.weight, layer.bias)
    assert vars(layer)["forward"] is theirs
    assert "flatlora_forward" not in vars(layer)


def test_sigma_zero_leaves_the_layers_own_forward_in_place() -> None:
    model = lora_mlp()
    optimizer = flatlora(model, mode="virtual", schedule="cosine", total_steps=4)
    plain = lora_mlp()
    with optimizer.perturbed():
        assert "forward" not in model.base_model.model.fc1.base_layer.__dict__
        mlp_loss(model).backward()
    mlp_loss(plain).backward()
    assert_equal_tensors(gradients(model), gradients(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_autocast(case: str, dtype: torch.dtype) -> None:
    make, loss_fn = CASES[case]

    def run(mode: str, sigma: float = 0.3) -> tuple[Tensor, Tensor]:
        model = make(bias="all")
        flat = flatlora(model, mode=mode, sigma=sigma)
        with torch.autocast("cpu", dtype):
            loss = loss_fn(model)
            loss.backward()
        flat.restore()
        return loss.detach(), torch.cat([g.flatten() for g in gradients(model).values()])

    (virtual, virtual_grads), (in_place, in_place_grads) = run("virtual"), run("in_place")
    torch.testing.assert_close(virtual, in_place, rtol=0.02, atol=0)
    assert (virtual_grads - in_place_grads).norm() < 0.02 * in_place_grads.norm()
    assert (virtual_grads - run("virtual", sigma=0.0)[1]).norm() > 0.04 * in_place_grads.norm()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "make", [lambda bias: nn.Linear(6, 5, bias), lambda bias: nn.Conv1d(6, 5, 3, bias=bias)]
)
def test_with_or_without_a_bias(make: Callable[[bool], nn.Module], bias: bool, autocast: bool) -> None:
    def run(mode: str) -> Tensor:
        torch.manual_seed(0)
        model = with_lora(nn.ModuleDict({"layer": make(bias)}), ["layer"])
        layer = model.base_model.model["layer"].base_layer
        with flatlora(model, mode=mode).perturbed(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return layer(torch.eye(6))

    virtual, in_place = run("virtual"), run("in_place")
    assert virtual.dtype == in_place.dtype
    torch.testing.assert_close(
        virtual, in_place, rtol=0.01 if autocast else 1e-5, atol=0.01 if autocast else 1e-6
    )


@pytest.mark.parametrize(
    ("make", "name", "shape"), [(lora_mlp, "fc1", (4, 6)), (lora_convnet, "conv1", (2, 3, 6, 6))]
)
def test_autocast_that_begins_after_the_forward_has_no_part_in_backward(
    make: Callable[[], nn.Module], name: str, shape: tuple[int, ...]
) -> None:
    if Chosen.noise == "low_rank":
        pytest.skip("its backward is torch's own, which follows autocast as in any layer")
    model = make()
    layer = getattr(model.base_model.model, name).base_layer
    x = torch.randn(shape, requires_grad=True)
    with flatlora(model, mode="virtual", sigma=0.3).perturbed():
        output = layer(x).square().sum()
        (expected,) = torch.autograd.grad(output, x, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            (actual,) = torch.autograd.grad(output, x)
    assert torch.equal(actual, expected)


class Twice(nn.Module):
    """Uses one layer twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Checkpointed(Twice):
    """The same, recomputed in backward."""

    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return checkpoint(super().forward, x, use_reentrant=self.use_reentrant)


def gradients_of_two_micro_batches(model: nn.Module, mode: str) -> dict[str, Tensor]:
    """Of two accumulated micro-batches with two forwards each, at one step's noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = with_lora(model, ["layer"])
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.4)
    optimizer = flatlora(model, mode=mode, sigma=0.3)
    for i in range(2):
        (model(mlp_batch(i)[0]).square().sum() + model(mlp_batch(i + 2)[0]).sum()).backward()
    optimizer.step()
    return gradients(model)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_one_noise_for_all_uses_in_a_step_and_for_recomputation(use_reentrant: bool) -> None:
    expected = gradients_of_two_micro_batches(Twice(), "in_place")
    for model in (Twice(), Checkpointed()):
        model.use_reentrant = use_reentrant
        actual = gradients_of_two_micro_batches(model, "virtual")
        for name, gradient in actual.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_a_graph_outlives_its_noise() -> None:
    """Backward after ``restore`` differentiates the noisy function that forward computed."""
    expected, actual = lora_mlp(), lora_mlp()
    with flatlora(expected, mode="virtual").perturbed():
        mlp_loss(expected).backward()
    with flatlora(actual, mode="virtual").perturbed():
        loss = mlp_loss(actual)
    loss.backward()
    assert_equal_tensors(gradients(actual), gradients(expected))


def test_compiled_model() -> None:
    def run(wrap: Callable[[nn.Module], nn.Module], sigma: float) -> list[float]:
        model = lora_mlp()
        optimizer = flatlora(model, mode="virtual", sigma=sigma, lr=0.01)
        called = wrap(model)
        losses = []
        for i in range(12):
            loss = mlp_loss(called)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            if i % 4 == 3:
                model.eval()
                with torch.no_grad():
                    losses.append(mlp_loss(called).item())
                model.train()
        return losses

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run(lambda model: torch.compile(model, backend="aot_eager"), 0.3)
    assert compiled == pytest.approx(run(lambda model: model, 0.3), rel=1e-4)
    assert compiled != pytest.approx(run(lambda model: model, 0.0), rel=1e-2)
    # A new graph per step would soon reach the recompilation limit.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < 12


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_layer_whose_forward_is_unknown_is_refused() -> None:
    model = Twice()
    model.layer = Doubling(6, 6)
    with pytest.raises(ValueError, match="virtual mode does not know the forward"):
        flatlora(with_lora(model, ["layer"]), mode="virtual")
