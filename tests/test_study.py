"""The study: its engine trains what the package trains, methods are their formulas, the report is honest."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import generalization
from flatlora_optim import FlatLoRAOptimizer, NoiseKey
from study import grid, language, report
from study.grid import Cell, Grid, Key, Results
from study.methods import METHODS, BiLoRA, EFMLoRA, FlatLoRA, LowRankFlatLoRA, Method
from study.population import AdamW, AdaptedLinear, Examples, Population
from study.tasks import Task, digits
from study.training import SIGMAS, Data, Run, calibration_error, carry_out

TARGETS = ("qkv", "proj", "fc1", "fc2")


class Recorded:
    """The package's Gaussian numbers, kept for the engine."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, int], Tensor] = {}

    def block(self, key: NoiseKey, number: int, out: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * key.step + number)
        out.normal_(generator=generator)
        self.numbers[key.step, number] = out.clone()
        return out


@pytest.fixture(scope="module")
def vit() -> digits.ViT:
    torch.manual_seed(0)
    return digits.ViT(2, width=16).requires_grad_(False)


def examples(count: int, seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    return Examples(
        (torch.randn(count, 16, 16, generator=generator),), torch.randint(5, (count,), generator=generator)
    )


def one_of(population: Population, run: int) -> dict[str, Tensor]:
    """A run's trained tensors, by the names they have in the model."""
    named = {}
    for name, module in population.model.named_modules():
        for part in ("A", "B") if isinstance(module, AdaptedLinear) else ():
            named[f"{name}.{part}"] = getattr(module, part)[run].detach().clone()
    head = population.model.get_submodule("head")
    return named | {
        "head.weight": head.weight[run].detach().clone(),
        "head.bias": head.bias[run, 0].detach().clone(),
    }


def as_peft(vit: digits.ViT, start: dict[str, Tensor]) -> nn.Module:
    """The same model with the package's own kind of adapters."""
    model = get_peft_model(copy.deepcopy(vit), LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS)))
    for name, value in start.items():
        module, _, part = name.rpartition(".")
        layer = model.base_model.model.get_submodule(module)
        with torch.no_grad():
            if module == "head":
                getattr(layer, part).copy_(value)
                getattr(layer, part).requires_grad_(True)
            else:
                getattr(layer, f"lora_{part}")["default"].weight.copy_(value)
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    named = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            named[
                name.removeprefix("base_model.model.").replace("lora_", "").replace(".default.weight", "")
            ] = p
    return named


