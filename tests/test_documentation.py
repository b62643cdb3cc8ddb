"""README and docs: what they show runs, what they name is there, and each message has an entry."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

import flatlora_optim
from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.targets import discovery
from helpers import changed_weights, fingerprint, flatlora, lora_mlp

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import blocks  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {str(page.relative_to(ROOT)): page for page in blocks.pages()}


# ---------------------------------------------------------------------- blocks


@pytest.mark.parametrize("name", PAGES)
def test_blocks_run_and_print_what_is_recorded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "_TARGET_TYPES", list(discovery._TARGET_TYPES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names, outputs = blocks.run(PAGES[name], tmp_path)
    for block, recorded, printed in outputs:
        assert blocks.shape(recorded) == blocks.shape(printed), f"{name}:{block.line}"
    for optimizer in (each for each in names.values() if isinstance(each, FlatLoRAOptimizer)):
        assert not optimizer.is_perturbed


def test_code_that_is_not_run_says_why() -> None:
    marked = 0
    for path in [ROOT / "README.md", *DOCS.glob("**/*.md")]:
        for language, code in re.findall(
            r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S
        ):
            if language == "py":
                marked += 1
                assert code.startswith("# not run by the tests"), f"{path.name}: {code[:80]}"
            elif language != "python":
                assert not re.search(r"^(import|from) \w+", code, re.M), f"{path.name}: {code[:80]}"
    assert marked > 0


@pytest.fixture
def reader(tmp_path: Path) -> dict[str, Any]:
    """What a reader of the README has before the two lines are added."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    model = get_peft_model(llama, LoraConfig(r=2, target_modules="all-linear"))
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 16
    small = lora_mlp()
    width = next(p.shape[1] for n, p in small.named_parameters() if n.endswith("fc1.base_layer.weight"))
    return {
        "Trainer": {
            "Trainer": Trainer,
            "model": model,
            "args": TrainingArguments(
                str(tmp_path), max_steps=2, logging_steps=2, report_to="none", use_cpu=True
            ),
            "dataset": rows,
        },
        "loop": {
            "torch": torch,
            "model": small,
            "adapters": [p for p in small.parameters() if p.requires_grad],
            "loss_fn": lambda out, y: F.mse_loss(out, y.expand_as(out)),
            "batches": [(torch.randn(4, width), torch.zeros(4, 1)) for _ in range(3)],
        },
    }


def test_two_lines_more_and_none_less(reader: dict[str, Any]) -> None:
    """The README's diffs run before and after, and the noise is there after."""
    diffs = re.findall(r"^```diff\n(.*?)^```$", README, re.M | re.S)
    assert len(diffs) == 2
    for diff, known in zip(diffs, reader.values(), strict=True):
        lines = diff.splitlines()
        assert [line[0] for line in lines if line and line[0] != " "] == ["+", "+"]
        after = "\n".join(line[2:] for line in lines)
        frozen = fingerprint(known["model"])
        exec(compile(after, "README.md", "exec"), known)
        assert not changed_weights(known["model"], frozen)
        if "trainer" in known:
            assert known["trainer"].state.log_history[0]["flatlora/noise_norm"] > 0
        else:
            assert known["optimizer"].step_count == len(known["batches"])
            assert known["optimizer"].metrics()["seconds"] > 0


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 180


def test_numbers_are_those_of_the_benchmarks() -> None:
    """A median with its quartiles stands so in the results, too, and a gain in the demo's table."""
    head, demo = README.split("<!-- demo: begin")
    gains = re.findall(r"[+-][\d.]+ ± [\d.]+", head)
    assert len(gains) == 1
    assert f"**{gains[0]}**" in demo.split("<!-- demo: end")[0]
    results = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    text = README + (DOCS / "cost.md").read_text(encoding="utf-8")
    numbers = re.findall(r"[\d.]+ \([\d.]+–[\d.]+\)", text)  # noqa: RUF001
    assert len(numbers) >= 16
    assert [number for number in numbers if f"| {number} |" not in results] == []


@pytest.mark.parametrize("page", ["README.md", "docs/choosing_sigma.md"])
def test_gains_are_those_of_the_study(page: str) -> None:
    results = (ROOT / "benchmarks/GENERALIZATION.md").read_text(encoding="utf-8")
    text = (ROOT / page).read_text(encoding="utf-8").split("<!-- study: begin -->")[1]
    gains = re.findall(r"[+-][\d.]+ ± [\d.]+", text.split("<!-- study: end -->")[0])
    assert len(gains) >= 2
    assert [gain for gain in gains if gain not in results] == []


