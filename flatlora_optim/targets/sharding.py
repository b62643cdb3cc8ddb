"""Weights of which this process holds a part: DTensors of FSDP2 and of tensor parallelism.

Noise goes into the local part, and is that of the whole weight whatever the sharding: it is made
block by block of the whole weight, and the norms of its rows are summed over the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

    That may be the tensor itself: of hundreds of weights, each operation would be felt.
    """
    if is_sharded(tensor):
        tensor = tensor.detach().to_local()
    local: Tensor = tensor.detach() if tensor.requires_grad else tensor
    return local


def place_of(tensor: Any) -> tuple[torch.device, int] | None:
    """Where in memory the local part begins: what parameters that share it have in common, if any."""
    local = local_part(tensor)
    try:
        address = local.data_ptr() if local.numel() else 0
    except RuntimeError:  # a subclass without memory of its own
        return None
    return (local.device, address) if address else None


def whole(tensor: Any) -> Tensor:
    """All parts of the tensor, put together on each process."""
    tensor = tensor.detach()
    values: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return values


def gathered(module: nn.Module, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """A block in which the module has these parameters whole, for code that knows no DTensor."""
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
    """Where the local part lies: its first row along dim 0, and its elements of each such row."""
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


def sum_over_parts(partial: Tensor, weight: Any) -> Tensor:
    """The sum of what each part of the weight contributes, in place, on all processes."""
    if is_sharded(weight):
        for dim in _sharded_dims(weight):
            torch.distributed.all_reduce(partial, group=weight.device_mesh.get_group(dim))
    return partial


def replica(model: nn.Module) -> int:
    """A number that tells apart the copies of the model, each of which may carry its own noise.

    Processes that hold parts of the same copy agree on it: the lowest rank among them.
    """
    if not in_a_group():
        return 0
    check_engine(model)  # it may have been wrapped after the optimizer was built
    weight: Any = next((p for p in model.parameters() if is_sharded(p)), None)
    if weight is None:
        return torch.distributed.get_rank()
    mesh, shards = weight.device_mesh, _sharded_dims(weight)
    # Copies along the leading dims are for data parallelism (HSDP). A tensor that is not sharded
    # at all, or along a later dim, is a duplicate within one copy of the model.
    copies = shards[0] if shards else 0
    return int(mesh.mesh[tuple(mesh.get_coordinate()[:copies])].min())


def fsdp_modules(model: nn.Module) -> Iterator[Any]:
    """The modules that ``fully_shard`` was applied to."""
    if in_a_group():
        for module in model.modules():
            if hasattr(module, "reshard") and hasattr(module, "unshard"):
                yield module


def reshard(module: Any) -> None:
    """Gives the module's own shards back, also in the middle of its forward."""
    module.reshard()
    state = module._get_fsdp_state()
    for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
        if group is not None and group.is_unsharded:
            # With reshard_after_forward=False, as for the root, reshard() does nothing within a forward.
            group._to_sharded()


def reshard_all(model: nn.Module) -> None:
    """Gives all shards of the model back: noise goes there, and is gathered from there.

    FSDP2 keeps the gathered weights of the root module after a forward; they would not see what is
    written to the shards.
    """
    for module in fsdp_modules(model):
        reshard(module)


@contextmanager
def before_gathering(module: Any, hook: object) -> Iterator[None]:
    """A block inside a forward pre-hook that runs before FSDP2 gathers the module's weights.

    So it does by itself, unless ``fully_shard`` came after the hook (Accelerate shards a model
    whose optimizer exists already). Then FSDP2 lets go and gathers again; once, as from the next
    forward on the hook comes first.
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
    """Raises ValueError for engines that take the weights' shapes or values away."""
    for parameter in model.parameters():
        # In its forward, FSDP1 replaces the parameters by views of the flattened one.
        if hasattr(parameter, "_fsdp_flattened") or hasattr(parameter._base, "_fsdp_flattened"):
            raise ValueError(
                "FullyShardedDataParallel (FSDP1) flattens the weights, so that their rows can't be "
                "found. Use FSDP2: `torch.distributed.fsdp.fully_shard`, or `fsdp_version: 2` in "
                "Accelerate"
            )
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                "DeepSpeed ZeRO-3 keeps the weights in pieces that can't be perturbed. Use DDP, or "
                "FSDP2: `torch.distributed.fsdp.fully_shard`"
            )


def _sharded_dims(tensor: Any) -> list[int]:
    """The mesh dims along which the tensor is cut. FSDP2 on top of TP cuts strided."""
    return [dim for dim, placement in enumerate(tensor.placements) if hasattr(placement, "dim")]


def in_a_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
