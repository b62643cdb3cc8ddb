"""PyPI's torchvision and torchaudio for x86 are built for CUDA. Beside a PyTorch without it, the one fails to
import, as it can't load its kernels, which nothing here uses; the other is left out. Goes before the trainer.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import torch

try:
    import torchvision
except ImportError:
    pass
except RuntimeError:
    for kernel in ("nms", "qnms"):
        torch.library.define(f"torchvision::{kernel}", "(Tensor dets, Tensor scores, float limit) -> Tensor")
    import torchvision  # noqa: F401

if find_spec("torchaudio") is None:
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)
