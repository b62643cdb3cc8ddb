"""Adapters outside the model that replace its layers' forwards: kohya's networks, LyCORIS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .attributes import has
from .probe import complaint_of
from .target import LowRank, Target, values_of
from .weights import UnsupportedAdapterError, own_forward, read_weight


class Network(Target):
    """A layer whose forward one or more such adapters have replaced, one around the other."""

    @classmethod
    def match(cls, name: str, module: nn.Module) -> Target | None:
        if not any(True for _ in _adapters_on(module)):
            return None
        for adapter in _adapters_on(module):
            if not _is_known(adapter):
                raise UnsupportedAdapterError(
                    f"{type(adapter).__name__} adds no product that we know; LoRA, LoCon, LoHa and LoKr do"
                )
        target = cls(name, module, module, read_weight(module, module, 0))
        target.delta()
        return target

    def check(self) -> None:
        if (complaint := complaint_of(self)) is not None:
            raise UnsupportedAdapterError(complaint)

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        for adapter in _adapters_on(self.layer):
            yield from adapter.parameters()

    @torch.no_grad()
    def delta(self) -> LowRank | Tensor | None:
        return self.summed([self._product(adapter) for adapter in _adapters_on(self.layer)])

    def _product(self, adapter: Any) -> LowRank | Tensor:
        multiplier, device = float(adapter.multiplier), self.weight.device
        # LyCORIS can train one more factor.
        factor = float(getattr(adapter, "scalar", 1.0))
        if has(adapter, "lora_down", "lora_up") and not hasattr(adapter, "lora_mid"):
            downs, ups = _listed(adapter.lora_down), _listed(adapter.lora_up)
            left = torch.block_diag(*(values_of(up, device).flatten(1) for up in ups))
            right = torch.cat([values_of(down, device).flatten(1) for down in downs])
            return self.low_rank(left, right, float(adapter.scale) * multiplier * factor)
        training = adapter.training
        try:
            adapter.training = False  # in training, rank dropout would change the product
            if hasattr(adapter, "lora_mid"):
                product = adapter.make_weight(device) * adapter.scale
            else:  # LoHa or LoKr
                product = adapter.get_weight(adapter.shape) * factor
        finally:
            adapter.training = training
        return (values_of(product, device) * multiplier).reshape(self.weight.shape)


def check_network(model: nn.Module) -> None:
    """Raises ValueError for such adapters without the model whose layers they adapt."""
    if any(has(module, "org_forward", "multiplier") for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} adapts the layers of another model. Give FlatLoRAOptimizer that model, "
            "once the network is attached to it (`network.apply_to(...)`)"
        )


def _is_known(adapter: Any) -> bool:
    is_lora = has(adapter, "lora_down", "lora_up", "scale")
    return is_lora or has(adapter, "get_weight", "hada_w1_a") or has(adapter, "get_weight", "use_w1")


def _adapters_on(layer: nn.Module) -> Iterator[Any]:
    """The adapters that have replaced the layer's forward, outermost first."""
    forward: Any = own_forward(layer)
    if "_old_forward" in layer.__dict__ and "flatlora_forward" not in layer.__dict__:
        forward = layer.__dict__["_old_forward"]  # one of accelerate's hooks is around it
    met = {id(layer)}
    while isinstance(adapter := getattr(forward, "__self__", None), nn.Module) and id(adapter) not in met:
        met.add(id(adapter))
        if not has(adapter, "org_forward", "multiplier"):
            return
        yield adapter
        forward = adapter.org_forward


def _listed(part: Any) -> list[Any]:
    return list(part) if isinstance(part, nn.ModuleList) else [part]
