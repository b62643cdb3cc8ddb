"""Every recipe of examples/recipes end to end, with its ``--smoke`` model and data."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from flatlora_optim import FlatLoRAOptimizer
from helpers import assert_equal_tensors, changed_weights, fingerprint

FOLDER = Path(__file__).parents[1] / "examples" / "recipes"
sys.path.insert(0, str(FOLDER))

import evaluate  # noqa: E402
import evaluate_images  # noqa: E402
import generate_images  # noqa: E402
import merge  # noqa: E402
import settings  # noqa: E402
import tasks  # noqa: E402
import train  # noqa: E402
from smoke import shrink  # noqa: E402

NAMES_AND_SIZES = {
    "model",
    "batch_size",
    "micro_batch_size",
    "data.path",
    "data.subset",
    "data.rows",
    "data.resolution",
    "training.num_train_epochs",
    "training.max_steps",
}
EVERY_RUN = [(name, variant) for name in settings.NAMES for variant in settings.variants(name) or [None]]


@dataclass
class Run:
    """A finished smoke run."""

    trainer: Trainer
    task: tasks.Task
    before: dict[str, torch.Tensor]
    folder: Path

    @property
    def optimizer(self) -> FlatLoRAOptimizer:
        optimizer = self.trainer.optimizer.optimizer  # Accelerate wraps it
        assert isinstance(optimizer, FlatLoRAOptimizer)
        return optimizer

    def logged(self, key: str) -> list[float]:
        return [entry[key] for entry in self.trainer.state.log_history if key in entry]


@pytest.fixture
def smoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Run]:
    """Runs the training script as the command line does."""
    build = train.build
    seen: dict[str, Any] = {}

    def watched(recipe: settings.Recipe) -> tasks.Task:
        seen["task"] = task = build(recipe)
        seen["before"] = fingerprint(task.model)
        return task

    monkeypatch.setattr(train, "build", watched)

    def run(name: str, variant: str | None = None, *changes: str, options: tuple[str, ...] = ()) -> Run:
        arguments = [name, "--smoke", "--output", str(tmp_path), *options]
        arguments += ["--variant", variant] if variant else []
        trainer = train.main([*arguments, "--set", "training.logging_steps=1", *changes])
        return Run(trainer, seen["task"], seen["before"], tmp_path)

    return run


@pytest.mark.parametrize(("name", "variant"), EVERY_RUN)
def test_recipe_trains_with_noise_and_saves_its_adapters(
    smoke: Callable[..., Run], name: str, variant: str | None
) -> None:
    run = smoke(name, variant)

    losses = run.logged("loss")
    assert len(losses) == run.optimizer.total_steps == 4
    assert all(math.isfinite(loss) for loss in losses)

    sigma = settings.load(name, variant)["sigma"]
    expected = [sigma / 2 * (1 - math.cos(math.pi * step / 4)) for step in range(4)]
    assert run.logged("flatlora/sigma") == pytest.approx(expected)
    noise = run.logged("flatlora/noise_norm")
    assert noise[0] == 0
    assert all(earlier < later for earlier, later in pairwise(noise))
    assert not run.optimizer.skipped
    adapted = {n for n, module in run.task.model.named_modules() if hasattr(module, "lora_A")}
    assert {target.name for target in run.optimizer.targets} == adapted

    assert changed_weights(run.task.model, run.before) == set()
    trained = get_peft_model_state_dict(run.task.adapted)
    assert all(value.dtype == torch.float32 for value in trained.values())
    assert all(value.any() for name, value in trained.items() if "lora_B" in name)
    loaded = PeftModel.from_pretrained(run.task.adapted.unload(), run.folder)
    assert_equal_tensors(get_peft_model_state_dict(loaded), trained)


@pytest.mark.parametrize(("name", "variant"), EVERY_RUN)
def test_smoke_changes_only_names_and_sizes(tmp_path: Path, name: str, variant: str | None) -> None:
    real = settings.load(name, variant)
    small = flat(shrink(real, tmp_path))
    assert {key for key in small.keys() | flat(real).keys() if small.get(key) != flat(real).get(key)} <= (
        NAMES_AND_SIZES
    )


def flat(recipe: settings.Recipe, prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in recipe.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


@pytest.mark.parametrize("name", settings.NAMES)
def test_readme_states_the_settings(name: str) -> None:
    table = (FOLDER / "README.md").read_text().split("## Settings")[1]
    row = next(line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
    sigma, rank, alpha, learning_rate, length, batch = [cell.strip() for cell in row.split("|")[5:11]]
    recipe = settings.load(name, {"nlu": "cola", "image": "cars"}.get(name))
    assert (float(sigma), int(batch)) == (recipe["sigma"], recipe["batch_size"])
    assert (int(rank), int(alpha)) == (recipe["lora"]["r"], recipe["lora"]["lora_alpha"])
    assert float(learning_rate) == recipe["training"]["learning_rate"]
    steps, epochs = recipe["training"].get("max_steps"), recipe["training"].get("num_train_epochs")
    assert f"{steps} steps" in length or f"{epochs} epochs" in length


def test_sigma_zero_is_plain_lora(smoke: Callable[..., Run]) -> None:
    run = smoke("math", None, "sigma=0")
    assert set(run.logged("flatlora/noise_norm")) == {0.0}


@pytest.mark.parametrize(
    ("name", "variant", "kinds"),
    [("math", None, {"bnb-4bit"}), ("nlu", "cola", {"bnb-4bit", "dense"})],  # T5 keeps its `wo` in float32
)
def test_qlora_variant_perturbs_quantized_weights(
    smoke: Callable[..., Run], name: str, variant: str | None, kinds: set[str]
) -> None:
    run = smoke(name, variant, "quantize=nf4")
    assert {target.weight.kind for target in run.optimizer.targets} == kinds
    assert run.logged("flatlora/noise_norm")[-1] > 0
    assert all(math.isfinite(loss) for loss in run.logged("loss"))
    assert changed_weights(run.task.model, run.before) == set()


def test_gradient_checkpointing_gives_the_same_adapters(smoke: Callable[..., Run]) -> None:
    plain = get_peft_model_state_dict(smoke("math").task.adapted)
    saving = get_peft_model_state_dict(
        smoke("math", None, "training.gradient_checkpointing=true").task.adapted
    )
    assert_equal_tensors(saving, plain)


def test_interrupted_run_resumes_bit_for_bit(smoke: Callable[..., Run]) -> None:
    two_epochs = "training.num_train_epochs=2"
    run = smoke("math", None, two_epochs)
    whole = get_peft_model_state_dict(run.task.adapted)
    shutil.rmtree(run.folder / "checkpoint-8")
    again = smoke("math", None, two_epochs, options=("--resume",))
    assert len(again.logged("loss")) == 8  # 4 of them from the checkpoint's history
    assert_equal_tensors(get_peft_model_state_dict(again.task.adapted), whole)


def test_prompts_are_masked_and_responses_end(smoke: Callable[..., Run]) -> None:
    task = smoke("math").task
    labels = [label for label in task.rows[0]["labels"] if label != -100]
    text = task.tokenizer.decode(labels)
    assert text.endswith("</s>")
    assert "#### " in text
    assert "Question" not in text
    assert "The answer is" not in text
    assert len(labels) < len(task.rows[0]["labels"]) == len(task.rows[0]["input_ids"])


def test_chat_messages_become_the_prompt_of_the_training(smoke: Callable[..., Run]) -> None:
    run = smoke("code")
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    messages = [{"role": "user", "content": "Add 1."}, {"role": "assistant", "content": "Here"}]
    prompt = settings.render(settings.load("code")["data"]["prompt"], {"query": "Add 1."})
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False) == "<s>" + prompt
    continued = tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert continued == "<s>" + prompt + "Here"


def test_merged_model_computes_what_the_adapters_do(smoke: Callable[..., Run]) -> None:
    run = smoke("dialogue", None, "dtype=float32")
    merge.main([str(run.folder), str(run.folder / "alpaca-merged")])
    merged = AutoModelForCausalLM.from_pretrained(run.folder / "alpaca-merged", dtype=torch.float32)
    tokens = torch.tensor([[5, 6, 7, 8]])
    adapted = run.task.adapted.eval()(tokens).logits
    assert torch.allclose(merged(tokens).logits, adapted, atol=1e-5)
    assert not torch.equal(adapted, run.task.adapted.unload()(tokens).logits)


def test_accuracy_on_the_test_images(smoke: Callable[..., Run]) -> None:
    run = smoke("image", "cifar100")
    accuracy = evaluate_images.main([str(run.folder)])["eval_accuracy"]
    assert accuracy * 16 == pytest.approx(round(accuracy * 16))


def test_images_are_generated_with_the_adapters(smoke: Callable[..., Run]) -> None:
    run = smoke("text_to_image", None, "training.learning_rate=1.0")

    def picture() -> np.ndarray:
        options = ["--prompt", "a 3d icon of a bird", "--seeds", "1", "--steps", "2"]
        generate_images.main([str(run.folder), *options])
        return np.array(Image.open(run.folder / "seed-0.png"))

    first = picture()
    assert first.shape == (64, 64, 3)
    assert np.array_equal(picture(), first)
    weights = load_file(run.folder / "adapter_model.safetensors")
    save_file({k: torch.zeros_like(v) for k, v in weights.items()}, run.folder / "adapter_model.safetensors")
    assert not np.array_equal(picture(), first)


def test_lm_eval_asks_what_t5_was_trained_on(smoke: Callable[..., Run]) -> None:
    pytest.importorskip("lm_eval")
    run = smoke("nlu", "cola")
    evaluate.main([str(run.folder)])
    (results,) = (run.folder / "results").rglob("results_*.json")
    assert 0 <= json.loads(results.read_text())["results"]["nlu-cola"]["acc,none"] <= 1


def test_lm_eval_knows_the_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = set(pytest.importorskip("lm_eval.tasks").TaskManager().all_tasks)
    named = []
    for name in ("math", "code", "instruct"):
        settings.save(settings.load(name), tmp_path)
        evaluate.main([str(tmp_path), "--print"])
        words = shlex.split(capsys.readouterr().out)
        named += [words[i + 1] for i, word in enumerate(words) if word == "--tasks"]
    assert len(named) == 6
    assert set(named) <= known


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nlu"], "needs --variant, one of mnli, sst2"),
        (["nlu", "--variant", "wnli"], "no variant 'wnli'"),
        (["math", "--smoke", "--set", "batch_size=0"], "batch_size 0 can't be split over 1 devices"),
        (["math", "--smoke", "--set", "sigma"], "key=value"),
    ],
)
def test_wrong_settings_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        train.main([*arguments, "--output", str(tmp_path)])
