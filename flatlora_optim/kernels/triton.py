"""Noise on a GPU: all weights of a device and dtype in one launch, which nothing waits for.

``jit`` has the code of the kernels. Tables in the device's memory describe the weights; they are made once
and kept for as long as the weights stay where they are. Memory for the journal is reserved once, too. The
device reports how much of it a step needed, without being waited for: a tile that finds no room stays clean
for the step, and there is more room at the next.

The module imports Triton; ask :func:`flatlora_optim.kernels.has_triton` first.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from . import jit, part, plain
from .part import Keep, Key, Packed, Recipe, read
from .plain import Product
from .threads import interprets_triton

T = TypeVar("T")

name = "Triton"
blocks_at_once = 1 << 40  # a weight is one part

TILE = 4096
"""Elements per program. A position within a tile fits the 16 bits that the journal has for it."""

WARPS = 4
"""Warps of a program that makes noise."""

_ROWS, _COLUMNS, _MOST_RANKS, _NORM_WARPS = 64, 64, 64, 4  # of the product in one program

_ROOM = {2: 1 / 18, 4: 1 / 13}
"""Journal entries per element that there is room for at first, by the size of an element: what noise of
sigma 0.05 needs, at most 12 % of the weights' memory."""

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_BITS = {2: tl.int16, 4: tl.int32}
_INTEGERS = {2: torch.int16, 4: torch.int32}
_KEEP = {Keep.NOTHING: jit.NOTHING, Keep.JOURNAL: jit.JOURNAL, Keep.COPY: jit.COPY}

# If `z * scale + w` were contracted into one rounding, a restore would miss other elements than the
# journal has.
_EXACT: dict[str, Any] = {"enable_fp_fusion": False}

# Norms may be contracted. Said, because Triton 3.9 warns of its default, which is about to change.
_FUSED: dict[str, Any] = {"enable_fp_fusion": True}


def takes(noise: Recipe, weight: Tensor) -> bool:
    is_known = noise.can_be_fused and noise.is_seeded and weight.dtype in _DTYPES
    return is_known and weight.is_contiguous() and weight.numel() > 0 and noise.grid.row_size < 1 << 31


def fill(out: Tensor, key: Key, block: int) -> Tensor:
    with _on(out.device):
        grid = (triton.cdiv(out.numel(), TILE),)
        jit.fill_kernel[grid](
            out, out.numel(), *map(_signed, key.words), _signed(block), TILE=TILE, num_warps=WARPS, **_EXACT
        )
    return out


def fill_factors(factors: Sequence[tuple[Tensor, Tensor, Recipe]]) -> None:
    """The same for both factors of low-rank noise; see ``FactoredNoise.factors``."""
    for some in _grouped(factors, lambda f: (f[0].device, f[0].dtype, f[2].key.words)):
        device, dtype = some[0][0].device, some[0][0].dtype
        weights = tuple(_describe_factors(*each) for each in some)
        table, entries = _factor_tables(device, weights, tuple(len(left) for left, *_ in some))
        for left, right, _ in some:
            increment_version((left, right))
        scales, words = _joined([noise.scales for *_, noise in some]), some[0][2].key.words
        with _on(device):
            jit.factors_kernel[(len(entries),)](
                table, entries, scales, *map(_signed, words),
                DTYPE=_DTYPES[dtype], TILE=TILE, num_warps=WARPS, **_EXACT,
            )  # fmt: skip


def _describe_factors(left: Tensor, right: Tensor, noise: Recipe) -> tuple[int, ...]:
    """As ``_description``, for ``jit.factors_kernel``."""
    of_left, numel, rank = left.numel(), left.numel() + right.numel(), len(right)
    at = right.data_ptr(), noise.grid.first_block, of_left, numel, rank
    return left.data_ptr(), *at, triton.cdiv(numel, TILE)


# ------------------------------------------------------------------------ parts of weights


