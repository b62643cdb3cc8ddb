"""LoRA, Flat-LoRA and LoRA + SAM on one task, over several seeds: scores, paired differences, plots.

    python examples/compare.py                               # digits; a few minutes on 2 CPU cores
    python examples/compare.py --task examples/sentiment.py  # MiniLM on movie reviews
    python examples/compare.py --task my_task.py --sigma 0.1 --seeds 3
    python examples/compare.py --write-readme                # writes table and pictures of README and docs

A task of your own is a file with a class ``Task`` that has the public members of that in ``digits.py``.
A seed fixes the initial adapter, the data and its order, the dropout and the noise, so that methods can be
compared seed by seed.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from digits import Task as Digits
from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.landscape import (
    ExpectedLoss,
    Slice1D,
    Slice2D,
    expected_loss,
    plot_expected_loss,
    plot_slice_1d,
    plot_slice_2d,
    slice_1d,
    slice_2d,
)
from sam import SAM

BASELINE = "LoRA"
METHODS = (BASELINE, "Flat-LoRA", "LoRA + SAM")
README = Path(__file__).parents[1] / "README.md"
PICTURES = {
    "expected_loss": "benchmarks/figures/demo.png",
    "slices": "docs/figures/slices.png",
    "planes": "docs/figures/planes.png",
}
"""Where README and docs show them."""
MARKS = "<!-- demo: begin", "<!-- demo: end -->"


class Task(Protocol):
    title: str
    steps: int
    lr: float
    sigma: float
    rho: float

    def model(self, seed: int) -> nn.Module:
        """A model with fresh LoRA adapters; only what is trained requires gradients."""

    def batches(self, seed: int) -> Iterator[Any]:
        """Training batches without end."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor: ...

    def training_loss(self, model: nn.Module, seed: int) -> Tensor:
        """The loss whose flatness is measured, on fixed training data."""

    def scores(self, model: nn.Module) -> dict[str, float]:
        """From 0 to 1, on data never trained on."""


@dataclass(frozen=True)
class Result:
    """What one method made of one seed."""

    scores: dict[str, float]
    around: list[ExpectedLoss]
    seconds_per_step: float
    slices: list[Slice1D]
    plane: Slice2D | None


# ---------------------------------------------------------------------- training


def train(task: Task, method: str, seed: int, args: argparse.Namespace) -> tuple[nn.Module, float]:
    """Returns the model, and the median of the processor's seconds per step."""
    model = task.model(seed).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    base = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    warmup = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        base, lambda t: min((t + 1) / warmup, (args.steps - t) / max(1, args.steps - warmup))
    )
    optimizer: Any = base
    if method == "Flat-LoRA":
        optimizer = FlatLoRAOptimizer(
            base, model, sigma=args.sigma, total_steps=args.steps, seed=seed, auto=False
        )
    elif method == "LoRA + SAM":
        adapters = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
        optimizer = SAM(base, args.rho, adapters)
    seconds = []
    for step, batch in zip(range(args.steps), task.batches(seed), strict=False):

        def closure(step: int = step, batch: Any = batch) -> Tensor:
            torch.manual_seed(1_000_003 * seed + step)  # the same dropout for all methods
            base.zero_grad()
            loss = task.loss(model, batch)
            loss.backward()
            return loss

        start = time.process_time()
        optimizer.step(closure)
        schedule.step()
        seconds.append(time.process_time() - start)
    return model.eval(), statistics.median(seconds)


def run(task: Task, method: str, seed: int, args: argparse.Namespace) -> Result:
    model, seconds = train(task, method, seed, args)

    def loss_fn(model: nn.Module) -> Tensor:
        return task.training_loss(model, seed)

    around = [
        expected_loss(model, loss_fn, sigma=sigma, samples=args.noises, seed=1, progress=False)
        for sigma in (share * args.sigma for share in args.shares)
    ]
    slices, plane = [], None
    if seed == 0 and args.sigma:
        options: dict[str, Any] = {"radius": 1.2 * args.sigma, "points": args.points, "progress": False}
        slices = [slice_1d(model, loss_fn, seed=d, **options) for d in range(args.directions)]
        plane = slice_2d(model, loss_fn, **options)
    return Result(task.scores(model), around, seconds, slices, plane)


