"""The kernels of ``native.c`` and ``norms.c``.

Noise is made, added and journaled in one pass over the weight, many times as fast as by torch
operations. One call works on many weights, however small, on all of torch's threads. In C, a cycle of
perturb and restore is ``perturb_segment`` and ``restore_segment``.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import part, plain
from .build import library, library_or_none
from .part import Keep, Key, Recipe
from .plain import Product
from .threads import for_each, scratch

name = "native C"
blocks_at_once = 4

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MOST = 1 << 23  # elements in one call: an interrupt waits for it, for about ten milliseconds
_WORTH_A_THREAD = 1 << 15
_ROWS = 1 << 19  # elements per piece of work when norms are computed
_GROUP = 4  # rows that norms.c works on together

_ROOM = (1 << 16) * (2 + 4)  # bytes of a Room of native.c


class _Noise(ctypes.Structure):
    """``Noise`` of native.c."""

    _fields_ = (
        ("tables", ctypes.POINTER(ctypes.c_void_p)),
        ("key", ctypes.c_uint32 * 4),
        ("first_block", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("row_size", ctypes.c_int64),
        ("transposed", ctypes.c_int32),
    )


class _Part(ctypes.Structure):
    """``Part`` of native.c."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("copy", ctypes.c_void_p),
        ("journals", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("journal_bytes", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("keeps_journal", ctypes.c_int32),
        ("is_perturbed", ctypes.c_int32),
        ("noise", _Noise),
    )


class _Task(ctypes.Structure):
    """``Task`` of shared.h."""

    _fields_ = (
        ("items", ctypes.c_void_p),
        ("rooms", ctypes.c_void_p),
        ("room_size", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("next", ctypes.c_int64),
        ("most", ctypes.c_int64),
        ("threads", ctypes.c_int32),
        ("failed", ctypes.c_int32),
    )


class _Product(ctypes.Structure):
    """``Product`` of norms.c."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("left", ctypes.c_void_p),
        ("right", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("format", ctypes.c_int32),
    )


def is_available() -> bool:
    return library_or_none() is not None


def takes(noise: Recipe, weight: Tensor) -> bool:
    return (
        noise.can_be_fused
        and not noise.grid.group
        and (noise.is_seeded or noise.is_in_memory)
        and weight.is_contiguous()
        and weight.dtype in _FORMATS
    )


def fill(out: Tensor, key: Key, block: int) -> Tensor:
    library().flatlora_fill(out.data_ptr(), out.numel(), (ctypes.c_uint32 * 4)(*key.words), block)
    return out


def checksums(weights: Sequence[Tensor]) -> list[int]:
    return [_checksum(weight) for weight in weights]


def _checksum(weight: Tensor) -> int:
    if not weight.is_contiguous():
        return int(plain.checksum(weight))
    numel = weight.numel()
    stride = max(1, numel // plain.SAMPLES)
    count, width = min(plain.SAMPLES, numel), weight.element_size()
    checksum: int = library().flatlora_checksum(weight.data_ptr(), count, stride, width)
    return checksum


class Part(part.Part):
    """C keeps the state of a part: no Python exception can come in between."""

    def _prepare(self) -> None:
        self._library = library()
        self._record = _Part(
            weight=self.rows.data_ptr(),
            copy=None if self.copy is None else self.copy.data_ptr(),
            numel=self.rows.numel(),
            format=_FORMATS[self.rows.dtype],
            keeps_journal=self.keep is Keep.JOURNAL,
        )

    @property
    def is_perturbed(self) -> bool:  # type: ignore[override]
        return bool(self._record.is_perturbed)

    @property
    def nbytes(self) -> int:
        return int(self._record.journal_bytes)

    def clean(self, copy: Tensor) -> None:
        self._describe_noise()
        self._library.flatlora_clean(ctypes.byref(self._record), copy.data_ptr())

    def forget(self) -> None:
        self._library.flatlora_forget(ctypes.byref(self._record))

    @classmethod
    def perturb_all(cls, parts: Sequence[Part]) -> None:  # type: ignore[override]
        if not _write("perturb", parts, _ROOM):
            raise MemoryError("out of memory for the journal of elements that a subtraction would miss")

    @classmethod
    def restore_all(cls, parts: Sequence[Part]) -> None:  # type: ignore[override]
        _write("restore", parts, 0)  # which must not depend on there being memory

    def _describe_noise(self) -> None:
        """Describes the noise to C, unless that was done before: numbers in memory may have changed since."""
        comes_from_a_copy = self.is_perturbed and self.copy is not None
        if comes_from_a_copy or (self.noise.is_seeded and self._record.noise.scales):
            return
        noise, lo, hi = self.noise, self.lo, self.hi
        scales = noise.scales_of(lo, hi)
        # C gets addresses only: the tensors must live as long as it uses them.
        self._alive = [scales]
        numbers, offset = noise.blocks(lo, hi)
        tables = None
        if not noise.is_seeded:
            table, starts = noise.places(numbers)
            self._alive.append(table)
            first = table.data_ptr()
            tables = (ctypes.c_void_p * len(starts))(*[first + 4 * start for start in starts])
        self._record.noise = _Noise(
            tables,
            noise.key.words,
            numbers[0],
            noise.grid.rows_per_block * noise.grid.row_size,
            offset,
            scales.data_ptr(),
            noise.grid.row_size,
            noise.row_dim,
        )


def _write(function: str, parts: Sequence[Part], room_size: int) -> bool:
    for each in parts:
        each._describe_noise()
        increment_version(each.rows)  # so that autograd sees that the weight was written
    records = [each._record for each in parts]
    return _share_out(function, records, [record.numel for record in records], room_size)


def squared_norms(products: Sequence[Product]) -> list[Tensor]:
    matrices = [product.matrices() for product in products]
    norms = iter(_squared_norms([matrix for some in matrices for matrix in some]))
    found = [[next(norms) for _ in some] for some in matrices]
    return [some[0] if len(some) == 1 else torch.cat(some) for some in found]


def _squared_norms(products: Sequence[Product]) -> list[Tensor]:
    # C gets addresses only: the factors must live as long as it uses them.
    factors = [_factors(products, 1), _factors(products, 2)]
    outs, tasks, sizes = [], [], []
    for product, left, right in zip(products, *factors, strict=True):
        matrix = product.matrix()
        (rows, columns), rank = matrix.shape, right.shape[0]
        if matrix.dtype not in _FORMATS or not matrix.is_contiguous() or rank == 0:
            outs.append(plain.squared_norms_of(product))
            continue
        out = torch.empty(rows, dtype=torch.float32, device=matrix.device)
        outs.append(out)
        most = max(_GROUP, _ROWS // max(1, columns) // _GROUP * _GROUP)
        for lo in range(0, rows, most):
            tasks.append(
                _Product(
                    matrix.data_ptr() + lo * columns * matrix.element_size(),
                    left.data_ptr() + lo * rank * 4,
                    right.data_ptr(),
                    out.data_ptr() + lo * 4,
                    min(most, rows - lo),
                    columns,
                    rank,
                    _FORMATS[matrix.dtype],
                )
            )
            sizes.append(tasks[-1].rows * columns)
    largest = max((task.rank for task in tasks), default=0)
    _share_out("squared_norms", tasks, sizes, library().flatlora_norm_room(largest))
    return outs


def _factors(products: Sequence[Product], which: int) -> list[Tensor]:
    """Scaled ``left``, or ``right``, of each."""
    factors = [product[which].float() for product in products]  # type: ignore[union-attr]
    if which == 1:
        factors = list(torch._foreach_mul(factors, [product.scaling for product in products]))
    return [factor.contiguous() for factor in factors]


def _share_out(
    function: str, records: Sequence[ctypes.Structure], sizes: Sequence[int], room_size: int
) -> bool:
    """Runs the library's function on all records, on as many threads as torch uses.

    Args:
        function: Its name.
        sizes: Elements of each record.
        room_size: Bytes that each thread needs.

    Returns:
        Whether all succeeded.
    """
    # The largest first, so that no thread is left with one while the others have finished.
    order = sorted(range(len(records)), key=lambda i: -sizes[i])
    items = (ctypes.c_void_p * len(records))(*[ctypes.addressof(records[i]) for i in order])
    threads = min(torch.get_num_threads(), len(records), 1 + sum(sizes) // _WORTH_A_THREAD)
    team = _torch_team()
    rooms = scratch("rooms", (threads * room_size,), torch.uint8, torch.device("cpu"))
    task = _Task(ctypes.addressof(items), rooms.data_ptr(), room_size, len(records), 0, _MOST)
    task.alive = items, rooms, records
    work = getattr(library(), f"flatlora_{function}")
    while task.next < task.count:
        task.threads = 0
        if team is not None and threads > 1:
            team(work, ctypes.byref(task), threads, 0)
        else:
            for_each(lambda _: work(ctypes.byref(task)), range(threads))
    return not task.failed


@functools.cache
def _torch_team() -> Callable[..., None] | None:
    """``GOMP_parallel(function, data, num_threads, flags)`` of the OpenMP library that torch has loaded.

    Its threads run torch's own operations, too, and are spread over the cores already. None in a forked
    process: threads do not survive a fork, and the call would wait for them for ever.
    """
    if _was_forked:
        return None
    team = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if team is not None:
        team.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        team.restype = None
    return team


_was_forked = False


def _note_fork() -> None:
    global _was_forked
    _was_forked = True
    _torch_team.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
