"""LoRA layers of other libraries, recognized by their attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .attributes import has, is_set
from .hand_written import HandWrittenLoRA, Registration
from .probe import complaint_of
from .sharding import whole
from .target import LowRank, Target, factor_of
from .weights import UnsupportedAdapterError


class LibraryLayer(HandWrittenLoRA):
    """A library's layer, which we describe so that its users need not."""

    MARKERS: ClassVar[tuple[str, ...]] = ()
    """Attributes that layers of this type have."""

    @classmethod
    def parts_of(cls, module: Any) -> Registration | None:
        """Where the module keeps its parts. None if it is of another type."""
        raise NotImplementedError

    @classmethod
    def match(cls, name: str, module: nn.Module) -> Target | None:
        if not has(module, *cls.MARKERS) or (parts := cls.parts_of(module)) is None:
            return None
        target = cls.described(name, module, parts)
        target.delta()
        return target

    def check(self) -> None:
        if (complaint := complaint_of(self)) is not None:
            raise UnsupportedAdapterError(f"it is no {type(self).__name__}: {complaint}")


class LoralibLinear(LibraryLayer):
    """A Linear with A and B as its own parameters, as in loralib and in much hand-written code."""

    MARKERS = ("weight", "lora_A", "lora_B", "scaling")

    @classmethod
    def parts_of(cls, module: Any) -> Registration | None:
        if not isinstance(module.lora_A, nn.Parameter) or isinstance(module, nn.Embedding):
            return None
        if not isinstance(module.weight, Tensor) or module.weight.ndim != 2:
            raise UnsupportedAdapterError(
                "its weight is no matrix, as that of loralib's Linear; describe it by `register`"
            )
        is_transposed = is_set(module, "fan_in_fan_out")
        return Registration("weight", "lora_A", "lora_B", "scaling", is_transposed)


class LoralibMergedLinear(LibraryLayer):
    """loralib's LoRA on some slices of a fused projection."""

    MARKERS = ("weight", "lora_A", "lora_B", "scaling", "enable_lora", "merge_AB")

    @classmethod
    def parts_of(cls, module: Any) -> Registration | None:
        return Registration(
            "weight",
            delta=_merged_product,
            parameters=("lora_A", "lora_B"),
            transposed=is_set(module, "fan_in_fan_out"),
        )


class LoralibEmbedding(LibraryLayer):
    """loralib's Embedding: a row of the weight is one token's output."""

    MARKERS = ("weight", "lora_A", "lora_B", "scaling")

    @classmethod
    def parts_of(cls, module: Any) -> Registration | None:
        if not isinstance(module, nn.Embedding) or not isinstance(module.lora_A, nn.Parameter):
            return None
        return Registration("weight", delta=_embedding_product, parameters=("lora_A", "lora_B"))


class LoralibConvolution(LibraryLayer):
    """loralib's convolutions, which read the weight of a convolution inside."""

    MARKERS = ("conv", "lora_A", "lora_B", "scaling")

    @classmethod
    def parts_of(cls, module: Any) -> Registration | None:
        return Registration("conv.weight", delta=_convolution_product, parameters=("lora_A", "lora_B"))

    @classmethod
    def described(cls, name: str, module: nn.Module, parts: Registration) -> HandWrittenLoRA:
        target = super().described(name, module, parts)
        target.computes = module
        return target


class LitgptLinear(LibraryLayer):
    """LitGPT's LoRALinear, and LoRAQKVLinear on some slices of a fused projection."""

    MARKERS = ("linear", "lora_A", "lora_B", "scaling", "get_lora_AB")

    @classmethod
    def parts_of(cls, module: Any) -> Registration | None:
        if has(module, "enable_lora"):
            return Registration("linear", delta="get_lora_AB", parameters=("lora_A", "lora_B"))
        return Registration("linear", "lora_A", "lora_B", "scaling")


class TorchtuneLinear(LibraryLayer):
    """torchtune's LoRALinear and DoRALinear, dense or NF4."""

    MARKERS = ("weight", "lora_a", "lora_b", "adapter_params")

    @classmethod
    def parts_of(cls, module: Any) -> Registration | None:
        if not has(module.lora_a, "weight"):
            raise UnsupportedAdapterError(f"{type(module).__name__} is none of torchtune's linear layers")
        scaling = module.scaling if has(module, "scaling") else module.alpha / module.rank
        return Registration(
            "weight", "lora_a.weight", "lora_b.weight", scaling, parameters=("lora_a", "lora_b")
        )

    def delta(self) -> LowRank | Tensor | None:
        return None if is_set(self.layer, "disabled") else super().delta()

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        return iter(()) if is_set(self.layer, "disabled") else super().adapter_parameters()


