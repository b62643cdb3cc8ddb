"""The small examples run as they stand, and learn."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def tiny_llama(folder: Path) -> Path:
    """An untrained model and a tokenizer of single characters, as ``from_pretrained`` reads them."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=0,
        bos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate(["<end>", *"0123456789+-= "])}
    characters = Tokenizer(BPE(vocabulary, []))
    PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_qlora_trains_both_ways_on_frozen_bytes(tmp_path: Path) -> None:
    path = EXAMPLES / "qlora.py"
    assert len(path.read_text().splitlines()) < 250
    options = ["--quick", "--sigma", "1", "--model", str(tiny_llama(tmp_path))]
    done = subprocess.run(
        [sys.executable, "-X", "utf8", str(path), *options],
        capture_output=True,
        encoding="utf-8",
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "14 bnb-4bit virtual" in done.stdout, done.stdout[-2000:]
    assert "The frozen 4-bit weights are the same bytes as before training." in done.stdout
    table = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    losses = {row[0].strip(): row[-2].strip() for row in table}
    assert losses.keys() == {"before training", "QLoRA", "QLoRA + Flat-LoRA"}
    assert losses["QLoRA"] != losses["QLoRA + Flat-LoRA"]  # the noise has reached the 4-bit layers


@pytest.mark.slow
def test_trainer_qlora_learns_and_resumes(tmp_path: Path) -> None:
    path = EXAMPLES / "trainer_qlora.py"
    assert len(path.read_text().splitlines()) < 120
    losses = []
    for options in (["--steps", "40"], ["--steps", "60", "--resume"]):
        done = subprocess.run(
            [sys.executable, str(path), "--output", str(tmp_path), *options],
            capture_output=True,
            encoding="utf-8",
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "'flatlora/noise_norm'" in done.stdout
        result = re.search(r"^Result: loss ([\d.]+) after", done.stdout, re.MULTILINE)
        assert result, done.stdout[-2000:]
        losses.append(float(result[1]))
    chance = math.log(32)
    assert losses[1] < losses[0] < 0.6 * chance
