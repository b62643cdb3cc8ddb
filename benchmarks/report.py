# ruff: noqa: RUF001 (× and – are meant)
"""Results as Markdown tables and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import bars
import cycles
import training
from measure import ratio

Results = dict[str, Any]


def markdown(results: Results) -> str:
    parts = results["parts"]
    sections = [_HEAD, _machine(results), _bars(parts)]
    for name, section in _SECTIONS.items():
        if name in parts:
            sections.append(section(parts[name]))
    return "\n\n".join(sections) + "\n"


_HEAD = """# Benchmark results

Written by `make bench`; [README.md](README.md) says what is measured, and how. Ratios are medians of
paired measurements, with their quartiles in parentheses."""


def _machine(results: Results) -> str:
    facts = {
        **results["machine"],
        "load average before each part": results["load"],
        "commit that each part was measured at": results["commit"],
    }
    return "\n".join(f"- {name}: {_fact(value)}" for name, value in facts.items())


def _fact(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _bars(parts: Results) -> str:
    checked = list(bars.check(parts))
    rows = [(bar.promise, bar.value, "met" if bar.met else "**missed**") for bar in checked]
    met = sum(bar.met for bar in checked)
    return (
        f"## Bars\n\n{met} of {len(checked)} met. The ratios are meant for two CPU cores; of several "
        "cases the worst counts.\n\n" + _table(("bar", "measured", ""), rows)
    )


def _cycles(records: list[Results]) -> str:
    text = (
        "## Perturb and restore alone\n\n"
        "Modes are named `restore, noise`. Extra memory is the peak over the frozen weights and the "
        "adapters, in per cent of the frozen weights."
    )
    for r in records:
        seconds, memory = r["seconds"], r["memory"]
        rows = [
            (
                variant,
                f"{1e3 * statistics.median(times):.1f}",
                f"{1e9 * statistics.median(times) / r['elements']:.2f}",
                f"{ratio(seconds[cycles.TRANSCRIPTION], times):.1f}",
                f"{ratio(times, seconds[cycles.MEMORY_LIMIT]):.1f}",
                _percent(memory[variant], r["bytes"]) if variant in memory else "",
            )
            for variant, times in seconds.items()
        ]
        share = ratio(seconds[cycles.ROW_SCALES], seconds["exact, gaussian"])
        share_of_table = ratio(seconds[cycles.ROW_SCALES], seconds["exact, table"])
        head = (
            "variant",
            "ms",
            "ns per element",
            "faster than transcription",
            "× memory limit",
            "extra memory",
        )
        text += (
            f"\n\n### {r['model']}, {r['dtype']}: {r['elements'] / 1e6:.1f} M elements, "
            f"{len(seconds[cycles.MEMORY_LIMIT])} rounds\n\n{_table(head, rows)}\n\n"
            f"The row scales take {share.median:.0%} of `exact, gaussian` and {share_of_table.median:.0%} "
            "of `exact, table`."
        )
    return text


def _training(records: list[Results]) -> str:
    text = "## Whole training steps\n\nMemory is what a step allocates over the loaded model."
    for r in records:
        plain_memory = r["memory"][training.PLAIN]
        rows = []
        for variant, peak in r["memory"].items():
            time = ("", "")
            if r["seconds"]:
                times = r["seconds"][variant]
                time = f"{statistics.median(times):.3f}", f"{ratio(times, r['seconds'][training.PLAIN]):.3f}"
            added = peak - plain_memory
            rows.append(
                (variant, *time, f"{peak / 2**20:.1f}", f"{added / 2**20:+.1f}", _percent(added, r["bytes"]))
            )
        head = (
            "variant", "s per step", "× plain LoRA", "peak MiB", "over plain LoRA", "… of the frozen weights"
        )  # fmt: skip
        rounds = f"{len(r['seconds'][training.PLAIN])} rounds" if r["seconds"] else "memory only"
        text += f"\n\n### {r['model']}, {r['tokens']} tokens, {r['dtype']}, {rounds}\n\n{_table(head, rows)}"
    return text


def _growth(records: list[Results]) -> str:
    text = "## Growth\n\nMedian time of a cycle of `exact` in ms, and relative to the first."
    for r in records:
        first = next(iter(r["seconds"].values()))
        rows = [
            (value, f"{1e3 * statistics.median(times):.2f}", f"{ratio(times, first):.2f}")
            for value, times in r["seconds"].items()
        ]
        text += f"\n\n### {r['axis']}, {r['noise']}\n\n{_table((r['axis'], 'ms', '× first'), rows)}"
    return text


def _drift(records: list[Results]) -> str:
    counts = list(records[0]["after"])
    rows = [
        (
            r["mode"],
            r["dtype"],
            *(f"{r['after'][c]['changed']:.2%}, {r['after'][c]['rms']:.1e}" for c in counts),
        )
        for r in records
    ]
    return (
        "## Drift\n\nElements that differ from the clean weight, and the root mean square of the "
        "difference relative to the weight's, after so many cycles.\n\n"
        + _table(("mode", "dtype", *(f"{int(c):,}" for c in counts)), rows)
    )


_MARKERS = "osD^v<>PX*hdp"
_SECTIONS = {"cycles": _cycles, "training": _training, "growth": _growth, "drift": _drift}


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(parts: Results, path: Path) -> bool:
    """Time against memory, one point per mode: of a cycle, and of a training step.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    panels = []
    if "cycles" in parts:
        r = parts["cycles"][-1]
        limit = r["seconds"][cycles.MEMORY_LIMIT]
        points = {v: ratio(r["seconds"][v], limit).median for v in r["memory"] if v != cycles.MEMORY_LIMIT}
        panels.append((f"Perturb and restore\n{r['model']}, {r['dtype']}", "× memory limit", r, points, 0))
    if "training" in parts:
        r = max((r for r in parts["training"] if r["seconds"]), key=lambda r: r["tokens"])
        plain = r["seconds"][training.PLAIN]
        points = {v: ratio(times, plain).median for v, times in r["seconds"].items()}
        title = f"Training step\n{r['model']}, {r['tokens']} tokens, {r['dtype']}"
        panels.append((title, "× plain LoRA", r, points, r["memory"][training.PLAIN]))
    if not panels:
        return False
    variants = list(dict.fromkeys(variant for *_, points, _ in panels for variant in points))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6 * len(panels), 5.5), squeeze=False, layout="constrained"
    )
    for ax, (title, unit, r, points, without) in zip(axes[0], panels, strict=True):
        for variant, time in points.items():
            extra = 100 * (r["memory"][variant] - without) / r["bytes"]
            number = variants.index(variant)
            marker, color = _MARKERS[number % len(_MARKERS)], f"C{number % 10}"
            ax.plot(extra, time, marker, color=color, markersize=9, label=variant)
        ax.set(title=title, xlabel="extra memory, % of the frozen weights", ylabel=f"time, {unit}")
        ax.set_xscale("symlog", linthresh=10)
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.grid(True, which="both", alpha=0.3)
    labels = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels())}  # noqa: B905
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=4, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
