"""The small examples run as they stand, and learn."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launcher"),
    [
        ("plain_loop.py", []),
        ("hf_trainer.py", []),
        ("lightning_module.py", []),
        ("accelerate_ddp.py", LAUNCH),
    ],
)
def test_example_learns(name: str, launcher: list[str], tmp_path: Path) -> None:
    path = EXAMPLES / name
    assert len(path.read_text().splitlines()) < 80
    done = subprocess.run(
        [sys.executable, *launcher, str(path), "--steps", "40"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = re.search(r"^Result: loss ([\d.]+) on held-out sequences", done.stdout, re.MULTILINE)
    assert result, done.stdout[-2000:]
    assert ("2 processes" in done.stdout) is bool(launcher)
    chance = math.log(32)
    assert float(result[1]) < 0.6 * chance
