"""The optimizer that users hold: any base optimizer, whose gradients are taken at W + eps.

================  ======================================================================
``flatlora``      :class:`.FlatLoRAOptimizer`: noise around a step
``adoption``      taking over an optimizer that somebody else has built, and giving it back
``hooks``         the automatic style: which forwards see noise, and which clean weights; merges
``other_steps``   steps of the same adapters by somebody else
``diagnostics``   what is told of noise that is not there
``schedule``      how the noise grows over training: ``sigma_t``
``state``         step, seed, sigma and schedule, and how a checkpoint carries them
``param_groups``  where they lie: in the param groups of the base
``checks``        checks of numbers and names
``wrapper``       an optimizer that is another one, seen from outside
================  ======================================================================
"""

from .flatlora import FlatLoRAOptimizer

__all__ = ["FlatLoRAOptimizer"]