def test_readme_says_what_is_known_of_gpus() -> None:
    measured = (ROOT / "benchmarks/RESULTS-GPU.md").exists()
    assert ("not yet run" in README.split("## Install")[0]) is not measured


# ---------------------------------------------------------------------- names


def test_options_are_those_of_the_constructor() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.*?)`)? ?\|", (DOCS / "options.md").read_text(), re.M)
    parameters = inspect.signature(FlatLoRAOptimizer).parameters.values()
    actual = {p.name: "" if p.default is p.empty else repr(p.default).replace("'", '"') for p in parameters}
    assert dict(rows) == actual


def test_members_exist() -> None:
    optimizer = flatlora(lora_mlp())
    table = (DOCS / "options.md").read_text().split("| member | meaning |")[1].split("\n\n")[0]
    first_cells = [row.split(" | ")[0] for row in table.splitlines()]
    members = [name for cell in first_cells for name in re.findall(r"`(\w+)(?:\(\))?`", cell)]
    assert len(members) >= 15
    assert [name for name in members if not hasattr(optimizer, name)] == []


def test_api_reference_has_the_public_names_and_no_others() -> None:
    text = (DOCS / "api.rst").read_text(encoding="utf-8")
    named = {name.rpartition(".")[2] for name in re.findall(r"^\.\. auto\w+:: ([\w.]+)", text, re.M)}
    public = {"FlatLoRACallback", "attach"}
    for module in ("flatlora_optim", "flatlora_optim.landscape"):
        public |= set(importlib.import_module(module).__all__)
    assert named == public


def test_links_lead_to_files_that_exist() -> None:
    for page in [ROOT / "README.md", *DOCS.glob("**/*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_each_page_is_in_the_contents() -> None:
    listed = set(re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text(encoding="utf-8"), re.M))
    pages = {str(p.relative_to(DOCS).with_suffix("")) for p in [*DOCS.glob("**/*.md"), *DOCS.glob("*.rst")]}
    assert listed == pages - {"index"}


# ---------------------------------------------------------------------- messages

INTERNAL = {
    # labels of plots
    "increase of the loss",
    "$\\sigma$, relative to the norm of each row",
    "distance, relative to the norm of each row",
    # what objects print
    "has not wrapped an optimizer yet: that is done when training begins",
    "noise for … of … trained matrices (…)",
    "…( perturbed: … of … adapted matrices, … elements (…); … not perturbed: … noise: …; sigma …, schedule … "
    "step … of …, seed … base: … )",
}
"""Texts that are no messages."""


def messages() -> Iterator[tuple[str, str]]:
    """Where, and what: each text of the package that a user may read, with … for what is filled in.

    Those are all texts of four words and more that are no docstrings, and all that is raised or warned of.
    """
    for path in sorted(Path(flatlora_optim.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        silent = {id(part) for part in _silent(tree)}
        raised = {id(part) for call in _raised(tree) for part in ast.walk(call)}
        for node in ast.walk(tree):
            text = _text(node)
            if text is not None and id(node) not in silent:
                words = re.findall(r"[A-Za-z]{2,}", text)
                if (len(words) >= 4 or (id(node) in raised and len(words) >= 2)) and " " in text:
                    yield f"{path.name}:{node.lineno}", " ".join(text.split())  # type: ignore[attr-defined]


def _silent(tree: ast.AST) -> Iterator[ast.AST]:
    """Docstrings, and the parts of texts that are seen as a whole."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                yield statement.value
        if isinstance(node, ast.JoinedStr):
            yield from node.values


def _raised(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield node.exc
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "warn":
            yield from node.args[:1]


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def entries() -> list[str]:
    """The messages that the page on troubleshooting explains: in backticks, at the begin of a term."""
    lines = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    terms: list[str] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("`") and following.startswith((": ", "`")):
            terms += re.findall(r"`([^`]+)`", line)
    return terms


def explains(entry: str, message: str) -> bool:
    """Whether the entry's parts, between its …, are in the message, in this order."""
    place = 0
    for part in (part.strip() for part in entry.split("…")):
        place = message.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def test_each_message_has_an_entry() -> None:
    known = entries()
    missing = {
        where: message
        for where, message in messages()
        if message not in INTERNAL and not any(explains(entry, message) for entry in known)
    }
    assert missing == {}


def test_each_entry_is_of_a_message() -> None:
    all_messages = [message for _, message in messages()]
    assert len(all_messages) > 100
    assert [e for e in entries() if not any(explains(e, message) for message in all_messages)] == []
    assert [e for e in entries() if len(e.replace("…", "").strip()) < 8] == []
    assert [text for text in INTERNAL if text not in all_messages] == []
