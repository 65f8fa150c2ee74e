"""Triton code of the heavy kernels; `triton_launch` launches it, `tiles` chooses the tiles.

Memory is dense, ``[N, outer, inner]``. All arithmetic is in the dtype of the rows. Arguments that
mean the same everywhere:

- `outer`, `units`: ``inner = units * UNIT``, so that the compiler knows a divisor of `inner`;
- LENGTH: 1 if `inner` are channels, 0 if it is one channel's plane; else the planes' length, where
  samples are runs of memory, cut elsewhere than between planes;
- `starts`: the first sample of each block, and N, ``[blocks + 1]``;
- `splits`: the programs that share the sums of a block and a tile of CHANNELS channels;
- rows ``[blocks, C]``, or of groups, come with the distance from one to the next; `owners` or
  `users`, ``[blocks]``, are the row of each block, None if it is the one of the same number.

A sum goes over steps of ROWS tiles ``[OUTER, INNER]``, which are loaded together. A mask per value
would cost more than its bytes in half precision. `moments`, which has to select by it, has a loop
for whole steps and one for others; `grad_sums` has a mask per load, of 16 bytes, and one loop.
"""

import triton
import triton.language as tl

from .triton_steps import (
    channels_of,
    count_values,
    existing,
    first_step,
    load_step,
    per_channel,
    per_lane,
    row_start,
    rows_of,
    share,
    steps_of,
)


