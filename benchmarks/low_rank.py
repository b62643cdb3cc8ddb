# ruff: noqa: RUF001 (× and – are meant)
"""Whether low-rank noise is the same method: loss and gradients under it, beside those under the paper's.

Three models with a LoRA that has learned a little; many draws of noise on one batch, without dropout.
Writes LOW_RANK.md.

python benchmarks/low_rank.py                 # all of it: about half an hour on two quiet cores
python benchmarks/low_rank.py --quick         # a minute, into outputs/; shows that it works
python benchmarks/low_rank.py --only ViT      # measures one model anew and keeps the others
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer, LowRankNoise
from flatlora_optim.perturbation import LowRankPerturbation
from layers import trainable
from measure import commit

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "examples"))

FULL = "full"
NORMS = "norms"
LEARNING_RATES = (2e-4, 2e-3)
RANKS = (1, 2, 4, 8, 16)
SIGMAS = (0.05, 0.2, 0.4)

Loss = Callable[[nn.Module, Any], Tensor]


class Subject(NamedTuple):
    """A model, its training batches, and the batch that is measured."""

    model: nn.Module
    batches: Iterator[Any]
    batch: Any
    loss: Loss
    steps: int
    lr: float
    draws: int


def minilm() -> Subject:
    import sentiment

    task = sentiment.Task()
    task.batch = 4
    return _of_task(task, 64)


def _of_task(task: Any, draws: int) -> Subject:
    batches = task.batches(0)
    return Subject(task.model(0), batches, next(batches), task.loss, 60, task.lr, draws)


def smollm2() -> Subject:
    from transformers import AutoTokenizer

    import packages
    import sentiment
    import training

    path = packages.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "\n".join(sentence for sentence, _ in sentiment.sentences("movies"))
    ids = tokenizer(text[:100_000], return_tensors="pt").input_ids[0]
    pieces = ids[: len(ids) // 32 * 32].view(-1, 1, 32)
    model = training.with_lora(training.smollm2())
    return Subject(
        model,
        iter(pieces[1:]),
        pieces[0],
        lambda model, ids: model(input_ids=ids, labels=ids).loss,
        20,
        5e-4,
        24,
    )


def vit() -> Subject:
    import digits

    return _of_task(digits.Task(), 400)


SUBJECTS = {"MiniLM": minilm, "SmolLM2-135M": smollm2, "ViT": vit}


def measure(subject: Subject, draws: int, ranks: Iterable[int]) -> dict[str, Any]:
    """Means and variances over draws, for each sigma and noise."""
    model = subject.model
    adam = torch.optim.AdamW(trainable(model), lr=subject.lr)
    model.train()
    for batch in islice(subject.batches, subject.steps):
        subject.loss(model, batch).backward()
        adam.step()
        adam.zero_grad()
    model.eval()
    clean, gradient = _loss_and_gradient(subject)
    scale, records = float(gradient.norm()), []
    for sigma in SIGMAS:
        full: dict[str, Any] | None = None
        for noise in ("gaussian", *map(LowRankNoise, ranks)):
            found = _draws(subject, noise, sigma, draws)
            full = full or found
            # Two estimates of one mean differ by their standard errors.
            expected = math.sqrt((found["spread"] ** 2 + full["spread"] ** 2) / draws)
            apart = float((found["mean"] - full["mean"]).norm())
            losses = found["losses"] - clean  # (draws, 2)
            increases = losses.mean(1)
            records.append(
                {
                    "sigma": sigma,
                    "noise": FULL if noise == "gaussian" else f"rank {noise.rank}",
                    "increase": increases.mean().item(),
                    "error": increases.std().item() / math.sqrt(draws),
                    "deviation": _root((losses - losses.mean()).square().mean(1)),
                    "largest": losses.max().item(),
                    "gradient": float(found["mean"].norm()) / scale,
                    "apart": apart / expected if found is not full else 0.0,
                    "spread": [value / scale for value in _root(found["noise"])],
                }
            )
            print(f"  sigma {sigma}, {records[-1]['noise']}", flush=True)
    return {"loss": clean, "draws": draws, "records": records, "commit": commit()}


def _root(squares: Tensor) -> list[float]:
    """The root of their mean, and its standard error."""
    root = math.sqrt(squares.mean().item())
    return [root, squares.std().item() / math.sqrt(len(squares)) / (2 * root)]


def _draws(subject: Subject, noise: str | LowRankNoise, sigma: float, draws: int) -> dict[str, Any]:
    """Losses, shape ``(draws, 2)``; the mean gradient; the root of the total variance of a pair's mean; the
    squared distances of single ones, shape ``(draws,)``."""
    base = torch.optim.SGD(trainable(subject.model), lr=0.0)
    options: dict[str, Any] = {"schedule": "constant", "auto": False, "noise": noise, "restore": "snapshot"}
    optimizer = FlatLoRAOptimizer(base, subject.model, sigma=sigma, **options)
    losses, halves, sums = [], [], [torch.zeros(()), torch.zeros(())]
    for k in range(draws):
        optimizer.step_count = k
        pair = []
        for _ in range(2):
            with optimizer.perturbed():
                pair.append(_loss_and_gradient(subject))
            # What is odd in the noise, and most of the variance, cancels in the mean of eps and -eps.
            _negate(optimizer)
        losses.append([loss for loss, _ in pair])
        both = (pair[0][1] + pair[1][1]) / 2
        halves.append(float((pair[0][1] - pair[1][1]).square().sum()) / 4)
        sums = [sums[0] + both, sums[1] + both.square()]
    optimizer.close()
    mean = sums[0] / draws
    spread = max(float((sums[1] / draws - mean.square()).sum()) * draws / (draws - 1), 0.0)
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "mean": mean,
        "spread": math.sqrt(spread),
        "noise": torch.tensor(halves, dtype=torch.float64) + spread,
    }


def _negate(optimizer: FlatLoRAOptimizer) -> None:
    for perturbation in optimizer._weights.perturbations:
        if isinstance(perturbation, LowRankPerturbation):
            perturbation.left.neg_()
    if not isinstance(optimizer._weights.perturbations[0], LowRankPerturbation):
        optimizer._noises = [noise and noise.negated() for noise in optimizer._noises or ()]


def _loss_and_gradient(subject: Subject) -> tuple[float, Tensor]:
    loss = subject.loss(subject.model, subject.batch)
    gradients = torch.autograd.grad(loss, trainable(subject.model))
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients])


def norms(steps: int) -> dict[str, Any]:
    """How often the norms of quantized weights are read in runs, and how far off the kept ones are."""
    return {"runs": [_norms(steps, lr) for lr in LEARNING_RATES], "steps": steps, "commit": commit()}


def _norms(steps: int, lr: float) -> dict[str, float]:
    import training

    subject = smollm2()
    model = training.with_lora(training.in_nf4(subject.model.unload()))
    base = torch.optim.AdamW(trainable(model), lr=lr)
    optimizer = FlatLoRAOptimizer(base, model, sigma=0.05, total_steps=steps)
    reads, errors = [0] * len(optimizer.targets), []
    for number, ids in enumerate(islice(cycle([subject.batch, *subject.batches]), steps)):
        before = [rows.kept for rows in optimizer._weights.norms]
        subject.loss(model, ids).backward()
        kept = [rows.kept for rows in optimizer._weights.norms]
        reads = [n + (new is not old) for n, new, old in zip(reads, kept, before, strict=True)]
        if number % 20 == 19:
            with torch.no_grad():
                for rows, squared in zip(optimizer._weights.norms, kept, strict=True):
                    assert squared is not None
                    weight, delta = rows.target.weight, rows.target.delta()
                    merged = weight.dense(torch.float32) + rows.target.as_stored(delta)
                    true, ours = merged.norm(dim=1), squared[: weight.rows].sqrt()
                    errors.append(float((ours - true).norm() / true.norm()))
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    found = torch.tensor(errors)
    return {
        "lr": lr,
        "reads": sum(reads) / len(reads),
        "most": max(reads),
        "mean": found.mean().item(),
        "largest": found.max().item(),
    }


def markdown(results: dict[str, Any]) -> str:
    text = (
        "# Low-rank noise beside full noise\n\n"
        "Written by `benchmarks/low_rank.py`. Each model has a LoRA that has learned a little; loss and "
        "gradient (in A and B) of one batch, over draws of the noise, each with both signs; ± is a standard "
        "error. **Increase**: of the loss over that at W. **From full**: how far it is from that under full "
        "noise, in standard errors of the difference. **Deviation**, **largest**: of single draws. **Mean "
        "gradient**: its norm, relative to the gradient at W. **Apart**: how far it is from that under full "
        "noise, in units of what two samples from one distribution differ by: 1 is none, 1.4 would be a "
        "difference as large as the sampling error. **Gradient noise**: the root of the total variance, "
        "relative to the norm of the gradient at W."
    )
    models = {name: found for name, found in results.items() if name != NORMS}
    far = [abs(r["from"]) > 2 for found in models.values() for r in _compared(found)]
    text += (
        f"\n\nOf {len(far)} increases, {sum(far)} are more than two standard errors from that under full "
        f"noise; chance alone would let {0.0455 * len(far):.1f} be."
    )
    for name, found in models.items():
        text += f"\n\n## {name}\n\nLoss at W {found['loss']:.4f}, {found['draws']} draws, "
        text += f"commit {found['commit']}.\n\n"
        text += "| σ | noise | increase | from full | deviation | largest | mean gradient | apart "
        text += "| gradient noise |\n|---|---|---|---|---|---|---|---|---|\n"
        compared = {(r["sigma"], r["noise"]): r["from"] for r in _compared(found)}
        for r in found["records"]:
            distance = compared.get((r["sigma"], r["noise"]))
            apart = "" if distance is None else f"{r['apart']:.2f}"
            text += (
                f"| {r['sigma']} | {r['noise']} | {r['increase']:+.5f} ± {r['error']:.5f} "
                f"| {'' if distance is None else f'{distance:+.1f}'} "
                f"| {r['deviation'][0]:.5f} ± {r['deviation'][1]:.5f} | {r['largest']:+.4f} "
                f"| {r['gradient']:.3f} | {apart} | {r['spread'][0]:.3f} ± {r['spread'][1]:.3f} |\n"
            )
    if NORMS in results:
        found = results[NORMS]
        text += (
            f"\n\n## Norms of quantized weights\n\nSmolLM2-135M in NF4, {found['steps']} steps of AdamW, "
            f"commit {found['commit']}. **Reads**: in how many of the steps a weight was read for its norms. "
            "**Error**: of the norms in use, in the root mean square over a weight's rows; the tolerance is "
            "1 %.\n\n"
            "| learning rate | reads | most of any weight | error | largest |\n|---|---|---|---|---|\n"
        )
        for run in found["runs"]:
            text += f"| {run['lr']} | {run['reads']:.1f} | {run['most']} | {run['mean']:.2%} "
            text += f"| {run['largest']:.2%} |\n"
    return text


def _compared(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of low rank, each with how far its increase is from that of full noise."""
    full = {r["sigma"]: r for r in found["records"] if r["noise"] == FULL}
    for r in found["records"]:
        if r["noise"] != FULL:
            other = full[r["sigma"]]
            error = math.hypot(r["error"], other["error"])
            yield {**r, "from": (r["increase"] - other["increase"]) / error}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=[*SUBJECTS, NORMS])
    parser.add_argument("--draws", type=int, help="of the noise, instead of each model's own number")
    parser.add_argument("--ranks", help="comma-separated, instead of 1,2,4,8,16")
    args = parser.parse_args()
    ranks = tuple(map(int, args.ranks.split(","))) if args.ranks else RANKS[:2] if args.quick else RANKS
    folder = HERE.parent / "outputs/benchmarks" if args.quick else HERE
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "low_rank.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    chosen = [args.only] if args.only else ["ViT"] if args.quick else [*SUBJECTS, NORMS]
    for name in chosen:
        print(name, flush=True)
        torch.manual_seed(0)
        if name == NORMS:
            results[name] = norms(args.draws or 200)
        else:
            subject = SUBJECTS[name]()
            draws = args.draws or (4 if args.quick else subject.draws)
            results[name] = measure(subject, draws, ranks)
        file.write_text(json.dumps(results, indent=1) + "\n")
    (folder / "LOW_RANK.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
