"""The kernels of ``native.c``, which the C compiler that is there builds at their first use.

One call makes, adds and journals the noise of a block in one pass over the weight, several times
as fast as torch operations can, and without Python's lock, so that threads work side by side. The
library is kept in the user's cache folder. Where there is no compiler, :mod:`.plain` does the work.

``FLATLORA_NATIVE=0`` in the environment switches it off, ``CC`` names the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..parallel import for_each, scratch
from . import plain
from .journal import SEGMENT, Journal, narrowed

if TYPE_CHECKING:
    from ..noise import Noise

name = "native C"
blocks_at_once = 2  # more would need more room for the longest journal

_SOURCE = Path(__file__).with_name("native.c")
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_INTEGERS = {2: torch.int16, 4: torch.int32}

# Without contraction all operations are rounded one by one, and the numbers are the same everywhere.
_FLAGS = (
    "-O3",
    "-std=c99",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
)
_VECTOR_FLAGS = {
    "AVX2": ("-mavx2",),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
}
_TIME_LIMIT = 120.0

_LARGEST_RANK = 16  # beyond, a matrix product is faster
_GROUP, _CHUNK = 4, 512  # GROUP and CHUNK of native.c

_KNOWN_SUM = -21_415_298_576
"""Of the bit patterns of the first 4096 numbers for seed 1."""


class _Noise(ctypes.Structure):
    """``Noise`` of native.c."""

    _fields_ = (
        ("tables", ctypes.POINTER(ctypes.c_void_p)),
        ("seeds", ctypes.POINTER(ctypes.c_uint32)),
        ("block_size", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("row_size", ctypes.c_int64),
        ("transposed", ctypes.c_int32),
    )


class _Journal(ctypes.Structure):
    """``Journal`` of native.c."""

    _fields_ = (
        ("low", ctypes.c_void_p),
        ("corrections", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("entries", ctypes.c_int64),
        ("width", ctypes.c_int32),
    )


def is_available() -> bool:
    return _library() is not None


def takes(noise: Noise, part: Tensor) -> bool:
    return noise.can_be_fused and part.is_contiguous() and part.dtype in _FORMATS


def fill(out: Tensor, seed: int) -> Tensor:
    _loaded().flatlora_fill(out.data_ptr(), out.numel(), seed)
    return out


def perturb(
    part: Tensor, noise: Noise, lo: int, hi: int, *, journal: bool, note: Callable[[Journal | None], object]
) -> None:
    call = _Call(part, noise, lo, hi)
    memory = _JournalMemory(part) if journal else None
    record: list[Journal | None] = []
    try:
        call.perturb(memory)
        record.append(memory.journal() if memory else None)
        note(record[0])
    except BaseException:
        if call.is_done and record:
            note(record[0])
        elif call.is_done:
            # No memory left for the journal, say: what it is made from is still here.
            call.restore(memory.view if memory else None)
        raise


def restore(
    part: Tensor, noise: Noise, lo: int, hi: int, *, journal: Journal | None, note: Callable[[], object]
) -> None:
    call = _Call(part, noise, lo, hi)
    view = None if journal is None else _view(journal.low, journal.corrections, journal.starts)
    try:
        call.restore(view)
        note()
    except BaseException:
        if call.is_done:
            note()
        raise


def norm_increase(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    rank = len(right)
    if rank > _LARGEST_RANK or matrix.dtype not in _FORMATS or not matrix.is_contiguous():
        return plain.norm_increase(matrix, left, right)
    left, right = left.contiguous(), right.contiguous()
    out = torch.empty(len(matrix), dtype=torch.float32, device=matrix.device)

    def compute(rows: slice) -> None:
        part = matrix[rows]
        padded = scratch("padded", ((rank + _GROUP) * _CHUNK + _GROUP * rank,), torch.float32, out.device)
        _loaded().flatlora_norm_increase(
            part.data_ptr(),
            *part.shape,
            _FORMATS[part.dtype],
            left[rows].data_ptr(),
            right.data_ptr(),
            rank,
            padded.data_ptr(),
            out[rows].data_ptr(),
        )

    for_each(compute, plain.row_chunks(matrix))
    return out


class _Call:
    """Some rows of a weight and their noise, as native.c wants them."""

    def __init__(self, part: Tensor, noise: Noise, lo: int, hi: int) -> None:
        scales, seeds, offset = noise.recipe(lo, hi)
        tables = [] if noise.is_seeded else noise.standard_blocks(lo, hi)
        # Addresses are all that C gets: the tensors have to live as long as they are in use.
        self._part, self._alive = part, (scales, tables)
        addresses = [table.data_ptr() for table in tables]
        self._noise = _Noise(
            (ctypes.c_void_p * len(tables))(*addresses) if tables else None,
            (ctypes.c_uint32 * len(seeds))(*seeds),
            noise.grid.rows_per_block * noise.grid.row_size,
            offset,
            scales.data_ptr(),
            noise.grid.row_size,
            noise.row_dim,
        )
        self._done = ctypes.c_int32(0)

    @property
    def is_done(self) -> bool:
        """Whether the rows were written, also if an interrupt followed at once."""
        return bool(self._done.value)

    def perturb(self, memory: _JournalMemory | None) -> None:
        self._run("flatlora_perturb", memory.view if memory else None)

    def restore(self, journal: _Journal | None) -> None:
        self._run("flatlora_restore", journal)

    def _run(self, function: str, journal: _Journal | None) -> None:
        part = self._part
        increment_version(part)  # autograd is to see that the weight was written
        getattr(_loaded(), function)(
            part.data_ptr(),
            part.numel(),
            _FORMATS[part.dtype],
            ctypes.byref(self._noise),
            None if journal is None else ctypes.byref(journal),
            ctypes.byref(self._done),
        )


class _JournalMemory:
    """Room for the longest journal that the rows can have."""

    def __init__(self, part: Tensor) -> None:
        numel = part.numel()
        segments = -(-numel // SEGMENT)
        self._low = scratch("low", (numel,), torch.int16, part.device)
        self._corrections = scratch("corrections", (numel,), _INTEGERS[part.element_size()], part.device)
        self._starts = scratch("starts", (segments + 1,), torch.int64, part.device)
        self.view = _view(self._low, self._corrections, self._starts)

    def journal(self) -> Journal:
        entries = self.view.entries
        corrections = self._corrections[:entries]
        starts = self._starts.clone() if self._starts.numel() > 2 else None
        return Journal(self._low[:entries].clone(), narrowed(corrections).clone(), starts)


def _view(low: Tensor, corrections: Tensor, starts: Tensor | None) -> _Journal:
    return _Journal(
        low.data_ptr(),
        corrections.data_ptr(),
        None if starts is None else starts.data_ptr(),
        low.numel(),
        corrections.element_size(),
    )


# ---------------------------------------------------------------------- building


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library, or None where it can't be had."""
    compiler = _compiler()
    if compiler is None or os.environ.get("FLATLORA_NATIVE") == "0":
        return None
    try:
        library = _load(compiler)
        if _first_numbers(library) != _KNOWN_SUM:
            raise OSError(f"{compiler} computes other numbers than it should")
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            "the native kernels could not be built, so noise takes several times as long: "
            f"{getattr(error, 'stderr', None) or error}\n"
            "Mend the C compiler, or set FLATLORA_NATIVE=0 to do without",
            stacklevel=2,
        )
        return None
    return library