class AdapterHubLinear(LibraryLayer):
    """AdapterHub's LoRA, on a linear layer or on slices of a fused projection."""

    MARKERS = ("weight", "loras", "get_active_setup", "location_key")

    @classmethod
    def parts_of(cls, module: Any) -> Registration | None:
        if not len(module.loras):
            return None
        for lora in module.loras.values():
            adds = getattr(lora, "composition_mode", "add") == "add" and has(lora, "lora_A", "lora_B")
            if not adds or lora.lora_B.ndim != 2:
                raise UnsupportedAdapterError(
                    f"{type(lora).__name__} of AdapterHub adds no product B @ A; its LoRA does"
                )
            if is_set(lora, "use_gating"):
                raise UnsupportedAdapterError(
                    "its LoRA is gated, so that there is no merged weight; build it without `use_gating`"
                )
        transposed = is_set(module, "fan_in_fan_out")
        return Registration("weight", delta=lambda module: None, transposed=transposed)

    def _active(self) -> list[tuple[Any, float]]:
        """The active adapters, and the weight of each in their sum."""
        setup = self.layer.get_active_setup()
        names = [setup] if isinstance(setup, str) else [] if setup is None else list(setup.flatten())
        active = [self.layer.loras[name] for name in names if name in self.layer.loras]
        if len(active) < 2:
            return [(lora, 1.0) for lora in active]
        if type(setup).__name__ != "Average" or set(setup) != set(names) or len(active) < len(names):
            raise UnsupportedAdapterError(
                f"{setup} of AdapterHub composes adapters to no single merged weight; activate one adapter, "
                "or an Average of some"
            )
        # AdapterHub takes the mean of what it has weighted.
        shares = zip(setup, setup.weights, strict=True)
        return [(self.layer.loras[name], share / len(active)) for name, share in shares]

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        for lora, _ in self._active():
            yield from lora.parameters()

    def delta(self) -> LowRank | Tensor | None:
        return self.summed([self._product(*each) for each in self._active()])

    def _product(self, lora: Any, share: float) -> LowRank | Tensor:
        left, right = (factor_of(factor, self.weight.device) for factor in (lora.lora_B, lora.lora_A))
        scaling = float(lora.scaling) * share
        if not hasattr(lora, "lora_ind"):
            return self.low_rank(left, right, scaling)
        slices = sum(lora.enable_lora)
        left, right = whole(left), whole(right)
        rows = F.conv1d(right[None], left[..., None], groups=slices)[0] * scaling
        product = left.new_zeros(self.weight.rows, self.weight.columns)
        product[lora.lora_ind.to(left.device)] = rows
        return (product.T if self.weight.row_dim else product).reshape(self.weight.shape)


class KerasDense(LibraryLayer):
    """A Dense layer of Keras 3 on torch, whose kernel is stored (inputs, outputs)."""

    MARKERS = ("lora_kernel_a", "lora_kernel_b", "lora_enabled", "_kernel")

    @classmethod
    def parts_of(cls, module: Any) -> Registration | None:
        kernel = module._kernel
        if len(kernel.shape) != 2 or not hasattr(module, "units"):
            raise UnsupportedAdapterError(f"of Keras' layers we know only Dense, no {type(module).__name__}")
        return Registration(
            f"torch_params.{kernel.path}",
            delta=_keras_product,
            parameters=("lora_kernel_a.value", "lora_kernel_b.value"),
            transposed=True,
        )


def check_keras(model: nn.Module) -> None:
    """Raises ValueError for a Keras 3 model with LoRA, whose layers torch can't see."""
    for module in model.modules():
        if hasattr(module, "_flatten_layers"):
            layers = module._flatten_layers(include_self=False)  # type: ignore[operator]
            if any(is_set(layer, "lora_enabled") for layer in layers):
                raise ValueError(
                    "Keras keeps its layers out of torch's module tree, and its training loop knows no torch "
                    "optimizer. Give FlatLoRAOptimizer the layers that have LoRA, `nn.ModuleList([...])`, "
                    "with auto=False, and use `with optimizer.perturbed():` in a `train_step` of your own"
                )


def _keras_product(module: Any) -> Tensor:
    scaling = module.lora_alpha / module.lora_rank
    product: Tensor = scaling * module.lora_kernel_a.value @ module.lora_kernel_b.value
    return product


def _merged_product(module: Any) -> Tensor | None:
    product: Tensor = module.merge_AB() * module.scaling
    return product


def _embedding_product(module: Any) -> tuple[Tensor, Tensor]:
    return module.lora_A.T * module.scaling, module.lora_B.T


def _convolution_product(module: Any) -> Tensor:
    product: Tensor = (module.lora_B @ module.lora_A).view(module.conv.weight.shape) * module.scaling
    return product


LIBRARIES: list[type[Target]] = [
    LoralibMergedLinear,
    LoralibEmbedding,
    LoralibConvolution,
    LoralibLinear,
    LitgptLinear,
    TorchtuneLinear,
    AdapterHubLinear,
    KerasDense,
]
"""Specific types come first: a general type would match their layers, too."""
