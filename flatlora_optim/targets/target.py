"""Adapters and the frozen weights under them.

Adapter layers are recognized by their attributes, never by their class. So no library is imported, and
subclasses, renamed adapters and quantized variants are found as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attributes import is_set
from .sharding import has_parts_of_matrix, is_sharded, whole
from .weights import FrozenWeight, UnsupportedAdapterError


class LowRank(NamedTuple):
    """An adapter product ``scaling * left @ right``.

    Shapes ``(m, r)`` and ``(r, n)``, where ``m`` counts output neurons; any floating dtype. Experts have one
    more dim in front. Factors may be sharded, as their parameters are.
    """

    left: Tensor
    right: Tensor
    scaling: float


class Target:
    """One frozen weight and the adapter on top of it.

    Args:
        name: The adapter layer's name in the model.
        layer: The adapter layer.
        owner: The module that holds the frozen weight (PEFT's ``base_layer``).
        weight: Reads the frozen weight.
    """

    def __init__(self, name: str, layer: nn.Module, owner: nn.Module, weight: FrozenWeight) -> None:
        self.name = name
        self.layer: Any = layer
        self.owner = owner
        self.weight = weight
        self.tied: list[Target] = []
        """Further adapter layers on the same weight, which is perturbed once for all of them."""
        self.first_block = 0
        self.computes = owner
        """The module whose forward computes with the weight. That is the owner, or the adapter layer if it
        reads the weight without calling the owner's forward."""

    @classmethod
    def match(cls, name: str, module: nn.Module) -> Target | None:
        """The target that ``module`` is, or None if it is of another type.

        Raises:
            UnsupportedAdapterError: It is of this type, but can't be perturbed.
        """
        raise NotImplementedError

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the active adapters."""
        raise NotImplementedError

    def delta(self) -> LowRank | Tensor | None:
        """The scaled product of all active adapters: low-rank, or dense in the stored shape.

        None if no adapter is active. Then the weight is not perturbed.
        """
        raise NotImplementedError

    def terms(self) -> list[LowRank | Tensor]:
        """The terms whose sum is ``delta``."""
        delta = self.delta()
        return [] if delta is None else [delta]

    def all_terms(self) -> list[LowRank | Tensor]:
        """The terms of all active adapters on the owner of the weight.

        If several owners share the weight, those of the first with an active adapter.
        """
        if not self.tied:
            return self.terms()
        found = [(each.owner, each.terms()) for each in self.sharing]
        active = [(owner, terms) for owner, terms in found if terms]
        return [term for owner, terms in active if owner is active[0][0] for term in terms]

    def summed(self, deltas: Sequence[LowRank | Tensor]) -> LowRank | Tensor | None:
        """The sum of what several adapters add; None if there is none."""
        if len(deltas) < 2:
            return deltas[0] if deltas else None
        products = [delta for delta in deltas if isinstance(delta, LowRank)]
        if len(products) == len(deltas):
            left = torch.cat([whole(term.left).float() * term.scaling for term in products], -1)
            return LowRank(left, torch.cat([whole(term.right).float() for term in products], -2), 1.0)
        total = torch.zeros(self.weight.shape, device=self.weight.device)
        for delta in deltas:
            total += self.as_stored(delta)
        return total

    def as_stored(self, delta: LowRank | Tensor) -> Tensor:
        """The product as one tensor, in the weight's stored shape."""
        if isinstance(delta, Tensor):
            return delta
        matrix = delta.scaling * whole(delta.left).float() @ whole(delta.right).float()
        return (matrix.mT if self.weight.row_dim else matrix).reshape(self.weight.shape)

    def check(self) -> None:
        """Checks on a small input that the adapter does what ``delta`` says.

        Raises:
            ValueError: It does not, and the user described it (``register``).
            UnsupportedAdapterError: It does not, so it was recognized wrongly.
        """

    @property
    def sharing(self) -> list[Target]:
        """This target, and those with the same weight."""
        return [self, *self.tied]

    @property
    def merges_by_itself(self) -> bool:
        """Whether ``eval()`` writes the adapter into the weight, as loralib does."""
        return any(is_set(each.layer, "merge_weights") for each in self.sharing)

    @property
    def merged(self) -> bool:
        """Whether an adapter has been written into the base weight."""
        return any(is_set(each.layer, "merged") for each in self.sharing)

    merges_a_sum = True
    """Whether merging just adds the adapter's product to the weight."""

    def check_ties(self) -> None:
        """Raises RuntimeError if a layer that shared this weight no longer does."""
        for other in self.tied:
            if other.weight.identity() != self.weight.identity():
                raise RuntimeError(
                    f"{self.name} and {other.name} shared a weight when this optimizer was built, and "
                    "don't any more: build a new FlatLoRAOptimizer"
                )

    def all_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of all active adapters on this weight."""
        for sharing in self.sharing:
            yield from sharing.adapter_parameters()

    def has_gradient(self) -> bool:
        """Whether an active adapter on this weight has a gradient other than 0."""
        return any(p.grad is not None and bool(p.grad.any()) for p in self.all_parameters())

    def low_rank(self, left: Tensor, right: Tensor, scaling: float) -> LowRank:
        """The product, if it fits the weight.

        Raises:
            UnsupportedAdapterError: It does not have the weight's shape.
        """
        rows, columns = self.weight.rows, self.weight.columns
        if right.ndim != 2 or left.shape != (rows, right.shape[0]) or right.shape[1] != columns:
            raise UnsupportedAdapterError(
                f"{self._called}: B @ A has shapes {tuple(left.shape)} @ "
                f"{tuple(right.shape)}, but the weight has {rows} output neurons and {columns} inputs; check "
                "lora_A, lora_B (shapes (r, n) and (m, r)) and `transposed`"
            )
        return LowRank(left, right, scaling)

    @property
    def _called(self) -> str:
        return self.name or type(self.layer).__name__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.weight.kind}, {tuple(self.weight.shape)})"


def factor_of(part: nn.Module | Tensor, device: torch.device) -> Tensor:
    """A factor: the parameter itself, where possible, also if it is sharded."""
    tensor: Tensor = part if isinstance(part, Tensor) else part.weight  # type: ignore[assignment]
    if is_sharded(tensor) and not (tensor.device == device and has_parts_of_matrix(tensor)):
        tensor = whole(tensor)
    if tensor.requires_grad and torch.is_grad_enabled():
        tensor = tensor.detach()
    return tensor if tensor.device == device else tensor.to(device)


def names_of(targets: Iterable[Target]) -> str:
    """The first three names, for a message."""
    names = [target.name for target in targets]
    return f"{', '.join(names[:3])}{' …' if names[3:] else ''}"


def values_of(part: nn.Module | Tensor, device: torch.device) -> Tensor:
    """All values of a factor, in float32."""
    return whole(factor_of(part, device)).float()
