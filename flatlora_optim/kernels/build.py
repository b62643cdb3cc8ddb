"""Compiles and loads ``native.c`` and ``norms.c``, at the first use.

The library is kept in the user's cache folder, and loaded from there unless somebody else may have
written it. ``FLATLORA_NATIVE=0`` in the environment switches it off, ``CC`` names the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
_SOURCES = _FOLDER / "native.c", _FOLDER / "norms.c"
_HEADER = _FOLDER / "shared.h"

# Without contraction, each operation is rounded by itself and the numbers are the same everywhere.
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

_KNOWN_SUM = -34_121_550_101
"""The sum of the bit patterns of the first 4096 numbers for ``_KNOWN_KEY`` in block 5."""

_KNOWN_KEY = (1, 2, 3, 4)


def library() -> ctypes.CDLL:
    """The library, if ``library_or_none`` has one."""
    found = library_or_none()
    assert found is not None
    return found


@functools.cache
def library_or_none() -> ctypes.CDLL | None:
    """The library, or None if it can't be built or loaded."""
    compiler = find_compiler()
    if os.environ.get("FLATLORA_NATIVE") == "0":
        return None
    if compiler is None:
        if os.environ.get("CC"):
            warnings.warn(
                f"there is no compiler CC={os.environ['CC']!r}, so adding noise is several times slower. "
                "Fix CC, or set FLATLORA_NATIVE=0 to silence this",
                stacklevel=2,
            )
        return None
    try:
        found = load(compiler)
        if _first_numbers(found) != _KNOWN_SUM:
            raise OSError(f"code compiled by {' '.join(compiler)} computes wrong numbers")
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            "the native kernels could not be built, so adding noise is several times slower: "
            f"{getattr(error, 'stderr', None) or error}\n"
            "Fix the C compiler, or set FLATLORA_NATIVE=0 to silence this",
            stacklevel=2,
        )
        return None
    return found


def find_compiler() -> list[str] | None:
    """The command of a C compiler. It may have several words: CC may be "ccache gcc"."""
    if os.name == "nt":
        return None
    chosen = os.environ.get("CC")
    commands = [shlex.split(chosen)] if chosen else [["cc"], ["gcc"], ["clang"]]
    return next((command for command in commands if shutil.which(command[0])), None)


def load(compiler: list[str]) -> ctypes.CDLL:
    capability = torch.backends.cpu.get_cpu_capability()
    command = [*compiler, *_FLAGS, *_VECTOR_FLAGS.get(capability, ())]
    sources = [path.read_text() for path in (*_SOURCES, _HEADER)]
    digest = hashlib.sha256("\0".join((*command, platform.machine(), *sources)).encode()).hexdigest()[:16]
    kept = _cache_folder() / f"native-{digest}.so"
    with suppress(OSError):  # not there, or damaged
        if _is_ours_alone(kept.lstat()) and _is_ours_alone(kept.parent.stat()):
            return _declared(ctypes.CDLL(str(kept)))
    with tempfile.TemporaryDirectory() as folder:  # nobody else may enter it
        fresh = Path(folder, kept.name)
        command += [*map(str, _SOURCES), "-o", str(fresh), "-lm"]
        try:
            _compile(command)
        except subprocess.CalledProcessError:  # perhaps the assembler is older than the compiler
            _compile([*command, "-DWITHOUT_PAIRS"])
        found = _declared(ctypes.CDLL(str(fresh)))
        _keep(fresh, kept)
    return found


def _compile(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIME_LIMIT)


def _cache_folder() -> Path:
    chosen = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # a user without a home
        return Path(chosen or Path("~/.cache").expanduser(), "flatlora-optim")
    return Path(os.devnull)  # nothing can be kept there


def _is_ours_alone(status: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user, and nobody else can write it.

    Whoever writes a library can run code as anyone who loads it.
    """
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _keep(fresh: Path, kept: Path) -> None:
    """Keeps the library for later processes. Other processes may do the same at the same time."""
    with suppress(OSError):  # a read-only home: each process builds its own
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours_alone(kept.parent.stat()):
            warnings.warn(
                f"each process builds the native kernels again, because others can write {kept.parent}. "
                "Remove that folder, or set XDG_CACHE_HOME to one of your own",
                stacklevel=2,
            )
            return
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as copy:
            copy.write(fresh.read_bytes())
        os.replace(copy.name, kept)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    signatures: dict[str, tuple[Any, ...]] = {
        "fill": (pointer, size, ctypes.c_uint32 * 4, ctypes.c_uint32),
        "perturb": (pointer,),
        "restore": (pointer,),
        "clean": (pointer, pointer),
        "forget": (pointer,),
        "checksum": (pointer, size, size, size),
        "squared_norms": (pointer,),
        "norm_room": (size,),
    }
    for name, argtypes in signatures.items():
        function = getattr(library, f"flatlora_{name}")
        function.argtypes, function.restype = argtypes, None
    library.flatlora_checksum.restype = ctypes.c_uint64
    library.flatlora_norm_room.restype = size
    return library


def _first_numbers(library: ctypes.CDLL) -> int:
    numbers = torch.empty(4096, dtype=torch.float32, device="cpu")
    library.flatlora_fill(numbers.data_ptr(), numbers.numel(), (ctypes.c_uint32 * 4)(*_KNOWN_KEY), 5)
    return int(numbers.view(torch.int32).long().sum())
