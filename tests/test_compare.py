"""The demo: methods differ by what they are compared for, and its numbers are those in the README."""

from __future__ import annotations

import argparse
import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import compare
from compare import Result
from digits import Task
from flatlora_optim.kernels import native
from flatlora_optim.landscape import ExpectedLoss
from helpers import lora_mlp, loss_of, mlp_batch, trainable
from sam import SAM


def settings(*options: str, **values: Any) -> argparse.Namespace:
    args = compare.arguments(["--quick", "--methods", "LoRA", *options])
    vars(args).update({"lr": 0.02, "sigma": 0.6, "rho": 0.1, **values})
    return args


@pytest.fixture(scope="module")
def task() -> Task:
    return Task(pretraining=8)


def adapters(task: Task, method: str, seed: int = 0, **values: Any) -> Tensor:
    model, _ = compare.train(task, method, seed, settings(**values))
    return torch.cat([p.detach().flatten() for p in trainable(model)])


def test_methods_differ_by_their_noise_alone(task: Task) -> None:
    plain = adapters(task, "LoRA")
    assert torch.equal(adapters(task, "Flat-LoRA", sigma=0.0), plain)
    assert torch.equal(adapters(task, "LoRA + SAM", rho=0.0), plain)
    others = [adapters(task, "Flat-LoRA"), adapters(task, "LoRA + SAM"), adapters(task, "LoRA", seed=1)]
    assert not any(torch.allclose(other, plain, atol=1e-3) for other in others)


def test_seeds_have_examples_of_their_own_that_no_test_has(task: Task) -> None:
    (x, y), (other, _) = (task._training_data(seed) for seed in (0, 1))
    assert len({tuple(row) for row in torch.cat([x, other]).flatten(1).tolist()}) > len(x)
    tested = {tuple(row) for row in task._tests["clean"].flatten(1).tolist()}
    assert not tested & {tuple(row) for row in x.flatten(1).tolist()}
    clean = copy.copy(task)
    clean.wrong = 0.0
    assert int((clean._training_data(0)[1] != y).sum()) == 20


def test_sam_takes_the_gradient_at_the_worst_point_nearby() -> None:
    model, batch = lora_mlp(), mlp_batch()
    climbing, resting = trainable(model)[:2], trainable(model)[2:]
    start = [p.detach().clone() for p in trainable(model)]
    gradients = torch.autograd.grad(loss_of(model, batch), climbing)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    with torch.no_grad():
        for p, g in zip(climbing, gradients, strict=True):
            p.add_(0.05 * g / norm)
    expected = torch.autograd.grad(loss_of(model, batch), [*climbing, *resting])
    with torch.no_grad():
        for p, value in zip(trainable(model), start, strict=True):
            p.copy_(value)
    sgd = torch.optim.SGD(trainable(model), lr=0.1)

    def closure() -> Tensor:
        sgd.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    before = loss_of(model, batch).item()
    assert SAM(sgd, 0.05, climbing).step(closure).item() == before
    for p, value, gradient in zip(trainable(model), start, expected, strict=True):
        torch.testing.assert_close(p.detach(), value - 0.1 * gradient)


def result(score: float, increase: float) -> Result:
    around = [ExpectedLoss(torch.tensor([increase + 1.0]), 1.0, sigma) for sigma in (0.1, 0.2)]
    return Result({"clean images": score}, around, 0.01, [], None)


def test_the_table_pairs_seeds_and_marks_what_is_beyond_its_interval() -> None:
    results = {
        "LoRA": [result(0.1, 0.5), result(0.5, 0.5), result(0.9, 0.5)],
        "Flat-LoRA": [result(0.12, 0.4), result(0.521, 0.6), result(0.922, 0.5)],
    }
    args = settings()
    args.seeds, args.steps = 3, 4
    lines = compare.rows(results, args)
    # t(0.975, 2) / sqrt(3) times the standard deviations 40 and 0.1
    assert lines[0] == ["accuracy, clean images, %", "50.0 ± 99.4", "52.1 ± 99.6", "**+2.1 ± 0.2**"]
    assert lines[2][-1] == "+0.000 ± 0.248"
    text = compare.markdown(results, Task(), args, 3.2, "0123abc")
    assert text.startswith(compare.MARKS[0])
    assert text.endswith(compare.MARKS[1])
    assert "| accuracy, clean images, % | 50.0 ± 99.4 | 52.1 ± 99.6 | **+2.1 ± 0.2** |" in text


def test_the_table_goes_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    monkeypatch.setattr(compare, "README", readme)
    readme.write_text(f"before\n{compare.MARKS[0]} 1 -->\nold\n{compare.MARKS[1]}\nafter\n", encoding="utf-8")
    new = f"{compare.MARKS[0]} 2 -->\nnew\n{compare.MARKS[1]}"
    compare.write_readme(new)
    assert readme.read_text(encoding="utf-8") == f"before\n{new}\nafter\n"
    readme.write_text("nothing", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"README\.md has no"):
        compare.write_readme(new)


@pytest.mark.skipif(not native.is_available(), reason="without a compiler the noise is of other numbers")
def test_the_table_in_the_readme_is_of_this_code() -> None:
    """A few steps of each method give the losses that they gave when the table was written."""
    readme = compare.README.read_text(encoding="utf-8")
    recorded = re.search(rf"{compare.MARKS[0]} ([\d. ]+) -->", readme)
    assert recorded, "write the table by `make demo-readme`"
    now = list(compare.fingerprint().values())
    assert [float(x) for x in recorded[1].split()] == pytest.approx(now, rel=2e-5), (
        "the demo's numbers have changed: write them again by `make demo-readme`"
    )
    assert re.search(r"at commit [0-9a-f]{7,}", readme)
    headline = re.search(r"in the demo below, beside LoRA \| (\S+ ± \S+) points", readme)
    assert headline, "the demo's gain is one of the first three numbers"
    assert f"**{headline[1]}**" in readme.split(compare.MARKS[0])[1]


def test_a_task_of_ones_own_is_compared_and_drawn(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from digits import Task as Digits\n\n\nclass Task(Digits):\n    title = 'mine'\n    steps = 2\n"
    )
    mine = compare.load(file)
    mine.pretraining = 2
    args = compare.arguments(["--quick"])
    results = compare.compare(mine, args, Progress(disable=True))
    assert [len(several) for several in results.values()] == [2, 2, 2]
    assert "mine" in str(compare.printed(results, mine, args).title)
    paths = compare.draw(results, tmp_path / "pictures", args)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert [path.stem for path in paths] == list(compare.PICTURES)


def test_sentences_are_compared_in_the_same_way() -> None:
    from sentiment import Task as Sentences
    from sentiment import sentences

    task = Sentences()
    task.tests = 8
    assert not {text for text, _ in sentences("movies")[:1000]} & {t for t, _ in sentences("movies")[1000:]}
    model, _ = compare.train(task, "Flat-LoRA", 0, settings(steps=1))
    assert task.scores(model).keys() == {"movies", "Amazon", "NYT", "tweets"}


@pytest.mark.parametrize("wrong", [["--sigma", "-1"], ["--sigma", "nan"], ["--steps", "0"], ["--seeds", "x"]])
def test_wrong_options_are_refused_before_anything_runs(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.arguments(wrong)
    assert f"argument {wrong[0]}" in capsys.readouterr().err
