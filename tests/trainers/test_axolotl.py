"""axolotl's own config, plug-in manager and ``train``."""

import os
from pathlib import Path

import pytest
import yaml

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
pytest.importorskip("axolotl", reason="make test-trainers")

from parts import Spy, tiny_model, write_rows


def test_yaml(tmp_path: Path) -> None:
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    rows = [{"text": " ".join(f"w{(i + j) % 60}" for j in range(6))} for i in range(36)]
    data = {"path": write_rows(tmp_path / "rows.jsonl", rows), "ds_type": "json", "type": "completion"}
    config = {
        "base_model": tiny_model(tmp_path / "model"),
        "datasets": [{**data, "field": "text"}],
        "plugins": ["flatlora_optim.integrations.axolotl.FlatLoRAPlugin"],
        "flatlora_sigma": 0.1,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": ["q_proj", "v_proj"],
        "sequence_len": 16,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "num_epochs": 1,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "output_dir": str(tmp_path / "output"),
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "dataset_num_proc": 1,
        "num_dataset_shards_to_save": 1,
        "dataloader_num_workers": 0,
        "val_set_size": 4,
        "eval_steps": 2,
        "save_steps": 2,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "use_cpu": True,
        "logging_steps": 1,
        "seed": 7,
        "special_tokens": {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"},
    }

    def run(**options: str) -> None:
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump({**config, **options}))
        cfg = load_cfg(str(path))
        assert cfg.flatlora_sigma == 0.1
        train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))

    whole = Spy(run)
    whole.assert_noise_only_in_training()
    whole.assert_same_as_by_hand()
    checkpoint = f"{tmp_path}/output/checkpoint-2"
    Spy(lambda: run(resume_from_checkpoint=checkpoint)).assert_resumed(whole)
