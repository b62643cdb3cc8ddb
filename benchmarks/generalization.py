"""Does Flat-LoRA generalize better than LoRA, SAM and noise on the adapters? In small, on a CPU.

    python benchmarks/generalization.py                       # everything, about 5 hours on 2 cores
    python benchmarks/generalization.py --task digits         # one task
    python benchmarks/generalization.py --quick               # under 10 minutes, to see that it runs
    python benchmarks/generalization.py --report              # only write the report again

Each finished run is a line of ``benchmarks/results/generalization.jsonl``; a run that is there
already is not repeated, so the study can be stopped and started at any time. The report is
``benchmarks/GENERALIZATION.md``.

Procedure: for each cell and method, the learning rate of a grid is chosen by the mean score on
validation data over seeds of its own, the same number of runs for each method. Then all methods
run with the same seeds: a seed fixes the initial adapter, the order of the data and the dropout.
Test data is looked at once, at the end of these runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from flatlora_optim import landscape
from study import report
from study.methods import METHODS, Method
from study.tasks import Arithmetic, Digits, Sentiment, Task

HERE = Path(__file__).parent
TASKS: dict[str, type[Task[Any]]] = {"digits": Digits, "sentiment": Sentiment, "arithmetic": Arithmetic}
SIGMAS = (0.05, 0.1, 0.2)
FIRST_TUNING_SEED = 1000


@dataclass(frozen=True)
class Cell:
    """A task of one size, and how it is trained."""

    name: str
    task: str
    train: int
    tests: int
    steps: int
    batch_size: int
    learning_rates: tuple[float, ...]
    seeds: int
    tuning_seeds: int
    flat: int
    noises: int
    label_noise: float = 0.0

    def make_task(self) -> Task[Any]:
        return TASKS[self.task](self.train, self.tests, self.flat, self.label_noise)

    def settings(self) -> str:
        """Tells apart runs of other settings. More seeds or learning rates are more runs of the same."""
        settings = asdict(replace(self, seeds=0, tuning_seeds=0, learning_rates=()))
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


DIGITS = Cell(
    "digits, 100 examples", "digits", train=100, tests=400, steps=120, batch_size=25,
    learning_rates=(1e-2, 3e-2, 1e-1), seeds=10, tuning_seeds=2, flat=100, noises=8,
)  # fmt: skip
SENTIMENT = Cell(
    "sentiment, 500 examples", "sentiment", train=500, tests=300, steps=64, batch_size=16,
    learning_rates=(1e-3, 3e-3, 1e-2), seeds=5, tuning_seeds=2, flat=24, noises=3,
)  # fmt: skip
ARITHMETIC = Cell(
    "arithmetic", "arithmetic", train=2000, tests=200, steps=120, batch_size=16,
    learning_rates=(1e-3, 2e-3, 4e-3), seeds=3, tuning_seeds=1, flat=16, noises=2,
)  # fmt: skip
CELLS = (
    DIGITS,
    replace(DIGITS, name="digits, 100 examples, 20 % wrong labels", label_noise=0.2),
    SENTIMENT,
    replace(SENTIMENT, name="sentiment, 500 examples, 20 % wrong labels", label_noise=0.2),
    replace(SENTIMENT, name="sentiment, all examples", train=10**6, steps=300),
    ARITHMETIC,
)


@dataclass(frozen=True)
class Run:
    cell: Cell
    phase: str
    method: Method
    lr: float
    seed: int

    def key(self) -> tuple[Any, ...]:
        return self.cell.settings(), self.phase, self.method.name, self.lr, self.seed


class Results:
    """The lines of the results file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self._known = {self._key(row): row for row in self.rows}

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["settings"], row["phase"], row["method"], row["lr"], row["seed"]

    def get(self, run: Run) -> dict[str, Any] | None:
        return self._known.get(run.key())

    def add(self, run: Run, measured: dict[str, Any]) -> None:
        settings, phase, method, lr, seed = run.key()
        row = {"cell": run.cell.name, "settings": settings, "phase": phase, "method": method} | {
            "lr": lr, "seed": seed, **measured
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        self._known[run.key()] = row


def train(task: Task[Any], run: Run) -> nn.Module:
    cell = run.cell
    model = task.model(run.seed).train()
    base = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=run.lr, weight_decay=0.0)
    warmup = max(1, cell.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        base, lambda t: min((t + 1) / warmup, (cell.steps - t) / max(1, cell.steps - warmup))
    )
    optimizer = run.method.build(model, base, cell.steps, run.seed)
    for step, batch in zip(range(cell.steps), task.batches(cell.batch_size, run.seed), strict=False):

        def closure(step: int = step, batch: Any = batch) -> torch.Tensor:
            # The same dropout for all methods, whatever random numbers they draw.
            torch.manual_seed(run.seed * 1_000_003 + step)
            base.zero_grad()
            loss = task.loss(model, batch)
            loss.backward()
            return loss

        if optimizer is base:
            closure()
            base.step()
        else:
            optimizer.step(closure)
        schedule.step()
    return model.eval()


