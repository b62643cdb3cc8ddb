"""Weights of which this process holds a part: DTensors of FSDP2 and of tensor parallelism.

The local part gets its share of the whole weight's noise, which does not depend on the sharding: blocks are
those of the whole weight, and row norms are summed over the parts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

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
    local: Tensor = tensor._local_tensor if is_sharded(tensor) else tensor  # `to_local` would make a view
    return local.detach() if local.requires_grad and torch.is_grad_enabled() else local


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
    values: Tensor = tensor.detach().full_tensor() if is_sharded(tensor) else tensor
    return values


def has_parts_of_matrix(tensor: Any) -> bool:
    """Whether the parts of the sharded tensor are parts of ``tensor.flatten(1)``, cut along dim 0 or 1."""
    dims = 2 if tensor.ndim == 2 else 1
    return all(each.is_replicate() or getattr(each, "dim", dims) < dims for each in tensor.placements)


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


class Cut(NamedTuple):
    """How a dim is shared out.

    Args:
        among: The same on all processes: the mesh, the dim's size, and which of the mesh's dims cut it, with
            their placements. Empty if the dim is not cut.
        here: What of it this process holds.
    """

    among: tuple[Any, ...] = ()
    here: slice = slice(None)


def cuts(tensor: Any) -> tuple[Cut, Cut]:
    """How the rows (dim 0) are cut, and how the elements of each row."""
    if not is_sharded(tensor):
        return Cut(), Cut()
    mesh = tensor.device_mesh
    return _cuts(tensor.shape, mesh, tuple(mesh.get_coordinate()), tensor.placements)


@functools.lru_cache(maxsize=1024)  # torch computes offsets by operations on tensors
def _cuts(
    shape: torch.Size, mesh: Any, coordinate: tuple[int, ...], placements: tuple[Any, ...]
) -> tuple[Cut, Cut]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(getattr(placement, "dim", 2) > 1 and not placement.is_replicate() for placement in placements):
        raise ValueError(
            f"a frozen weight is placed as {placements}; only weights that are sharded along "
            "dim 0 or 1 can be perturbed"
        )
    sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)

    def cut(dim: int, unit: int) -> Cut:
        by = [(i, each) for i, each in enumerate(placements) if getattr(each, "dim", None) == dim]
        here = slice(offsets[dim] * unit, (offsets[dim] + sizes[dim]) * unit)
        return Cut((mesh, shape[dim], *by) if by else (), slice(None) if sizes[dim] == shape[dim] else here)

    return cut(0, 1), cut(1, shape[2:].numel())


def parts_at_once(wanted: Sequence[tuple[Any, int, Cut]]) -> list[Tensor]:
    """The parts of matrices that this process needs, by one collective for all that are alike.

    Args:
        wanted: A matrix, sharded or not; a dim and a cut of it, of which the part that is here is needed. Of
            the other dim, all is needed.
    """
    parts = [local_part(matrix) for matrix, _, _ in wanted]
    alike: dict[tuple[Any, ...], list[int]] = {}
    held = set()
    for i, (matrix, dim, cut) in enumerate(wanted):
        missing = [each.among for each in cuts(matrix)]
        if missing[dim] == cut.among:
            missing[dim] = ()
            held.add(i)
        rows, columns = missing
        # What we gather, and in which order, follows from what is the same on all processes.
        if columns or not _are_chunks(rows):
            parts[i] = whole(matrix)
            held.discard(i)
        elif rows:
            mesh, _, (along, _) = rows
            alike.setdefault((mesh, along, matrix.dtype, parts[i].shape[1:]), []).append(i)
    for (mesh, along, *_), some in alike.items():
        sizes = tuple(wanted[i][0].shape[0] for i in some)
        gathered = _gathered_rows([parts[i] for i in some], sizes, mesh, along)
        for i, each in zip(some, gathered, strict=True):
            parts[i] = each
    for i, (_, dim, cut) in enumerate(wanted):
        if i not in held and cut.here != slice(None):
            parts[i] = parts[i][cut.here] if dim == 0 else parts[i][:, cut.here]
    return parts


def _are_chunks(among: tuple[Any, ...]) -> bool:
    """Whether the dim is cut as by ``torch.chunk``, if at all: once, and not as by FSDP2 on top of TP."""
    return not among or (len(among) == 3 and type(among[2][1]).__name__ == "Shard")


def _gathered_rows(
    parts: Sequence[Tensor], sizes: tuple[int, ...], mesh: Any, along: int
) -> tuple[Tensor, ...]:
    """All rows of tensors of which each process along this dim of the mesh has a chunk.

    Args:
        sizes: The number of rows of each.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    device = parts[0].device
    most, order = _order_of_rows(sizes, mesh.size(along), device)
    padding = parts[0].new_empty(most - sum(map(len, parts)), *parts[0].shape[1:])
    placements = [Shard(0) if dim == along else Replicate() for dim in range(mesh.ndim)]
    joined = DTensor.from_local(torch.cat([*parts, padding]), mesh, placements, run_check=False)
    rows = whole(joined).to(device)  # offloaded parts have gone to the mesh's own device
    return rows.index_select(0, order).split(sizes)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=64)
