"""Where does Flat-LoRA help, and by how much? The study that benchmarks/study/PLAN.md lays out.

    python benchmarks/generalization.py                      # what is missing, about 10 hours of one core
    python benchmarks/generalization.py --cell MNIST         # the cells whose names have one of these in
                                                             # them: one process for each core
    python benchmarks/generalization.py --device cuda        # a language model of full size, 8 minutes
    python benchmarks/generalization.py --quick              # some minutes, to see that it runs
    python benchmarks/generalization.py --report             # only write the report again

Each finished run is a line of ``benchmarks/results/study*.jsonl``; a run that is there already is not
repeated, so the study can be stopped and started at any time. The report is
``benchmarks/GENERALIZATION.md``.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from study import grid, report
from study.grid import CELLS, GPU_CELLS, TASKS, Cell, Grid, Key, Results
from study.tasks import Task
from study.training import Data, carry_out

HERE = Path(__file__).parent


@cache
def make_task(name: str) -> Task:
    return TASKS[name]()


class OutOfTimeError(Exception):
    """The next batch may take longer than is left."""


class Clock:
    """Stops before the batch that would go beyond the time, judging by the longest so far."""

    def __init__(self, minutes: float) -> None:
        self.end, self.started, self.longest = time.monotonic() + 60 * minutes, time.monotonic(), 0.0

    def tick(self) -> None:
        now = time.monotonic()
        self.longest, self.started = max(self.longest, now - self.started), now
        if now + self.longest > self.end:
            raise OutOfTimeError


def make(cell: Cell, keys: Sequence[Key], results: Results, bar: tqdm, clock: Clock) -> None:
    """Makes the runs that are missing."""
    task = make_task(cell.task)
    bar.update(sum(results.get(key) is not None for key in keys))
    for batch in grid.batches(keys, results, task.at_once):
        clock.tick()
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
    parser.add_argument("--cell", nargs="+", default=[""], help="only cells whose name contains one of these")
    parser.add_argument(
        "--device", default="cpu", help="cuda: the cells of full size, with their own results"
    )
    parser.add_argument("--minutes", type=float, help="stop in time; 8 on a GPU")
    parser.add_argument("--quick", action="store_true", help="a trial; its results go to outputs/")
    parser.add_argument(
        "--report", action="store_true", help="write the report of what is there, run nothing"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    Task.device = torch.device(args.device)
    everything = [quick(cell) if args.quick else cell for cell in (*CELLS, *GPU_CELLS)]
    mine = [cell for cell in everything if (cell.task == grid.ON_GPU) == (args.device != "cpu")]
    folder = Path("outputs/generalization-quick") if args.quick else HERE
    files = [folder / "results" / name for name in ("study.jsonl", "study-gpu.jsonl")]
    files = files if args.device == "cpu" else files[::-1]
    clock = Clock(args.minutes or (math.inf if args.device == "cpu" else 8))
    if not args.report:
        results = Results(*files)
        with tqdm(unit="run") as bar, suppress(OutOfTimeError):
            chosen = [cell for cell in mine if any(part in cell.name for part in args.cell)]
            for cell, stage in grid.stages(chosen, results):
                make(cell, stage(), results, bar, clock)
    # Read again: other processes may have made other cells.
    for path in report.write(folder, everything, Results(*files)):
        print(path)


if __name__ == "__main__":
    main()
