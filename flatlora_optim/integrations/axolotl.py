"""For axolotl's YAML::

plugins:
  - flatlora_optim.integrations.axolotl.FlatLoRAPlugin
flatlora_sigma: 0.05
flatlora_options:  # further options of FlatLoRACallback, if any
  schedule: linear
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from .transformers import FlatLoRACallback

_FUSED = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class FlatLoRAArgs(BaseModel):  # type: ignore[misc]
    """What the plugin reads from the YAML."""

    flatlora_sigma: float | None = None
    flatlora_options: dict[str, Any] | None = None


class FlatLoRAPlugin(BasePlugin):  # type: ignore[misc]
    """Adds a :class:`.FlatLoRACallback` if ``flatlora_sigma`` is set.

    axolotl's fused LoRA kernels read a quantized weight without its layer's forward, where the noise is. With
    a quantized base they are switched off; axolotl would switch them on by itself.

    Raises:
        ValueError: The config asks for such a kernel on a quantized base.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Called with the config before axolotl completes it."""
        if not cfg.get("flatlora_sigma") or not _is_quantized(cfg):
            return
        if wanted := [name for name in _FUSED if cfg.get(name)]:
            raise ValueError(
                f"{', '.join(wanted)}: axolotl's fused LoRA kernels read the quantized weight without "
                "Flat-LoRA's noise. Leave them out, or train without `flatlora_sigma`"
            )
        for name in _FUSED:
            cfg[name] = False

    def get_input_args(self) -> str:
        return f"{__name__}.FlatLoRAArgs"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[FlatLoRACallback]:
        if not cfg.flatlora_sigma:
            return []
        return [FlatLoRACallback(sigma=cfg.flatlora_sigma, **(cfg.flatlora_options or {}))]


def _is_quantized(cfg: dict[str, Any]) -> bool:
    return bool(cfg.get("load_in_4bit") or cfg.get("load_in_8bit") or cfg.get("adapter") == "qlora")
