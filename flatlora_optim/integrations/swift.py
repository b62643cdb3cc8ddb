"""For ms-swift's command line. The plug-in is a file of two lines::

    from flatlora_optim.integrations import swift
    swift.register(sigma=0.05)

Load it with ``swift sft ... --external_plugins FILE --callbacks flatlora``.
"""

from __future__ import annotations

from typing import Any

from .transformers import FlatLoRACallback

NAME = "flatlora"


def register(*, sigma: float, name: str = NAME, **options: Any) -> None:
    """Registers a :class:`.FlatLoRACallback` for ``--callbacks``.

    Args:
        sigma, **options: As in the callback.
        name: Its name in ``--callbacks``.
    """
    from swift.callbacks import callbacks_map

    FlatLoRACallback(sigma=sigma, **options)  # raises for wrong options at once

    class SwiftCallback(FlatLoRACallback):
        def __init__(self, args: Any, trainer: Any) -> None:
            super().__init__(sigma=sigma, **options)

    callbacks_map[name] = SwiftCallback
