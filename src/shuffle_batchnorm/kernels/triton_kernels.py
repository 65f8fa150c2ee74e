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

from .triton_merge import is_last, merge_moments, merge_sums, move_running, sum_gradients
from .triton_steps import (
    all_channels,
    channels_of,
    count_values,
    existing,
    first_step,
    load_step,
    own_channels,
    per_channel,
    per_lane,
    per_sample,
    row_start,
    rows_of,
    share,
    steps_of,
    tile_of,
)


@triton.jit(do_not_specialize=["weight", "columns", "splits", "members", "normalisers"])
def moments(
    x, starts, out, owners, order, weight, rows_out, arrivals, root: tl.float64, columns, members,
    normalisers, splits, outer, units, SPLIT: tl.constexpr, UNIT: tl.constexpr,
    LENGTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, OUTER: tl.constexpr,
    INNER: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Write mean and standard deviation; or a split's mean, sum of squares about it, and count.

    Sums the distances to the mean of the program's first tile, and their squares. As that tile is
    one of a few, it can't be far from the mean unless the values are, too: little cancels at worst,
    next to nothing where tiles resemble each other. That tile is read ahead of the loop, which then
    finds it in the cache.

    `out` is ``[2, blocks, C]``, or ``[3, splits, blocks, C]`` if SPLIT, for `merge_moments`;
    `columns` is blocks * C. If there are `arrivals`, the last program to end its part of a
    normaliser's channels merges all parts of these, MERGED at a time, to `rows_out`.
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
    if arrivals is not None:
        group, tiles, column = _merged(block, owners, tile, outer, inner, LENGTH, CHANNELS)
        if is_last(arrivals + group * tiles + tile, splits * members):
            merge_moments(
                out, order, weight, rows_out, root, group, normalisers, column, columns,
                all_channels(outer, inner, LENGTH), splits, members, MERGED, CHANNELS,
            )  # fmt: skip


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


@triton.jit(
    do_not_specialize=[
        "columns", "center_stride", "scale_at", "scale_stride", "splits", "members", "normalisers",
        "out_at",
    ]
)  # fmt: skip
def grad_sums(
    x, dy, starts, out, owners, order, center, scale, arrivals, count: tl.float64, columns,
    center_stride, scale_at, scale_stride, out_at, members, normalisers, splits, outer, units,
    UNIT: tl.constexpr, LENGTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Write each split's sums of ``dy`` and of ``dy * (x - center) * scale``.

    `owners` are for `center` and `scale`, whose first row is `scale_at` numbers from `scale`; `out`
    is ``[2, splits, blocks, C]``; `columns` is blocks * C. If there are `arrivals`, the last
    program to end its part of a normaliser's channels merges all parts of these, MERGED at a time,
    to rows that begin `out_at` numbers from `out`.
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

    factors = scale + scale_at + row * scale_stride + channels
    factor = tl.load(factors, mask=exist, other=0)
    position = out + row_start(block, split, columns, outer, inner, LENGTH) + channels
    tl.store(position, per_channel(total, LENGTH, CHANNELS, INNER), mask=exist)
    size = splits.to(tl.int64) * columns
    tl.store(position + size, per_channel(dot, LENGTH, CHANNELS, INNER) * factor, mask=exist)
    if arrivals is not None:
        group, tiles, column = _merged(block, owners, tile, outer, inner, LENGTH, CHANNELS)
        if is_last(arrivals + group * tiles + tile, splits * members):
            merge_sums(
                out, order, center, out + out_at, count, group, normalisers, column, columns,
                all_channels(outer, inner, LENGTH), splits, members, MERGED, CHANNELS,
            )  # fmt: skip


@triton.jit
def _merged(block, owners, tile, outer, inner, LENGTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Return what merges a program's part: normaliser, tiles of it, channels ``[1, CHANNELS]``."""
    group = block if owners is None else tl.load(owners + block)
    tiles = tl.cdiv(all_channels(outer, inner, LENGTH), CHANNELS)
    return group, tiles, tile * CHANNELS + tl.arange(0, CHANNELS)[None, :]


@triton.jit(
    do_not_specialize=[
        "running_mean", "running_var", "number", "steps", "counts", "rows", "samples"
    ]
)  # fmt: skip
def affine(
    x, y, blocks, owners, center, scale, shift, running_mean, running_var, number, steps, counts,
    step: tl.float64, change: tl.float64, center_stride, scale_at, scale_stride, shift_stride, rows,
    samples, outer, units, UNIT: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Write ``y = (x - center) * scale + shift``.

    `blocks` is the block of each sample ``[samples]``; `owners` are for `center`, `scale` and
    `shift`; the first row of scales is `scale_at` numbers from `scale`. Without `shift`, it is 0.
    The first program of each channel moves running statistics, if there are any: see
    `triton_merge.move_running`.
    """
    dtype = center.dtype.element_ty
    inner = units * UNIT
    offsets, exists, block, channels, exist, next_channel, is_next = tile_of(
        blocks, samples, outer, inner, LENGTH, ROWS, OUTER, INNER
    )
    owner = block if owners is None else tl.load(owners + block)
    values = tl.load(x + offsets, mask=exists, other=0).to(dtype)
    centers = center + owner * center_stride + channels
    values -= per_sample(centers, exist, next_channel, is_next, LENGTH)
    scales = scale + scale_at + owner * scale_stride + channels
    values *= per_sample(scales, exist, next_channel, is_next, LENGTH)
    if shift is not None:
        shifts = shift + owner * shift_stride + channels
        values += per_sample(shifts, exist, next_channel, is_next, LENGTH).to(dtype)
    tl.store(y + offsets, values.to(y.dtype.element_ty), mask=exists)
    if running_mean is not None:
        first, column, exist = own_channels(outer, inner, LENGTH, OUTER, INNER)
        if first:
            move_running(
                center, rows, center_stride, running_mean, running_var, number, steps, counts, step,
                change, column, exist,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=["weight_grad", "bias_grad", "sums_at", "rows", "samples"]
)  # fmt: skip
def grad_affine(
    x, y, dy, blocks, owners, users, center, scale, shift, factor, weight_grad, bias_grad, sums_at,
    center_at, center_stride, scale_at, scale_stride, shift_at, shift_stride, factor_at,
    factor_stride, rows, samples, outer, units, UNIT: tl.constexpr, LENGTH: tl.constexpr,
    ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Write ``y = dy * factor + (x - center) * scale + shift``.

    `users` are for `factor`; otherwise as in `affine`. The first program of each channel writes the
    gradients of weight and bias, if they are asked for, from rows that begin `sums_at` numbers from
    `scale`: see `triton_merge.sum_gradients`.
    """
    dtype = center.dtype.element_ty
    inner = units * UNIT
    offsets, exists, block, channels, exist, next_channel, is_next = tile_of(
        blocks, samples, outer, inner, LENGTH, ROWS, OUTER, INNER
    )
    owner = block if owners is None else tl.load(owners + block)
    user = block if users is None else tl.load(users + block)
    values = tl.load(x + offsets, mask=exists, other=0).to(dtype)
    gradient = tl.load(dy + offsets, mask=exists, other=0).to(dtype)
    centers = center + center_at + owner * center_stride + channels
    values -= per_sample(centers, exist, next_channel, is_next, LENGTH)
    slopes = scale + scale_at + owner * scale_stride + channels
    values *= per_sample(slopes, exist, next_channel, is_next, LENGTH)
    shifts = shift + shift_at + owner * shift_stride + channels
    values += per_sample(shifts, exist, next_channel, is_next, LENGTH)
    factors = factor + factor_at + user * factor_stride + channels
    values += gradient * per_sample(factors, exist, next_channel, is_next, LENGTH)
    tl.store(y + offsets, values.to(y.dtype.element_ty), mask=exists)
    if weight_grad is not None or bias_grad is not None:
        first, column, exist = own_channels(outer, inner, LENGTH, OUTER, INNER)
        if first:
            sums = scale + sums_at
            sum_gradients(sums, rows, scale_stride, weight_grad, bias_grad, column, exist)
