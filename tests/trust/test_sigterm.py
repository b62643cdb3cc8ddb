"""SIGTERM in the middle of a perturbed step of a Trainer run, which goes on from its checkpoint."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from helpers import changed_weights, fingerprint, flatlora, int_view, lora_gpt2, same, trainable

STEPS, SAVE_STEPS, STOPPED_AFTER = 6, 3, 4
CASES = {"the process dies": 3, "a handler exits": 3, "transformers saves first": 4}
"""What SIGTERM does, and the step of the last checkpoint then."""


class History(TrainerCallback):
    """The adapters after each step; under 0, those that the run began with."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.adapters: dict[int, list[Tensor]] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.adapters[0] = [p.detach().clone() for p in trainable(self.model)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.adapters[state.global_step] = [p.detach().clone() for p in trainable(self.model)]


class Run:
    """A small GPT-2. Without PEFT's wrapper the Trainer saves the frozen weights, too."""

    def __init__(self, folder: Path, case: str) -> None:
        adapted = lora_gpt2()
        self.model = adapted if case == "the process dies" else adapted.base_model.model
        self.clean = fingerprint(self.model)
        self.optimizer = flatlora(
            self.model, base=torch.optim.AdamW, lr=0.01, schedule="cosine", total_steps=STEPS
        )
        self.history = History(self.model)
        saves_first = {"enable_jit_checkpoint": True} if case == "transformers saves first" else {}
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            save_steps=SAVE_STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **saves_first,
        )
        tokens = torch.randint(1, 29, (12, 6), generator=torch.Generator().manual_seed(0)).tolist()
        self.trainer = Trainer(
            self.model,
            arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
            optimizers=(self.optimizer, torch.optim.lr_scheduler.LinearLR(self.optimizer)),
            callbacks=[self.history],
        )


def train_until_stopped(folder: str, case: str) -> None:
    """What the child process does."""
    run = Run(Path(folder), case)
    if case == "a handler exits":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))

    def wait_for_the_signal(*args: Any) -> None:
        if run.trainer.state.global_step < STOPPED_AFTER:
            return
        assert changed_weights(run.model, run.clean)
        print("in a perturbed step", flush=True)
        while not any(
            manager.is_checkpoint_requested
            for callback in run.trainer.callback_handler.callbacks
            if (manager := getattr(callback, "jit_manager", None))
        ):
            time.sleep(0.05)

    frozen = next(m for m in run.model.modules() if hasattr(m, "base_layer")).base_layer
    frozen.register_forward_hook(wait_for_the_signal)
    try:
        run.trainer.train()
    finally:
        run.trainer.save_model(f"{folder}/last-words")


def stop_in_a_perturbed_step(folder: Path, case: str) -> int:
    code = "import sys, test_sigterm; test_sigterm.train_until_stopped(*sys.argv[1:])"
    tests = Path(__file__).parent
    child = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.append({str(tests.parent)!r}); {code}", folder, case],
        cwd=tests,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert any(line == "in a perturbed step\n" for line in child.stdout)
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)
    finally:
        child.kill()
    return child.returncode


def check_saved(folder: Path, case: str, adapters: list[Tensor]) -> None:
    """The weights in the folder are complete, and clean."""
    fresh = Run(folder / "unused", case)
    if case == "the process dies":
        saved = list(load_file(folder / "adapter_model.safetensors").values())
        assert sorted(map(_bytes, saved)) == sorted(map(_bytes, adapters))
        return
    saved = load_file(folder / "model.safetensors")
    assert fresh.clean.keys() <= saved.keys()
    assert all(torch.equal(int_view(saved[name]), bits) for name, bits in fresh.clean.items())
    names = [name for name, p in fresh.model.named_parameters() if p.requires_grad]
    assert same([saved[name] for name in names], adapters)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that can be handled")
@pytest.mark.parametrize("case", CASES)
def test_a_run_ended_by_sigterm_goes_on_from_its_checkpoint(case: str, tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", case)
    whole.trainer.train()
    history = whole.history.adapters
    assert not any(same(history[step], history[step + 1]) for step in range(STEPS))

    code = stop_in_a_perturbed_step(tmp_path / "stopped", case)
    assert code == {"the process dies": -signal.SIGTERM, "a handler exits": 7}.get(case, 0)
    last = Path(get_last_checkpoint(str(tmp_path / "stopped")))
    assert last.name == f"checkpoint-{CASES[case]}"
    complete = {path.name for path in (tmp_path / "whole" / f"checkpoint-{SAVE_STEPS}").iterdir()}
    assert {path.name for path in last.iterdir()} == complete
    check_saved(last, case, history[CASES[case]])
    if case == "a handler exits":
        check_saved(tmp_path / "stopped" / "last-words", case, history[STOPPED_AFTER])

    resumed = Run(tmp_path / "stopped", case)
    resumed.trainer.train(resume_from_checkpoint=True)
    assert same(resumed.history.adapters.pop(0), history[CASES[case]])
    for step, adapters in resumed.history.adapters.items():
        assert same(adapters, history[step]), step
    assert max(resumed.history.adapters) == STEPS
    assert not changed_weights(resumed.model, resumed.clean)