class Part(part.Part):
    """A whole weight, or its local part. The device keeps which of its tiles carry the noise."""

    memory: _Batch | None = None

    def _prepare(self) -> None:
        self.address = self.rows.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.memory.share if self.is_perturbed and self.memory is not None else 0

    def clean(self, copy: Tensor) -> None:
        assert self.memory is not None
        self.memory.restore_copy(self, copy)

    def forget(self) -> None:
        if self.is_perturbed and self.memory is not None:
            self.memory.forget(self)
        self.is_perturbed = False

    @classmethod
    def perturb_all(cls, parts: Sequence[Part]) -> None:  # type: ignore[override]
        for some in _grouped(parts, lambda p: (p.rows.device, p.rows.dtype, p.keep, p.noise.key.words)):
            _batch_of(some).perturb(some)

    @classmethod
    def restore_all(cls, parts: Sequence[Part]) -> None:  # type: ignore[override]
        for some in _grouped([p for p in parts if p.memory is not None], lambda p: p.memory):
            assert some[0].memory is not None
            some[0].memory.restore(some)

    @classmethod
    def add_all(cls, parts: Sequence[Part]) -> None:  # type: ignore[override]
        for each in parts:
            rows, noise = each.rows, each.noise
            increment_version(rows)
            table, entries = _only(rows.device, _description(each, in_place=False))
            _launch(
                jit.perturb_kernel, rows, (table, entries, 0, rows.data_ptr()), noise.scales, noise.key.words,
                (None,) * 5, len(entries), KEEP=jit.NOTHING, **_of_perturb(rows.dtype, each.packed),
            )  # fmt: skip


def _description(part: Part, *, in_place: bool) -> tuple[int, ...]:
    """A weight's entry of the table, without the places of its first scale and first tile, and then the
    number of its tiles. See ``jit._located``."""
    grid, rows = part.noise.grid, part.rows
    first_row, size, row_size = grid.first_row + part.lo, grid.rows_per_block, grid.row_size
    block = first_row // size
    skipped = (first_row - block * size) * row_size // TILE
    tiles = triton.cdiv(size * row_size, TILE)
    last, rest = divmod(first_row + part.hi - part.lo - 1, size)
    count = (last - block) * tiles + triton.cdiv((rest + 1) * row_size, TILE) - skipped
    address = part.address if in_place else 0
    others = _addresses(part.packed) if part.copy is None else (part.copy.data_ptr(), 0, 0, 0, 0, 0)
    number = grid.first_block + block
    # Scales run along the rows of memory, or along their elements; then each group has its own.
    group = (grid.group or grid.rows) if part.noise.row_dim else 0
    at = number, rows.numel(), block * size, size, tiles, row_size, first_row, skipped, group
    return address, *at, *others, count


def _tables(device: torch.device, weights: Sequence[tuple[int, ...]], scales: Sequence[int]) -> list[Tensor]:
    """The table of some weights, which have so many scales each, and the weight that each tile belongs to."""
    rows, tile, scale = [], 0, 0
    for (address, *at, count), size in zip(weights, scales, strict=True):
        rows.append([address, scale, tile, *at])
        tile, scale = tile + count, scale + size
    counts = [count for *_, count in weights]
    return _copied(device, torch.tensor(rows, dtype=torch.int64, device="cpu"), _owners(counts))


def _owners(counts: Sequence[int]) -> Tensor:
    """Which weight each tile belongs to, of weights of so many tiles."""
    numbers = torch.arange(len(counts), dtype=torch.int32, device="cpu")
    return numbers.repeat_interleave(torch.tensor(counts, device="cpu"))


def _copied(device: torch.device, *tables: Tensor) -> list[Tensor]:
    """Waits for it: on whatever stream they are read later, they are there."""
    with torch.inference_mode(False):
        return [table.to(device, copy=True) for table in tables]


_factor_tables = functools.lru_cache(maxsize=64)(_tables)


@functools.lru_cache(maxsize=4096)
def _only(device: torch.device, weight: tuple[int, ...]) -> list[Tensor]:
    return _tables(device, [weight], [0])


_batches: WeakValueDictionary[tuple[Any, ...], _Batch] = WeakValueDictionary()