def _order_of_rows(sizes: tuple[int, ...], count: int, device: torch.device) -> tuple[int, Tensor]:
    """How many rows the first of ``count`` processes has, which has most, and where each row is if all send
    as many."""
    pieces: list[list[Tensor]] = []
    ends = [0] * count
    for size in sizes:
        chunk = -(-size // count)
        lengths = [max(0, min(chunk, size - chunk * i)) for i in range(count)]
        pieces.append([torch.arange(end, end + length) for end, length in zip(ends, lengths, strict=True)])
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    order = [piece + ends[0] * i for some in pieces for i, piece in enumerate(some)]
    return ends[0], torch.cat(order).to(device)


def sums_over_parts(
    partial: Sequence[Tensor], weights: Sequence[Any], rows: Sequence[tuple[int, Cut]]
) -> list[Tensor]:
    """The sums over all parts of each weight, on all processes: one reduction for all that are cut alike.

    Args:
        partial: Those over the local part, for its rows (output neurons) or for all.
        rows: How many rows each weight has, and how they are cut.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, weight in enumerate(weights):
        if is_sharded(weight) and (dims := _sharded_dims(weight)):
            alike.setdefault((weight.device_mesh, *dims), []).append(i)
    sums = list(partial)
    for (mesh, *dims), some in alike.items():
        flat = torch.cat([partial[i] for i in some])
        sizes = tuple(rows[i][0] for i in some)
        if len(flat) < sum(sizes):
            all_rows = flat.new_zeros(sum(sizes))
            ours = tuple((_first(partial[i], *rows[i]), len(partial[i])) for i in some)
            flat = all_rows.index_copy_(0, _places(sizes, ours, flat.device), flat)
        for dim in dims:
            torch.distributed.all_reduce(flat, group=mesh.get_group(dim))
        for i, each in zip(some, flat.split(sizes), strict=True):
            sums[i] = each
    return sums


def _first(partial: Tensor, rows: int, cut: Cut) -> int:
    return 0 if len(partial) == rows else cut.here.start


@functools.lru_cache(maxsize=64)
def _places(sizes: tuple[int, ...], ours: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Where our rows of each weight, from a first one on and so many, are among all rows of all."""
    ends = itertools.accumulate(sizes)
    firsts = (end - size + first for end, size, (first, _) in zip(ends, sizes, ours, strict=True))
    places = [torch.arange(first, first + count) for first, (_, count) in zip(firsts, ours, strict=True)]
    return torch.cat(places).to(device)


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
    return _lowest_rank(mesh, tuple(mesh.get_coordinate()[:copies]))


@functools.lru_cache(maxsize=64)
def _lowest_rank(mesh: Any, place: tuple[int, ...]) -> int:
    return int(mesh.mesh[place].min())


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
    earlier = list(itertools.takewhile(lambda other: other is not hook, hooks.values()))
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
