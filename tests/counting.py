"""How many torch operations, launches and waits something takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flatlora_optim.kernels import checksums, has_triton


class Counter(TorchDispatchMode):
    """Counts torch operations, launches of kernels, and waits for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "item", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.operations.append(name)
        if any(hasattr(kind, "device_mesh") for kind in types):
            return NotImplemented  # a DTensor then runs its operations on its parts, and they come here, too
        if name in self.WAITS:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    from flatlora_optim.perturbation import states
    from flatlora_optim.targets import scales

    counter = Counter()

    def read(tensor: Tensor) -> list[int]:
        counter.waits.append("read")
        with torch.utils._python_dispatch._disable_current_modes():
            return tensor.tolist()

    class Launched:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                counter.operations.append(self.name)
                with torch.utils._python_dispatch._disable_current_modes():
                    self.kernel[grid](*args, **kwargs)

            return launch

    with monkeypatch.context() as patch:
        for module in (scales, checksums, states):
            patch.setattr(module, "read", read)
        if has_triton(torch.device("cpu")):
            from flatlora_optim.kernels import jit, triton

            patch.setattr(triton, "read", read)
            for name in [name for name in vars(jit) if name.endswith("_kernel")]:
                patch.setattr(jit, name, Launched(name, getattr(jit, name)))
        with counter:
            yield counter