def _batch_of(parts: Sequence[Part]) -> _Batch:
    """The batch of these weights. Their last perturbation keeps it alive."""
    first = parts[0]
    weights = tuple(_description(each, in_place=True) for each in parts)
    scales = tuple(len(each.noise.scales) for each in parts)
    key = first.rows.device, first.rows.dtype, first.keep, weights, scales
    batch = _batches.get(key)
    if batch is None:
        batch = _batches[key] = _Batch(*key)
    return batch


class _Batch:
    """Weights of the same device, dtype and way to restore, with all that brings them back."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        keep: Keep,
        weights: Sequence[tuple[int, ...]],
        scales: Sequence[int],
    ) -> None:
        self._device, self._dtype, self._keep = device, dtype, keep
        self._numel = sum(weight[2] for weight in weights)
        self._spans: dict[
            int, tuple[int, int]
        ] = {}  # first tile and number of tiles, by the weight's address
        tiles = 0
        for address, *_, count in weights:
            self._spans[address] = tiles, count
            tiles += count
        self._tiles = tiles
        self._table, self._entries = _tables(device, weights, scales)
        with torch.inference_mode(False):
            self._counts = torch.full((tiles,), -1, dtype=torch.int32, device=device)
            self._starts = torch.zeros(tiles if keep is Keep.JOURNAL else 0, dtype=torch.int64, device=device)
            self._control = torch.zeros(3, dtype=torch.int64, device=device)
            self._counters = self._control[:2]
            self._answer = torch.zeros(3, dtype=torch.int64, pin_memory=device.type == "cuda", device="cpu")
        self._asked: Any = None  # an event: whether the answer has come
        self._is_measured = self._warned = False
        self._wanted = self._expected = 0.0  # entries of the last step, and what the next may need
        self._positions = self._originals = torch.empty(0, dtype=torch.int16, device=device)
        self._scales: Tensor = self._control
        self._words = 0, 0, 0, 0
        self._stream = _stream(device)

    @property
    def nbytes(self) -> int:
        """Memory of the journal; the tables are small."""
        journal = self._starts, self._positions, self._originals
        return sum(tensor.numel() * tensor.element_size() for tensor in journal)

    @property
    def share(self) -> int:
        """The memory divided by the number of weights."""
        return self.nbytes // len(self._spans)

    def perturb(self, parts: Sequence[Part]) -> None:
        with _on(self._device):
            if self._keep is Keep.JOURNAL:
                self._learn()
                self._reserve()
                self._counters.zero_()
            self._scales = _joined([each.noise.scales for each in parts])
            self._words = parts[0].noise.key.words
            for each in parts:
                # Set before it is true: restoring a weight without noise does no harm.
                each.memory, each.is_perturbed = self, True
                increment_version(each.rows)  # so that autograd sees that the weight was written
            self._perturb()
            if self._keep is Keep.JOURNAL and not self._is_measured:
                self._make_up()
            elif self._keep is Keep.JOURNAL:
                self._ask()

    def restore(self, parts: Sequence[Part]) -> None:
        with _on(self._device):
            for each in parts:
                increment_version(each.rows)
            if len(parts) == len(self._spans):
                self._restore(0, self._tiles)
            else:
                for each in parts:
                    self._restore(*self._spans[each.address])
            for each in parts:
                each.is_perturbed = False
            self._learn()

    def restore_copy(self, part: Part, copy: Tensor) -> None:
        with _on(self._device):
            self._restore(*self._spans[part.address], copy.data_ptr())

    def forget(self, part: Part) -> None:
        first, count = self._spans[part.address]
        self._counts[first : first + count] = -1

    def _perturb(self) -> None:
        journal = self._positions, self._originals, self._starts, self._counts, self._control
        self._launch(jit.perturb_kernel, 0, 0, journal, self._tiles, **_of_perturb(self._dtype))

    def _restore(self, first: int, tiles: int, elsewhere: int = 0) -> None:
        journal = self._positions, self._originals, self._starts, self._counts
        self._launch(jit.restore_kernel, first, elsewhere, journal, tiles)

    def _launch(
        self, kernel: Any, first: int, elsewhere: int, journal: Sequence[Tensor], tiles: int, **options: Any
    ) -> None:
        if _stream(self._device) != self._stream:
            for tensor in (self._table, self._entries, self._scales, *journal):
                tensor.record_stream(_stream(self._device))
        where = self._table, self._entries, first, elsewhere
        keep = _KEEP[self._keep]
        _launch(kernel, self._dtype, where, self._scales, self._words, journal, tiles, KEEP=keep, **options)

    def _reserve(self, kept: int = 0) -> None:
        """Reserves more memory for the journal, if there may not be enough.

        Args:
            kept: Entries of this step to keep.
        """
        known, room = len(self._positions), self._numel * _ROOM[self._dtype.itemsize]
        if known and not kept and self._expected <= known:
            return
        if known:
            room = self._expected * 1.25
        room = min(int(room), self._numel) + 2 * TILE  # for what a tile without room leaves unused
        before = (self._positions[:kept], self._originals[:kept]) if kept else None
        if before is None:  # free the old memory first
            self._positions = self._originals = torch.empty(0, dtype=torch.int16, device=self._device)
        with torch.inference_mode(False):
            self._positions = torch.empty(room, dtype=torch.int16, device=self._device)
            bits = _INTEGERS[self._dtype.itemsize]
            self._originals = torch.empty(room, dtype=bits, device=self._device)
        if before is not None:
            self._positions[:kept], self._originals[:kept] = before
        self._control.copy_(torch.tensor([kept, 0, room], device="cpu"), non_blocking=True)

    def _make_up(self) -> None:
        """Waits once, when the journal is new, and puts the noise on tiles that had found no room."""
        lost, room = self._expect(*read(self._control))
        self._is_measured = True
        if lost:
            self._reserve(room)
            self._perturb()

    def _ask(self) -> None:
        """Asks the device how much room was needed, without waiting for the answer."""
        self._answer.copy_(self._control, non_blocking=True)
        self._asked = torch.cuda.Event() if self._device.type == "cuda" else True
        if self._asked is not True:
            self._asked.record()

    def _learn(self) -> None:
        if self._asked is None or not (self._asked is True or self._asked.query()):
            return
        self._asked = None
        lost, room = self._expect(*self._answer.tolist())
        if lost and not self._warned:
            self._warned = True
            warnings.warn(
                f"the journal had room for {room} of {self._wanted:.0f} entries, so that a share of "
                f"{lost / self._tiles:.2%} of the weights went without noise in this step: sigma or the "
                "weights have changed. There will be more room at the next step",
                stacklevel=2,
            )

    def _expect(self, wanted: int, lost: int, room: int) -> tuple[int, int]:
        """Sigma may go on growing as it did in the last step: the room is to last for the next one, too."""
        growth = wanted / self._wanted if self._wanted else 1.0
        self._expected = wanted * min(1.2, max(1.01, growth))
        self._wanted = wanted
        return lost, room


def _joined(scales: Sequence[Tensor]) -> Tensor:
    """All scales in one tensor: no copy, if they lie one after another already."""
    place = scales[0].data_ptr()
    for each in scales:
        if each.data_ptr() != place or not each.is_contiguous():
            return torch.cat(list(scales))
        place += each.numel() * 4
    return scales[0]


def _launch(
    kernel: Any,
    like: Tensor | torch.dtype,
    where: Sequence[Any],
    scales: Tensor,
    words: Sequence[int],
    journal: Sequence[Any],
    tiles: int,
    **options: Any,
) -> None:
    dtype = like if isinstance(like, torch.dtype) else like.dtype
    with _on(scales.device):
        kernel[(tiles,)](
            *where, scales, *map(_signed, words), *journal,
            DTYPE=_DTYPES[dtype], REGULAR=False, TILE=TILE, num_warps=WARPS, **options, **_EXACT,
        )  # fmt: skip


def _of_perturb(dtype: torch.dtype, packed: Packed | None = None) -> dict[str, Any]:
    """Constants that only the perturbing kernel needs."""
    return {"BITS": _BITS[dtype.itemsize], "THREADS": 32 * WARPS, **_sizes(packed)}


# ------------------------------------------------------------------------ weights in 4 bits


def unpacked(packed: Packed, dtype: torch.dtype) -> Tensor:
    out = torch.empty(packed.shape, dtype=dtype, device=packed.device)
    with _on(out.device):
        jit.unpack_kernel[(triton.cdiv(out.numel(), TILE),)](
            _copied(out.device, torch.tensor(_addresses(packed), device="cpu"))[0], out, out.numel(),
            DTYPE=_DTYPES[dtype], TILE=TILE, **_sizes(packed), **_EXACT,
        )  # fmt: skip
    return out


def _sizes(packed: Packed | None) -> dict[str, int]:
    return {"SIZE": packed.size, "OUTER": packed.outer_size} if packed else {"SIZE": 0, "OUTER": 0}


def _addresses(packed: Packed | None) -> tuple[int, ...]:
    """Six addresses, or zeros: see ``jit._unpacked``."""
    if packed is None:
        return (0,) * 6
    tensors = packed.codes, packed.values, packed.scales, *packed.outer
    addresses = tuple(tensor.data_ptr() for tensor in tensors)
    return addresses + (0,) * (6 - len(addresses))


# ------------------------------------------------------------------------ norms


def squared_norms(products: Sequence[Product]) -> list[Tensor]:
    sizes = [product.rows for product in products]
    out = torch.empty(sum(sizes), dtype=torch.float32, device=products[0].weight.device)
    with _on(out.device):
        places = dict(zip(map(id, products), _starts_of(sizes), strict=True))
        for some in _grouped(products, _kind_of_product):
            if (kind := _kind_of_product(some[0])) is not None:
                _squared_norms(kind, some, [places[id(product)] for product in some], out)
    squared = list(out.split(sizes))
    for product, norms in zip(products, squared, strict=True):
        if _kind_of_product(product) is None:
            if product.packed is not None:
                product = product._replace(weight=unpacked(product.packed, torch.float32))
            norms.copy_(*plain.squared_norms([product]))
    return squared


def _kind_of_product(product: Product) -> tuple[Any, ...] | None:
    """What products in one launch have in common; None if the kernel can't read this one."""
    left, right = product.left, product.right
    weight = product.weight if product.packed is None else left  # whose dtype does for the kernel
    dtypes = tuple(_DTYPES.get(each.dtype) for each in (weight, left, right))
    are_alike = all((left.dtype, right.dtype) == (b.dtype, a.dtype) for b, a, _ in product.more)
    if None in dtypes or not are_alike or not product.weight.is_contiguous():
        return None
    return (*dtypes, product.row_dim, *_sizes(product.packed).values())


