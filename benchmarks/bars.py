# ruff: noqa: RUF001 (× and – are meant)
"""What the package promises, checked against the results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import cycles
import growth
import training
from measure import ratio

Results = dict[str, Any]
TOLERANCE = 1.2
_CHUNK = 4 << 20
"""The buffers of one block of 2**18 elements, on one thread: noise, sums and rounded values."""


_LOW_RANK = {
    ("float32", 256): 1.10,
    ("float32", 1024): 1.04,
    (training.NF4, 256): 1.12,
    (training.NF4, 1024): 1.05,
}


class Bar(NamedTuple):
    """``value`` is the worst of all cases that the promise covers."""

    promise: str
    value: str
    met: bool


def check(parts: Results) -> Iterator[Bar]:
    if "cycles" in parts:
        yield from _cycles(parts["cycles"])
    if "training" in parts:
        yield from _training(parts["training"])
    if "growth" in parts:
        yield from _growth(parts["growth"])
    if "drift" in parts:
        kept = {r["mode"]: [] for r in parts["drift"]}
        for record in parts["drift"]:
            kept[record["mode"]] += [after["changed"] for after in record["after"].values()]
        for mode in ("exact", "snapshot"):
            worst = max(kept[mode])
            yield Bar(
                f"`{mode}`: no bit differs after any number of cycles", f"{worst:.2%} differ", worst == 0
            )


def _cycles(records: list[Results]) -> Iterator[Bar]:
    for mode, times in {"exact, gaussian": 3, "exact, table": 8, "snapshot, table": 12}.items():
        speedups = [
            (ratio(r["seconds"][cycles.TRANSCRIPTION], r["seconds"][mode]).median, r) for r in records
        ]
        yield _least(f"`{mode}`: ≥ {times}× as fast as the transcription", speedups, times)
    slowdowns = [
        (ratio(r["seconds"]["snapshot, table"], r["seconds"][cycles.MEMORY_LIMIT]).median, r) for r in records
    ]
    yield _most("`snapshot, table`: ≤ 2.5× the memory limit", slowdowns, 2.5)


def _least(promise: str, cases: list[tuple[float, Results]], bound: float) -> Bar:
    value, where = min(cases, key=lambda case: case[0])
    return Bar(promise, _worst_of(cases, value, where), value >= bound)


def _most(promise: str, cases: list[tuple[float, Results]], bound: float) -> Bar:
    value, where = max(cases, key=lambda case: case[0])
    return Bar(promise, _worst_of(cases, value, where), value <= bound)


def _worst_of(cases: list[tuple[float, Results]], value: float, where: Results) -> str:
    middle = statistics.median(v for v, _ in cases)
    return f"{value:.2f}× ({where['model']}, {where['dtype']}); median of all {middle:.2f}×"


def _training(records: list[Results]) -> Iterator[Bar]:
    timed = [r for r in records if r["seconds"]]
    longest = max((r for r in timed if r["dtype"] != training.NF4), key=lambda r: r["tokens"])
    low_rank = "virtual, low rank"
    for r in timed:
        most = _LOW_RANK.get((r["dtype"], r["tokens"]))
        if most is not None:
            times = ratio(r["seconds"][low_rank], r["seconds"][training.PLAIN]).median
            promise = f"`{low_rank}`: ≤ {most}× plain LoRA, {r['tokens']} tokens, {r['dtype']}"
            yield Bar(promise, f"{times:.3f}×", times <= most)
    for variant, percent in {"exact, table": 5, "exact, gaussian": 15, training.SAM: 80}.items():
        added = ratio(longest["seconds"][variant], longest["seconds"][training.PLAIN])
        value = 100 * (added.median - 1)
        is_sam = variant == training.SAM
        promise = (
            f"`{variant}` adds {'≥' if is_sam else '≤'} {percent} % to a step of {longest['tokens']} tokens"
        )
        yield Bar(promise, f"{value:+.1f} %", value >= percent if is_sam else value <= percent)
    half = next(r for r in records if r["dtype"] == "bfloat16")
    for variant, allowed, room in (
        ("exact, gaussian", 0.12, "12 %"),
        ("subtract, gaussian", 0.01, "1 % + one chunk"),
        ("virtual, gaussian", 0.01, "1 % + one chunk"),
        (low_rank, 0.01, "1 %"),
    ):
        added = half["memory"][variant] - half["memory"][training.PLAIN]
        # What is in work: a block, and in virtual mode the weight of one layer.
        chunk = _CHUNK + (half["largest"] if variant == "virtual, gaussian" else 0)
        most = allowed * half["bytes"] + (chunk if "chunk" in room else 0)
        yield Bar(
            f"`{variant}`: peak memory ≤ {room} of the frozen weights (bf16) above plain LoRA",
            f"{added / half['bytes']:.1%}, {added / 2**20:.1f} MiB of {most / 2**20:.1f}",
            added <= most,
        )


def _growth(records: list[Results]) -> Iterator[Bar]:
    for record in records:
        middle = {int(v): statistics.median(times) for v, times in record["seconds"].items()}
        small, large = min(middle), max(middle)
        times = middle[large] / middle[small]
        named = f"`exact, {record['noise']}`"
        if record["axis"] == growth.SIZE:
            exponent = math.log(times) / math.log((large / small) ** 2)
            yield Bar(f"{named}: linear in weight elements", f"exponent {exponent:.2f}", exponent <= 1.1)
        elif record["axis"] == growth.LAYERS:
            exponent = math.log(times) / math.log(large / small)
            yield Bar(f"{named}: linear in layers", f"exponent {exponent:.2f}", exponent <= 1.1)
        elif record["axis"] == growth.RANKS:
            yield Bar(f"{named}: rank {large} ≤ 1.2× rank {small}", f"{times:.2f}×", times <= TOLERANCE)
        elif record["axis"] == growth.ACCUMULATION:
            yield Bar(
                f"{named}: {large} micro-batches ≤ 1.2× the noise time of {small}",
                f"{times:.2f}×",
                times <= TOLERANCE,
            )
