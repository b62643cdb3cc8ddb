"""What must be done before the libraries are imported."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch

os.environ["KERAS_BACKEND"] = "torch"
os.environ.update(UNSLOTH_ALLOW_CPU="1", UNSLOTH_DISABLE_STATISTICS="1", HF_HUB_OFFLINE="1")
os.environ["UNSLOTH_COMPILE_LOCATION"] = tempfile.mkdtemp()  # by default, in the current folder

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # The index has it for a torch with CUDA. Beside another it can't load two operators, and names them.
    for name in ("nms", "qnms"):
        arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{name}", arguments)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