def _is_aligned(product: Product) -> bool:
    """Whether elements of a weight in 4 bits that the kernel reads at once have a scale in common."""
    assert product.packed is not None
    sizes = product.packed.size, product.columns
    return product.weight.data_ptr() % 4 == 0 and all(size % _COLUMNS == 0 for size in sizes)


def _squared_norms(
    kind: tuple[Any, ...], products: Sequence[Product], at: Sequence[int], out: Tensor
) -> None:
    weights = tuple(_describe_product(product, first) for product, first in zip(products, at, strict=True))
    table, entries, terms, factors = _norm_tables(out.device, weights)
    rank = max(right.shape[-2] for product in products for _, right, _ in product.terms)
    jit.norms_kernel[(len(entries),)](
        table, entries, terms, factors, out,
        DTYPE=kind[0], LEFT=kind[1], RIGHT=kind[2], FACTORS=_factors(out.device), TRANSPOSED=bool(kind[3]),
        RANK=min(_MOST_RANKS, max(16, triton.next_power_of_2(rank))), IS_ONE=len(terms) == len(table),
        ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_NORM_WARPS, SIZE=kind[4], OUTER=kind[5],
        ALIGNED=kind[4] > 0 and all(map(_is_aligned, products)), **_FUSED,
    )  # fmt: skip