def measure(task: Task[Any], run: Run) -> dict[str, Any]:
    start = time.perf_counter()
    model = train(task, run)
    measured: dict[str, Any] = {"train_seconds": round(time.perf_counter() - start, 2)}
    measured["validation"] = task.validate(model)
    if run.phase == "final":
        measured["test"] = task.test(model)
        measured["flatness"] = flatness(task, model, run.cell.noises)
    measured["seconds"] = round(time.perf_counter() - start, 2)
    return measured


def flatness(task: Task[Any], model: nn.Module, noises: int) -> dict[str, float]:
    """Of the training loss in the full weights, with the same noise for all runs."""
    measured = {}
    for sigma in SIGMAS:
        around = landscape.expected_loss(
            model, task.training_loss, sigma=sigma, samples=noises, progress=False
        )
        measured["loss"] = around.at_minimum
        measured[f"increase at {sigma}"] = around.increase
    trace = landscape.hessian_trace(model, task.training_loss, samples=noises, progress=False)
    return {**measured, "trace": trace.mean}


def tuning_runs(cell: Cell, methods: Iterable[Method]) -> list[Run]:
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + cell.tuning_seeds)
    rates = cell.learning_rates
    return [Run(cell, "tuning", method, lr, seed) for seed in seeds for method in methods for lr in rates]


def final_runs(cell: Cell, methods: Iterable[Method], results: Results) -> list[Run]:
    rates = {method: best_learning_rate(cell, method, results) for method in methods}
    return [Run(cell, "final", m, lr, seed) for seed in range(cell.seeds) for m, lr in rates.items() if lr]


def best_learning_rate(cell: Cell, method: Method, results: Results) -> float | None:
    """Highest mean validation score; among equals, lowest mean validation loss. None until tuned."""
    rows = [results.get(run) for run in tuning_runs(cell, [method])]
    done = [row for row in rows if row is not None]
    if len(done) < len(rows):
        return None

    def rank(lr: float) -> tuple[float, float]:
        scores = [row["validation"] for row in done if row["lr"] == lr]
        return sum(s["score"] for s in scores), -sum(s["loss"] for s in scores)

    return max(cell.learning_rates, key=rank)


def comparison(cell: Cell, methods: Iterable[Method], results: Results) -> report.Cell:
    methods = list(methods)
    runs = tuning_runs(cell, methods) + final_runs(cell, methods, results)
    rows = [row for row in map(results.get, runs) if row is not None]
    rates = {method.name: best_learning_rate(cell, method, results) for method in methods}
    return report.Cell(cell, TASKS[cell.task], rates, rows)


def carry_out(cells: list[Cell], methods: Iterable[Method], results: Results) -> None:
    """Makes the runs that are missing."""
    methods = list(methods)
    total = sum(len(methods) * (len(c.learning_rates) * c.tuning_seeds + c.seeds) for c in cells)
    with tqdm(total=total, unit="run") as bar:

        def make(runs: list[Run], task: Task[Any]) -> None:
            for run in runs:
                bar.set_description(f"{run.cell.name}: {run.phase}, {run.method.name}")
                if results.get(run) is None:
                    results.add(run, measure(task, run))
                bar.update()

        for cell in cells:
            task = cell.make_task()
            make(tuning_runs(cell, methods), task)
            make(final_runs(cell, methods, results), task)


def quick(cell: Cell) -> Cell:
    """A few steps on little data: numbers without meaning."""
    return replace(
        cell, train=min(cell.train, 100), tests=8, steps=2, batch_size=4,
        learning_rates=cell.learning_rates[:1], seeds=cell.seeds // 2, tuning_seeds=1, flat=4, noises=1,
    )  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, action="append", help="may be given several times")
    parser.add_argument(
        "--seeds", type=int, help="instead of 10 for digits, 5 for sentiment, 3 for arithmetic"
    )
    parser.add_argument("--quick", action="store_true", help="a trial; its results go to outputs/")
    parser.add_argument(
        "--report", action="store_true", help="write the report of what is there, run nothing"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    logging.disable(logging.WARNING)
    cells = [quick(cell) for cell in CELLS] if args.quick else list(CELLS)
    if args.seeds:
        cells = [replace(cell, seeds=args.seeds) for cell in cells]
    chosen = [cell for cell in cells if cell.task in (args.task or TASKS)]
    folder = Path("outputs/generalization-quick") if args.quick else HERE
    results = Results(folder / "results" / "generalization.jsonl")
    if not args.report:
        carry_out(chosen, METHODS, results)
    for path in report.write(folder, [comparison(cell, METHODS, results) for cell in cells]):
        print(path)


if __name__ == "__main__":
    main()
