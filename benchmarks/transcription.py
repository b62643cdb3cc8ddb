"""The paper's procedure in plain PyTorch, done the way it is published.

Written for this benchmark, from the paper (arXiv 2409.14396, section 3.2) and the published
behaviour: for each weight, the global generator is seeded, ``W + s * B @ A`` is materialized in
float32 for the row norms, the standard deviations are expanded to the weight's shape, and
``torch.normal`` draws noise of that shape, which is added to the weight in place. Restoring seeds
again, draws again from the kept row norms, and subtracts.

One thing differs: the published seed is the clock, ours is a counter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from layers import SIGMA, adapted_weights


class Transcription:
    def __init__(self, model: nn.Module) -> None:
        self.adapted = list(adapted_weights(model))
        self.seed = 0
        self.stds: list[Tensor] = []

    @torch.no_grad()
    def perturb(self) -> None:
        self.seed += 1
        self.stds = []
        for weight, A, B, scaling in self.adapted:
            merged = weight.float() + scaling * (B.float() @ A.float())
            norms = merged.norm(dim=1, keepdim=True)
            self.stds.append(SIGMA * norms / math.sqrt(weight.shape[1]))
            weight.data += self._noise(weight, self.stds[-1])

    @torch.no_grad()
    def restore(self) -> None:
        for (weight, *_), std in zip(self.adapted, self.stds, strict=True):
            weight.data -= self._noise(weight, std)

    def _noise(self, weight: Tensor, std: Tensor) -> Tensor:
        torch.manual_seed(self.seed)
        return torch.normal(0.0, std.expand(weight.shape))