def _compiler() -> str | None:
    if os.name == "nt":
        return None
    names = [os.environ["CC"]] if "CC" in os.environ else ["cc", "gcc", "clang"]
    return next(filter(None, map(shutil.which, names)), None)


def _load(compiler: str) -> ctypes.CDLL:
    capability = torch.backends.cpu.get_cpu_capability()
    command = [compiler, *_FLAGS, *_VECTOR_FLAGS.get(capability, ())]
    parts = (*command, platform.machine(), _SOURCE.read_text())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    kept = _cache_folder() / f"native-{digest}.so"
    if kept.exists():
        with suppress(OSError):  # damaged
            return _declared(ctypes.CDLL(str(kept)))
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder, kept.name)
        command += [str(_SOURCE), "-o", str(fresh), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIME_LIMIT)
        library = _declared(ctypes.CDLL(str(fresh)))
        _keep(fresh, kept)
    return library


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "flatlora_optim"


def _keep(fresh: Path, kept: Path) -> None:
    """For the next process; other processes may do the same at the same time."""
    with suppress(OSError):  # a read-only home: each process builds its own
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as copy:
            copy.write(fresh.read_bytes())
        os.replace(copy.name, kept)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.flatlora_fill.argtypes = (pointer, size, ctypes.c_uint32)
    two = library.flatlora_perturb, library.flatlora_restore
    for function in two:
        function.argtypes = (pointer, size, number, pointer, pointer, pointer)
    norm_increase = pointer, size, size, number, pointer, pointer, size, pointer, pointer
    library.flatlora_norm_increase.argtypes = norm_increase
    for function in (*two, library.flatlora_fill, library.flatlora_norm_increase):
        function.restype = None
    return library


def _first_numbers(library: ctypes.CDLL) -> int:
    numbers = torch.empty(4096, dtype=torch.float32, device="cpu")
    library.flatlora_fill(numbers.data_ptr(), numbers.numel(), 1)
    return int(numbers.view(torch.int32).long().sum())
