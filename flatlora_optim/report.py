"""What a bug report should say about the machine: ``python -m flatlora_optim.report``.

It imports torch alone and reads the versions of other packages from their metadata.
"""

from __future__ import annotations

import os
import platform
import subprocess
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from .kernels import kernels_of
from .kernels.build import find_compiler

_PACKAGES = (
    "numpy",
    "triton",
    "peft",
    "transformers",
    "bitsandbytes",
    "accelerate",
    "trl",
    "diffusers",
    "lightning",
    "deepspeed",
    "torchao",
    "hqq",
)
_VARIABLES = "CC", "FLATLORA_NATIVE", "FLATLORA_TRITON", "TRITON_INTERPRET"

_ASK = """
Only your own script knows which weights are perturbed, and how. Please add what this prints in it, right
after the optimizer is built:

    print(optimizer)
"""


def report() -> str:
    """Versions, devices, and which kernels run on them, one a line."""
    facts = [*_software(), *_devices()]
    width = max(len(name) for name, _ in facts) + 2
    return "\n".join(f"{name:{width}}{value}" for name, value in facts)


def _software() -> Iterator[tuple[str, str]]:
    yield "flatlora-optim", _version("flatlora-optim")
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", str(torch.__version__)
    yield from ((name, _version(name)) for name in _PACKAGES)
    yield "C compiler", _compiler()
    yield from ((name, repr(os.environ[name])) for name in _VARIABLES if name in os.environ)


def _devices() -> Iterator[tuple[str, str]]:
    capability = torch.backends.cpu.get_cpu_capability()
    yield "cpu", f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads; {_kernels('cpu')}"
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        name, toolkit = torch.cuda.get_device_name(i), torch.version.cuda or torch.version.hip
        yield f"cuda:{i}", f"{name}, {major}.{minor}, toolkit {toolkit}; {_kernels(f'cuda:{i}')}"
    for kind in ("mps", "xpu"):
        backend = getattr(torch, kind, None)
        if backend is not None and backend.is_available():
            yield kind, _kernels(kind)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _compiler() -> str:
    command = find_compiler()
    if command is None:
        return "-"
    try:
        answer = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]}: {error}"
    return answer.stdout.partition("\n")[0]


def _kernels(device: str) -> str:
    """The name of the kernels there, and why they are not faster ones."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        name = kernels_of(torch.device(device)).name
    return "; ".join([f"noise by {name}", *(str(each.message) for each in caught)])


if __name__ == "__main__":
    print(report(), _ASK, sep="\n")
