from __future__ import annotations

import builtins
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer, NoiseTable, find_targets, landscape
from flatlora_optim.landscape.surroundings import measuring
from helpers import (
    NORM_ERROR,
    assert_equal_tensors,
    changed_weights,
    fingerprint,
    flatlora,
    gradients,
    lora_gpt2,
    lora_lm,
    lora_mlp,
    loss_of,
    mlp_batch,
    trainable,
    untouched_rng,
    with_lora,
)

silent: dict[str, Any] = {"progress": False}

MEASUREMENTS: dict[str, Callable[..., Any]] = {
    "expected_loss": partial(landscape.expected_loss, sigma=0.1, samples=2, **silent),
    "slice_1d": partial(landscape.slice_1d, points=3, **silent),
    "slice_2d": partial(landscape.slice_2d, points=3, **silent),
    "trace, autograd": partial(landscape.hessian_trace, samples=2, method="autograd", **silent),
    "trace, differences": partial(landscape.hessian_trace, samples=2, method="differences", **silent),
    "top_eigenvalue": partial(landscape.top_eigenvalue, tolerance=0.1, **silent),
}
FOR_QUANTIZED = ("expected_loss", "slice_1d", "slice_2d", "trace, differences")


class Quadratic:
    """The squared error of one Linear: its Hessian in the weight is ``kron(I, 2 X'X / (N m))``."""

    def __init__(self, inputs: int = 5, outputs: int = 7, examples: int = 12) -> None:
        torch.manual_seed(3)
        self.model = with_lora(nn.Sequential(nn.Linear(inputs, outputs)), ["0"])
        self.x, self.y = torch.randn(examples, inputs), torch.randn(examples, outputs)
        self.outputs = outputs
        self.block = 2 * self.x.double().T @ self.x.double() / (examples * outputs)

    def loss(self, model: nn.Module) -> Tensor:
        return F.mse_loss(model(self.x), self.y)

    def merged(self) -> Tensor:
        layer = self.model.base_model.model[0]
        return (layer.base_layer.weight + layer.get_delta_weight("default")).detach()


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
        self.fc2 = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
        self.untargeted = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.untargeted(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


def quantized_model() -> nn.Module:
    torch.manual_seed(0)
    return with_lora(Quantized().to("cpu"), ["fc1", "fc2"], r=4)


def quantized_loss(model: nn.Module) -> Tensor:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    return model(x).square().mean()


def mlp_loss(model: nn.Module) -> Tensor:
    return loss_of(model, mlp_batch())


def storage(model: nn.Module) -> dict[str, Tensor]:
    """The bits of every parameter, quantized or not."""
    return {n: p.detach().clone().view(torch.uint8) for n, p in model.named_parameters()}


# ------------------------------------------------------------------ values


def test_expected_loss_is_that_of_the_noise_the_optimizer_puts_on() -> None:
    model = lora_mlp().eval()
    measured = landscape.expected_loss(model, mlp_loss, sigma=0.1, samples=3, seed=1, **silent)
    optimizer = flatlora(model, sigma=0.1, seed=1, lr=0.0)
    by_hand = []
    for _ in range(3):
        with optimizer.perturbed():
            by_hand.append(mlp_loss(model).item())
        optimizer.step()
    assert measured.samples.tolist() == by_hand
    assert measured.at_minimum == mlp_loss(model).item() != by_hand[0]
    assert measured.mean == pytest.approx(sum(by_hand) / 3)
    assert measured.increase == pytest.approx(measured.mean - measured.at_minimum)
    spread = sum((loss - measured.mean) ** 2 for loss in by_hand) / 2
    assert measured.standard_error == pytest.approx(math.sqrt(spread / 3))
    other = landscape.expected_loss(model, mlp_loss, sigma=0.1, samples=3, seed=2, **silent)
    assert not set(other.samples.tolist()) & set(by_hand)


def test_expected_loss_of_a_quadratic_is_known() -> None:
    q, sigma = Quadratic(), 1.0
    measured = landscape.expected_loss(q.model, q.loss, sigma=sigma, samples=1000, **silent)
    row_variances = (sigma * q.merged().norm(dim=1)) ** 2 / q.merged().shape[1]
    expected = float(row_variances.sum() * q.block.trace()) / 2
    assert abs(measured.increase - expected) < 4 * measured.standard_error
    assert measured.standard_error < 0.05 * expected


@pytest.mark.parametrize("make", [lora_mlp, lora_gpt2, lora_lm], ids=["mlp", "transposed", "embedding"])
def test_slices_run_along_filter_normalized_directions(make: Callable[[], nn.Module]) -> None:
    model = make()
    seen: list[list[Tensor]] = []
    targets = find_targets(model).targets

    def record(model: nn.Module) -> Tensor:
        seen.append([t.weight.dense(torch.float32) for t in targets])
        return torch.zeros(())

    landscape.slice_2d(model, record, radius=0.5, points=3, seed=4, **silent)
    origin, first, second, both = (seen[i] for i in (4, 7, 5, 8))
    for i, target in enumerate(targets):
        rows = 1 - target.weight.row_dim
        norms = (origin[i] + delta_of(target)).norm(dim=rows)
        d1, d2 = first[i] - origin[i], second[i] - origin[i]
        for d in (d1, d2):
            torch.testing.assert_close(d.norm(dim=rows), 0.5 * norms, rtol=NORM_ERROR, atol=1e-6)
        assert abs(float((d1 * d2).sum() / (d1.norm() * d2.norm()))) < 0.9
        torch.testing.assert_close(both[i], origin[i] + d1 + d2, rtol=1e-5, atol=1e-6)
    seen.clear()
    landscape.slice_1d(model, record, radius=1.0, points=5, seed=4, **silent)
    for line, plane, middle in zip(seen[3], first, origin, strict=True):
        assert torch.equal(line, plane)
        assert torch.equal(seen[2][0], origin[0])
        assert not torch.equal(line, middle)


def delta_of(target: Any) -> Tensor:
    left, right, scaling = target.delta()
    product = scaling * left @ right
    return product.T if target.weight.row_dim else product


def test_a_slice_through_the_minimum_of_a_quadratic_is_its_parabola() -> None:
    q = Quadratic()
    curve = landscape.slice_1d(q.model, q.loss, radius=1.0, points=9, **silent)
    a, losses = curve.coordinates, curve.losses
    assert a.tolist() == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]
    assert float(losses[4]) == pytest.approx(q.loss(q.model).item(), rel=1e-6)
    fit = torch.linalg.lstsq(torch.stack([a**0, a, a**2], 1), losses[:, None]).solution
    torch.testing.assert_close(torch.stack([a**0, a, a**2], 1) @ fit, losses[:, None], rtol=1e-5, atol=1e-6)
    plane = landscape.slice_2d(q.model, q.loss, radius=1.0, points=9, **silent)
    assert torch.equal(plane.losses[:, 4], losses)
    assert not torch.equal(plane.losses[4, :], losses)


