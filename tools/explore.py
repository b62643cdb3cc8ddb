"""Runs the property tests with fresh random seeds until the time is over, or one of them fails.

    python tools/explore.py [SECONDS] [SEED]

Each pass prints its seed first; SEED runs the pass of that seed alone. The pass that is under way when the
time is over is finished, so a run may take a minute more than SECONDS.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main(seconds: float = 120, seed: int | None = None) -> int:
    end, passes = time.monotonic() + seconds, 0
    while passes == 0 or (seed is None and time.monotonic() < end):
        chosen = secrets.randbits(32) if seed is None else seed
        print(f"Exploring with seed {chosen}", flush=True)
        options = [
            "-q",
            "-x",
            "-m",
            "hypothesis",
            "--hypothesis-profile=explore",
            f"--hypothesis-seed={chosen}",
        ]
        failed = subprocess.run(
            [sys.executable, "-m", "pytest", *options], cwd=Path(__file__).parent.parent, check=False
        ).returncode
        if failed:
            print(f"To see it again: python tools/explore.py 0 {chosen}", flush=True)
            return failed
        passes += 1
    print(f"Found nothing in {passes} passes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
