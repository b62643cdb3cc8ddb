"""The report that a bug report asks for: what is there, read without importing it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
import torch

from flatlora_optim import report
from flatlora_optim.kernels import kernels_of


def lines_of(text: str) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in text.splitlines() if line)


def test_the_command_names_versions_and_kernels_and_asks_for_the_rest() -> None:
    code = "import runpy, sys; runpy.run_module('flatlora_optim.report', run_name='__main__')"
    check = "assert not {'numpy', 'peft', 'transformers'} & set(sys.modules) - before"
    command = [sys.executable, "-c", f"import torch, sys; before = set(sys.modules); {code}; {check}"]
    environment = {**os.environ, "FLATLORA_NATIVE": "0"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    facts = lines_of(output.split("\n\n")[0].replace("C compiler", "compiler"))
    assert facts["flatlora-optim"] == version("flatlora-optim")
    assert facts["torch"] == torch.__version__
    assert facts["peft"] == version("peft")
    assert facts["FLATLORA_NATIVE"] == "'0'"
    assert facts["cpu"].endswith("noise by torch operations")
    assert "print(optimizer)" in output


def test_what_is_absent_is_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_PACKAGES", ("no-such-package",))
    monkeypatch.setattr(report, "find_compiler", lambda: None)
    facts = lines_of(report.report().replace("C compiler", "compiler"))
    assert facts["no-such-package"] == facts["compiler"] == "-"


def test_it_says_why_kernels_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def warns(device: torch.device) -> Any:
        report.warnings.warn("no compiler", stacklevel=1)
        return kernels_of(device)

    monkeypatch.setattr(report, "kernels_of", warns)
    assert lines_of(report.report().replace("C compiler", "compiler"))["cpu"].endswith("; no compiler")
