"""The procedure of benchmarks/generalization.py, on a task that takes no time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers import lora_mlp, loss_of, mlp_batch, trainable

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import generalization
from generalization import Cell, Results, Run
from study import report
from study.methods import METHODS, SAM, AdapterNoise, Method
from study.tasks import Arithmetic, Digits, Scores, Task, add_lora, endless, with_wrong_labels

LORA = METHODS[0]


class Toy(Task[tuple[Tensor, Tensor]]):
    in_domain, out_of_domain = "near", ("far", "farther")

    def model(self, seed: int) -> nn.Module:
        return lora_mlp(seed=seed)

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return (mlp_batch(seed * 100 + i, size=size) for i in range(1000))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss_of(model, batch)

    def training_loss(self, model: nn.Module) -> Tensor:
        return self.loss(model, mlp_batch(0))

    def validate(self, model: nn.Module) -> Scores:
        return {"score": 0.5, "loss": self.training_loss(model).item()}

    def test(self, model: nn.Module) -> Scores:
        loss = self.training_loss(model).item()
        return {"near": loss, "far": loss / 2, "farther": loss / 4}


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    monkeypatch.setitem(generalization.TASKS, "toy", Toy)
    return Cell(
        "toy", "toy", train=8, tests=8, steps=3, batch_size=4, learning_rates=(1e-3, 1e-2), seeds=3,
        tuning_seeds=1, flat=4, noises=2,
    )  # fmt: skip


def test_sam_steps_along_the_gradient_at_the_adversarial_point() -> None:
    model, batch = lora_mlp(), mlp_batch()
    adapters = trainable(model)
    start = [p.detach().clone() for p in adapters]
    loss_of(model, batch).backward()
    norm = torch.stack([p.grad.norm() for p in adapters]).norm()
    with torch.no_grad():
        for p in adapters:
            p.add_(p.grad * 0.05 / norm)
    model.zero_grad()
    loss_of(model, batch).backward()
    expected = [p - 0.1 * q.grad for p, q in zip(start, adapters, strict=True)]

    model = lora_mlp()
    sgd = torch.optim.SGD(trainable(model), lr=0.1)

    def closure() -> Tensor:
        sgd.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    SAM(sgd, trainable(model), rho=0.05).step(closure)
    for p, value in zip(trainable(model), expected, strict=True):
        torch.testing.assert_close(p.detach(), value)


def test_noise_on_adapters_is_relative_to_their_rows_and_taken_away() -> None:
    model = lora_mlp()
    adapters = trainable(model)
    before = [p.detach().clone() for p in adapters]
    ratios: list[Tensor] = []

    def closure() -> Tensor:
        noise = [p.detach() - q for p, q in zip(adapters, before, strict=True)]
        ratios.extend(n.norm(dim=1) / q.norm(dim=1) for n, q in zip(noise, before, strict=True))
        return torch.zeros(())

    optimizer = AdapterNoise(torch.optim.SGD(adapters, lr=0.0), adapters, sigma=0.2, steps=2, seed=0)
    optimizer.step(closure)
    assert float(torch.cat(ratios).max()) == 0  # the schedule starts at 0
    ratios.clear()
    optimizer.step(closure)
    assert 0.05 < float(torch.cat(ratios).mean()) < 0.15  # and is at sigma / 2 halfway
    assert all(torch.equal(p, q) for p, q in zip(adapters, before, strict=True))


def test_methods_differ_in_nothing_but_their_noise(cell: Cell) -> None:
    """With noise and rho too small to matter, all train the very same adapter."""
    tiny = [replace(method, sigma=method.sigma and 1e-9, rho=method.rho and 1e-9) for method in METHODS]
    task = cell.make_task()
    trained = [generalization.train(task, Run(cell, "final", method, 1e-2, 0)) for method in tiny]
    vectors = [torch.cat([p.detach().flatten() for p in trainable(model)]) for model in trained]
    for vector in vectors[1:]:
        torch.testing.assert_close(vector, vectors[0], rtol=1e-4, atol=1e-5)
    other = generalization.train(task, Run(cell, "final", LORA, 1e-2, 1))
    assert not torch.allclose(next(iter(trainable(other))), next(iter(trainable(trained[0]))))


def test_learning_rates_are_chosen_by_validation_on_seeds_of_their_own(cell: Cell, tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    tuning = generalization.tuning_runs(cell, [LORA])
    for run in tuning:
        score = {1e-3: 0.9, 1e-2: 0.8}[run.lr]
        results.add(run, {"validation": {"score": score, "loss": 1.0}})
    assert not generalization.final_runs(replace(cell, tuning_seeds=2), [LORA], results)  # not tuned yet
    final = generalization.final_runs(cell, [LORA], results)
    assert {run.lr for run in final} == {1e-3}
    assert not {run.seed for run in final} & {run.seed for run in tuning}


def test_finished_runs_are_not_repeated(cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    methods = METHODS[:2]
    generalization.carry_out([replace(cell, seeds=1)], methods, Results(path))
    first = path.read_text()
    assert len(first.splitlines()) == 2 * 2 + 2
    measured: list[Run] = []
    original = generalization.measure
    monkeypatch.setattr(
        generalization, "measure", lambda task, run: (measured.append(run), original(task, run))[1]
    )
    generalization.carry_out([cell], methods, Results(path))  # as after an interruption
    assert path.read_text().startswith(first)
    assert [(run.phase, run.seed) for run in measured] == [
        ("final", 1),
        ("final", 1),
        ("final", 2),
        ("final", 2),
    ]
    measured.clear()
    generalization.carry_out([replace(cell, steps=4, seeds=1)], methods, Results(path))
    assert len(measured) == 6  # other settings are other runs


def test_the_report_is_paired_by_seed_and_names_what_is_missing(cell: Cell, tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    methods = (LORA, Method("Flat-LoRA 0.1", sigma=0.1))
    flat = dict.fromkeys(("loss", *report.FLATNESS), 1.0)
    for run in generalization.tuning_runs(cell, methods):
        results.add(run, {"validation": {"score": run.lr, "loss": 1.0}, "seconds": 1})
    for seed, score in enumerate((0.1, 0.5, 0.9)):
        for method, better in zip(methods, (0.0, 0.02 + 0.001 * seed), strict=True):
            near = score + better
            measured = {"test": {"near": near, "far": near / 2, "farther": near / 2}, "flatness": flat}
            results.add(Run(cell, "final", method, 1e-2, seed), {**measured, "seconds": 1})
    results.add(Run(cell, "final", LORA, 1e-2, 3), {**measured, "seconds": 1})  # LoRA alone has seed 3
    missing = replace(cell, name="never run", steps=99)
    # From before the grid of learning rates was extended:
    results.add(Run(cell, "final", LORA, 1e-3, 0), {"seconds": 1})
    cells = [generalization.comparison(spec, methods, results) for spec in (cell, missing)]
    path, figure = report.write(tmp_path, cells)
    text = path.read_text(encoding="utf-8")
    assert figure.stat().st_size > 0
    # t(0.975, 2) / sqrt(3) times the standard deviations 40 and 0.1
    assert "| toy: in domain | 50.0 ± 99.4 | **+2.1 ± 0.2** |" in text
    assert "| toy | 10 of 10 | 3 of 3 seeds |" in text
    assert "| never run | 0 of 10 | **left out** |" in text


def test_wrong_labels_and_data_order() -> None:
    labels = torch.arange(100) % 5
    noisy = with_wrong_labels(labels, 5, 0.2)
    assert int((noisy != labels).sum()) == 20
    assert set(noisy.tolist()) == set(range(5))
    batches = endless(10, 4, seed=1)
    epoch = [next(batches), next(batches)]
    assert len({i for batch in epoch for i in batch}) == 8
    assert next(endless(10, 4, seed=1)) == epoch[0] != next(endless(10, 4, seed=2))


def test_digits_keep_training_validation_and_test_apart() -> None:
    task = Digits(train=50, tests=400, flat=10, label_noise=0.2)
    images = {name: {tuple(x.flatten().tolist()) for x in task._data[name][0]} for name in task._data}
    assert [len(task._data[name][0]) for name in ("train", "validation", "test")] == [50, 200, 400]
    assert not images["train"] & images["test"]
    assert not images["validation"] & images["test"]
    assert not images["old"] & images["train"]
    clean = Digits(train=50, tests=400, flat=10)
    assert torch.equal(task._data["test"][1], clean._data["test"][1])
    assert int((task._data["train"][1] != clean._data["train"][1]).sum()) == 10


def test_the_answers_are_predicted_as_from_the_whole_question() -> None:
    """What all questions begin with is computed once, and the rest is padded behind it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    model = add_lora(
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)), ["q_proj", "up_proj"], 2, 0
    )
    batch = [([5, 6, 7, 8, 9, 1, 2], 5), ([5, 6, 7, 9, 3], 4), ([5, 6, 7, 3, 3, 3, 3, 4], 7)]
    logits, labels = Arithmetic._predictions(model, batch)
    for row, (tokens, start) in enumerate(batch):
        answer = labels[row] != -100
        assert labels[row][answer].tolist() == tokens[start:]
        expected = model(input_ids=torch.tensor([tokens])).logits[0, start - 1 : -1]
        torch.testing.assert_close(logits[row][answer], expected, rtol=1e-5, atol=1e-6)
