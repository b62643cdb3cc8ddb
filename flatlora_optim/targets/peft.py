"""PEFT's adapters, recognized by their attributes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .attributes import has, innermost_base_layer, is_set
from .sharding import gathered, is_sharded, whole
from .target import LowRank, Target, factor_of
from .weights import ExpertsWeight, FrozenWeight, UnsupportedAdapterError, is_plain, read_weight


class PeftLoRA(Target):
    """PEFT's LoRA on Linear, ``Conv1D``, convolution or Embedding, dense or quantized."""

    VARIANTS: ClassVar[tuple[str, ...]] = ("ALora", "Dora", "MiCA", "Velora", "_Dora")
    """Variants whose forward adds ``B @ A``, at least for some of the tokens."""

    def __init__(self, name: str, layer: nn.Module, owner: nn.Module, weight: FrozenWeight) -> None:
        super().__init__(name, layer, owner, weight)
        self._factors: dict[str, tuple[tuple[Any, ...], tuple[Tensor, Tensor]]] = {}

    @classmethod
    def match(cls, name: str, module: nn.Module) -> Target | None:
        if not (has(module, "base_layer", "scaling") and _lora_pairs(module)):
            return None
        if hasattr(module, "lora_E"):
            return None
        computes = getattr(module.__dict__.get("forward"), "__self__", module)
        if computes is not module:  # X-LoRA mixes the adapters differently for each token
            raise UnsupportedAdapterError(
                f"{type(computes).__name__} computes in place of PEFT's own forward, so there may be no "
                "single merged weight"
            )
        owner = innermost_base_layer(module)
        if not hasattr(owner, "weight") and hasattr(owner, "in_proj_weight"):
            raise UnsupportedAdapterError("PEFT merges the adapter into `in_proj_weight` in each forward")
        if getattr(owner, "groups", 1) > 1:
            raise UnsupportedAdapterError(
                "PEFT's adapter on a grouped convolution mixes channels that the weight keeps apart, "
                "so there is no merged weight to take the strength of the noise from"
            )
        unknown = {type(variant).__name__ for variant in getattr(module, "lora_variant", {}).values()}
        unknown = {variant for variant in unknown if not variant.startswith(cls.VARIANTS)}
        if unknown:
            raise UnsupportedAdapterError(
                f"{', '.join(unknown)} of PEFT does not add B @ A to the weight, as plain LoRA does"
            )
        row_dim = 1 if _is_transposed(module, owner) else 0
        target = cls(name, module, owner, read_weight(owner, module, row_dim))
        target.delta()
        return target

    @property
    def merges_a_sum(self) -> bool:  # type: ignore[override]
        return not getattr(self.layer, "lora_variant", {})

    def _active(self) -> Iterator[tuple[str, Any, Any]]:
        if is_set(self.layer, "disable_adapters"):
            return
        pairs = _lora_pairs(self.layer)
        for adapter in self.layer.active_adapters:
            if adapter in pairs:
                yield adapter, *pairs[adapter]

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        for _, a, b in self._active():
            for part in (a, b):
                if isinstance(part, nn.Parameter):
                    yield part
                elif "parametrizations" in part._modules:
                    yield from part.parameters()
                else:  # the fastest way, since this runs at each step
                    yield from (parameter for parameter in part._parameters.values() if parameter is not None)

    def delta(self) -> LowRank | Tensor | None:
        return self.summed(self.terms())

    def terms(self) -> list[LowRank | Tensor]:
        return [self._product(adapter, a, b) for adapter, a, b in self._active()]

    def _product(self, adapter: str, a: Any, b: Any) -> LowRank:
        scaling = float(self.layer.scaling[adapter])
        a, b = factor_of(a, self.weight.device), factor_of(b, self.weight.device)
        if any(is_sharded(each) or not isinstance(each, nn.Parameter) for each in (a, b)):
            return LowRank(*self._factors_of(adapter, a, b), scaling)
        places = a.data_ptr(), a.shape, a.dtype, b.data_ptr(), b.shape, b.dtype
        known, factors = self._factors.get(adapter, (None, None))
        if factors is None or known != places:  # of hundreds of weights, each view would be felt
            factors = self._factors_of(adapter, a, b)
            self._factors[adapter] = places, factors
        return LowRank(*factors, scaling)

    def _factors_of(self, adapter: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Views of A and B, as ``LowRank`` has them."""
        if adapter in getattr(self.layer, "lora_embedding_A", ()):
            # The weight is stored (tokens, dim), and A.T @ B.T, too: a row is one token's output.
            return self.low_rank(whole(a).T, whole(b).T, 1.0)[:2]
        return self.low_rank(b.flatten(1), a.flatten(1), 1.0)[:2]


class PeftParameter(PeftLoRA):
    """PEFT's LoRA on a bare parameter (``target_parameters``): the experts of a mixture, above all."""

    @classmethod
    def match(cls, name: str, module: nn.Module) -> Target | None:
        if not has(module, "base_layer", "parameter_name", "num_experts") or not _lora_pairs(module):
            return None
        owner, parameter_name = innermost_base_layer(module), str(module.parameter_name)
        parameter = owner._parameters.get(parameter_name)
        if parameter is None or not is_plain(parameter) or not parameter.is_contiguous():
            raise UnsupportedAdapterError(
                f"{parameter_name} of {type(owner).__name__} is packed, sharded or not contiguous, and PEFT "
                "computes it in each forward: load it in 16 or 32 bits, one whole copy on each process, or "
                "adapt other layers"
            )
        if type(owner).__name__ == "Conv1D":
            raise UnsupportedAdapterError("its axes are swapped; adapt the layer by `target_modules` instead")
        # Unless PEFT has swapped the features, experts are stored (inputs, outputs).
        is_transposed = parameter.ndim == 3 and not is_set(module, "_did_swap_in_out_features")
        target = cls(name, module, owner, ExpertsWeight(owner, parameter_name, is_transposed))
        target.computes = module.base_layer  # type: ignore[assignment]
        target.delta()
        return target

    def _factors_of(self, adapter: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        experts = self.layer.num_experts
        return b.view(b.shape[0], -1, experts).permute(2, 0, 1), a.view(experts, -1, a.shape[1])


class PeftAdditive(Target):
    """PEFT's other adapters that add ``get_delta_weight(adapter)``, such as AdaLoRA, LoHa and VeRA.

    Their row norms are not cheap: the whole delta is computed, one layer at a time.
    """

    MARKERS: ClassVar[tuple[str, ...]] = (
        "lora_E",
        "hada_w1_a",
        "lokr_w1",
        "vera_lambda_b",
        "vblora_logits_A",
        "fourierft_spectrum",
        "randlora_lambda",
        "c3a_kernel",
        "waveft_spectrum",
        "delora_lambda",
        "gralora_A",
        "pvera_lambda_b",
        "shira_weight",
        "unilora_theta_d",
        "tinylora_v",
        "supertuning_values",
        "adamss_A",
        "osf_svd_params",
        "psoft_R",
        "miss_block",
    )
    """The attribute by which each method is recognized. It has an entry for each adapter."""

    @classmethod
    def match(cls, name: str, module: nn.Module) -> Target | None:
        if not (
            any(hasattr(module, marker) for marker in cls.MARKERS)
            and has(module, "base_layer", "get_delta_weight")
        ):
            return None
        owner = innermost_base_layer(module)
        weight = read_weight(owner, module, 1 if _is_transposed(module, owner) else 0)
        if weight.kind == "opaque":
            raise UnsupportedAdapterError("this adapter's norms need a base weight that can be read")
        if getattr(module, "miss_fn", None) == "bat":
            raise UnsupportedAdapterError("MISS with 'bat' multiplies the weight; without, it adds to it")
        return cls(name, module, owner, weight)

    def _active(self) -> list[str]:
        if is_set(self.layer, "disable_adapters"):
            return []
        marker = next(getattr(self.layer, m) for m in self.MARKERS if hasattr(self.layer, m))
        known = set(marker) | set(getattr(self.layer, "lokr_w1_a", ()))
        return [a for a in self.layer.active_adapters if a in known]

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        active = self._active()
        for path, parameter in self.layer.named_parameters():
            if not path.startswith("base_layer.") and set(active) & set(path.split(".")):
                yield parameter

    def delta(self) -> Tensor | None:
        return _sum_of_deltas(self, self._active())


def unknown_method(module: Any) -> str | None:
    """Why a PEFT layer of no known type has no noise. None if the module is no PEFT layer."""
    if not has(module, "base_layer", "active_adapters", "adapter_layer_names"):
        return None
    if not any(len(getattr(module, name, ())) for name in module.adapter_layer_names):
        return None  # all of its adapters were deleted
    _, *path = type(module).__module__.split(".")
    method = path[1].upper() if path[:1] == ["tuners"] and path[1:] else type(module).__name__
    return (
        f"{method} adds no product to its weight, as LoRA does, but changes the weight or the activations "
        "otherwise"
    )


def _lora_pairs(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """A and B of each adapter, as modules or parameters."""
    pairs: dict[str, tuple[Any, Any]] = {}
    for a_name, b_name in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        # nn.Module's own lookup is slow, and this runs at each step.
        a, b = module._modules.get(a_name), module._modules.get(b_name)
        if isinstance(a, (nn.ModuleDict, nn.ParameterDict)) and isinstance(
            b, (nn.ModuleDict, nn.ParameterDict)
        ):
            pairs.update({key: (a[key], b[key]) for key in a if key in b})
    return pairs


def _is_transposed(layer: nn.Module, owner: nn.Module) -> bool:
    """Whether the weight is stored (inputs, outputs), as in the Conv1D of GPT-2."""
    return bool(getattr(layer, "fan_in_fan_out", False)) and not isinstance(owner, nn.Embedding)


@torch.no_grad()
def _sum_of_deltas(target: Target, adapters: Iterable[str]) -> Tensor | None:
    """The sum of the dense products that PEFT itself computes, in the weight's stored shape."""
    total: Tensor | None = None
    layer, training = target.layer, target.layer.training
    try:
        layer.training = False  # earlier releases of PEFT apply their rank dropout here, too
        with gathered(layer, target.adapter_parameters()):
            for adapter in adapters:
                if hasattr(layer, "miss_block"):  # makes the merged weight
                    zero = torch.zeros(target.weight.shape, device=target.weight.device)
                    term: Tensor = layer.get_delta_weight_miss(adapter, zero)
                else:
                    term = layer.get_delta_weight(adapter)
                term = term.detach().to_dense() if term.is_sparse else term.detach()
                term = term.to(target.weight.device, torch.float32).reshape(target.weight.shape)
                total = term if total is None else total + term
    finally:
        layer.training = training
    return total
