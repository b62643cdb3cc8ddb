"""torch.compile: the compiled graph reads the weights, noise included, and bakes none of them in."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

from flatlora_optim import FlatLoRAOptimizer

STEPS = 4
BUILDS = ["before", "after", "in place", "warmed up"]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class LoraLinear(nn.Linear):
    """In the style of loralib."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(2, inputs) / 4)
        self.lora_B = nn.Parameter(torch.randn(outputs, 2) / 4)
        self.scaling = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T * self.scaling


def with_peft() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
    return get_peft_model(Net(), config).train()


def by_hand() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    model.up, model.down = LoraLinear(8, 16), LoraLinear(16, 4)
    return model.train()


def flat_optimizer(model: nn.Module, **options: Any) -> FlatLoRAOptimizer:
    base = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.02)
    return FlatLoRAOptimizer(
        base, model, **{"sigma": 0.3, "schedule": "constant", "noise": "gaussian", **options}
    )


def compile_and_wrap(
    model: nn.Module, build: str, *, mode: str = "auto", **options: Any
) -> tuple[Any, FlatLoRAOptimizer]:
    if build == "before":
        compiled = torch.compile(model, **options)
        return compiled, flat_optimizer(compiled, mode=mode)
    if build == "warmed up":
        compiled = torch.compile(model, **options)
        compiled(inputs())  # traced before there were hooks
        return compiled, flat_optimizer(model, mode=mode)
    optimizer = flat_optimizer(model, mode=mode)
    if build == "after":
        return torch.compile(model, **options), optimizer
    model.compile(**options)
    return model, optimizer


def inputs() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def train(model: Callable[..., Any], optimizer: FlatLoRAOptimizer) -> list[float]:
    losses = []
    for _ in range(STEPS):
        loss = model(inputs()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def frozen(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if not p.requires_grad]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("make", "mode"),
    [(with_peft, "in_place"), (with_peft, "virtual"), (by_hand, "in_place")],
    ids=["peft", "peft-virtual", "by_hand"],
)
def test_same_curve_as_eager_however_it_is_compiled(make: Any, build: str, mode: str) -> None:
    eager = make()
    expected = train(eager, flat_optimizer(eager))
    model = make()
    before = frozen(model)
    compiled, optimizer = compile_and_wrap(model, build, mode=mode, backend="aot_eager")
    assert train(compiled, optimizer) == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, frozen(model), strict=True))
    # Compiled at all, and not anew for each step's noise.
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
    without_noise = make()
    plain = train(without_noise, flat_optimizer(without_noise, sigma=0.0))
    assert plain != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=["default", "reduce-overhead"])
def test_inductor_bakes_in_no_weight_even_when_it_freezes(options: dict[str, str]) -> None:
    """Freezing turns weights into constants of graphs that need no gradient."""
    eager = with_peft()
    expected = train(eager, flat_optimizer(eager))
    model = with_peft()
    with torch._inductor.config.patch(freezing=True):
        optimizer = flat_optimizer(model)
        compiled = torch.compile(model, **options)
        with torch.no_grad():
            clean = model(inputs())
        loss = compiled(inputs()).square().mean()
        assert optimizer.is_perturbed
        # First evaluation, so what is frozen now stays: between forward and backward of a step.
        with torch.no_grad():
            torch.testing.assert_close(compiled(inputs()), clean)
        assert optimizer.is_perturbed
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert [loss.item(), *train(compiled, optimizer)[:-1]] == pytest.approx(expected, rel=1e-5)


def test_fullgraph_needs_the_compiled_model_or_the_explicit_style() -> None:
    model = with_peft()
    optimizer = flat_optimizer(model)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="aot_eager", fullgraph=True)(inputs())
    optimizer.close()

    torch.compiler.reset()
    expected = train(eager := with_peft(), flat_optimizer(eager))
    model = with_peft()
    optimizer = flat_optimizer(model, auto=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses = []
    for _ in range(STEPS):
        with optimizer.perturbed():
            loss = compiled(inputs()).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_pass_without_gradients_outside_of_the_graph_is_clean() -> None:
    """An eager forward calls a compiled part of the model twice: for a reference, and to train."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = with_peft()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.reference = self.inner(x)
            return self.inner(x)

    outer, x = Outer(), inputs()
    clean = outer.inner(x).detach()
    optimizer = flat_optimizer(outer)
    outer.inner.compile(backend="eager")
    for _ in range(2):
        noisy = outer(x)
        torch.testing.assert_close(outer.reference, clean)
        assert (noisy - clean).abs().max() > 1e-3
        noisy.sum().backward()
        optimizer.restore()
