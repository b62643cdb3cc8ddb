"""Which runs the study has, in the order in which they are made. PLAN.md says why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .language import Arithmetic, Reviews
from .methods import METHODS
from .tasks import Sentiment, Task
from .training import Data, Row, Run
from .vision import MNIST, Digits

ON_GPU = "SmolLM2 on sums, all layers"
TASKS: dict[str, type[Task]] = {
    "digits": Digits,
    "MNIST": MNIST,
    "sentiment": Sentiment,
    "SmolLM2 on reviews": Reviews,
    ON_GPU: Arithmetic,
}
BASELINE = "LoRA"
UNTUNED = ("LoRA", "early stopping")
"""Methods without a strength: they are tuned over as many learning rates and lengths instead."""
FIRST_TUNING_SEED = 1000
FEW = ("LoRA", "LoRA + SAM", "Flat-LoRA", "Flat-LoRA, low rank")
"""Compared first, and alone where a run is long."""


@dataclass(frozen=True)
class Grid:
    """What is tried for each method of a task: always the same number of settings."""

    lrs: tuple[float, ...]
    steps: tuple[int, ...]
    strengths: dict[str, tuple[float, ...]]
    untuned_lrs: tuple[float, ...]
    untuned_steps: tuple[int, ...]
    seeds: int
    """Tuning runs of each setting, on seeds that are not used afterwards."""

    def settings(self, method: str) -> list[tuple[float, int, float]]:
        if method in UNTUNED:
            return [(lr, steps, 0.0) for lr in self.untuned_lrs for steps in self.untuned_steps]
        return [(lr, n, x) for lr in self.lrs for n in self.steps for x in self.strengths[method]]


@dataclass(frozen=True)
class Cell:
    """A task with so many examples and wrong labels."""

    name: str
    task: str
    data: Data
    grid: Grid
    seeds: int
    together: int
    """How many seeds are finished for all methods before the next ones begin."""
    tuned_as: str = ""
    """The cell whose choices are taken over: another size with the same share of wrong labels."""
    curve: tuple[float, ...] = ()
    """Sigmas of Flat-LoRA at ``fixed``, whatever tuning chose."""
    lengths: tuple[int, ...] = ()
    """Steps at which some sigmas are run, too."""
    fixed: tuple[float, int] = (0.02, 600)
    """Learning rate and steps of the curves."""
    methods: tuple[str, ...] = tuple(METHODS)


@dataclass(frozen=True)
class Key:
    """Names a run in the results."""

    cell: str
    phase: str
    run: Run

    def tuple(self) -> tuple[Any, ...]:
        run = self.run
        return self.cell, self.phase, run.method, run.lr, run.steps, run.strength, run.seed


STRENGTHS = {
    "LoRA + dropout": (0.05, 0.1, 0.2, 0.4),
    "LoRA + weight decay": (0.03, 0.1, 0.3, 1.0),
    "LoRA + SAM": (0.03, 0.1, 0.3, 1.0),
    "noise on A, B": (0.1, 0.2, 0.4, 0.8),
    "Flat-LoRA": (0.1, 0.2, 0.4, 0.8),
    "Flat-LoRA, low rank": (0.1, 0.2, 0.4, 0.8),
    "Bi-LoRA": (0.03, 0.1, 0.3, 1.0),
    "EFMLoRA": (0.03, 0.1, 0.3, 1.0),
}
VISION = Grid((0.01, 0.02), (300, 600), STRENGTHS, (0.005, 0.01, 0.02, 0.04), (75, 150, 300, 600), seeds=2)
SIGMAS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
LENGTH_SIGMAS = (0.2, 0.4, 0.6)
SENTENCES = Grid(
    (0.001, 0.003),
    (300,),
    STRENGTHS | dict.fromkeys(("Flat-LoRA", "Flat-LoRA, low rank", "noise on A, B"), (0.2, 0.4, 0.8, 1.6)),
    (0.0003, 0.001, 0.003, 0.01),
    (100, 300),
    seeds=1,
)


ANSWERS = Grid(
    (0.001, 0.003), (200,), STRENGTHS, (0.0003, 0.001, 0.003, 0.01), (100, 200), seeds=1
)  # fmt: skip
SUMS = Grid(
    (0.001, 0.003),
    (400,),
    STRENGTHS | dict.fromkeys(("Flat-LoRA", "Flat-LoRA, low rank"), (0.05, 0.1, 0.2, 0.4)),
    (0.0003, 0.001, 0.003, 0.01),
    (150, 400),
    seeds=1,
)


def vision(task: str, count: int, wrong: int, **more: Any) -> Cell:
    return Cell(
        f"{task}, {count} examples, {wrong} % wrong",
        task,
        Data(count, 196, wrong / 100, 25),
        VISION,
        30,
        10,
        **more,
    )


def sentences(count: int, wrong: int, **more: Any) -> Cell:
    return Cell(
        f"sentiment, {count} examples, {wrong} % wrong", "sentiment", Data(count, 200, wrong / 100, 16),
        SENTENCES, 8, 4, fixed=(0.003, 300), **more,
    )  # fmt: skip


def answers(task: str, grid: Grid, wrong: int, **more: Any) -> Cell:
    return Cell(
        f"{task}, 300 examples, {wrong} % wrong", task, Data(300, 200, wrong / 100, 16), grid, 5, 5, **more
    )


CELLS = (
    vision("digits", 100, 20, curve=SIGMAS, lengths=(75, 150, 300, 1200)),
    vision("digits", 100, 0, curve=SIGMAS),
    vision("digits", 100, 40, curve=SIGMAS),
    *(
        vision("digits", count, wrong, tuned_as=f"digits, 100 examples, {wrong} % wrong")
        for count in (50, 300)
        for wrong in (20, 0, 40)
    ),
    vision("MNIST", 100, 0, curve=SIGMAS),
    vision("MNIST", 100, 20, curve=SIGMAS),
    sentences(300, 20, curve=(0.2, 0.4, 0.8, 1.2, 1.6, 2.4)),
    sentences(300, 0, curve=(0.4, 0.8, 1.2, 1.6), methods=FEW),
    answers("SmolLM2 on reviews", ANSWERS, 20, curve=(0.1, 0.2, 0.4, 0.8, 1.6), fixed=(0.003, 200)),
    sentences(1000, 20, tuned_as="sentiment, 300 examples, 20 % wrong", methods=FEW),
)
GPU_CELLS = tuple(answers(ON_GPU, SUMS, wrong, methods=FEW) for wrong in (20, 0))
"""At full size, for ``--device cuda``."""


class Results:
    """The lines of the results file."""

    def __init__(self, path: Path, *others: Path) -> None:
        """``others`` are read, too; what is new goes to ``path``."""
        self.path = path
        lines = [line for file in (path, *others) if file.exists() for line in file.read_text().splitlines()]
        self.rows: dict[tuple[Any, ...], Row] = {}
        for line in lines:
            row = json.loads(line)
            key = Key(row.pop("cell"), row.pop("phase"), Run(**row.pop("run")))
            self.rows[key.tuple()] = row

    def get(self, key: Key) -> Row | None:
        return self.rows.get(key.tuple())

    def add(self, keys: Sequence[Key], rows: Sequence[Row]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for key, row in zip(keys, rows, strict=True):
            lines.append(
                json.dumps({"cell": key.cell, "phase": key.phase, "run": asdict(key.run)} | row) + "\n"
            )
            self.rows[key.tuple()] = row
        # In one piece: several processes may append.
        with self.path.open("a", buffering=1 << 20) as file:
            file.write("".join(lines))


# ---------------------------------------------------------------------- phases


def tuning(cell: Cell, methods: Sequence[str] = tuple(METHODS)) -> list[Key]:
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + cell.grid.seeds)
    return [
        Key(cell.name, "tuning", Run(method, lr, steps, strength, seed))
        for method in cell.methods
        if method in methods
        for lr, steps, strength in cell.grid.settings(method)
        for seed in seeds
    ]


def chosen(cell: Cell, results: Results) -> dict[str, tuple[float, int, float]]:
    """Settings of each method that has been tuned: best mean validation score, then lowest loss."""
    tuned = next((c for c in CELLS if c.name == cell.tuned_as), cell)
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + tuned.grid.seeds)
    best = {}
    for method in tuned.methods:
        ranked = []
        for setting in tuned.grid.settings(method):
            rows = [results.get(Key(tuned.name, "tuning", Run(method, *setting, seed))) for seed in seeds]
            scores = [row["validation"] for row in rows if row]
            if len(scores) == len(seeds):
                ranked.append((sum(s["score"] for s in scores), -sum(s["loss"] for s in scores), setting))
        if len(ranked) == len(tuned.grid.settings(method)):
            best[method] = max(ranked)[2]
    return best


def curve(cell: Cell) -> list[Key]:
    """LoRA and Flat-LoRA at fixed settings, over sigma."""
    return _at(cell, [(cell.fixed[1], sigma) for sigma in cell.curve and (0.0, *cell.curve)])


def lengths(cell: Cell) -> list[Key]:
    """The same over the length of training."""
    return _at(cell, [(steps, sigma) for steps in cell.lengths for sigma in (0.0, *LENGTH_SIGMAS)])


def _at(cell: Cell, points: list[tuple[int, float]]) -> list[Key]:
    """All points for a block of seeds before the next block."""
    return [
        Key(cell.name, "curve", Run("Flat-LoRA" if sigma else BASELINE, cell.fixed[0], steps, sigma, seed))
        for first in range(0, cell.seeds, cell.together)
        for steps, sigma in points
        for seed in range(first, min(first + cell.together, cell.seeds))
    ]


def final(cell: Cell, results: Results, seeds: range) -> list[Key]:
    settings = chosen(cell, results)
    return [
        Key(cell.name, "final", Run(method, *settings[method], seed))
        for first in range(seeds.start, seeds.stop, cell.together)
        for method in cell.methods
        if method in settings
        for seed in range(first, min(first + cell.together, seeds.stop))
    ]


Stage = Callable[[], list[Key]]


def stages(cells: Sequence[Cell], results: Results) -> Iterator[tuple[Cell, Stage]]:
    """All runs in the order in which they are made: curves, then task by task some seeds of all cells first.

    What is final is known when tuning has been done: hence functions.
    """
    for cell in cells:
        yield cell, partial(curve, cell)
    for task in dict.fromkeys((cell.task, not cell.tuned_as) for cell in cells):
        group = [cell for cell in cells if (cell.task, not cell.tuned_as) == task]
        for methods in (FEW, tuple(METHODS)):
            for cell in group:
                if not cell.tuned_as:
                    yield cell, partial(tuning, cell, methods)
                yield cell, partial(final, cell, results, range(cell.together))
            for cell in group:
                yield cell, partial(final, cell, results, range(cell.seeds))
        for cell in group:
            yield cell, partial(lengths, cell)


def batches(keys: Sequence[Key], results: Results, size: int) -> Iterator[list[Key]]:
    """Missing runs that can be made at once: neighbours of the same method and length."""
    batch: list[Key] = []
    for key in keys:
        if results.get(key) is not None:
            continue
        if batch and (len(batch) == size or _kind(key) != _kind(batch[0])):
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def _kind(key: Key) -> tuple[str, int]:
    return key.run.method, key.run.steps
