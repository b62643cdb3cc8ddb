# ruff: noqa: RUF001 - Greek letters and minus signs are meant
"""The report: means and intervals over seeds, paired differences, flatness, and plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from .tasks import Task

Row = dict[str, Any]
BASELINE = "LoRA"
FLATNESS = ("increase at 0.05", "increase at 0.1", "increase at 0.2", "trace")

HEAD = """# Does Flat-LoRA generalize better, in small?

Written by `python benchmarks/generalization.py` from `results/generalization.jsonl`; the same command
goes on where it stopped. Small models on a CPU: this asks whether the paper's effects show at all at
this size, and can't confirm or refute them at the paper's.

**Procedure.** AdamW everywhere, linear warm-up and decay, no weight decay. For each cell and method
the learning rate is the one of the grid with the best mean validation score, over seeds that are not
used afterwards; each method gets the same grid and as many runs. Then all methods run with the same
seeds; a seed fixes the initial adapter, the order of the data and the dropout. All take the same
number of steps (a step of SAM costs two gradients). No test set was looked at for any choice, but for
what the notes below tell. Wrong
labels are in the training and in the validation data, never in the tests.

**Methods.** *Flat-LoRA σ*: noise on the full weights, cosine schedule. *LoRA + SAM*: adversarial step of
ρ = 0.05 on A and B, not on the full weights (as the paper's LoRA + SAM). *noise on A, B*: Gaussian
noise of σ = 0.1 relative to the rows of A and B, same schedule (the paper's ablation).

**Numbers.** Mean ± half of the 95 % interval (t distribution) over seeds. Differences to LoRA are paired
by seed; **bold** where the interval excludes 0. With five comparisons in each column, some do so by
chance. *Out of domain* is the mean over the shifted test sets. *Gap* is in domain minus out of domain.
Flatness is that of the training loss in the full frozen weights: its mean increase under noise of
strength σ, and the trace of its Hessian (Hutchinson), with the same noise for all runs.
"""


class Cell:
    """The finished runs of one cell: the seeds that all methods have."""

    def __init__(
        self, spec: Any, task: type[Task[Any]], learning_rates: dict[str, float | None], rows: list[Row]
    ) -> None:
        """``learning_rates`` are those chosen for each method, if it has been tuned."""
        self.spec, self.learning_rates = spec, learning_rates
        self.in_domain, self.out_of_domain = task.in_domain, task.out_of_domain
        self.rows = rows
        runs = {(row["method"], row["seed"]): row for row in rows if row["phase"] == "final"}
        self.methods = [name for name in learning_rates if any(method == name for method, _ in runs)]
        self.missing = [name for name in learning_rates if name not in self.methods]
        seeds = sorted({seed for _, seed in runs}) if BASELINE in self.methods else []
        self.seeds = [seed for seed in seeds if all((name, seed) in runs for name in self.methods)]
        self._runs = runs

    @property
    def planned(self) -> int:
        return len(self.learning_rates) * (
            len(self.spec.learning_rates) * self.spec.tuning_seeds + self.spec.seeds
        )

    def values(self, method: str, measure: Callable[[Row], float]) -> list[float]:
        return [measure(self._runs[method, seed]) for seed in self.seeds]

    def domain(self, name: str) -> Callable[[Row], float]:
        return lambda row: 100 * row["test"][name]

    def out(self, row: Row) -> float:
        return statistics.mean(100 * row["test"][name] for name in self.out_of_domain)

    def gap(self, row: Row) -> float:
        return 100 * row["test"][self.in_domain] - self.out(row)

    def correlations(self) -> dict[str, float]:
        """`r` of each domain, where the task has them."""
        keys = (f"{name} r" for name in (self.in_domain, *self.out_of_domain))
        return {key: 0.0 for key in keys if key in self._runs[self.methods[0], self.seeds[0]]["test"]}


def write(folder: Path, cells: Sequence[Cell]) -> list[Path]:
    """Writes the report and its figures; returns their paths."""
    finished = [cell for cell in cells if cell.seeds]
    paths = [figure(cell, folder / "figures") for cell in finished]
    parts = [HEAD, coverage(cells)]
    notes = folder / "results" / "NOTES.md"  # written by hand: what the numbers don't say
    if notes.exists():
        parts.append("## Notes on these results\n\n" + notes.read_text(encoding="utf-8"))
    if finished:
        parts += [overview(finished), tracking(finished)]
        parts += [section(cell, path) for cell, path in zip(finished, paths, strict=True)]
    report = folder / "GENERALIZATION.md"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n".join(parts), encoding="utf-8")
    return [report, *paths]


# ---------------------------------------------------------------------- numbers


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean; NaN for a single value."""
    n = len(values)
    if n < 2:
        return math.nan
    return float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)


def spread(values: Sequence[float], digits: int = 1) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {half_interval(values):.{digits}f}"


def difference(values: Sequence[float], baseline: Sequence[float], digits: int = 1) -> str:
    """Paired; bold where the interval excludes 0."""
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    text = f"{statistics.mean(differences):+.{digits}f}"
    if len(differences) < 2:
        return text
    half = half_interval(differences)
    text = f"{text} ± {half:.{digits}f}"
    return f"**{text}**" if abs(statistics.mean(differences)) > half else text


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    align = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, align, *lines)) + "\n"