@pytest.mark.parametrize("method", ["autograd", "differences"])
def test_trace_of_a_quadratic(method: str) -> None:
    q = Quadratic()
    trace = landscape.hessian_trace(q.model, q.loss, samples=400, method=method, **silent)
    expected = float(q.block.trace()) * q.outputs
    assert abs(trace.mean - expected) < 4 * trace.standard_error
    assert trace.standard_error < 0.05 * expected


def test_both_ways_to_the_trace_agree_sample_by_sample() -> None:
    model = lora_mlp()
    ways = [
        landscape.hessian_trace(model, mlp_loss, samples=4, method=method, **silent).samples
        for method in ("autograd", "differences")
    ]
    torch.testing.assert_close(*ways, rtol=0.03, atol=1e-2)


def test_top_eigenvalue_of_a_quadratic() -> None:
    q = Quadratic()
    expected = float(torch.linalg.eigvalsh(q.block)[-1])
    top = landscape.top_eigenvalue(q.model, q.loss, tolerance=1e-6, **silent)
    assert top.converged
    assert top.value == pytest.approx(expected, rel=1e-3)


def test_top_eigenvalue_is_the_largest_also_when_a_negative_one_dominates() -> None:
    q = Quadratic()

    def saddle(model: nn.Module) -> Tensor:
        return q.loss(model) - 2 * model(q.x[:1]).square().mean()

    block = q.block - 4 * q.x[:1].double().T @ q.x[:1].double() / q.outputs
    eigenvalues = torch.linalg.eigvalsh(block)
    assert -eigenvalues[0] > eigenvalues[-1] > 0
    top = landscape.top_eigenvalue(q.model, saddle, tolerance=1e-7, iterations=500, **silent)
    assert top.value == pytest.approx(float(eigenvalues[-1]), rel=1e-2)


