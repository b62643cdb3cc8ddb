"""LLaMA-Factory's ``run_exp``, in a launcher of two lines."""

import json
from pathlib import Path

import pytest
import without_cuda  # noqa: F401

pytest.importorskip("llamafactory", reason="make test-trainers")

from parts import Spy, tiny_model


def test_launcher(tmp_path: Path) -> None:
    from llamafactory.train.tuner import run_exp

    from flatlora_optim.integrations.transformers import FlatLoRACallback

    rows = [{"instruction": f"w1 w{i}", "input": "", "output": "w3 w4"} for i in range(36)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    arguments = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": tiny_model(tmp_path / "model"),
        "dataset": "rows",
        "dataset_dir": str(tmp_path),
        "template": "empty",
        "finetuning_type": "lora",
        "lora_target": "all",
        "output_dir": str(tmp_path / "output"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "val_size": 4,
        "preprocessing_num_workers": 1,
    }

    def run(**options: str) -> None:
        run_exp({**arguments, **options}, callbacks=[FlatLoRACallback(sigma=0.1)])

    whole = Spy(run)
    whole.assert_noise_only_in_training()
    whole.assert_same_as_by_hand()
    checkpoint = f"{tmp_path}/output/checkpoint-2"
    Spy(lambda: run(resume_from_checkpoint=checkpoint)).assert_resumed(whole)