@triton.jit(do_not_specialize=["columns", "splits"])
def moments(
    x, starts, out, columns, outer, units, splits, SPLIT: tl.constexpr, UNIT: tl.constexpr,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, OUTER: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """Write mean and standard deviation; or a split's mean, sum of squares about it, and count.

    Sums the distances to the mean of the program's first tile, and their squares. As that tile is
    one of a few, it can't be far from the mean unless the values are, too: little cancels at worst,
    next to nothing where tiles resemble each other. That tile is read ahead of the loop, which then
    finds it in the cache.

    `out` is ``[2, blocks, C]``, or ``[3, splits, blocks, C]`` if SPLIT, for `merge_moments`;
    `columns` is blocks * C.
    """
    dtype = out.dtype.element_ty
    inner = units * UNIT
    block, split, tile, start, rows, per_piece, first, last = share(
        starts, outer, inner, splits, LENGTH, CHANNELS, ROWS, OUTER, INNER
    )
    offsets, lanes, jump = first_step(
        tile, start, outer, inner, LENGTH, CHANNELS, ROWS, OUTER, INNER
    )

    center = _mean_of_first_tile(
        x, tile, start, rows, per_piece, first, last, jump, outer, inner, dtype, LENGTH, CHANNELS,
        ROWS, OUTER, INNER,
    )  # fmt: skip
    centers = per_lane(center, LENGTH, CHANNELS, INNER)

    total = tl.zeros([OUTER, INNER], dtype)
    squares = tl.zeros([OUTER, INNER], dtype)
    n = tl.full([], 0, tl.int64)
    for piece in range(first // per_piece, tl.cdiv(last, per_piece)):
        begin, whole, end = steps_of(
            piece, per_piece, first, last, rows, inner, LENGTH, ROWS, OUTER, INNER
        )
        n += count_values(begin, end, piece, rows, inner, LENGTH, ROWS, OUTER, INNER)
        at = begin * jump + piece * INNER
        for _ in range(begin, whole):
            distance = load_step(x + at + offsets, lanes, dtype, OUTER, INNER) - centers
            total += tl.sum(distance, axis=0)
            squares += tl.sum(distance * distance, axis=0)
            at += jump
        for step in range(whole, end):
            exists = lanes & existing(step, piece, rows, inner, LENGTH, ROWS, OUTER, INNER)
            distance = load_step(x + at + offsets, exists, dtype, OUTER, INNER) - centers
            distance = tl.where(tl.reshape(exists, [ROWS, OUTER, INNER]), distance, 0)
            total += tl.sum(distance, axis=0)
            squares += tl.sum(distance * distance, axis=0)
            at += jump

    count = n.to(dtype)
    total = per_channel(total, LENGTH, CHANNELS, INNER)
    squares = per_channel(squares, LENGTH, CHANNELS, INNER)
    mean = total / tl.maximum(count, 1)
    # Squares beyond the dtype are infinite, as in the reference; inf - inf would be NaN.
    squares = tl.where(squares < float("inf"), squares - total * mean, squares)
    squares = tl.where(squares < 0, 0, squares)
    squares = tl.where(tl.abs(mean) < float("inf"), squares, mean - mean)  # NaN

    channels, exist = channels_of(tile, outer, inner, LENGTH, CHANNELS)
    position = out + row_start(block, split, columns, outer, inner, LENGTH) + channels
    size = splits.to(tl.int64) * columns
    tl.store(position, center + mean, mask=exist)
    if SPLIT:
        tl.store(position + size, squares, mask=exist)
        tl.store(position + 2 * size, count + tl.zeros_like(squares), mask=exist)
    else:
        tl.store(position + size, tl.sqrt(squares / tl.maximum(count, 1)), mask=exist)


@triton.jit
def _mean_of_first_tile(
    x, tile, start, rows, per_piece, first, last, jump, outer, inner, dtype: tl.constexpr,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, OUTER: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """Return the mean of each channel in the first tile of a program; 0 where it isn't finite."""
    offsets, lanes, _ = first_step(tile, start, outer, inner, LENGTH, CHANNELS, 1, OUTER, INNER)
    piece, step = first // per_piece, first % per_piece
    left = tl.where(first < last, rows - rows_of(step, LENGTH, ROWS, OUTER), 0)
    exists = lanes & existing(0, piece, left, inner, LENGTH, 1, OUTER, INNER)
    at = step * jump + piece * INNER
    values = load_step(x + at + offsets, exists, dtype, OUTER, INNER)
    total = per_channel(tl.sum(values, axis=0), LENGTH, CHANNELS, INNER)
    count = count_values(0, 1, piece, left, inner, LENGTH, 1, OUTER, INNER)
    mean = total / tl.maximum(count, 1).to(dtype)
    # About infinity, infinite values would be NaN, and their mean.
    return tl.where(tl.abs(mean) < float("inf"), mean, 0)


@triton.jit(do_not_specialize=["columns", "splits"])
def grad_sums(
    dy, x, starts, owners, center, center_stride, scale, scale_stride, out, columns, outer, units,
    splits, UNIT: tl.constexpr, LENGTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Write each split's sums of ``dy`` and of ``dy * (x - center) * scale``.

    `owners` are for `center` and `scale`; `out` is ``[2, splits, blocks, C]``; `columns` is
    blocks * C.
    """
    dtype = out.dtype.element_ty
    inner = units * UNIT
    block, split, tile, start, rows, per_piece, first, last = share(
        starts, outer, inner, splits, LENGTH, CHANNELS, ROWS, OUTER, INNER
    )
    offsets, lanes, jump = first_step(
        tile, start, outer, inner, LENGTH, CHANNELS, ROWS, OUTER, INNER
    )
    channels, exist = channels_of(tile, outer, inner, LENGTH, CHANNELS)
    row = block if owners is None else tl.load(owners + block)
    mean = tl.load(center + row * center_stride + channels, mask=exist, other=0)
    means = per_lane(mean, LENGTH, CHANNELS, INNER)

    total = tl.zeros([OUTER, INNER], dtype)
    dot = tl.zeros([OUTER, INNER], dtype)
    for piece in range(first // per_piece, tl.cdiv(last, per_piece)):
        begin, _, end = steps_of(
            piece, per_piece, first, last, rows, inner, LENGTH, ROWS, OUTER, INNER
        )
        at = begin * jump + piece * INNER
        for step in range(begin, end):
            exists = lanes & existing(step, piece, rows, inner, LENGTH, ROWS, OUTER, INNER)
            gradient = load_step(dy + at + offsets, exists, dtype, OUTER, INNER)
            values = load_step(x + at + offsets, exists, dtype, OUTER, INNER)
            total += tl.sum(gradient, axis=0)
            dot += tl.sum(gradient * (values - means), axis=0)
            at += jump

    factor = tl.load(scale + row * scale_stride + channels, mask=exist, other=0)
    position = out + row_start(block, split, columns, outer, inner, LENGTH) + channels
    tl.store(position, per_channel(total, LENGTH, CHANNELS, INNER), mask=exist)
    size = splits.to(tl.int64) * columns
    tl.store(position + size, per_channel(dot, LENGTH, CHANNELS, INNER) * factor, mask=exist)


@triton.jit(do_not_specialize=["samples"])
def affine(
    x, y, blocks, owners, center, center_stride, scale, scale_stride, shift, shift_stride,
    dy, users, factor, factor_stride, samples, outer, units, UNIT: tl.constexpr,
    LENGTH: tl.constexpr, ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Write ``y = (x - center) * scale + shift``, plus ``dy * factor`` if there is a `dy`.

    `blocks` is the block of each sample ``[samples]``; `owners` are for `center`, `scale` and
    `shift`, `users` for `factor`.
    """
    dtype = center.dtype.element_ty
    inner = units * UNIT
    pieces = tl.cdiv(inner, INNER)
    heights = tl.cdiv(outer, OUTER)
    program = tl.program_id(0)
    sample = (program // pieces // heights).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o = program // pieces % heights * OUTER + tl.arange(0, OUTER)
    i = program % pieces * INNER + tl.arange(0, INNER)
    offsets = (sample[None, :, None] * outer + o[:, None, None]) * inner + i
    there = sample < samples
    exists = there[:, None] & (o < outer)[:, None, None] & (i < inner)

    block = tl.load(blocks + sample, mask=there, other=0)
    next_channel, is_next = None, None
    if LENGTH == 1:
        block, channels, exist = block[:, None], i[None, :], there[:, None] & (i < inner)
    else:
        block, channels, exist = block[None, :], o[:, None], there & (o < outer)[:, None]
    if LENGTH > 1:
        # INNER values of a run of memory, in which one channel ends and the next begins.
        first = channels * INNER
        channels = first // LENGTH
        next_channel = (first + (INNER - 1)) // LENGTH - channels
        is_next = (first[:, :, None] + i) >= ((channels + 1) * LENGTH)[:, :, None]
    owner = block if owners is None else tl.load(owners + block)
    values = tl.load(x + offsets, mask=exists, other=0).to(dtype)
    values -= _per_sample(
        center + owner * center_stride + channels, exist, next_channel, is_next, LENGTH
    )
    values *= _per_sample(
        scale + owner * scale_stride + channels, exist, next_channel, is_next, LENGTH
    )
    values += _per_sample(
        shift + owner * shift_stride + channels, exist, next_channel, is_next, LENGTH
    )
    if dy is not None:
        gradient = tl.load(dy + offsets, mask=exists, other=0).to(dtype)
        user = block if users is None else tl.load(users + block)
        factors = factor + user * factor_stride + channels
        values += gradient * _per_sample(factors, exist, next_channel, is_next, LENGTH)
    tl.store(y + offsets, values.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _per_sample(pointers, exist, next_channel, is_next, LENGTH: tl.constexpr):
    """Load ``[ROWS, INNER]`` or ``[OUTER, ROWS]`` numbers of rows, to broadcast with a tile."""
    row = tl.load(pointers, mask=exist, other=0)
    row = row[None, :, :] if LENGTH == 1 else row[:, :, None]
    if LENGTH > 1:
        following = tl.load(pointers + next_channel, mask=exist, other=0)[:, :, None]
        row = tl.where(is_next, following, row)
    return row
