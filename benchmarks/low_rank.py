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
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer, LowRankNoise
from layers import trainable
from measure import commit

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "examples"))

FULL = "full"
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

    return _of_task(sentiment.Task(), 64)


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
    pieces = ids[: len(ids) // 128 * 128].view(-1, 1, 128)
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

    return _of_task(digits.Task(), 512)


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
    records = []
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
                    "deviation": losses.std().item(),
                    "largest": losses.max().item(),
                    "gradient": float(found["mean"].norm() / gradient.norm()),
                    "apart": apart / expected if found is not full else 0.0,
                    "spread": found["noise"] / float(gradient.norm()),
                }
            )
            print(f"  sigma {sigma}, {records[-1]['noise']}", flush=True)
    return {"loss": clean, "draws": draws, "records": records, "commit": commit()}


def _draws(subject: Subject, noise: str | LowRankNoise, sigma: float, draws: int) -> dict[str, Any]:
    """Losses, shape ``(draws, 2)``; the mean gradient; roots of the total variance of a pair and of one."""
    base = torch.optim.SGD(trainable(subject.model), lr=0.0)
    options: dict[str, Any] = {"schedule": "constant", "auto": False, "noise": noise}
    optimizer = FlatLoRAOptimizer(base, subject.model, sigma=sigma, **options)
    losses, sums, singles = [], [torch.zeros(()), torch.zeros(())], 0.0
    for k in range(draws):
        optimizer.step_count = k
        pair = []
        for _ in range(2):
            with optimizer.perturbed():
                pair.append(_loss_and_gradient(subject))
            # What is odd in the noise, and most of the variance, cancels in the mean of eps and -eps.
            optimizer._noises = [noise and noise.negated() for noise in optimizer._noises or ()]
        losses.append([loss for loss, _ in pair])
        both = (pair[0][1] + pair[1][1]) / 2
        sums = [sums[0] + both, sums[1] + both.square()]
        singles += sum(float(gradient.square().sum()) for _, gradient in pair) / 2
    optimizer.close()
    mean = sums[0] / draws
    spread = float((sums[1] / draws - mean.square()).sum()) * draws / (draws - 1)
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "mean": mean,
        "spread": math.sqrt(max(spread, 0.0)),
        "noise": math.sqrt(max(singles / draws - float(mean.square().sum()), 0.0)),
    }


def _loss_and_gradient(subject: Subject) -> tuple[float, Tensor]:
    loss = subject.loss(subject.model, subject.batch)
    gradients = torch.autograd.grad(loss, trainable(subject.model))
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients])


def markdown(results: dict[str, Any]) -> str:
    text = (
        "# Low-rank noise beside full noise\n\n"
        "Written by `benchmarks/low_rank.py`. Each model has a LoRA that has learned a little; loss and "
        "gradient (in A and B) of one batch, over draws of the noise, each with both signs. **Increase**: of "
        "the loss over that at W, ± standard error. **Deviation**, **largest**: of single draws. **Mean "
        "gradient**: its norm, relative to the gradient at W. **Apart**: how far it is from that under full "
        "noise, in units of what two samples from one distribution differ by: 1 is none, 1.4 would be a "
        "difference as large as the sampling error. **Gradient noise**: the root of the total variance, "
        "relative to the norm of the gradient at W."
    )
    for name, found in results.items():
        text += f"\n\n## {name}\n\nLoss at W {found['loss']:.4f}, {found['draws']} draws, "
        text += f"commit {found['commit']}.\n\n"
        text += "| σ | noise | increase | deviation | largest | mean gradient | apart | gradient noise |\n"
        text += "|---|---|---|---|---|---|---|---|\n"
        for r in found["records"]:
            apart = f"{r['apart']:.2f}" if r["noise"] != FULL else ""
            text += (
                f"| {r['sigma']} | {r['noise']} | {r['increase']:+.5f} ± {r['error']:.5f} "
                f"| {r['deviation']:.5f} | {r['largest']:+.4f} | {r['gradient']:.3f} | {apart} "
                f"| {r['spread']:.3f} |\n"
            )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=SUBJECTS)
    parser.add_argument("--draws", type=int, help="of the noise, instead of each model's own number")
    parser.add_argument("--ranks", help="comma-separated, instead of 1,2,4,8,16")
    args = parser.parse_args()
    ranks = tuple(map(int, args.ranks.split(","))) if args.ranks else RANKS[:2] if args.quick else RANKS
    folder = HERE.parent / "outputs/benchmarks" if args.quick else HERE
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "low_rank.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    chosen = [args.only] if args.only else ["ViT"] if args.quick else list(SUBJECTS)
    for name in chosen:
        print(name, flush=True)
        torch.manual_seed(0)
        subject = SUBJECTS[name]()
        draws = args.draws or (4 if args.quick else subject.draws)
        results[name] = measure(subject, draws, ranks)
        file.write_text(json.dumps(results, indent=1) + "\n")
    (folder / "LOW_RANK.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
