"""For ms-swift's command line. A file of two lines is the plug-in::

    from flatlora_optim.integrations import swift
    swift.register(sigma=0.05)

and ``swift sft ... --external_plugins FILE --callbacks flatlora`` takes it.
"""

from __future__ import annotations

from typing import Any

from .transformers import FlatLoRACallback

NAME = "flatlora"


def register(*, sigma: float, name: str = NAME, **options: Any) -> None:
    """Makes a :class:`.FlatLoRACallback` known to ``--callbacks``.

    Args:
        sigma, **options: As of the callback.
        name: What ``--callbacks`` calls it.
    """
    from swift.callbacks import callbacks_map

    FlatLoRACallback(sigma=sigma, **options)  # wrong options are told at once

    class SwiftCallback(FlatLoRACallback):
        def __init__(self, args: Any, trainer: Any) -> None:
            super().__init__(sigma=sigma, **options)

    callbacks_map[name] = SwiftCallback
