"""Trains a batch of runs and measures them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .methods import METHODS, normal
from .population import AdamW, AdaptedLinear, Examples, Population
from .tasks import Split, Task, accuracy, digits

SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""At which the increase of the training loss is measured."""
NOISES = 4
"""Draws at each; the same for all runs."""
CHECKS = 12
"""How often early stopping looks at validation data."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training. Runs of the same method and number of steps can be batched."""

    method: str
    lr: float
    steps: int
    strength: float
    seed: int


@dataclass(frozen=True)
class Data:
    """How much each run learns from."""

    train: int
    validation: int
    wrong: float
    batch: int


def carry_out(task: Task, data: Data, runs: Sequence[Run], *, final: bool) -> list[Row]:
    """Trains these runs at once; ``final`` ones are tested as well.

    Returns:
        For each run, its scores as fractions, losses in nats.
    """
    start = time.perf_counter()
    splits = [task.split(run.seed, data.train, data.validation, data.wrong) for run in runs]
    population, losses = train(task, data, runs, splits)
    rows = [{"validation": v} for v in validate(population, splits)]
    if final:
        for row, measured in zip(rows, examine(task, population, splits), strict=True):
            row |= measured
    seconds = round((time.perf_counter() - start) / len(runs), 3)
    return [
        row | {"loss under way": loss, "seconds": seconds} for row, loss in zip(rows, losses, strict=True)
    ]