# ---------------------------------------------------------------------- sections


def coverage(cells: Sequence[Cell]) -> str:
    lines = []
    for cell in cells:
        hours = sum(row["seconds"] for row in cell.rows) / 3600
        done = len(cell.rows)
        state = f"{len(cell.seeds)} of {cell.spec.seeds} seeds" if cell.seeds else "**left out**"
        if cell.seeds and cell.missing:
            state += f", without {', '.join(cell.missing)}"
        lines.append((cell.spec.name, f"{done} of {cell.planned}", state, f"{hours:.2f}"))
    text = (
        "`python benchmarks/generalization.py` makes the runs that are missing; hours are of one thread on a "
        "shared CPU.\n\n"
    )
    return "## What was run\n\n" + text + table(("cell", "runs", "compared below", "hours"), lines)


def overview(cells: Sequence[Cell]) -> str:
    others = [name for name in cells[0].learning_rates if name != BASELINE]
    lines = []
    for cell in cells:
        for label, measure in (("in", cell.domain(cell.in_domain)), ("out of", cell.out)):
            base = cell.values(BASELINE, measure)
            columns = [
                difference(cell.values(name, measure), base) if name in cell.methods else ""
                for name in others
            ]
            lines.append((f"{cell.spec.name}: {label} domain", spread(base), *columns))
    head = ("accuracy, %", BASELINE, *(f"{name} − {BASELINE}" for name in others))
    return "## In short: differences to LoRA\n\n" + table(head, lines)


def tracking(cells: Sequence[Cell]) -> str:
    """Rank correlations of flatness with the gap, between runs of the same seed."""
    lines = []
    for cell in cells:
        columns = []
        for key in FLATNESS:
            for measure in (cell.gap, cell.out):
                rho, p = rank_correlation(cell, flatness(key), measure)
                columns.append(f"{rho:+.2f} (p {p:.2f})")
        lines.append((cell.spec.name, str(len(cell.seeds) * len(cell.methods)), *columns))
    head = ("Spearman's ρ", "runs", *(f"{key}: {what}" for key in FLATNESS for what in ("gap", "out")))
    note = (
        "Over all methods and seeds, after the mean of each seed was taken away, so that only differences "
        "between methods count. If flat minima generalized better, sharpness would go with a larger gap "
        "(ρ > 0) and lower accuracy out of domain (ρ < 0). The p values take runs as independent and are "
        "not corrected for the number of tests.\n\n"
    )
    return "## Does flatness track generalization?\n\n" + note + table(head, lines)


def flatness(key: str) -> Callable[[Row], float]:
    return lambda row: row["flatness"][key]


def rank_correlation(cell: Cell, x: Callable[[Row], float], y: Callable[[Row], float]) -> tuple[float, float]:
    result = stats.spearmanr(centred(cell, x), centred(cell, y))
    return float(result.statistic), float(result.pvalue)