def _describe_product(product: Product, first: int) -> tuple[Any, ...]:
    """What the tables say of a weight: see ``jit.norms_kernel``. Of experts, there is one after another."""
    weight, rows, columns = product.weight, product.left.shape[-2], product.columns
    stride = rows if product.row_dim else columns
    terms = tuple(term for each in product.terms for term in _describe_term(*each))
    size = rows * columns * weight.element_size()
    place = weight.data_ptr(), rows, columns, stride, first
    return product.experts, place, size, terms, _addresses(product.packed)


def _describe_term(left: Tensor, right: Tensor, scaling: float) -> Iterator[tuple[Any, ...]]:
    """The term, in pieces of no more ranks than the kernel takes at once; last, how far experts are apart."""
    sizes = right.element_size(), left.element_size()
    strides = right.stride()[-2:], left.stride()[-2:]
    apart = (right.stride(0) * sizes[0], left.stride(0) * sizes[1]) if left.ndim == 3 else (0, 0)
    for first in range(0, max(1, right.shape[-2]), _MOST_RANKS):
        of_right = right.data_ptr() + first * strides[0][0] * sizes[0]
        of_left = left.data_ptr() + first * strides[1][1] * sizes[1]
        count = min(_MOST_RANKS, right.shape[-2] - first)
        yield (of_right, of_left, count, *strides[0], *strides[1]), scaling, apart