def test_the_engine_trains_what_the_package_trains(vit: digits.ViT) -> None:
    """Fed with the same noise, for two runs at once against one after the other."""
    steps, sigma, lr, data = 6, 0.5, 0.02, examples(40)
    order = torch.Generator().manual_seed(1)
    batches = [torch.randperm(40, generator=order)[:8] for _ in range(steps)]
    population = Population(vit, [3, 4], targets=TARGETS, heads=("head",), rank=4)
    starts = [one_of(population, run) for run in range(2)]
    source = Recorded()
    by_package = []
    for start in starts:
        model = as_peft(vit, start)
        base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
        optimizer = FlatLoRAOptimizer(
            base, model, sigma=sigma, total_steps=steps, noise=source, restore="snapshot"
        )
        for index in batches:
            batch = data.take(index)
            F.cross_entropy(model(*batch.inputs), batch.labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        by_package.append(trained(model))
    assert len(source.numbers) == (steps - 1) * len(population.layers)  # none in the first step

    optimizer = AdamW(population.theta, torch.full((2,), lr), torch.full((2,), 0.1))
    method = Method(population, torch.full((2,), sigma), steps)
    for step, index in enumerate(batches):

        def numbers(layer: AdaptedLinear, step: int = step) -> Tensor:
            known = source.numbers.get((step, population.layers.index(layer)))
            return torch.zeros(1) if known is None else known[None].expand(2, -1, -1)

        batch = data.take(index.repeat(2))
        with population.noisy(numbers, method.sigma()):
            gradient = population.gradients(batch)
        optimizer.step(gradient, 1.0)
        method.after()
    for run in range(2):
        for name, value in one_of(population, run).items():
            torch.testing.assert_close(value, by_package[run][name].detach(), rtol=2e-3, atol=2e-4)
            if not name.endswith("bias"):
                assert not torch.equal(value, starts[run][name])


class Toy(Task):
    """Sixteen patches at random; the label is where their mean is largest."""

    in_domain, out_of_domain = "near", ("far", "farther")
    targets, heads, rank, classes = TARGETS, ("head",), 4, 5
    at_once = 3

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._vit = digits.ViT(2, width=16).requires_grad_(False)
        x = torch.randn(160, 16, 16, generator=torch.Generator().manual_seed(0))
        everything = Examples((x,), x.mean(1)[:, :5].argmax(1))
        self.pool = everything.take(torch.arange(100))
        self.tests = {"near": everything.take(torch.arange(100, 130))}
        self.tests |= {name: everything.take(torch.arange(130, 160)) for name in self.out_of_domain}

    def model(self) -> nn.Module:
        return self._vit


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


DATA = Data(40, 20, 0.2, 8)
STRONG = {
    "LoRA + dropout": 0.3, "LoRA + weight decay": 2.0, "LoRA + SAM": 0.5, "noise on A, B": 1.0,
    "Flat-LoRA": 0.8, "Flat-LoRA, low rank": 0.8, "Bi-LoRA": 0.5, "EFMLoRA": 0.5,
}  # fmt: skip


def trained_theta(toy: Toy, method: str, seeds: list[int], strength: float, monkeypatch: Any) -> Tensor:
    """A and B of the first adapter and the head, of all runs."""
    made: list[Population] = []
    original = toy.population
    with monkeypatch.context() as patch:
        patch.setattr(toy, "population", lambda *args: (made.append(original(*args)), made[-1])[1])
        carry_out(toy, DATA, [Run(method, 0.02, 6, strength, seed) for seed in seeds], final=False)
    (population,) = made
    parts = [value for layer in population.layers for value in (layer.A[:, :4], layer.B[:, :, :4])]
    return torch.cat([part.detach().flatten(1) for part in parts], 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_the_same_alone_and_among_others(
    toy: Toy, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    strength = STRONG.get(method, 0.0)
    both = trained_theta(toy, method, [1, 2], strength, monkeypatch)
    assert not torch.allclose(both[0], both[1], atol=1e-2)
    if method != "LoRA + dropout":  # dropout's numbers are torch's own
        alone = trained_theta(toy, method, [2], strength, monkeypatch)
        torch.testing.assert_close(alone[0], both[1], rtol=1e-2, atol=2e-3)
    if strength:
        plain = trained_theta(toy, "LoRA", [1, 2], 0.0, monkeypatch)
        assert not torch.allclose(both, plain, atol=2e-3)
        silent = trained_theta(toy, method, [1, 2], 0.0, monkeypatch)
        torch.testing.assert_close(silent, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [FlatLoRA, LowRankFlatLoRA])
def test_noise_has_the_strength_of_each_run_relative_to_its_rows(
    vit: digits.ViT, kind: type[FlatLoRA]
) -> None:
    population = Population(vit, [0, 1], targets=TARGETS)
    with torch.no_grad():
        population.theta.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    method = kind(population, torch.tensor([0.1, 0.4]), steps=10)
    method.done = 10
    squares = torch.zeros(2)
    for _ in range(30):
        with population.noisy(method.numbers, method.sigma()):
            for layer in population.layers:
                relative = (layer.noisy - layer.weight).norm(dim=2) / layer.merged().norm(dim=2)
                squares += relative.square().mean(1) / (30 * len(population.layers))
    torch.testing.assert_close(squares.sqrt(), torch.tensor([0.1, 0.4]), rtol=0.1, atol=0)


def test_bi_lora_stays_in_its_ball_and_leaves_no_second_adapter(vit: digits.ViT) -> None:
    population = Population(vit, [0, 1], targets=TARGETS, heads=("head",), rank=4, adapters=2)
    method = BiLoRA(population, torch.tensor([0.1, 1e9]), steps=3)
    optimizer = AdamW(population.theta, torch.full((2,), 0.05), torch.zeros(2))
    batch = examples(16)
    for _ in range(3):
        optimizer.step(method.gradient(batch), 1.0)
        method.after()
    norms = torch.zeros(2)
    for layer in population.layers:
        second = layer.scaling * layer.B[:, :, 4:] @ layer.A[:, 4:]
        norms += second.detach().flatten(1).norm(dim=1).square()
    assert norms[0].sqrt().item() == pytest.approx(0.1, rel=1e-4)
    assert norms[1].sqrt() > 0.2
    method.finish()
    assert not any(layer.B[:, :, 4:].any() for layer in population.layers)
    assert all(layer.B[:, :, :4].any() for layer in population.layers)


def test_bi_loras_second_adapter_climbs(vit: digits.ViT) -> None:
    population = Population(vit, [0], targets=TARGETS, rank=4, adapters=2)
    with torch.no_grad():
        population.theta.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    batch = examples(16)
    gradient = population.gradients(batch)
    turned = BiLoRA(population, torch.ones(1), steps=1).gradient(batch)
    (number, name), part = next(iter(population.where.items()))
    assert (number, name) == (0, "A")
    of_A, turned_of_A = (x[:, part].unflatten(1, (8, -1)) for x in (gradient, turned))
    torch.testing.assert_close(turned_of_A[:, :4], of_A[:, :4])
    torch.testing.assert_close(turned_of_A[:, 4:], -of_A[:, 4:])


def test_efmlora_carries_sams_step_in_the_full_weight_over_to_b(vit: digits.ViT) -> None:
    """With as many ranks as rows and columns the estimate of the gradient is exact."""
    population = Population(vit, [0], targets=("proj",), rank=16, scaling=2.0)
    with torch.no_grad():
        population.theta.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.3)
    method, batch = EFMLoRA(population, torch.tensor([0.5]), steps=1), examples(16)
    layer = population.layers[0]
    layer.noisy = layer.weight[None].clone().requires_grad_()
    (full,) = torch.autograd.grad(population.losses(batch).sum(), layer.noisy)
    layer.noisy = None
    torch.testing.assert_close(method.gradient(batch), population.gradients(batch))  # no past yet
    average = method._average[:, population.where[0, "B"]].unflatten(1, (16, 16))
    torch.testing.assert_close(
        2.0 * average @ layer.A.detach(), 0.9 * 0.5 * full / full.norm(), rtol=1e-2, atol=1e-3
    )


def test_calibration_error() -> None:
    logits = torch.tensor([[[2.0, 0.0], [2.0, 0.0], [0.0, 9.0]]])
    sure = float(torch.tensor([2.0, 0.0]).softmax(0)[0])
    very = float(torch.tensor([9.0, 0.0]).softmax(0)[0])
    (error,) = calibration_error(logits, torch.tensor([[0, 1, 1]]))
    assert error == pytest.approx((2 * abs(0.5 - sure) + abs(1 - very)) / 3, abs=1e-5)


# ---------------------------------------------------------------------- what is run, and the report

SMALL = Grid((0.01,), (2,), {name: (x,) for name, x in STRONG.items()}, (0.01, 0.02), (2,), seeds=1)
CELL = Cell("toy", "toy", DATA, SMALL, 3, 2, curve=(0.5,), fixed=(0.01, 2), methods=("LoRA", "Flat-LoRA"))


@pytest.fixture(autouse=True)
def _toy_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(grid.TASKS, "toy", Toy)


def run_all(cell: Cell, results: Results) -> list[Key]:
    made: list[Key] = []
    original = results.add
    results.add = lambda keys, rows: (made.extend(keys), original(keys, rows))[1]  # type: ignore[method-assign]
    for each, stage in grid.stages([cell], results):
        generalization.make(each, stage(), results, tqdm(disable=True), generalization.Clock(1e9))
    return made


def test_finished_runs_are_not_repeated_and_the_report_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "results" / "study.jsonl"
    made = run_all(CELL, Results(path))
    assert [key.phase for key in made].count("tuning") == 2 + 1
    assert {key.run.seed for key in made if key.phase == "tuning"}.isdisjoint(range(CELL.seeds))
    assert len([key for key in made if key.phase == "final"]) == 2 * 3
    assert not run_all(CELL, Results(path))
    report.write(tmp_path, [CELL], Results(path))
    assert "All planned runs are there" in (tmp_path / "GENERALIZATION.md").read_text(encoding="utf-8")

    lines = path.read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if json.loads(line)["phase"] == "final")
    path.write_text("\n".join(lines[:last] + lines[last + 1 :]) + "\n")
    figures = report.write(tmp_path, [CELL, replace(CELL, name="never run")], Results(path))[1:]
    text = (tmp_path / "GENERALIZATION.md").read_text(encoding="utf-8")
    assert "**Incomplete: 14 of 30 planned runs are there.**" in text
    assert "| toy | 2 of 3 |" in text
    assert "preliminary" in text
    assert all(figure.stat().st_size > 0 for figure in figures)
    assert [(key.phase, key.run.seed) for key in run_all(CELL, Results(path))] == [("final", 2)]


def row(near: float, loss: float = 0.0) -> dict[str, Any]:
    flat = dict.fromkeys(["loss", *map(str, SIGMAS)], 0.1)
    calibration = dict.fromkeys(["ECE in", "ECE out", "loss in", "loss out"], 0.1)
    tests = {"near": near, "far": near / 2, "farther": near / 2}
    rest = {"loss under way": 0.1, "seconds": 1.0, "calibration": calibration, "flatness": flat}
    return {"validation": {"score": near, "loss": loss}, "test": tests, **rest}


def test_settings_are_chosen_by_validation_and_differences_are_paired(tmp_path: Path) -> None:
    results = Results(tmp_path / "study.jsonl")
    for key in grid.tuning(CELL):
        results.add([key], [row({0.01: 0.8, 0.02: 0.9}[key.run.lr])])
    assert grid.chosen(CELL, results) == {"LoRA": (0.02, 2, 0.0), "Flat-LoRA": (0.01, 2, 0.8)}
    for seed, score in enumerate((0.1, 0.5, 0.9)):
        for key in grid.final(CELL, results, range(seed, seed + 1)):
            results.add([key], [row(score + (key.run.method == "Flat-LoRA") * (0.02 + 0.001 * seed))])
    report.write(tmp_path, [CELL], results)
    text = (tmp_path / "GENERALIZATION.md").read_text(encoding="utf-8")
    # t(1 - 0.025 / 2, 2) / sqrt(3) times the standard deviations 40 and 0.1: two comparisons
    assert "| toy | 3 | 50.0 ± 99.4 | **+2.1 ± 0.4** | 25.0 ± 49.7 | **+1.1 ± 0.2** | helps |" in text


def test_a_rule_for_sigma_is_judged_by_what_is_not_worse_than_the_best(tmp_path: Path) -> None:
    cell = replace(CELL, curve=(0.1, 0.2, 0.4, 0.8))
    results = Results(tmp_path / "study.jsonl")
    gains = {0.0: 0.0, 0.1: 0.0, 0.2: 0.05, 0.4: 0.1, 0.8: 0.0}
    for key in grid.curve(cell):
        made = row(0.5 + gains[key.run.strength] + 0.01 * key.run.seed)
        made["loss under way"] = key.run.strength
        results.add([key], [made])
    curve = report.curves(cell, results, 2, cell.curve)
    assert report.best_sigma(curve) == 0.4
    assert report.as_good(curve, 0.4) == [0.4]
    constant = report.fitted(report.rising_loss, curve)
    assert report.rising_loss(curve, constant) == 0.4
    assert report.rising_loss(curve, 0.1) == 0.2


# ---------------------------------------------------------------------- the language model


def test_last_layers_answer_as_the_whole_model_does() -> None:
    """From states that are made once, padded behind the answers, at one or at several places."""
    from types import SimpleNamespace

    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval().requires_grad_(False)

    class Tiny(language.LanguageTask):
        _loaded = model, SimpleNamespace(eos_token_id=0)
        _vocabulary = torch.tensor([4, 9])

    task = Tiny()
    rows = [[5, 6, 7, 8, 9], [5, 6, 7], [1, 2, 3, 4]]
    states = task._states(rows)
    several = task.model()(states, torch.tensor([[3, 4], [1, 2], [2, 3]]))
    last = task.model()(states, torch.tensor([4, 2, 3]))
    for i, row in enumerate(rows):
        expected = model(input_ids=torch.tensor([row])).logits[0, -2:, [4, 9]]
        torch.testing.assert_close(several[i], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last[i], expected[1], rtol=1e-4, atol=1e-5)


def test_wrong_answers_take_the_place_of_right_ones() -> None:
    class Sums(language.Arithmetic):
        pool = Examples((torch.arange(20.0)[:, None],), torch.arange(20))  # the second half is wrong

    split = Sums().split(0, train=5, validation=5, wrong=0.4)
    chosen = torch.cat([split.train.labels, split.validation.labels])
    assert [int((part.labels >= 10).sum()) for part in split] == [2, 2]
    assert len(set((chosen % 10).tolist())) == 10
    assert torch.equal(split.train.inputs[0][:, 0].long(), split.train.labels)
