"""Sharpness-aware minimization (Foret et al., 2021) on chosen parameters, to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class SAM:
    """Steps ``base`` along the gradient at ``p + rho * g / |g|``, which costs a second gradient.

    With the adapters' parameters it is what the Flat-LoRA paper calls LoRA-SAM: it sees how sharp the
    loss is in A and B, not in the full weights.

    Args:
        base: The optimizer that takes the step; its learning rate and schedule are not touched.
        parameters: Those to climb in; others keep their place. None: all of ``base``.

    Example:
        >>> optimizer = SAM(torch.optim.AdamW(adapters, lr=2e-4), rho=0.05)
        >>> loss = optimizer.step(closure)  # the closure clears gradients, and calls backward
    """

    def __init__(
        self, base: torch.optim.Optimizer, rho: float, parameters: Iterable[Tensor] | None = None
    ) -> None:
        self.base, self.rho = base, rho
        everything = [p for group in base.param_groups for p in group["params"]]
        self.parameters = everything if parameters is None else list(parameters)

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Returns the loss before the step. The parameters come back bit for bit before it is taken."""
        loss = closure()
        climbing = [p for p in self.parameters if p.grad is not None]
        before = [p.detach().clone() for p in climbing]
        norm = torch.stack([p.grad.norm() for p in climbing]).norm() + 1e-12
        with torch.no_grad():
            for p in climbing:
                p.add_(p.grad * (self.rho / norm))
        try:
            closure()
        finally:
            with torch.no_grad():
                for p, value in zip(climbing, before, strict=True):
                    p.copy_(value)
        self.base.step()
        return loss
