"""The optimizer that users hold: any base optimizer, with gradients taken at W + eps.

================  ======================================================================
``flatlora``      :class:`.FlatLoRAOptimizer`: noise around a step
``adoption``      taking over an optimizer that somebody else has built, and giving it back
``forwards``      the automatic style: which forwards see noise, and which clean weights
``hooks``         the hooks in the model: around forwards, before merges, in state dicts
``other_steps``   steps of the same adapters by another optimizer
``diagnostics``   warnings about missing noise
``schedule``      how the noise grows over training: ``sigma_t``
``state``         step, seed, sigma and schedule, and how a checkpoint carries them
``param_groups``  our entries in the base's param groups, and their check before they are loaded
``checks``        checks of numbers and names
``wrapper``       an optimizer that passes for its base
================  ======================================================================
"""

from .flatlora import FlatLoRAOptimizer

__all__ = ["FlatLoRAOptimizer"]
