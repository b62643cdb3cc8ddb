"""ms-swift's ``swift sft``."""

from pathlib import Path

import pytest

pytest.importorskip("swift", reason="make test-trainers")

from parts import Spy, tiny_model, write_rows


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from swift import sft_main

    plugin = tmp_path / "plugin.py"
    plugin.write_text("from flatlora_optim.integrations import swift\nswift.register(sigma=0.1)\n")
    turns = [
        {"messages": [{"role": role, "content": f"w1 w{i}"} for role in ("user", "assistant")]}
        for i in range(32)
    ]
    spy = Spy(monkeypatch)
    arguments = {
        "model": tiny_model(tmp_path / "model"),
        "model_type": "llama",
        "template": "dummy",
        "dataset": write_rows(tmp_path / "rows.jsonl", turns),
        "tuner_type": "lora",
        "target_modules": "all-linear",
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
        "save_strategy": "no",
        "eval_strategy": "no",
        "split_dataset_ratio": 0,
        "dataset_num_proc": 1,
    }
    sft_main([str(part) for name, value in arguments.items() for part in (f"--{name}", value)])
    spy.assert_noise_grew(4)