@functools.lru_cache(maxsize=64)
def _norm_tables(device: torch.device, weights: tuple[tuple[Any, ...], ...]) -> list[Tensor]:
    table: list[list[int]] = []
    terms: list[list[int]] = []
    factors: list[float] = []
    tiles: list[int] = []
    tile = 0
    for experts, (address, rows, columns, stride, first), size, parts, packed in weights:
        for expert in range(experts):
            place = [address + expert * size, tile, rows, columns, stride, first + expert * rows]
            table.append([*place, len(terms), len(terms) + len(parts), *packed])
            tiles.append(triton.cdiv(rows, _ROWS))
            tile += tiles[-1]
            for (right, left, *others), factor, apart in parts:
                terms.append([right + expert * apart[0], left + expert * apart[1], *others, 0])
                factors.append(factor)
    return _copied(
        device,
        torch.tensor(table, dtype=torch.int64, device="cpu"),
        _owners(tiles),
        torch.tensor(terms, dtype=torch.int64, device="cpu"),
        torch.tensor(factors, dtype=torch.float32, device="cpu"),
    )


@functools.cache
def _factors(device: torch.device) -> Any:
    """The dtype that factors are multiplied in."""
    is_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return tl.float32 if is_old or interprets_triton() else tl.bfloat16


# ------------------------------------------------------------------------ checksums


def checksums(weights: Sequence[Tensor]) -> Tensor:
    device = weights[0].device
    out = torch.empty(len(weights), dtype=torch.int64, device=device)
    with _on(device):
        jit.checksum_kernel[(len(weights),)](
            _sample_table(device, tuple(map(_describe_samples, weights))), out, num_warps=1, **_EXACT
        )
    return out


def _describe_samples(weight: Tensor) -> tuple[int, int, int, int]:
    numel, width = weight.numel(), weight.element_size()
    stride = max(1, numel // plain.SAMPLES)
    if not weight.is_contiguous():
        numel, stride = weight.shape[0], weight.stride(0)
    return weight.data_ptr(), stride, min(plain.SAMPLES, numel), width


@functools.lru_cache(maxsize=64)
def _sample_table(device: torch.device, weights: tuple[tuple[int, ...], ...]) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(weights, dtype=torch.int64, device=device)


# ------------------------------------------------------------------------ helpers


def _signed(word: int) -> int:
    """The 32 bits as a signed integer: for larger ones, Triton would compile another kernel."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _grouped(items: Iterable[T], kind: Callable[[T], object]) -> Iterator[list[T]]:
    groups: dict[object, list[T]] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    yield from groups.values()


def _starts_of(sizes: Iterable[int]) -> list[int]:
    starts, start = [], 0
    for size in sizes:
        starts.append(start)
        start += size
    return starts


def _stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