def fingerprint() -> dict[str, float]:
    """The demo's training loss with each method after a few steps: changes if the numbers of a full run do.

    So few steps, also of pretraining, that another processor's rounding doesn't show.
    """
    task = Digits(pretraining=8)
    args = argparse.Namespace(steps=8, lr=task.lr, sigma=task.sigma, rho=task.rho)
    losses = {}
    for method in METHODS:
        model, _ = train(task, method, 0, args)
        with torch.no_grad():
            losses[method] = float(task.training_loss(model, 0))
    return losses


# ---------------------------------------------------------------------- reporting


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean (t distribution)."""
    from scipy import stats

    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def spread(values: Sequence[float], style: str) -> str:
    mean = f"{statistics.mean(values):{style}}"
    return mean if len(values) < 2 else f"{mean} ± {half_interval(values):{style.lstrip('+')}}"


def rows(results: dict[str, list[Result]], args: argparse.Namespace) -> list[list[str]]:
    """Each method, then its paired difference to LoRA; differences beyond their interval in bold."""
    lines = []

    def add(name: str, value: Callable[[Result], float], style: str, paired: bool = True) -> None:
        columns = {method: [value(result) for result in several] for method, several in results.items()}
        line = [name, *(spread(values if paired else values[:1], style) for values in columns.values())]
        for method, values in columns.items():
            if method == BASELINE or BASELINE not in columns:
                continue
            differences = [a - b for a, b in zip(values, columns[BASELINE], strict=True)]
            text = spread(differences, "+" + style) if paired else ""
            beyond = (
                paired and len(values) > 1 and abs(statistics.mean(differences)) > half_interval(differences)
            )
            line.append(f"**{text}**" if beyond else text)
        lines.append(line)

    for name in next(iter(results.values()))[0].scores:
        add(f"accuracy, {name}, %", lambda r, name=name: 100 * r.scores[name], ".1f")
    add("training loss at W", lambda r: r.around[0].at_minimum, ".3f")
    add(f"its increase by noise of σ = {args.sigma:g}", lambda r: r.around[-1].increase, ".3f")  # noqa: RUF001
    add("CPU milliseconds per step", lambda r: 1000 * r.seconds_per_step, ".1f", paired=False)
    return lines


def head(results: dict[str, list[Result]]) -> list[str]:
    others = [f"{method} − {BASELINE}" for method in results if method != BASELINE]  # noqa: RUF001
    return ["", *results, *(others if BASELINE in results else [])]


def printed(results: dict[str, list[Result]], task: Task, args: argparse.Namespace) -> Table:
    table = Table(title=f"{task.title}: mean of {args.seeds} seeds ± half of the 95 % interval")
    for column in head(results):
        table.add_column(column, justify="right" if column else "left")
    for line in rows(results, args):
        table.add_row(*(cell.replace("**", "[bold]", 1).replace("**", "[/bold]") for cell in line))
    return table


def markdown(
    results: dict[str, list[Result]], task: Task, args: argparse.Namespace, minutes: float, at: str
) -> str:
    """The README's part, with what a test needs to see whether it still holds."""
    lines = [head(results), ["---", *["---:"] * (len(head(results)) - 1)], *rows(results, args)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    known = " ".join(f"{loss:.6f}" for loss in fingerprint().values())
    return (
        f"{MARKS[0]} {known} -->\n"
        f"{task.title[0].upper()}{task.title[1:]}; {args.steps} steps, lr {args.lr:g}, σ = {args.sigma:g}, "  # noqa: RUF001
        f"ρ = {args.rho:g}. Mean of {args.seeds} seeds ± half of the 95 % interval; differences are "  # noqa: RUF001
        f"paired by seed, bold where the interval excludes 0.\n\n{table}\n\n"
        f"![Loss increase over sigma for LoRA, Flat-LoRA and SAM]({PICTURES['expected_loss']})\n\n"
        f"Written by `make demo-readme` at commit {at}, in {minutes:.0f} minutes of one core.\n{MARKS[1]}"
    )


def commit() -> str:
    command = ["git", "-C", str(README.parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def write_readme(text: str) -> None:
    readme = README.read_text(encoding="utf-8")
    before, _, rest = readme.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end:
        sys.exit(f"README.md has no {MARKS[0]} ... --> and {MARKS[1]} between which the table could go")
    README.write_text(before + text + after, encoding="utf-8")


def draw(results: dict[str, list[Result]], folder: Path, args: argparse.Namespace) -> list[Path]:
    """Expected loss over sigma for all seeds; slices and planes for the first."""
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    estimates = {name: [x for r in several for x in r.around] for name, several in results.items()}
    around = plot_expected_loss(estimates)
    pictures = {"expected_loss": around}
    planes = {name: several[0].plane for name, several in results.items() if several[0].plane is not None}
    if planes:
        slices = {name: several[0].slices for name, several in results.items()}
        pictures |= {
            "slices": plot_slice_1d(slices, sigma=args.sigma),
            "planes": plot_slice_2d(planes, levels=6)[0],
        }
    paths = []
    for name, ax in pictures.items():
        paths.append(folder / f"{name}.png")
        ax.figure.savefig(paths[-1], dpi=120)
        pyplot.close(ax.figure)
    return paths


# ---------------------------------------------------------------------- command line


def load(path: Path) -> Task:
    """The class ``Task`` of this file."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        sys.exit(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Task()


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", type=Path, help="a file with a class Task; digits.py by default")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--seeds", type=positive, default=10, help="how many")
    add("--steps", type=positive, help="optimizer steps; this and what follows: the task's own by default")
    add("--lr", type=float)
    add("--sigma", type=strength, help="of Flat-LoRA, relative to the norm of each row")
    add("--rho", type=strength, help="of SAM")
    add("--noises", type=positive, default=8, help="draws of the noise for each point of the picture")
    add("--quick", action="store_true", help="a few steps of two seeds, to see that it runs")
    add("--output", type=Path, default=Path("outputs/compare"), help="where the pictures go")
    add("--write-readme", action="store_true", help="write the table and the pictures of README and docs")
    args = parser.parse_args(argv)
    # Of sigma, where the expected loss is measured: the last is sigma itself.
    args.shares, args.directions, args.points = (0.1, 0.25, 0.5, 0.75, 1.0), 8, 17
    if args.quick:
        args.steps, args.seeds, args.noises, args.shares = 4, 2, 2, (0.5, 1.0)
        args.directions, args.points = 2, 5
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def strength(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be finite and not negative, got {value}")
    return value


def compare(task: Task, args: argparse.Namespace, progress: Progress) -> dict[str, list[Result]]:
    for name in ("steps", "lr", "sigma", "rho"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(task, name))
    results: dict[str, list[Result]] = {method: [] for method in args.methods}
    bar = progress.add_task("", total=args.seeds * len(args.methods))
    for seed in range(args.seeds):
        for method in args.methods:
            progress.update(bar, description=f"seed {seed + 1} of {args.seeds}, {method}")
            results[method].append(run(task, method, seed, args))
            progress.advance(bar)
    return results


def main() -> None:
    args = arguments(sys.argv[1:])
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)
    console = Console()
    task = load(args.task) if args.task else Digits()
    at = commit() if args.write_readme else ""
    with Progress(console=console) as progress:
        results = compare(task, args, progress)
    minutes = time.process_time() / 60
    console.print(printed(results, task, args))
    pictures = draw(results, args.output, args)
    console.print(*pictures, sep="\n")
    if args.write_readme:
        write_readme(markdown(results, task, args, minutes, at))
        for picture in pictures:
            shutil.copy(picture, README.parent / PICTURES[picture.stem])


if __name__ == "__main__":
    main()
