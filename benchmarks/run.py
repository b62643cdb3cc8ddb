"""Runs the benchmarks of the CPU and writes RESULTS.md. (``gpu.py`` measures a GPU.)

python benchmarks/run.py                  # all of it, under 15 minutes on two quiet cores
python benchmarks/run.py --quick          # a minute; shows that it works, not how fast
python benchmarks/run.py --only growth    # measures a part anew and keeps the other results
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is loaded; silences its profiler

import torch

import cycles
import drift
import growth
import measure
import report
import training

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "examples"))

PARTS = {"cycles": cycles.run, "training": training.run, "growth": growth.run, "drift": drift.run}


def main() -> None:
    options = _parse()
    folder = HERE.parent / "outputs/benchmarks" if options.quick else HERE
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    results = _known(file, measure.machine("cpu"))
    for name in options.only:
        print(f"{name} …", flush=True)
        results["load"][name] = measure.load_average()
        results["commit"][name] = measure.commit()
        start = time.perf_counter()
        with torch.random.fork_rng():
            results["parts"][name] = PARTS[name](options.quick)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
    text = report.markdown(results)
    if report.plot(results["parts"], folder / "figures/time_against_memory.png"):
        text += "\n## Time against memory\n\n![time against memory](figures/time_against_memory.png)\n"
    (folder / "RESULTS.md").write_text(text)
    print(text)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds, into outputs/")
    parser.add_argument("--only", help=f"comma-separated parts of {','.join(PARTS)}")
    options = parser.parse_args()
    options.only = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return options


def _known(file: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """Earlier results, if they were measured on the same machine; never a mixture."""
    if file.exists():
        results: dict[str, Any] = json.loads(file.read_text())
        if results["machine"] == machine:
            return {"commit": {}, **results}
    return {"machine": machine, "load": {}, "commit": {}, "parts": {}}


if __name__ == "__main__":
    main()
