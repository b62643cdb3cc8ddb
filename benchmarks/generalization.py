"""Where does Flat-LoRA help, and by how much? The study that benchmarks/study/PLAN.md lays out.

    python benchmarks/generalization.py                      # what is missing, about 10 hours of one core
    python benchmarks/generalization.py --cell MNIST         # the cells whose names have this in them:
                                                             # one process for each core
    python benchmarks/generalization.py --quick              # two minutes, to see that it runs
    python benchmarks/generalization.py --report             # only write the report again

Each finished run is a line of ``benchmarks/results/study*.jsonl``; a run that is there already is not
repeated, so the study can be stopped and started at any time. The report is
``benchmarks/GENERALIZATION.md``.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from study import grid, report
from study.grid import CELLS, TASKS, Cell, Grid, Key, Results
from study.tasks import Task
from study.training import Data, carry_out

HERE = Path(__file__).parent


@cache
def make_task(name: str) -> Task:
    return TASKS[name]()


def make(cell: Cell, keys: Sequence[Key], results: Results, bar: tqdm) -> None:
    """Makes the runs that are missing."""
    task = make_task(cell.task)
    bar.update(sum(results.get(key) is not None for key in keys))
    for batch in grid.batches(keys, results, task.at_once):
        bar.set_description(f"{cell.name}: {batch[0].phase}, {batch[0].run.method}")
        final = batch[0].phase != "tuning"
        results.add(batch, carry_out(task, cell.data, [key.run for key in batch], final=final))
        bar.update(len(batch))


def quick(cell: Cell) -> Cell:
    """A few steps on little data: numbers without meaning."""
    small = Grid((0.01,), (4,), cell.grid.strengths, (0.01,), (4,), seeds=1)
    small = replace(small, strengths={name: values[:1] for name, values in small.strengths.items()})
    data = Data(16, 16, cell.data.wrong, 8)
    return replace(
        cell, data=data, grid=small, seeds=2, together=2, tuned_as="", curve=cell.curve[:1], lengths=(),
        fixed=(0.01, 4),
    )  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", default="", help="only cells whose name contains this")
    parser.add_argument("--quick", action="store_true", help="a trial; its results go to outputs/")
    parser.add_argument(
        "--report", action="store_true", help="write the report of what is there, run nothing"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    cells = [quick(cell) for cell in CELLS] if args.quick else list(CELLS)
    folder = Path("outputs/generalization-quick") if args.quick else HERE
    results = Results(folder / "results" / "study.jsonl")
    if not args.report:
        with tqdm(unit="run") as bar:
            for cell, stage in grid.stages([cell for cell in cells if args.cell in cell.name], results):
                make(cell, stage(), results, bar)
    for path in report.write(folder, cells, results):
        print(path)


if __name__ == "__main__":
    main()
