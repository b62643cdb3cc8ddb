"""ms-swift's ``swift sft``."""

from pathlib import Path

import pytest

pytest.importorskip("swift", reason="make test-trainers")

from parts import Spy, tiny_model, write_rows


def test_command_line(tmp_path: Path) -> None:
    from swift import sft_main

    plugin = tmp_path / "plugin.py"
    plugin.write_text("from flatlora_optim.integrations import swift\nswift.register(sigma=0.1)\n")
    turns = [
        {"messages": [{"role": role, "content": f"w1 w{i}"} for role in ("user", "assistant")]}
        for i in range(32)
    ]
    arguments = {
        "model": tiny_model(tmp_path / "model"),
        "model_type": "llama",
        "template": "dummy",
        "dataset": write_rows(tmp_path / "rows.jsonl", turns),
        "tuner_type": "lora",
        "target_modules": "all-linear",
        "lora_dropout": 0,
        "external_plugins": plugin,
        "callbacks": "flatlora",
        "output_dir": tmp_path / "output",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": "true",
        "torch_dtype": "float32",
        "add_version": "false",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "val_dataset": write_rows(tmp_path / "validation.jsonl", turns[:4]),
        "dataset_num_proc": 1,
    }

    def run(**options: str) -> None:
        words = [(f"--{name}", str(value)) for name, value in {**arguments, **options}.items()]
        sft_main([part for pair in words for part in pair])

    whole = Spy(run)
    whole.assert_noise_only_in_training()
    whole.assert_same_as_by_hand()
    checkpoint = f"{tmp_path}/output/checkpoint-2"
    Spy(lambda: run(resume_from_checkpoint=checkpoint)).assert_resumed(whole)
