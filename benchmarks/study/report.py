# ruff: noqa: RUF001 - Greek letters and minus signs are meant
"""The report: what is there, whatever that is, with paired differences and corrected intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from . import grid
from .grid import BASELINE, TASKS, Cell, Key, Results
from .training import SIGMAS, Row, Run

FLAT = "Flat-LoRA"
HERE = Path(__file__).parent
Measure = Callable[[Row], float]

HEAD = """# Where Flat-LoRA helps, in small

Written by `python benchmarks/generalization.py` (`make study`) from `results/study.jsonl`; the same command
goes on where it stopped. What was asked, tried and called success was written down before, in
`benchmarks/study/PLAN.md`. Small models on a CPU: this shows what the method does where everything can be
repeated 30 times, not how large the effect is on a language model of billions.

Accuracies in %. Mean ± half of a 95 % interval over seeds (t distribution); differences are paired by seed.
*Corrected*: the intervals of a table hold together with 95 % (Bonferroni); **bold** where such an interval
excludes 0. *Out* is the mean over the tests out of domain.
"""


# ---------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Interval:
    mean: float
    half: float

    @property
    def beyond(self) -> bool:
        return abs(self.mean) > self.half

    def text(self, digits: int = 1, sign: str = "+") -> str:
        text = f"{self.mean:{sign}.{digits}f} ± {self.half:.{digits}f}"
        return f"**{text}**" if sign and self.beyond else text


def interval(values: Sequence[float], comparisons: int = 1) -> Interval:
    """Of the mean; its half is NaN for a single value."""
    n = len(values)
    if n < 2:
        return Interval(statistics.mean(values), math.nan)
    t = float(stats.t.ppf(1 - 0.025 / comparisons, n - 1))
    return Interval(statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n))


def paired(a: Sequence[float], b: Sequence[float], comparisons: int = 1) -> Interval:
    return interval([x - y for x, y in zip(a, b, strict=True)], comparisons)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    align = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, align, *lines)) + "\n"


class Compared:
    """Finished runs of several variants: the seeds that all of them have."""

    def __init__(self, cell: Cell, runs: Mapping[Any, Mapping[int, Row]]) -> None:
        self.cell = cell
        self.variants = [name for name, rows in runs.items() if rows]
        self.seeds = sorted(set.intersection(*(set(runs[v]) for v in self.variants))) if self.variants else []
        self._runs = runs

    def values(self, variant: Any, measure: Measure) -> list[float]:
        return [measure(self._runs[variant][seed]) for seed in self.seeds]

    def pairs(self, variant: Any, base: Any, measure: Measure) -> tuple[list[float], list[float]]:
        """Values of two variants for the seeds that these two have."""
        both = sorted(set(self._runs[variant]) & set(self._runs[base]))
        return [measure(self._runs[variant][s]) for s in both], [measure(self._runs[base][s]) for s in both]

    def within(self, row: Row) -> float:
        return 100 * row["test"][TASKS[self.cell.task].in_domain]

    def out(self, row: Row) -> float:
        return 100 * statistics.mean(row["test"][name] for name in TASKS[self.cell.task].out_of_domain)

    def both(self, row: Row) -> float:
        return (self.within(row) + self.out(row)) / 2

    @property
    def complete(self) -> bool:
        return len(self.seeds) == self.cell.seeds and len(self.variants) == len(self._runs)


def finals(cell: Cell, results: Results) -> Compared:
    """Each method as tuned."""
    runs: dict[str, dict[int, Row]] = {method: {} for method in cell.methods}
    for key in grid.final(cell, results, range(cell.seeds)):
        if row := results.get(key):
            runs[key.run.method][key.run.seed] = row
    return Compared(cell, runs)


def curves(cell: Cell, results: Results, steps: int, sigmas: Sequence[float]) -> Compared:
    """Flat-LoRA at several sigmas, 0 for LoRA."""
    runs: dict[float, dict[int, Row]] = {}
    for sigma in (0.0, *sigmas):
        method = FLAT if sigma else BASELINE
        keys = {
            s: Key(cell.name, "curve", Run(method, cell.fixed[0], steps, sigma, s)) for s in range(cell.seeds)
        }
        runs[sigma] = {seed: row for seed, key in keys.items() if (row := results.get(key))}
    full = {sigma: rows for sigma, rows in runs.items() if len(rows) >= min(cell.together, cell.seeds)}
    return Compared(cell, full if 0.0 in full and len(full) > 1 else {})


# ---------------------------------------------------------------------- sections


def write(folder: Path, cells: Sequence[Cell], results: Results) -> list[Path]:
    """Writes the report and its figures; returns their paths."""
    tuned = [
        c
        for cell in cells
        if len((c := finals(cell, results)).seeds) > 1 and {BASELINE, FLAT} <= set(c.variants)
    ]
    by_sigma = [c for cell in cells if len((c := curves(cell, results, cell.fixed[1], cell.curve)).seeds) > 1]
    parts = [HEAD, coverage(cells, results)]
    figures: list[Path] = []
    if tuned:
        parts.append(primary(tuned))
    if by_sigma:
        path = folder / "figures" / "study-sigma.png"
        figures.append(draw_curves(by_sigma, path))
        parts.append(over_sigma(by_sigma, f"figures/{path.name}"))
        parts.append(rules(by_sigma))
    if lengths := [text for cell in cells if (text := over_length(cell, results))]:
        parts += ["## Over the length of training\n", *lengths]
    if tuned:
        path = folder / "figures" / "study-methods.png"
        figures.append(draw_methods(tuned, path))
        parts.append(f"## All methods, as tuned\n\n![differences to LoRA](figures/{path.name})\n")
        parts += [methods(c, grid.chosen(c.cell, results)) for c in tuned]
    parts.append((HERE / "APPENDIX.md").read_text(encoding="utf-8"))
    report = folder / "GENERALIZATION.md"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n".join(parts), encoding="utf-8")
    return [report, *figures]


def coverage(cells: Sequence[Cell], results: Results) -> str:
    lines, done, planned, missing = [], 0, 0, []
    for cell in cells:
        tuning = [] if cell.tuned_as else grid.tuning(cell)
        final = len(cell.methods) * cell.seeds
        curve = [*grid.curve(cell), *grid.lengths(cell)]
        rows = [row for (name, *_), row in results.rows.items() if name == cell.name]
        counts = [
            (sum(results.get(key) is not None for key in tuning), len(tuning)),
            (
                sum(results.get(key) is not None for key in grid.final(cell, results, range(cell.seeds))),
                final,
            ),
            (sum(results.get(key) is not None for key in curve), len(curve)),
        ]
        done, planned = done + sum(n for n, _ in counts), planned + sum(m for _, m in counts)
        if any(n < m for n, m in counts):
            missing.append(cell.name + " (on a GPU)" * (cell.task == grid.ON_GPU))
        texts = [f"{n} of {m}" if m else "–" for n, m in counts]
        lines.append((cell.name, *texts, f"{sum(row['seconds'] for row in rows) / 3600:.2f}"))
    state = (
        "All planned runs are there.\n"
        if done == planned
        else (
            f"**Incomplete: {done} of {planned} planned runs are there.** Runs are missing of: "
            f"{'; '.join(missing)}. What follows is of those that are there; cells with fewer seeds than "
            "planned say so.\n"
        )
    )
    head = ("cell", "tuning runs", "final runs", "curves", "hours of one core")
    return f"## What was run\n\n{state}\n{table(head, lines)}"


def seeds(compared: Compared) -> str:
    n, m = len(compared.seeds), compared.cell.seeds
    return str(n) if n == m else f"{n} of {m}"


def primary(cells: Sequence[Compared]) -> str:
    lines, verdicts = [], []
    for c in cells:
        texts = []
        for measure in (c.within, c.out):
            base, flat = c.values(BASELINE, measure), c.values(FLAT, measure)
            difference = paired(flat, base, 2 * len(cells))
            texts += [interval(base).text(sign=""), difference.text()]
        verdict = "can't tell" if not difference.beyond else "helps" if difference.mean > 0 else "hurts"
        verdicts.append((c.cell.data.wrong > 0, verdict))
        lines.append((c.cell.name, seeds(c), *texts, verdict))
    wrong = [verdict for is_wrong, verdict in verdicts if is_wrong]
    useful = wrong and wrong.count("helps") * 2 >= len(wrong) and "hurts" not in wrong
    preliminary = "" if all(c.complete for c in cells) else " (preliminary: cells are missing or incomplete)"
    success = (
        f"By the plan's measure Flat-LoRA **is {'useful' if useful else 'not shown to be useful'}**"
        f"{preliminary}: it helps out of domain in {wrong.count('helps')} of {len(wrong)} cells with wrong "
        f"labels and hurts in {wrong.count('hurts')}.\n"
    )
    head = (
        "cell",
        "seeds",
        "LoRA, in",
        f"{FLAT} − LoRA, in",
        "LoRA, out",
        f"{FLAT} − LoRA, out",
        "out of domain it",
    )
    return (
        "## Flat-LoRA against LoRA, each as tuned\n\n"
        f"Corrected for {2 * len(cells)} comparisons.\n\n{table(head, lines)}\n{success}"
    )


def over_sigma(cells: Sequence[Compared], figure: str) -> str:
    parts = [
        "## Over sigma\n\nAt fixed settings, whatever tuning chose. Differences are to LoRA of the same "
        "learning rate and length, corrected for the number of sigmas in the table. *Loss under way*: of the "
        "training batches with the noise, over the last tenth. *Increase*: of the training loss by noise of "
        f"σ = 0.1.\n\n![gain over sigma]({figure})\n"
    ]
    for c in cells:
        lines = []
        for sigma in c.variants:
            texts = []
            for measure in (c.within, c.out):
                values, base = c.pairs(sigma, 0.0, measure)
                mean = interval(values).text(sign="")
                texts.append(paired(values, base, len(c.variants) - 1).text() if sigma else mean)
            means = [statistics.mean(c.pairs(sigma, sigma, m)[0]) for m in (at_w, under_way, increase(0.1))]
            name = f"{sigma:g}" if sigma else "LoRA"
            lines.append((name, str(len(values)), *texts, *(f"{x:.4f}" for x in means)))
        head = ("σ", "seeds", "in", "out", "training loss at W", "loss under way", "increase at 0.1")
        cell = c.cell
        parts.append(
            f"**{cell.name}**, lr {cell.fixed[0]:g}, {cell.fixed[1]} steps, {cell.seeds} seeds planned:\n\n"
            f"{table(head, lines)}"
        )
    return "\n".join(parts)


def over_length(cell: Cell, results: Results) -> str:
    lines = []
    for steps in sorted({*cell.lengths, cell.fixed[1]}) if cell.lengths else ():
        c = curves(cell, results, steps, grid.LENGTH_SIGMAS)
        if len(c.seeds) < 2:
            continue
        base = [interval(c.values(0.0, m)).text(sign="") for m in (c.within, c.out)]
        gains = [
            paired(c.values(sigma, m), c.values(0.0, m), 2 * len(grid.LENGTH_SIGMAS)).text()
            if sigma in c.variants
            else ""
            for sigma in grid.LENGTH_SIGMAS
            for m in (c.within, c.out)
        ]
        lines.append((str(steps), seeds(c), *base, *gains))
    if not lines:
        return ""
    head = ["steps", "seeds", "LoRA, in", "LoRA, out"]
    head += [f"σ = {sigma:g}, {where}" for sigma in grid.LENGTH_SIGMAS for where in ("in", "out")]
    note = "differences to LoRA of the same length, corrected within each row."
    return f"**{cell.name}**: {note}\n\n{table(head, lines)}"


def methods(c: Compared, settings: Mapping[str, tuple[float, int, float]]) -> str:
    others = [name for name in c.variants if name != BASELINE]
    lines, described = [], []
    for name in c.variants:
        lr, steps, strength = settings[name]
        line = [name, f"{lr:g}, {steps}" + (f", {strength:g}" if strength else "")]
        for measure in (c.within, c.out):
            values = c.values(name, measure)
            line.append(interval(values).text(sign=""))
            for other, flip in ((BASELINE, 1), (FLAT, -1)):
                difference = paired(values, c.values(other, measure), 2 * len(others))
                text = Interval(flip * difference.mean, difference.half).text()
                line.append("" if name == other else text)
        lines.append(line)
        texts = [name]
        for measure, digits in DESCRIBED.values():
            known = all(_has(measure, row) for row in c._runs[name].values())
            texts.append(interval(c.values(name, measure)).text(digits, "") if known else "–")
        described.append(texts)
    head = ["", "lr, steps, strength", "in", "− LoRA", "Flat-LoRA − it", "out", "− LoRA", "Flat-LoRA − it"]
    missing = [name for name in c.cell.methods if name not in c.variants]
    note = f" Not there yet: {', '.join(missing)}." if missing else ""
    return (
        f"### {c.cell.name}\n\n{seeds(c)} seeds; corrected within each pair of difference columns.{note}\n\n"
        f"{table(head, lines)}\nDescribed, not corrected:\n\n{table(['', *DESCRIBED], described)}"
    )


def at_w(row: Row) -> float:
    return row["flatness"]["loss"]


def under_way(row: Row) -> float:
    return row["loss under way"]


def increase(sigma: float) -> Measure:
    return lambda row: row["flatness"][str(sigma)]


DESCRIBED: dict[str, tuple[Measure, int]] = {
    "training loss": (at_w, 4),
    "increase at σ = 0.1": (increase(0.1), 4),
    "at 0.4": (increase(0.4), 3),
    "ECE, in": (lambda row: row["calibration"]["ECE in"], 3),
    "ECE, out": (lambda row: row["calibration"]["ECE out"], 3),
    "test loss, in": (lambda row: row["calibration"]["loss in"], 2),
    "test loss, out": (lambda row: row["calibration"]["loss out"], 2),
    "old classes, %": (lambda row: 100 * row["remembered"], 1),
}


def _has(measure: Measure, row: Row) -> bool:
    try:
        measure(row)
    except KeyError:
        return False
    return True


# ---------------------------------------------------------------------- rules for sigma


def rules(cells: Sequence[Compared]) -> str:
    """Whether a rule, fitted on the first cell, picks a sigma as good as the best of the others."""
    names = {"rising loss": rising_loss, "flatness of LoRA": flatness_of_lora}
    cells = [c for c in cells if len(c.variants) == 1 + len(c.cell.curve)]
    if len({c.cell.task for c in cells}) < 2:
        return "## Rules for sigma\n\nNo rule can be judged yet: fewer than two tasks have all sigmas.\n"
    lines = []
    constants = {name: fitted(rule, cells[0]) for name, rule in names.items()}
    worse: dict[str, set[str]] = {name: set() for name in names}
    for c in cells:
        best = best_sigma(c)
        good = as_good(c, best)
        texts = []
        for name, rule in names.items():
            pick = rule(c, constants[name])
            texts.append(f"{pick:g}, {'as good' if pick in good else 'worse'}" if pick else "none")
            if (pick or 0.0) not in good:
                worse[name].add(c.cell.task)
        lines.append((c.cell.name, f"{best:g}", ", ".join(f"{x:g}" for x in good), *texts))
    head = (
        "cell",
        "best σ",
        "not significantly worse",
        *(f"{name}, c = {constants[name]:g}" for name in names),
    )
    tasks = len({c.cell.task for c in cells})
    verdict = " ".join(
        f"*{name[0].upper()}{name[1:]}* is as good in all cells of {tasks - len(failed)} of {tasks} tasks."
        for name, failed in worse.items()
    )
    works = any(tasks - len(failed) >= 3 for failed in worse.values())
    return (
        "## Rules for sigma\n\nMean of in and out of domain; the constants are fitted on the first cell "
        f"({cells[0].cell.name}). {tasks} of the plan's four tasks have a curve.\n\n{table(head, lines)}\n"
        f"{verdict} The plan asks for three of four: {'one' if works else 'none'} works.\n"
    )


def best_sigma(c: Compared) -> float:
    return max(c.variants, key=lambda sigma: statistics.mean(c.values(sigma, c.both)))


def as_good(c: Compared, best: float) -> list[float]:
    top = c.values(best, c.both)
    worse = {
        s for s in c.variants if s != best and (d := paired(c.values(s, c.both), top)).beyond and d.mean < 0
    }
    return [sigma for sigma in c.variants if sigma not in worse]


def rising_loss(c: Compared, constant: float) -> float | None:
    limit = constant * _initial(c)
    return next((s for s in c.variants if s and statistics.mean(c.values(s, under_way)) > limit), None)


def flatness_of_lora(c: Compared, constant: float) -> float | None:
    limit = constant * _initial(c)
    rises = {sigma: statistics.mean(c.values(0.0, increase(sigma))) for sigma in SIGMAS}
    below = max((sigma for sigma, rise in rises.items() if rise < limit), default=None)
    # The nearest on the curve, by ratio.
    return below and min((s for s in c.variants if s), key=lambda s: abs(math.log(s / below)))


def fitted(rule: Callable[[Compared, float], float | None], c: Compared) -> float:
    """The smallest constant with which the rule picks the best sigma of this cell, or the nearest."""
    constants = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
    best = best_sigma(c) or min(s for s in c.variants if s)
    return min(constants, key=lambda k: abs(math.log((rule(c, k) or 1e-3) / best)))


def _initial(c: Compared) -> float:
    return math.log(TASKS[c.cell.task].classes)


# ---------------------------------------------------------------------- figures


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_curves(cells: Sequence[Compared], path: Path) -> Path:
    """Gain over sigma, in and out of domain, with 95 % bands."""
    pyplot = _pyplot()
    columns = min(3, len(cells))
    rows = math.ceil(len(cells) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns, 3.6 * rows), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(cells) :]:
        ax.set_visible(False)
    for ax, c in zip(axes.flat, cells, strict=False):
        sigmas = [sigma for sigma in c.variants if sigma]
        for label, measure in (("in domain", c.within), ("out of domain", c.out)):
            gains = [paired(*c.pairs(sigma, 0.0, measure)) for sigma in sigmas]
            (line,) = ax.plot(sigmas, [g.mean for g in gains], marker="o", linewidth=2, label=label)
            low, high = ([g.mean + sign * g.half for g in gains] for sign in (-1, 1))
            ax.fill_between(sigmas, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        ax.axhline(0, color="gray", linewidth=1)
        ax.set_title(c.cell.name, fontsize=11)
        ax.set_xlabel("σ of Flat-LoRA", fontsize=12)
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel("accuracy − LoRA's, %", fontsize=12)
        ax.tick_params(labelsize=11)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=12)
    return _saved(figure, path)


def draw_methods(cells: Sequence[Compared], path: Path) -> Path:
    """Paired differences to LoRA out of domain, a panel a cell."""
    pyplot = _pyplot()
    columns = min(3, len(cells))
    rows = math.ceil(len(cells) / columns)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(4.4 * columns + 1, 3.4 * rows),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for ax in axes.flat[len(cells) :]:
        ax.set_visible(False)
    names = [name for name in cells[0].cell.methods if name != BASELINE]
    for ax, c in zip(axes.flat, cells, strict=False):
        there = [name for name in names if name in c.variants]
        for offset, label, measure in ((-0.15, "in domain", c.within), (0.15, "out of domain", c.out)):
            gains = [paired(c.values(name, measure), c.values(BASELINE, measure)) for name in there]
            heights = [names.index(name) + offset for name in there]
            ax.errorbar(
                [g.mean for g in gains],
                heights,
                xerr=[g.half for g in gains],
                fmt="o",
                capsize=3,
                label=label,
            )
        ax.axvline(0, color="gray", linewidth=1)
        ax.set_yticks(range(len(names)), names, fontsize=11)
        ax.set_title(f"{c.cell.name} ({seeds(c)} seeds)", fontsize=11)
        ax.set_xlabel("accuracy − LoRA's, %", fontsize=12)
    axes[0][0].invert_yaxis()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=12)
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.get_layout_engine().set(hspace=0.06)
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
    return path