def diagonal(*eigenvalues: float) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A loss whose Hessian in the weight has these eigenvalues, and others between 0 and 1."""
    curvature = torch.rand(16, 16)
    curvature.view(-1)[: len(eigenvalues)] = torch.tensor(eigenvalues)
    model = with_lora(nn.Sequential(nn.Linear(16, 16, bias=False)), ["0"])
    return model, lambda model: 0.5 * (model(torch.eye(16)).T.square() * curvature).sum()


@pytest.mark.parametrize("seed", range(3))
def test_top_eigenvalue_is_not_what_two_others_agree_on_for_a_while(seed: int) -> None:
    model, loss = diagonal(5.0, -20.0)
    top = landscape.top_eigenvalue(model, loss, iterations=1000, seed=seed, **silent)
    assert top.converged
    assert top.value == pytest.approx(5.0, rel=2e-3)
    model, loss = diagonal(10.0, -9.99)
    with pytest.warns(UserWarning, match="no convergence"):
        assert not landscape.top_eigenvalue(model, loss, seed=seed, **silent).converged


def test_a_tied_weight_is_measured_if_any_of_its_adapters_is_active() -> None:
    model = lora_lm(tied=True, targets=("embed", "lm_head"))
    model.base_model.model.embed.enable_adapters(False)
    tokens = torch.arange(6).view(2, 3)
    around = landscape.expected_loss(
        model, lambda model: model(tokens).square().mean(), sigma=0.5, samples=2, **silent
    )
    assert around.samples.tolist() != [around.at_minimum] * 2


def test_scripted_modules_are_left_alone() -> None:
    model = lora_mlp()
    model.scripted = torch.jit.script(nn.Linear(2, 2))
    landscape.expected_loss(model, mlp_loss, sigma=0.1, samples=1, **silent)


def test_dora_is_not_differentiated_twice() -> None:
    model = lora_mlp(use_dora=True)
    auto, differences = (
        landscape.hessian_trace(model, mlp_loss, samples=2, method=method, **silent).samples
        for method in ("auto", "differences")
    )
    assert torch.equal(auto, differences)
    with pytest.raises(ValueError, match=r"fc1 has DoRA.*method='differences'"):
        landscape.top_eigenvalue(model, mlp_loss, **silent)


def test_an_unfinished_power_iteration_says_so() -> None:
    q = Quadratic()
    with pytest.warns(UserWarning, match="no convergence"):
        top = landscape.top_eigenvalue(q.model, q.loss, iterations=1, **silent)
    assert not top.converged
    assert top.iterations == 1


def test_fused_attention_has_a_hessian() -> None:
    model = lora_gpt2().eval()
    tokens = torch.arange(8)[None]

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:])

    double = landscape.hessian_trace(model, loss, samples=2, method="autograd", **silent).samples
    # Its weights are tiny: a small step would drown in the rounding of the loss.
    differences = landscape.hessian_trace(
        model, loss, samples=2, method="differences", step=0.3, **silent
    ).samples
    torch.testing.assert_close(double, differences, rtol=0.05, atol=0.05)


# ------------------------------------------------------------------ quantized weights


def test_quantized_weights_get_the_noise_of_the_optimizer() -> None:
    model = quantized_model()
    measured = landscape.expected_loss(model, quantized_loss, sigma=0.1, samples=1, seed=1, **silent)
    optimizer = FlatLoRAOptimizer(
        torch.optim.SGD(trainable(model)), model, sigma=0.1, schedule="constant", seed=1
    )
    with optimizer.perturbed():
        # With gradients, the thin products are added elsewhere than without.
        assert float(measured.samples[0]) == pytest.approx(float(quantized_loss(model)), rel=1e-6)


def test_repacked_weights_are_measured_alike_and_stay_repacked() -> None:
    """An evaluation on a CPU with AVX512-BF16 repacks 4-bit weights for a kernel of bfloat16."""
    model = quantized_model().eval()
    with torch.no_grad():
        quantized_loss(model)
    before = storage(model)
    measured = landscape.expected_loss(model, quantized_loss, sigma=0.0, samples=1, **silent)
    assert measured.increase == 0
    assert_equal_tensors(storage(model), before)


def test_quantized_curvature_is_that_of_the_dequantized_model() -> None:
    model = quantized_model()
    dense = with_lora(
        nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()), ["0", "2"], r=4
    )
    last = find_weight(model.base_model.model.untargeted)
    with torch.no_grad():
        for ours, theirs in zip(find_targets(dense).targets, find_targets(model).targets, strict=True):
            ours.weight.tensor.copy_(theirs.weight.dense(torch.float32))
            ours.layer.base_layer.bias.copy_(theirs.layer.base_layer.bias)
            for name in ("lora_A", "lora_B"):
                getattr(ours.layer, name)["default"].load_state_dict(
                    getattr(theirs.layer, name)["default"].state_dict()
                )

    def dense_loss(model: nn.Module) -> Tensor:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        return F.linear(model(x), last, quantized.untargeted.bias).square().mean()

    quantized = model.base_model.model
    trace = landscape.hessian_trace(model, quantized_loss, samples=4, **silent).samples
    expected = landscape.hessian_trace(dense, dense_loss, samples=4, method="autograd", **silent).samples
    torch.testing.assert_close(trace, expected, rtol=0.05, atol=1e-3)


def find_weight(layer: nn.Module) -> Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def test_power_iteration_on_quantized_weights_names_the_alternative() -> None:
    with pytest.raises(ValueError, match=r"fc1 is bnb-4bit.*method='differences'"):
        landscape.top_eigenvalue(quantized_model(), quantized_loss, **silent)


# ------------------------------------------------------------------ nothing is left behind


@pytest.mark.parametrize("measure", MEASUREMENTS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "quantized"])
def test_nothing_is_left_behind(measure: str, kind: str) -> None:
    if kind == "quantized" and measure not in FOR_QUANTIZED:
        pytest.skip("differentiates twice")
    model = quantized_model() if kind == "quantized" else lora_mlp(getattr(torch, kind))
    model.train()
    inner = list(model.modules())[-1].eval()

    def random_loss(model: nn.Module) -> Tensor:
        assert not any(m.training for m in model.modules() if isinstance(m, nn.Dropout) or m is model)
        losses.append(torch.rand(()))
        dtype = torch.float32 if kind == "quantized" else getattr(torch, kind)
        x = torch.randn(8, 64 if kind == "quantized" else 6).to(dtype)
        return model(x).float().square().mean()

    losses: list[Tensor] = []
    before, frozen = storage(model), [p.requires_grad for p in model.parameters()]
    with untouched_rng():
        MEASUREMENTS[measure](model, random_loss)
    assert_equal_tensors(storage(model), before)
    assert frozen == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model.modules()] == [m is not inner for m in model.modules()]
    assert len({float(loss) for loss in losses}) == 1  # each evaluation draws the same data


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("measure", MEASUREMENTS)
@pytest.mark.parametrize("kind", ["dense", "quantized"])
def test_nothing_is_left_behind_by_an_exception(measure: str, kind: str, error: type[BaseException]) -> None:
    if kind == "quantized" and measure not in FOR_QUANTIZED:
        pytest.skip("differentiates twice")
    model = quantized_model() if kind == "quantized" else lora_mlp()
    before = storage(model)
    forwards = {name: m.__dict__.get("forward") for name, m in model.named_modules()}
    calls = 0

    def failing(model: nn.Module) -> Tensor:
        nonlocal calls
        calls += 1
        torch.rand(())
        if calls == 2 or measure in ("trace, autograd", "top_eigenvalue"):
            raise error("in the middle")
        return quantized_loss(model) if kind == "quantized" else mlp_loss(model)

    with untouched_rng(), pytest.raises(error, match="in the middle"):
        MEASUREMENTS[measure](model, failing)
    assert_equal_tensors(storage(model), before)
    assert forwards == {name: m.__dict__.get("forward") for name, m in model.named_modules()}
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize("measure", MEASUREMENTS)
@pytest.mark.parametrize("mode", ["auto", "virtual"])
def test_an_attached_optimizer_does_not_notice(measure: str, auto: bool, mode: str) -> None:
    """Measured in the middle of its step, with a backward still to come."""
    results, grads = [], []
    for disturbed in (False, True):
        model = lora_mlp().train()
        expected = MEASUREMENTS[measure](model, mlp_loss)
        optimizer = flatlora(model, auto=auto, mode=mode)
        if not auto:
            optimizer.perturb()
        loss = mlp_loss(model)
        perturbed = fingerprint(model)
        if disturbed:
            results = [expected, MEASUREMENTS[measure](model, mlp_loss)]
            assert optimizer.is_perturbed
        assert not changed_weights(model, perturbed)
        loss.backward()
        grads.append(gradients(model))
        optimizer.step()
    assert repr(results[0]) == repr(results[1])
    assert_equal_tensors(grads[1], grads[0])


def test_a_pending_graph_of_the_clean_model_stays_valid() -> None:
    model = lora_mlp()
    loss = mlp_loss(model)
    landscape.expected_loss(model, mlp_loss, sigma=0.1, samples=1, **silent)
    loss.backward()
    assert gradients(model)


# ------------------------------------------------------------------ errors and plots


def test_errors_name_what_is_wrong() -> None:
    model = lora_mlp()
    with pytest.raises(ValueError, match="no active LoRA adapter found in Linear"):
        landscape.slice_1d(nn.Linear(3, 3), mlp_loss, **silent)
    with pytest.raises(TypeError, match=r"scalar tensor, got \(4, 5\)"):
        landscape.slice_1d(model, lambda model: model(mlp_batch()[0]), **silent)
    with pytest.raises(TypeError, match="scalar tensor, got float"):
        landscape.slice_1d(model, lambda model: float(mlp_loss(model)), **silent)
    with pytest.raises(ValueError, match="sigma must be finite"):
        landscape.expected_loss(model, mlp_loss, sigma=-1.0, **silent)
    with pytest.raises(ValueError, match="radius"):
        landscape.slice_1d(model, mlp_loss, radius=0.0, **silent)
    with pytest.raises(ValueError, match="points"):
        landscape.slice_2d(model, mlp_loss, points=1, **silent)
    for step in (0.0, math.nan):
        with pytest.raises(ValueError, match="step"):
            landscape.hessian_trace(model, mlp_loss, step=step, **silent)
    with pytest.raises(ValueError, match="method"):
        landscape.hessian_trace(model, mlp_loss, method="magic", **silent)
    for tolerance in (-1.0, math.nan):
        with pytest.raises(ValueError, match="tolerance"):
            landscape.top_eigenvalue(model, mlp_loss, tolerance=tolerance, **silent)
    with pytest.raises(TypeError, match="noise must be one of"):
        landscape.expected_loss(model, mlp_loss, sigma=0.1, noise=NoiseTable, **silent)
    measures = landscape.slice_1d, landscape.slice_2d, landscape.hessian_trace, landscape.top_eigenvalue
    for measure in (*measures, partial(landscape.expected_loss, sigma=0.1)):
        with pytest.raises(TypeError, match="seed must be an int"):
            measure(model, mlp_loss, seed=1.5, **silent)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        landscape.slice_1d(model, mlp_loss, **silent)


def test_progress_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    model = lora_mlp()
    landscape.slice_1d(model, mlp_loss, points=3)
    assert "slice" in capsys.readouterr().err
    landscape.slice_1d(model, mlp_loss, points=3, progress=False)
    assert not capsys.readouterr().err


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_without_tqdm_it_is_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without("tqdm", monkeypatch)
    landscape.slice_1d(lora_mlp(), mlp_loss, points=3)
    assert not capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    curve = landscape.slice_1d(lora_mlp(), mlp_loss, points=3, **silent)
    without("matplotlib", monkeypatch)
    with pytest.raises(ImportError, match=r"flatlora-optim\[plot\]"):
        landscape.plot_slice_1d(curve)


@pytest.fixture
def pyplot() -> Iterator[Any]:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def band(ax: Any, number: int = 0) -> tuple[float, float]:
    """Lowest and highest point of a band."""
    ys = ax.collections[number].get_paths()[0].vertices[:, 1]
    return float(ys.min()), float(ys.max())


def estimate(sigma: float, increase: float, *draws: float) -> landscape.ExpectedLoss:
    return landscape.ExpectedLoss(
        torch.tensor(draws or (0.0,), dtype=torch.float64) + 1 + increase, 1.0, sigma
    )


def test_plot_of_expected_loss_has_bands_over_draws_or_over_models(pyplot: Any) -> None:
    one = estimate(0.1, 0.5, -0.1, 0.0, 0.1)
    ax = landscape.plot_expected_loss([one])
    half = 4.30 * 0.1 / math.sqrt(3)
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([0.5])
    assert band(ax) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-3)

    models = [estimate(sigma, sigma + x) for x in (-0.1, 0.0, 0.1) for sigma in (0.4, 0.2)]
    ax = landscape.plot_expected_loss({"LoRA": models, "Flat-LoRA": [estimate(0.2, 0.1)]})
    assert ax.lines[0].get_xdata().tolist() == [0.2, 0.4]
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([0.2, 0.4])
    assert band(ax) == pytest.approx((0.2 - half, 0.4 + half), rel=1e-3)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["LoRA", "Flat-LoRA"]
    assert "sigma" in ax.get_xlabel()


def test_plot_of_slices_is_the_rise_with_a_band_over_directions(pyplot: Any) -> None:
    model = lora_mlp()
    slices = [landscape.slice_1d(model, mlp_loss, points=5, seed=seed, **silent) for seed in range(3)]
    ax = landscape.plot_slice_1d({"LoRA": slices, "Flat-LoRA": slices[0]}, sigma=0.25)
    mean = sum(s.losses for s in slices) / 3 - mlp_loss(model).item()
    assert ax.lines[0].get_ydata().tolist() == pytest.approx(mean.tolist(), abs=1e-6)
    assert ax.lines[0].get_ydata()[2] == pytest.approx(0, abs=1e-6)  # at W
    assert len(ax.collections) == 1  # a single direction has no band
    assert {line.get_xdata()[0] for line in ax.lines[2:]} == {-0.25, 0.25}
    assert [text.get_text() for text in ax.texts] == [r"$\pm\sigma$ "]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["LoRA", "Flat-LoRA"]

    own = pyplot.subplots()[1]
    assert landscape.plot_slice_1d(slices[0], own) is own
    assert own.get_legend() is None


def test_planes_of_several_models_share_their_scale(pyplot: Any) -> None:
    model = lora_mlp()
    plane = landscape.slice_2d(model, mlp_loss, points=5, **silent)
    steeper = replace(plane, losses=plane.at_minimum + 3 * (plane.losses - plane.at_minimum))
    left, right = landscape.plot_slice_2d({"LoRA": steeper, "Flat-LoRA": plane})
    scales = [ax.collections[0].get_clim() for ax in (left, right)]
    assert scales[0] == scales[1]
    assert left.get_title() == "LoRA"
    assert len(left.figure.axes) == 3  # one colorbar for both
    assert len(left.collections) == 2  # filled, and lines
    levels = left.collections[1].levels
    assert levels[0] <= 0
    assert levels[-1] == pytest.approx(float(steeper.losses.max()) - plane.at_minimum, rel=1e-6)
    assert {f"{level:.0e}"[0] for level in levels[1:-1]} <= {"1", "2", "5"}

    ax = landscape.plot_slice_2d(plane)
    assert ax.get_xlabel() == "direction 1"
    assert len(ax.figure.axes) == 2
    own = pyplot.subplots()[1]
    assert landscape.plot_slice_2d(plane, own) is own
    with pytest.raises(ValueError, match="2 planes need as many axes, got 1"):
        landscape.plot_slice_2d({"LoRA": plane, "Flat-LoRA": plane}, [own])


def test_plots_can_be_read_at_half_size(pyplot: Any) -> None:
    ax = landscape.plot_expected_loss({"LoRA": [estimate(0.1, 0.5)]})
    texts = [ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_legend().get_texts()]
    assert min(text.get_fontsize() for text in texts) / ax.figure.get_figwidth() >= 2.5  # points an inch


def test_norms_are_exact_under_autocast() -> None:
    model, loss_fn = lora_mlp(), partial(loss_of, batch=mlp_batch())
    with measuring(model, loss_fn) as at:
        expected = at.norms
    with torch.autocast("cpu", torch.bfloat16), measuring(model, loss_fn) as at:
        assert all(torch.equal(a, b) for a, b in zip(at.norms, expected, strict=True))
