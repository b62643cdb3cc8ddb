"""The code of the Triton kernels: each is one launch over all weights of a device and dtype.

A program works on one tile of one weight, which a table in the device's memory describes. The numbers
are those of ``native.c``, to the bit: Philox-4x32-10 (Salmon et al. 2011), all four words of it, and a
Box-Muller transform of operations that IEEE 754 rounds one by one. So the kernels must be compiled
without contraction (``enable_fp_fusion=False``).

Only the device knows how far perturb and restore have come, tile by tile: ``counts`` is -1 for a tile
without noise, else the number of its journal's entries. Both may be launched again at any time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .threads import interprets_triton

INTERPRETED = tl.constexpr(interprets_triton())

FIELDS = tl.constexpr(18)
"""Numbers per weight in the table: see ``_description`` in ``triton``."""

NORM_FIELDS = tl.constexpr(14)
"""The same of the table for norms."""

FACTOR_FIELDS = tl.constexpr(8)
"""The same of the table for factors."""

NOTHING, JOURNAL, COPY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What is kept of the clean weight."""

CURSOR, LOST, CAPACITY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""The control block: entries that tiles have asked for, tiles that found no room, and entries that there
is room for."""

_CHUNK = tl.constexpr(256)  # journal entries that are put back at once

# Arguments that change with each call: Triton must not compile a variant for their divisors.
_STEP = ["first", "elsewhere", "key0", "key1", "step", "replica", "block"]


@triton.jit
def _philox(key0, key1, c0, c1, c2, c3):
    """Ten rounds; the products of 64 bits are one instruction each."""
    for _ in tl.static_range(10):
        p = c0.to(tl.uint64) * 0xD2511F53
        q = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (q >> 32).to(tl.uint32) ^ c1 ^ key0
        c2 = (p >> 32).to(tl.uint32) ^ c3 ^ key1
        c1 = q.to(tl.uint32)
        c3 = p.to(tl.uint32)
        key0 = (key0 + 0x9E3779B9).to(tl.uint32)
        key1 = (key1 + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _minus_two_ln(word):
    """-2 ln((i + 1/2) / 2^31) of the upper 31 bits i: at most 44.4, for a Gaussian of up to 6.66."""
    u = (word >> 1).to(tl.int32).to(tl.float32) + 0.5
    shifted = u.to(tl.int32, bitcast=True) - 0x4EB504F3
    e = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = f * -0.15277184 + 0.2582834
    p = p * f - 0.26481686
    p = p * f + 0.28360158
    p = p * f - 0.33218252
    p = p * f + 0.40004144
    p = p * f - 0.5000317
    p = p * f + 0.6666665
    p = p * f - 0.99999976
    p = p * f + 2.0
    return -(p * f) - e * 1.38629436


@triton.jit
def _box_muller(radius, angle):
    """Two Gaussians of two words."""
    r = tl.sqrt_rn(_minus_two_ln(radius))
    t = angle + 0x20000000
    x = (angle << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.6572952e-10
    y = x * x
    s = y * -1.9503963e-4 + 8.3320364e-3
    s = s * y - 1.6666651e-1
    s = s * y + 1.0
    s = s * x * r
    c = y * 2.4379880e-5 - 1.3886619e-3
    c = c * y + 4.1666616e-2
    c = c * y - 0.5
    c = c * y + 1.0
    c = c * r
    is_odd = (t & 0x40000000) != 0
    z0 = tl.where(is_odd, s, c).to(tl.uint32, bitcast=True) ^ ((t + 0x40000000) & 0x80000000)
    z1 = tl.where(is_odd, c, s).to(tl.uint32, bitcast=True) ^ (t & 0x80000000)
    return z0.to(tl.float32, bitcast=True), z1.to(tl.float32, bitcast=True)


@triton.jit
def _gaussians(key0, key1, step, replica, block, tile, TILE: tl.constexpr):
    """The numbers of one tile of a block, in four planes; ``_places`` says where each belongs."""
    call = (tile * (TILE // 4) + tl.arange(0, TILE // 4)).to(tl.uint32)
    zero = call ^ call
    w0, w1, w2, w3 = _philox(
        key0.to(tl.uint32, bitcast=True),
        key1.to(tl.uint32, bitcast=True),
        call,
        zero + block.to(tl.uint32),
        zero + step.to(tl.uint32, bitcast=True),
        zero + replica.to(tl.uint32, bitcast=True),
    )
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def _places(TILE: tl.constexpr):
    """Where the first plane's elements lie in a tile; the others follow 256, 512 and 768 later."""
    call = tl.arange(0, TILE // 4)
    return (call // 256) * 1024 + call % 256


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    if dtype == tl.bfloat16 and INTERPRETED:  # which would truncate
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(x == x, nearest, 0x7FC0)  # it could carry a NaN into an infinity
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _rounded_sum(w, eps, dtype: tl.constexpr):
    """``round(w + eps)``; a finite float16 weight stays finite."""
    total = w.to(tl.float32) + eps
    if dtype == tl.float16:
        finite = tl.abs(w.to(tl.float32)) <= 65504.0
        clamped = tl.minimum(tl.maximum(total, -65504.0), 65504.0)
        total = tl.where(finite, clamped, total)
    return _rounded(total, dtype)


@triton.jit(do_not_specialize=_STEP)
def fill_kernel(out, numel, key0, key1, step, replica, block, TILE: tl.constexpr):
    """The numbers of a block."""
    tile = tl.program_id(0)
    z0, z1, z2, z3 = _gaussians(key0, key1, step, replica, block, tile, TILE)
    place = tile * TILE + _places(TILE)
    tl.store(out + place, z0, mask=place < numel)
    tl.store(out + place + 256, z1, mask=place + 256 < numel)
    tl.store(out + place + 512, z2, mask=place + 512 < numel)
    tl.store(out + place + 768, z3, mask=place + 768 < numel)


@triton.jit
def _located(entry, tile, TILE: tl.constexpr):
    """Where a tile of a weight lies.

    Returns:
        Its place in a block of the whole weight; of this block, the number among all, the first row,
        and its first element counted from the weight's first local one; where in the tile the
        weight's elements begin and end.
    """
    numel, first_row, row_size = tl.load(entry + 4), tl.load(entry + 9), tl.load(entry + 8)
    rows, tiles = tl.load(entry + 6), tl.load(entry + 7).to(tl.int32)
    tile += tl.load(entry + 10).to(tl.int32)
    block = tile // tiles
    tile -= block * tiles
    row = tl.load(entry + 5) + block * rows
    shift = (row - first_row) * row_size
    start = tile * TILE
    lo = tl.maximum(-shift - start, 0)
    hi = tl.minimum(tl.minimum(rows * row_size, numel - shift) - start, TILE)
    return tile, (tl.load(entry + 3) + block).to(tl.int32), row, shift, lo.to(tl.int32), hi.to(tl.int32)


@triton.jit
def _is_regular(entry, tile, TILE: tl.constexpr):
    """Whether the tile is whole and has parts of at most two rows, each with a scale."""
    _, _, _, _, lo, hi = _located(entry, tile, TILE)
    return (hi - lo == TILE) & (tl.load(entry + 8) >= TILE) & (tl.load(entry + 11) == 0)


@triton.jit
def _scaled(entry, scales, z, row, start, o, lo, hi, REGULAR: tl.constexpr, TILE: tl.constexpr):
    """``scale * z`` of the elements ``o`` of a tile that begins at ``start`` in a block of rows."""
    row_size = tl.load(entry + 8).to(tl.int32)
    if REGULAR:
        first = start // row_size
        rest = (first + 1) * row_size - start
        one = tl.load(scales + row + first)
        other = tl.load(scales + row + first + (rest < TILE).to(tl.int32))
        return tl.where(o < rest, one, other) * z
    place = start + o
    index = row + place // row_size
    group = tl.load(entry + 11)
    if group != 0:
        index = (place % row_size).to(tl.int64) + row // group * row_size
    return tl.load(scales + index, mask=(o >= lo) & (o < hi), other=0.0) * z


@triton.jit
def _noise(
    entry, scales, tile, number, row, lo, hi, key0, key1, step, replica,
    REGULAR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """eps of a tile, in four planes."""
    z0, z1, z2, z3 = _gaussians(key0, key1, step, replica, number, tile, TILE)
    o, start = _places(TILE), tile * TILE
    scales += tl.load(entry + 1)
    e0 = _scaled(entry, scales, z0, row, start, o, lo, hi, REGULAR, TILE)
    e1 = _scaled(entry, scales, z1, row, start, o + 256, lo, hi, REGULAR, TILE)
    e2 = _scaled(entry, scales, z2, row, start, o + 512, lo, hi, REGULAR, TILE)
    e3 = _scaled(entry, scales, z3, row, start, o + 768, lo, hi, REGULAR, TILE)
    return e0, e1, e2, e3


@triton.jit
def _pointer(address, place, dtype: tl.constexpr):
    return address.to(tl.pointer_type(dtype)) + place


@triton.jit
def _get(pointer, o, lo, hi, REGULAR: tl.constexpr):
    if REGULAR:
        return tl.load(pointer + o)
    return tl.load(pointer + o, mask=(o >= lo) & (o < hi), other=0.0)


@triton.jit
def _put(pointer, o, values, lo, hi, REGULAR: tl.constexpr):
    if REGULAR:
        tl.store(pointer + o, values)
    else:
        tl.store(pointer + o, values, mask=(o >= lo) & (o < hi))


@triton.jit
def _value(packed, code):
    return tl.load(_pointer(tl.load(packed + 1), code & 15, tl.float32))


@triton.jit
def _scale(packed, place, mask, SIZE: tl.constexpr, OUTER: tl.constexpr):
    group = place.to(tl.uint32) // SIZE
    if OUTER:
        code = tl.load(_pointer(tl.load(packed + 2), group, tl.uint8), mask=mask, other=0).to(tl.int32)
        scale = tl.load(_pointer(tl.load(packed + 3), code, tl.float32))
        scale *= tl.load(_pointer(tl.load(packed + 4), group // OUTER, tl.float32), mask=mask, other=0.0)
        scale += tl.load(_pointer(tl.load(packed + 5), 0, tl.float32))
    else:
        scale = tl.load(_pointer(tl.load(packed + 2), group, tl.float32), mask=mask, other=0.0)
    return scale


@triton.jit
def _unpacked(packed, place, mask, SIZE: tl.constexpr, OUTER: tl.constexpr):
    """The elements at these places of a weight in 4 bits, float32: the operations of bitsandbytes, each
    rounded as there (in norms, which may be contracted, nearly so).

    Args:
        packed: The addresses of the tensors of :class:`.Packed`, up to six.
        SIZE: Elements that have a scale in common.
        OUTER: Scales that have a scale in common themselves; 0 if they are float32.
    """
    place = place.to(tl.uint32)  # so that divisions are shifts
    byte = tl.load(_pointer(tl.load(packed), place // 2, tl.uint8), mask=mask, other=0).to(tl.int32)
    return _value(packed, byte >> (4 - place % 2 * 4)) * _scale(packed, place, mask, SIZE, OUTER)


@triton.jit
def _unpacked_pairs(packed, place, mask, SIZE: tl.constexpr, OUTER: tl.constexpr, COLUMNS: tl.constexpr):
    """``COLUMNS`` elements from each of these places on, which have a scale in common, with fewer loads. The
    places are multiples of 8."""
    pointer = _pointer(tl.load(packed), place // 2 + tl.arange(0, COLUMNS // 2)[None, :], tl.uint8)
    pointer = tl.max_contiguous(tl.multiple_of(pointer, (1, 4)), (1, 4))
    byte = tl.load(pointer, mask=mask, other=0).to(tl.int32)
    scale = _scale(packed, place, mask, SIZE, OUTER)
    return tl.interleave(_value(packed, byte >> 4) * scale, _value(packed, byte) * scale)


@triton.jit
def unpack_kernel(
    packed, out, numel, DTYPE: tl.constexpr, SIZE: tl.constexpr, OUTER: tl.constexpr, TILE: tl.constexpr
):
    """A weight in 4 bits without noise."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    values = _unpacked(packed, place, place < numel, SIZE, OUTER)
    tl.store(out + place, _rounded(values, DTYPE), mask=place < numel)


@triton.jit
def _clean(
    entry, pointer, place, o, lo, hi,
    DTYPE: tl.constexpr, REGULAR: tl.constexpr, SIZE: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """The elements ``o`` of a tile without noise, from wherever they are kept."""
    if SIZE == 0:
        return _get(pointer, o, lo, hi, REGULAR)
    is_there = (o >= 0) if REGULAR else (o >= lo) & (o < hi)
    return _rounded(_unpacked(entry + 12, place.to(tl.int32) + o, is_there, SIZE, OUTER), DTYPE)


@triton.jit
def _put_factor(entry, scales, place, z, DTYPE: tl.constexpr):
    of_left, numel, rank = tl.load(entry + 5), tl.load(entry + 6), tl.load(entry + 7).to(tl.int32)
    is_left, is_right = place < of_left, (place >= of_left) & (place < numel)
    scale = tl.load(scales + tl.load(entry + 1) + place // rank, mask=is_left, other=1.0)
    left = _rounded(z * tl.div_rn(scale, tl.sqrt_rn(rank.to(tl.float32))), DTYPE)
    tl.store(_pointer(tl.load(entry), place, DTYPE), left, mask=is_left)
    tl.store(_pointer(tl.load(entry + 3), place - of_left, DTYPE), _rounded(z, DTYPE), mask=is_right)


@triton.jit(do_not_specialize=_STEP)
def factors_kernel(
    table, entries, scales, key0, key1, step, replica, DTYPE: tl.constexpr, TILE: tl.constexpr
):
    """Both factors of the low-rank noise of each weight.

    Args:
        table: ``FACTOR_FIELDS`` numbers per weight: the address of left, its first scale, its first tile, the
            address of right, its block, the elements of left and of both, and the rank.
        entries: For each program, the weight.
    """
    index = tl.program_id(0)
    entry = table + tl.load(entries + index) * FACTOR_FIELDS
    tile = index - tl.load(entry + 2).to(tl.int32)
    block = tl.load(entry + 4).to(tl.int32)
    z0, z1, z2, z3 = _gaussians(key0, key1, step, replica, block, tile, TILE)
    place = tile * TILE + _places(TILE)
    _put_factor(entry, scales, place, z0, DTYPE)
    _put_factor(entry, scales, place + 256, z1, DTYPE)
    _put_factor(entry, scales, place + 512, z2, DTYPE)
    _put_factor(entry, scales, place + 768, z3, DTYPE)


@triton.jit
def _missed(w, perturbed, eps, o, lo, hi, BITS: tl.constexpr, REGULAR: tl.constexpr):
    """1 where the subtraction will not bring w back."""
    back = _rounded_sum(perturbed, -eps, w.dtype)
    is_missed = back.to(BITS, bitcast=True) != w.to(BITS, bitcast=True)
    if not REGULAR:
        is_missed &= (o >= lo) & (o < hi)
    return is_missed.to(tl.int32)


@triton.jit
def _note(positions, originals, slot, o, w, missed, BITS: tl.constexpr):
    tl.store(positions + slot, o.to(tl.int16), mask=missed != 0)
    tl.store(originals + slot, w.to(BITS, bitcast=True), mask=missed != 0)


@triton.jit
def _perturb(
    entry, tile, index, address, scales, key0, key1, step, replica,
    positions, originals, starts, counts, control,
    DTYPE: tl.constexpr, BITS: tl.constexpr, KEEP: tl.constexpr, REGULAR: tl.constexpr, TILE: tl.constexpr,
    THREADS: tl.constexpr, SIZE: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    tile, number, row, shift, lo, hi = _located(entry, tile, TILE)
    place = shift + tile * TILE
    pointer = _pointer(address, place, DTYPE)
    e0, e1, e2, e3 = _noise(
        entry, scales, tile, number, row, lo, hi, key0, key1, step, replica, REGULAR, TILE
    )
    o0 = _places(TILE)
    o1, o2, o3 = o0 + 256, o0 + 512, o0 + 768
    w0 = _clean(entry, pointer, place, o0, lo, hi, DTYPE, REGULAR, SIZE, OUTER)
    w1 = _clean(entry, pointer, place, o1, lo, hi, DTYPE, REGULAR, SIZE, OUTER)
    w2 = _clean(entry, pointer, place, o2, lo, hi, DTYPE, REGULAR, SIZE, OUTER)
    w3 = _clean(entry, pointer, place, o3, lo, hi, DTYPE, REGULAR, SIZE, OUTER)
    s0, s1 = _rounded_sum(w0, e0, DTYPE), _rounded_sum(w1, e1, DTYPE)
    s2, s3 = _rounded_sum(w2, e2, DTYPE), _rounded_sum(w3, e3, DTYPE)
    fits = tile >= 0
    if KEEP == JOURNAL:
        m0 = _missed(w0, s0, e0, o0, lo, hi, BITS, REGULAR)
        m1 = _missed(w1, s1, e1, o1, lo, hi, BITS, REGULAR)
        m2 = _missed(w2, s2, e2, o2, lo, hi, BITS, REGULAR)
        m3 = _missed(w3, s3, e3, o3, lo, hi, BITS, REGULAR)
        # Each thread counts its own entries first. Their order does not matter.
        missed = tl.reshape(m0 + m1 + m2 + m3, (TILE // 4 // THREADS, THREADS))
        of_thread = tl.sum(missed, 0)
        count = tl.sum(of_thread, 0)
        first = tl.atomic_add(control + CURSOR, count.to(tl.int64), sem="relaxed")
        fits = first + count <= tl.load(control + CAPACITY)
        if fits:
            before = (tl.cumsum(of_thread, 0) - of_thread)[None, :]
            slot = tl.reshape(before + tl.cumsum(missed, 0) - missed, (TILE // 4,))
            positions += first
            originals += first
            _note(positions, originals, slot, o0, w0, m0, BITS)
            _note(positions, originals, slot + m0, o1, w1, m1, BITS)
            _note(positions, originals, slot + m0 + m1, o2, w2, m2, BITS)
            _note(positions, originals, slot + m0 + m1 + m2, o3, w3, m3, BITS)
            tl.store(starts + index, first)
            tl.store(counts + index, count)
        else:
            tl.atomic_add(control + LOST, 1, sem="relaxed")
    elif KEEP == COPY:
        to = _pointer(tl.load(entry + 12), place, DTYPE)
        _put(to, o0, w0, lo, hi, REGULAR)
        _put(to, o1, w1, lo, hi, REGULAR)
        _put(to, o2, w2, lo, hi, REGULAR)
        _put(to, o3, w3, lo, hi, REGULAR)
    if fits:
        _put(pointer, o0, s0, lo, hi, REGULAR)
        _put(pointer, o1, s1, lo, hi, REGULAR)
        _put(pointer, o2, s2, lo, hi, REGULAR)
        _put(pointer, o3, s3, lo, hi, REGULAR)
    if KEEP != JOURNAL and counts is not None:
        tl.store(counts + index, 0)


@triton.jit(do_not_specialize=_STEP)
def perturb_kernel(
    table, entries, first, elsewhere, scales, key0, key1, step, replica,
    positions, originals, starts, counts, control,
    DTYPE: tl.constexpr, BITS: tl.constexpr, KEEP: tl.constexpr, REGULAR: tl.constexpr, TILE: tl.constexpr,
    THREADS: tl.constexpr, SIZE: tl.constexpr, OUTER: tl.constexpr,
):  # fmt: skip
    """``W += eps`` in all tiles that carry no noise yet.

    Args:
        entries: Which entry of the table each tile belongs to.
        first: The number of the first tile.
        elsewhere: The address of memory to write in place of the weight, or 0.
        counts: None to add the noise without a record of it.
        REGULAR: Whether all tiles are regular.
        THREADS: Of a program.
        SIZE, OUTER: Of weights in 4 bits, whose sums with eps are written elsewhere (see ``_unpacked``). Else
            0.
    """
    index = tl.program_id(0) + first
    todo = index >= 0
    if counts is not None:
        todo = tl.load(counts + index) < 0
        tl.debug_barrier()  # before any thread of this program changes it
    if todo:
        entry = table + tl.load(entries + index) * FIELDS
        tile = index - tl.load(entry + 2).to(tl.int32)
        address = elsewhere + tl.load(entry) * (elsewhere == 0)
        is_regular = todo
        if not REGULAR:
            is_regular = _is_regular(entry, tile, TILE)
        if is_regular:
            _perturb(
                entry, tile, index, address, scales, key0, key1, step, replica,
                positions, originals, starts, counts, control,
                DTYPE, BITS, KEEP, True, TILE, THREADS, SIZE, OUTER,
            )  # fmt: skip
        elif not REGULAR:
            _perturb(
                entry, tile, index, address, scales, key0, key1, step, replica,
                positions, originals, starts, counts, control,
                DTYPE, BITS, KEEP, False, TILE, THREADS, SIZE, OUTER,
            )  # fmt: skip


@triton.jit
def _restore(
    entry, tile, index, count, address, scales, key0, key1, step, replica, positions, originals, starts,
    DTYPE: tl.constexpr, KEEP: tl.constexpr, REGULAR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile, number, row, shift, lo, hi = _located(entry, tile, TILE)
    place = shift + tile * TILE
    pointer = _pointer(address, place, DTYPE)
    o = _places(TILE)
    if KEEP == COPY:
        source = _pointer(tl.load(entry + 12), place, DTYPE)
        _put(pointer, o, _get(source, o, lo, hi, REGULAR), lo, hi, REGULAR)
        _put(pointer, o + 256, _get(source, o + 256, lo, hi, REGULAR), lo, hi, REGULAR)
        _put(pointer, o + 512, _get(source, o + 512, lo, hi, REGULAR), lo, hi, REGULAR)
        _put(pointer, o + 768, _get(source, o + 768, lo, hi, REGULAR), lo, hi, REGULAR)
    else:
        e0, e1, e2, e3 = _noise(
            entry, scales, tile, number, row, lo, hi, key0, key1, step, replica, REGULAR, TILE
        )
        w0, w1 = _get(pointer, o, lo, hi, REGULAR), _get(pointer, o + 256, lo, hi, REGULAR)
        w2, w3 = _get(pointer, o + 512, lo, hi, REGULAR), _get(pointer, o + 768, lo, hi, REGULAR)
        _put(pointer, o, _rounded_sum(w0, -e0, DTYPE), lo, hi, REGULAR)
        _put(pointer, o + 256, _rounded_sum(w1, -e1, DTYPE), lo, hi, REGULAR)
        _put(pointer, o + 512, _rounded_sum(w2, -e2, DTYPE), lo, hi, REGULAR)
        _put(pointer, o + 768, _rounded_sum(w3, -e3, DTYPE), lo, hi, REGULAR)
    if KEEP == JOURNAL:
        # Other threads of this program have just stored the elements that are corrected now.
        tl.debug_barrier()
        start = tl.load(starts + index)
        for chunk in range(0, count, _CHUNK):
            slot = chunk + tl.arange(0, _CHUNK)
            is_there = slot < count
            position = tl.load(positions + start + slot, mask=is_there, other=0).to(tl.int32)
            original = tl.load(originals + start + slot, mask=is_there, other=0)
            tl.store(pointer + position, original.to(DTYPE, bitcast=True), mask=is_there)


@triton.jit(do_not_specialize=_STEP)
def restore_kernel(
    table, entries, first, elsewhere, scales, key0, key1, step, replica, positions, originals, starts, counts,
    DTYPE: tl.constexpr, KEEP: tl.constexpr, REGULAR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Brings W back in all tiles that carry noise, or with ``elsewhere`` a copy of W."""
    index = tl.program_id(0) + first
    count = tl.load(counts + index)
    tl.debug_barrier()  # before any thread of this program changes it
    if count >= 0:
        entry = table + tl.load(entries + index) * FIELDS
        tile = index - tl.load(entry + 2).to(tl.int32)
        address = elsewhere + tl.load(entry) * (elsewhere == 0)
        is_regular = count >= 0
        if not REGULAR:
            is_regular = _is_regular(entry, tile, TILE)
        if is_regular:
            _restore(
                entry, tile, index, count, address, scales, key0, key1, step, replica,
                positions, originals, starts, DTYPE, KEEP, True, TILE,
            )  # fmt: skip
        elif not REGULAR:
            _restore(
                entry, tile, index, count, address, scales, key0, key1, step, replica,
                positions, originals, starts, DTYPE, KEEP, False, TILE,
            )  # fmt: skip
        if elsewhere == 0:
            tl.store(counts + index, -1)


@triton.jit
def _rounded_to(x, dtype: tl.constexpr):
    """The nearest of bfloat16, as numbers of ``dtype``."""
    if dtype == tl.bfloat16:
        nearest = x.to(tl.bfloat16)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        nearest = tl.where(x == x, kept, bits).to(tl.float32, bitcast=True)
    return nearest


@triton.jit
def _left(term, factor, row, rows, FACTORS: tl.constexpr, LEFT: tl.constexpr, RANK: tl.constexpr):
    """Rows of ``scaling * left``."""
    r = tl.arange(0, RANK)
    at = tl.load(term + 1).to(tl.pointer_type(LEFT))
    at += row[:, None].to(tl.int64) * tl.load(term + 5) + r[None, :] * tl.load(term + 6)
    b = tl.load(at, mask=(row[:, None] < rows) & (r[None, :] < tl.load(term + 2)), other=0.0)
    return _rounded_to(b.to(tl.float32) * tl.load(factor), FACTORS)


@triton.jit
def _right(term, column, columns, FACTORS: tl.constexpr, RIGHT: tl.constexpr, RANK: tl.constexpr):
    r = tl.arange(0, RANK)
    at = tl.load(term).to(tl.pointer_type(RIGHT))
    at += r[:, None] * tl.load(term + 3) + column[None, :].to(tl.int64) * tl.load(term + 4)
    a = tl.load(at, mask=(r[:, None] < tl.load(term + 2)) & (column[None, :] < columns), other=0.0)
    return _rounded_to(a.to(tl.float32), FACTORS)


@triton.jit
def norms_kernel(
    table, entries, terms, factors, out,
    DTYPE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, FACTORS: tl.constexpr,
    RANK: tl.constexpr, IS_ONE: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr, OUTER: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``out[i] = ||(W + D)[i, :]||^2`` where D is the sum of some ``scaling * left @ right``.

    W is read once. Scaled ``left`` and ``right`` are rounded to bfloat16, as in ``norms.c``; all else is in
    float32, in the same order each time.

    Args:
        table: For each weight its address; where its first tile comes; rows, columns, and the distance
            between rows (transposed: between columns); where its rows are in ``out``; the first of its
            terms, and the first of the next weight; of a weight in 4 bits, six addresses (see ``_unpacked``).
        terms: Up to ``RANK`` ranks each: the addresses of right and left, the number of ranks, and the
            strides of right and left.
        factors: The scalings of the terms.
        FACTORS: What products are made of: bfloat16, or float32 where that can't be multiplied.
        IS_ONE: Whether each weight has one term.
        SIZE, OUTER: Of weights in 4 bits (see ``_unpacked``), else 0.
        ALIGNED: Whether they can be read by ``_unpacked_pairs``.
    """
    tile, which = tl.program_id(0), tl.load(entries + tl.program_id(0))
    entry = table + which * NORM_FIELDS
    rows, columns = tl.load(entry + 2).to(tl.int32), tl.load(entry + 3).to(tl.int32)
    stride = tl.load(entry + 4)
    first_term, end = tl.load(entry + 6).to(tl.int32), tl.load(entry + 7).to(tl.int32)
    row = (tile - tl.load(entry + 1).to(tl.int32)) * ROWS + tl.arange(0, ROWS)
    weight = tl.load(entry).to(tl.pointer_type(DTYPE))
    b = _left(terms + first_term * 8, factors + first_term, row, rows, FACTORS, LEFT, RANK)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        if TRANSPOSED:
            at = weight + row[:, None] + column[None, :].to(tl.int64) * stride
        else:
            at = weight + row[:, None].to(tl.int64) * stride + column[None, :]
        is_there = (row[:, None] < rows) & (column[None, :] < columns)
        if SIZE:
            place = row[:, None] * columns + first
            if ALIGNED:
                w = _unpacked_pairs(entry + 8, place, row[:, None] < rows, SIZE, OUTER, COLUMNS)
            else:
                place += tl.arange(0, COLUMNS)[None, :]
                w = tl.where(is_there, _unpacked(entry + 8, place, is_there, SIZE, OUTER), 0.0)
        else:
            w = tl.load(at, mask=is_there, other=0.0).to(tl.float32)
        a = _right(terms + first_term * 8, column, columns, FACTORS, RIGHT, RANK)
        d = tl.dot(b, a, input_precision="ieee")
        if not IS_ONE:
            for term in range(first_term + 1, end):
                c = _left(terms + term * 8, factors + term, row, rows, FACTORS, LEFT, RANK)
                a = _right(terms + term * 8, column, columns, FACTORS, RIGHT, RANK)
                d = tl.dot(c, a, d, input_precision="ieee")
        merged = w + d
        total += merged * merged
    tl.store(out + tl.load(entry + 5) + row, tl.sum(total, 1), mask=row < rows)


@triton.jit
def _mixed(x):
    """A bijection of integers of 64 bits."""
    x = (x ^ (x >> 32)) * 0x9E3779B97F4A7C15
    return x ^ (x >> 29)


@triton.jit
def checksum_kernel(table, out):
    """A number for each weight, which changes if any of the sampled elements does.

    Args:
        table: For each weight its address, the distance between sampled elements, their number, and the
            size of an element.
    """
    weight = tl.program_id(0)
    lane, entry = tl.arange(0, 64), table + weight * 4
    address, place, width = tl.load(entry), lane * tl.load(entry + 1), tl.load(entry + 3)
    is_there = lane < tl.load(entry + 2)
    bits = lane.to(tl.int64)
    if width == 2:
        bits = tl.load(address.to(tl.pointer_type(tl.int16)) + place, mask=is_there, other=0).to(tl.int64)
    elif width == 4:
        bits = tl.load(address.to(tl.pointer_type(tl.int32)) + place, mask=is_there, other=0).to(tl.int64)
    else:
        bits = tl.load(address.to(tl.pointer_type(tl.int64)) + place, mask=is_there, other=0)
    mixed = _mixed(_mixed(bits.to(tl.uint64, bitcast=True)) + lane.to(tl.uint64))
    tl.store(out + weight, tl.sum(mixed.to(tl.int64, bitcast=True), 0))
