"""Weights of which this process holds a part: DTensors of FSDP2 and of tensor parallelism.

The local part gets its share of the whole weight's noise, which does not depend on the sharding: blocks are
those of the whole weight, and row norms are summed over the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import takewhile
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module


def is_sharded(tensor: object) -> bool:
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Any) -> Tensor:
    """The part of the tensor that this process holds, without autograd history.

    That may be the tensor itself: with hundreds of weights, each operation costs time.
    """
    if is_sharded(tensor):
        tensor = tensor.detach().to_local()
    local: Tensor = tensor.detach() if tensor.requires_grad else tensor
    return local


def place_of(tensor: Any) -> tuple[torch.device, int] | None:
    """Where in memory the local part begins. Parameters that share it have the same place."""
    local = local_part(tensor)
    try:
        address = local.data_ptr() if local.numel() else 0
    except RuntimeError:  # a subclass without memory of its own
        return None
    return (local.device, address) if address else None


def whole(tensor: Any) -> Tensor:
    """All parts of the tensor, gathered on each process."""
    tensor = tensor.detach()
    values: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return values


def gathered(module: nn.Module, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """A block in which the module has these parameters whole, for code that can't use DTensors."""
    wanted = {id(parameter) for parameter in parameters if is_sharded(parameter)}
    values = {name: whole(p) for name, p in module.named_parameters() if id(p) in wanted}
    return _reparametrize_module(module, values)


def like(tensor: Any, local: Tensor) -> Tensor:
    """A tensor that is sharded as ``tensor`` is, with ``local`` as the part of this process."""
    if not is_sharded(tensor):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def region(tensor: Any) -> tuple[int, slice]:
    """Where the local part is: its first row along dim 0, and which elements of each row it has."""
    if not is_sharded(tensor):
        return 0, slice(None)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(
        getattr(placement, "dim", 2) > 1 and not placement.is_replicate() for placement in tensor.placements
    ):
        raise ValueError(
            f"a frozen weight is placed as {tensor.placements}; only weights that are sharded along "
            "dim 0 or 1 can be perturbed"
        )
    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    if sizes[1] == tensor.shape[1]:
        return offsets[0], slice(None)
    inner = tensor.shape[2:].numel()
    return offsets[0], slice(offsets[1] * inner, (offsets[1] + sizes[1]) * inner)


def sums_over_parts(partial: Sequence[Tensor], weights: Sequence[Any]) -> list[Tensor]:
    """The sum over all parts of each weight, on all processes: one reduction for all that are cut alike."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, weight in enumerate(weights):
        if is_sharded(weight) and (dims := _sharded_dims(weight)):
            alike.setdefault((weight.device_mesh, *dims), []).append(i)
    sums = list(partial)
    for (mesh, *dims), some in alike.items():
        flat = torch.cat([partial[i] for i in some])
        for dim in dims:
            torch.distributed.all_reduce(flat, group=mesh.get_group(dim))
        for i, each in zip(some, flat.split([len(partial[i]) for i in some]), strict=True):
            sums[i] = each
    return sums


def replica(model: nn.Module) -> int:
    """The number of this copy of the model. Each copy may have its own noise.

    It is the lowest rank among the processes that hold parts of the copy.
    """
    if not in_a_group():
        return 0
    check_engine(model)  # the model may have been wrapped after the optimizer was built
    weight: Any = next((p for p in model.parameters() if is_sharded(p)), None)
    if weight is None:
        return torch.distributed.get_rank()
    mesh, shards = weight.device_mesh, _sharded_dims(weight)
    # Copies along the leading dims are data parallelism (HSDP). Duplicates along a later dim belong to one
    # copy of the model.
    copies = shards[0] if shards else 0
    return int(mesh.mesh[tuple(mesh.get_coordinate()[:copies])].min())


def fsdp_modules(model: nn.Module) -> Iterator[Any]:
    """The modules that ``fully_shard`` was applied to."""
    if in_a_group():
        for module in model.modules():
            if hasattr(module, "reshard") and hasattr(module, "unshard"):
                yield module


def reshard(module: Any) -> None:
    """Frees the module's gathered weights and puts its shards back, also in the middle of its forward."""
    module.reshard()
    state = module._get_fsdp_state()
    for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
        if group is not None and group.is_unsharded:
            # With reshard_after_forward=False, as for the root, reshard() does nothing within a forward.
            group._to_sharded()


def reshard_all(model: nn.Module) -> None:
    """Reshards all modules: noise is written to the shards, and weights are gathered from there.

    After a forward, FSDP2 keeps the root module's gathered weights, which would not have the noise.
    """
    for module in fsdp_modules(model):
        reshard(module)


@contextmanager
def before_gathering(module: Any, hook: object) -> Iterator[None]:
    """A block inside a forward pre-hook that must run before FSDP2 gathers the module's weights.

    It does, unless ``fully_shard`` came after the hook (Accelerate shards a model whose optimizer exists
    already). Then the weights are resharded and gathered again; only once, because the hook is moved to
    the front.
    """
    hooks = module._forward_pre_hooks
    earlier = list(takewhile(lambda other: other is not hook, hooks.values()))
    if not any(getattr(other, "__module__", "").startswith("torch.distributed.fsdp") for other in earlier):
        yield
        return
    hooks.move_to_end(next(key for key, other in hooks.items() if other is hook), last=False)
    reshard(module)
    yield
    module.unshard()


def check_engine(model: nn.Module) -> None:
    """Raises ValueError for engines that hide the weights' shapes or values."""
    for parameter in model.parameters():
        # In its forward, FSDP1 replaces the parameters by views of the flattened one.
        if hasattr(parameter, "_fsdp_flattened") or hasattr(parameter._base, "_fsdp_flattened"):
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) flattens the weights, so we can't find their "
                "rows. Use FSDP2: `torch.distributed.fsdp.fully_shard`, or `fsdp_version: 2` in "
                "Accelerate"
            )
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                "DeepSpeed ZeRO-3 keeps the weights in pieces that can't be perturbed. Use DDP, or "
                "FSDP2: `torch.distributed.fsdp.fully_shard`"
            )


def _sharded_dims(tensor: Any) -> list[int]:
    """The mesh dims along which the tensor is cut, also by FSDP2's strided placement on top of TP."""
    return [dim for dim, placement in enumerate(tensor.placements) if hasattr(placement, "dim")]


def in_a_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
