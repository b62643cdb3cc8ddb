"""The demo: with sigma 0 Flat-LoRA is plain LoRA, with noise it is not; table and picture say so."""

from __future__ import annotations

import dataclasses
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import sentiment

SMALL = {"steps": 2, "batch_size": 4, "test_sentences": 16, "loss_sentences": 8, "noises": 2, "points": 3}


@pytest.fixture(autouse=True)
def _as_loud_as_before() -> Iterator[None]:
    yield
    logging.disable(logging.NOTSET)


def run(method: str, data: sentiment.Data, sigma: float) -> sentiment.Result:
    args = sentiment.arguments(["--sigma", str(sigma)])
    vars(args).update(SMALL)
    result = sentiment.run(method, data, args, seed=0, progress=Progress(disable=True))
    return dataclasses.replace(result, seconds_per_step=0.0)


def test_both_methods_differ_by_the_noise_alone(tmp_path: Path) -> None:
    sentiment.be_quiet()
    args = sentiment.arguments(["--quick"])
    data = sentiment.load_data(args)
    assert len(data.tests) == 4
    assert not {text for text, _ in data.train} & {text for text, _ in data.in_domain}

    plain, silent, noisy = run("AdamW", data, 0.0), run("Flat-LoRA", data, 0.0), run("Flat-LoRA", data, 0.5)
    assert (silent.loss, silent.accuracies) == (plain.loss, plain.accuracies)
    assert silent.expected_loss == silent.loss
    assert noisy.loss != plain.loss
    assert noisy.expected_loss != noisy.loss

    results = {"AdamW": [plain, silent], "Flat-LoRA": [silent, noisy]}
    printed = Console(file=io.StringIO(), width=120)
    printed.print(sentiment.report(results, data, args))
    for line in ("movies (in domain)", "Amazon", "NYT", "tweets", "loss at W", "seconds per step"):
        assert line in printed.file.getvalue()
    sentiment.draw(results, data, tmp_path / "outputs" / "picture.png")
    assert (tmp_path / "outputs" / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [["--sigma", "-1"], ["--sigma", "nan"], ["--steps", "0"], ["--seeds", "x"]])
def test_wrong_options_are_refused_before_anything_runs(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sentiment.arguments(wrong)
    assert f"argument {wrong[0]}" in capsys.readouterr().err