def train(
    task: Task, data: Data, runs: Sequence[Run], splits: Sequence[Split]
) -> tuple[Population, list[float]]:
    """Returns the trained runs, and their losses, with noise, over the last tenth of the steps."""
    (name,), (steps,) = {run.method for run in runs}, {run.steps for run in runs}
    method_class = METHODS[name]
    population = task.population([run.seed for run in runs], method_class.adapters)
    strength, lr = population.theta.new_tensor([(run.strength, run.lr) for run in runs]).T
    method = method_class(population, strength, steps)
    optimizer = AdamW(population.theta, lr, method.weight_decay)
    batches = [digits.endless(data.train, data.batch, run.seed) for run in runs]
    warmup = max(1, steps // 10)
    keeper = Keeper(population, splits) if name == "early stopping" else None
    last = torch.zeros_like(lr)
    for step in range(steps):
        batch = together(splits, [torch.tensor(next(b)) for b in batches])
        optimizer.step(
            method.gradient(batch), min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
        )
        method.after()
        if step >= steps - max(1, steps // 10):
            last += population.last_losses / max(1, steps // 10)
        if keeper and (step + 1) % max(1, steps // CHECKS) == 0:
            keeper.look()
    method.finish()
    if keeper:
        keeper.restore()
    return population, [round(loss, 5) for loss in last.tolist()]


class Keeper:
    """Early stopping: keeps each run's parameters that were best on its validation data."""

    def __init__(self, population: Population, splits: Sequence[Split]) -> None:
        self.population, self.splits = population, splits
        self.best = population.theta.new_full((len(population),), -1.0)
        self.kept = population.theta.clone()

    def look(self) -> None:
        scores = self.best.new_tensor([v["score"] for v in validate(self.population, self.splits)])
        better = scores > self.best
        self.kept = torch.where(better[:, None], self.population.theta, self.kept)
        self.best = torch.maximum(scores, self.best)

    @torch.no_grad()
    def restore(self) -> None:
        self.population.theta.copy_(self.kept)


def together(splits: Sequence[Split], indices: Sequence[Tensor]) -> Examples:
    """Flat training examples of all runs."""
    parts = [split.train.take(index) for split, index in zip(splits, indices, strict=True)]
    inputs = tuple(torch.cat(columns) for columns in zip(*(part.inputs for part in parts), strict=True))
    return Examples(inputs, torch.cat([part.labels for part in parts]))


# ---------------------------------------------------------------------- measuring


@torch.no_grad()
def logits_of(population: Population, parts: Sequence[Examples], piece: int = 50) -> Tensor:
    """Logits of each run on its own examples, equally many: shape (runs, examples, ...)."""
    results = []
    for start in range(0, len(parts[0]), piece):
        index = torch.arange(start, min(start + piece, len(parts[0])))
        flat = [part.take(index) for part in parts]
        inputs = tuple(torch.cat(columns) for columns in zip(*(part.inputs for part in flat), strict=True))
        logits = population.model(*inputs)
        results.append(logits.unflatten(0, (len(parts), -1)))
    return torch.cat(results, 1)


def validate(population: Population, splits: Sequence[Split]) -> list[dict[str, float]]:
    """Score and loss on validation data, whose labels are as wrong as those of training."""
    parts = [split.validation for split in splits]
    logits = logits_of(population, parts)
    labels = torch.stack([part.labels for part in parts])
    scores, losses = accuracy(logits, labels).tolist(), cross_entropy(logits, labels).tolist()
    return [{"score": rounded(s), "loss": rounded(x)} for s, x in zip(scores, losses, strict=True)]


def examine(task: Task, population: Population, splits: Sequence[Split]) -> list[Row]:
    """All that is reported of finished runs."""
    runs = len(population)
    tests: list[dict[str, float]] = [{} for _ in range(runs)]
    calibration: list[dict[str, float]] = [{} for _ in range(runs)]
    for name, examples in task.tests.items():
        examples = examples.to(task.device)
        labels = examples.labels.expand(runs, *examples.labels.shape)
        logits = logits_of(population, [examples] * runs)
        where = "in" if name == task.in_domain else "out"
        for i, (score, loss, error) in enumerate(
            zip(
                accuracy(logits, labels).tolist(),
                cross_entropy(logits, labels).tolist(),
                calibration_error(logits, labels),
                strict=True,
            )
        ):
            tests[i][name] = rounded(score)
            for key, value in (("loss", loss), ("ECE", error)):
                share = 1 if where == "in" else 1 / len(task.out_of_domain)
                calibration[i][f"{key} {where}"] = calibration[i].get(f"{key} {where}", 0.0) + share * value
    remembered = task.remembered(population)
    rows: list[Row] = []
    for i, flat in enumerate(flatness(population, splits, task.flatness_examples)):
        row: Row = {"test": tests[i], "calibration": {k: rounded(v) for k, v in calibration[i].items()}}
        if remembered:
            row["remembered"] = rounded(remembered[i])
        rows.append(row | {"flatness": flat})
    return rows


def flatness(population: Population, splits: Sequence[Split], count: int) -> list[dict[str, float]]:
    """The training loss at W, and how much noise on the full weights adds to it."""
    parts = [split.train.take(torch.arange(min(count, len(split.train)))) for split in splits]
    labels = torch.stack([part.labels for part in parts])

    def losses() -> Tensor:
        return cross_entropy(logits_of(population, parts), labels)

    at_minimum = losses()
    measured = {"loss": at_minimum}
    for sigma in SIGMAS:
        generator = [torch.Generator(population.device).manual_seed(0)]

        def numbers(layer: AdaptedLinear, generator: list[torch.Generator] = generator) -> Tensor:
            return normal(layer.weight.new_empty(1, *layer.weight.shape), generator)

        total = torch.zeros_like(at_minimum)
        for _ in range(NOISES):
            with population.noisy(numbers, torch.full_like(at_minimum, sigma)):
                total += losses() - at_minimum
        measured[str(sigma)] = total / NOISES
    return [
        {key: rounded(float(values[i]), 6) for key, values in measured.items()}
        for i in range(len(population))
    ]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss of each run; logits (runs, examples, ..., classes)."""
    each = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="none")
    return each.view(len(logits), -1).sum(1) / (labels != -100).flatten(1).sum(1)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> list[float]:
    """Expected calibration error of each run: bins of equal width by confidence."""
    confidence, predicted = logits.softmax(-1).max(-1)
    errors = []
    for c, p, y in zip(confidence.flatten(1), predicted.flatten(1), labels.flatten(1), strict=True):
        c, right = c[y != -100], (p == y)[y != -100].float()
        number = (c * bins).long().clamp_max(bins - 1)
        gaps = torch.zeros(bins, device=c.device).index_add(0, number, right - c)
        errors.append(float(gaps.abs().sum() / len(c)))
    return errors


def rounded(value: float, digits: int = 5) -> float:
    return round(value, digits)