def centred(cell: Cell, measure: Callable[[Row], float]) -> list[float]:
    """The values of all methods, each less the mean of its seed."""
    columns = [cell.values(name, measure) for name in cell.methods]
    means = [statistics.mean(values) for values in zip(*columns, strict=True)]
    return [value - mean for column in columns for value, mean in zip(column, means, strict=True)]


def at_the_edge(cell: Cell) -> str:
    ends = min(cell.spec.learning_rates), max(cell.spec.learning_rates)
    names = [name for name in cell.methods if cell.learning_rates[name] in ends]
    return f"Chosen at an end of the grid, so perhaps not the best: {', '.join(names)}. " if names else ""


def section(cell: Cell, figure: Path) -> str:
    spec = cell.spec
    domains = (cell.in_domain, *cell.out_of_domain)
    rows = []
    for name in cell.methods:
        scores = [spread(cell.values(name, cell.domain(domain))) for domain in domains]
        out, gap = spread(cell.values(name, cell.out)), spread(cell.values(name, cell.gap))
        rows.append((name, f"{cell.learning_rates[name]:g}", *scores, out, gap))
    parts = [
        f"## {spec.name[0].upper()}{spec.name[1:]}\n",
        f"{len(cell.seeds)} seeds, {spec.steps} steps of {spec.batch_size} examples; learning rates "
        f"{', '.join(f'{lr:g}' for lr in spec.learning_rates)}, each tried with {spec.tuning_seeds} seed(s). "
        f"{at_the_edge(cell)}Accuracy in %:\n",
        table(("", "lr", *domains, "out of domain", "gap"), rows),
    ]
    if keys := cell.correlations():
        lines = [
            (name, *(spread(cell.values(name, lambda row, key=key: row["test"][key]), 3) for key in keys))
            for name in cell.methods
        ]
        parts += ["Correlation with the human rating:\n", table(("", *(key[:-2] for key in keys)), lines)]
    lines = []
    for name in cell.methods:
        line = [name, spread(cell.values(name, flatness("loss")), 4)]
        for key in FLATNESS:
            digits = 1 if key == "trace" else 4
            values, base = cell.values(name, flatness(key)), cell.values(BASELINE, flatness(key))
            line += [spread(values, digits), "" if name == BASELINE else difference(values, base, digits)]
        lines.append(line)
    head = ["", "training loss", *(text for key in FLATNESS for text in (key, f"− {BASELINE}"))]
    parts += ["Flatness of the training loss, and the paired difference to LoRA:\n", table(head, lines)]
    parts.append(f"![{spec.name}](figures/{figure.name})\n")
    return "\n".join(parts)


# ---------------------------------------------------------------------- figures


def figure(cell: Cell, folder: Path) -> Path:
    """Left: paired differences to LoRA. Right: flatness against the gap, one point per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fig, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    others = [name for name in cell.methods if name != BASELINE]
    measures = (("in domain", cell.domain(cell.in_domain)), ("out of domain", cell.out))
    for offset, (label, measure) in zip((-0.12, 0.12), measures, strict=True):
        base = cell.values(BASELINE, measure)
        paired = [[a - b for a, b in zip(cell.values(name, measure), base, strict=True)] for name in others]
        heights = [i + offset for i in range(len(others))]
        means, halves = [statistics.mean(d) for d in paired], [half_interval(d) for d in paired]
        left.errorbar(means, heights, xerr=halves, fmt="o", capsize=3, label=label)
    left.axvline(0, color="gray", linewidth=0.8)
    left.set_yticks(range(len(others)), others)
    left.invert_yaxis()
    left.set(xlabel="accuracy minus LoRA's, % (paired, 95 % interval)")
    left.legend(fontsize=8)
    for name in cell.methods:
        flat = cell.values(name, flatness("increase at 0.1"))
        right.plot(flat, cell.values(name, cell.gap), "o", label=name, alpha=0.7)
    right.set(xlabel="increase of the training loss under noise of σ = 0.1", ylabel="gap, %")
    right.legend(fontsize=8)
    fig.suptitle(cell.spec.name)
    fig.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in cell.spec.name.replace(" %", "").replace(",", ""))
    path = folder / f"generalization-{name}.png"
    fig.savefig(path, dpi=120)
    pyplot.close(fig)
    return path
