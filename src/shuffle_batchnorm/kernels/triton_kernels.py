"""Triton code of the heavy kernels; `triton_launch` launches it, `tiles` chooses the tiles.

Memory is dense, ``[N, outer, inner]``: ``[N, L, C]`` if CHANNELS_LAST, else ``[N, C, L]``. All
arithmetic is in the dtype of the rows. Arguments that mean the same everywhere:

- `outer`, `units`: ``inner = units * UNIT``, so that the compiler knows a divisor of `inner`;
- `starts`: the first sample of each block, and N, ``[blocks + 1]``;
- `splits`: the programs that share the sums of a block and a tile of channels;
- rows ``[blocks, C]``, or of groups, come with the distance from one to the next; `owners` or
  `users`, ``[blocks]``, are the row of each block, None if it is the one of the same number.
"""

import triton
import triton.language as tl

from .triton_merge import is_last, merge_moments, merge_sums, move_running, sum_gradients


@triton.jit(do_not_specialize=["weight", "columns", "splits", "members", "normalisers"])
def moments(
    x, starts, out, owners, order, weight, rows, arrivals, root: tl.float64, columns, members,
    normalisers, splits, outer, units, SPLIT: tl.constexpr, UNIT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    MERGED: tl.constexpr,
):  # fmt: skip
    """Write mean and standard deviation; or a split's mean, sum of squares about it, and count.

    Sums the distances to the mean of the program's first tile, and their squares. As that tile is
    one of a few, it can't be far from the mean unless the values are, too: little cancels at worst,
    next to nothing where tiles resemble each other.

    `out` is ``[2, blocks, C]``, or ``[3, splits, blocks, C]`` if SPLIT, for `merge_moments`;
    `columns` is blocks * C. If there are `arrivals`, the last program to end its part of a
    normaliser's channels merges all parts of these, MERGED at a time.
    """
    dtype = out.dtype.element_ty
    inner = units * UNIT
    block, split, tile, start, end, first, last = _share(
        starts, outer, inner, splits, CHANNELS_LAST, ROWS, OUTER, INNER
    )

    offsets, lanes, position, pitch, limit, jump, count = _step(
        first, tile, start, end, outer, inner, CHANNELS_LAST, ROWS, OUTER, INNER
    )
    center = tl.zeros([OUTER, INNER], dtype)
    for r in tl.static_range(ROWS):
        exists = lanes & (position + r * pitch < limit)
        center += tl.load(x + offsets + r * jump, mask=exists, other=0).to(dtype)
    center = _per_channel(center, CHANNELS_LAST) / tl.maximum(count, 1).to(dtype)
    # About infinity, infinite values would be NaN, and their mean.
    center = tl.where(tl.abs(center) < float("inf"), center, 0)

    total = tl.zeros([OUTER, INNER], dtype)
    squares = tl.zeros([OUTER, INNER], dtype)
    n = tl.full([], 0, tl.int64)
    for step in range(first, last):
        offsets, lanes, position, pitch, limit, jump, count = _step(
            step, tile, start, end, outer, inner, CHANNELS_LAST, ROWS, OUTER, INNER
        )
        for r in tl.static_range(ROWS):
            exists = lanes & (position + r * pitch < limit)
            values = tl.load(x + offsets + r * jump, mask=exists, other=0).to(dtype)
            distance = tl.where(exists, values - center, 0)
            total += distance
            squares += distance * distance
        n += count

    count = n.to(dtype)
    total = _per_channel(total, CHANNELS_LAST)
    squares = _per_channel(squares, CHANNELS_LAST)
    mean = total / tl.maximum(count, 1)
    # Squares beyond the dtype are infinite, as in the reference; inf - inf would be NaN.
    squares = tl.where(squares < float("inf"), squares - total * mean, squares)
    squares = tl.where(squares < 0, 0, squares)
    squares = tl.where(tl.abs(mean) < float("inf"), squares, mean - mean)  # NaN

    channels, exist = _channels(tile, outer, inner, CHANNELS_LAST, OUTER, INNER)
    position = out + _row_start(block, split, columns, outer, inner, CHANNELS_LAST) + channels
    size = splits.to(tl.int64) * columns
    tl.store(position, center + mean, mask=exist)
    if SPLIT:
        tl.store(position + size, squares, mask=exist)
        tl.store(position + 2 * size, count + tl.zeros_like(squares), mask=exist)
    else:
        tl.store(position + size, tl.sqrt(squares / tl.maximum(count, 1)), mask=exist)
    if arrivals is not None:
        LANES: tl.constexpr = INNER if CHANNELS_LAST else OUTER
        group, tiles, column = _merged(block, owners, tile, outer, inner, CHANNELS_LAST, LANES)
        if is_last(arrivals + group * tiles + tile, splits * members):
            merge_moments(
                out, order, weight, rows, root, group, normalisers, column, columns,
                inner if CHANNELS_LAST else outer, splits, members, MERGED, LANES,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "columns", "center_stride", "scale_at", "scale_stride", "splits", "members", "normalisers",
        "out_at",
    ]
)  # fmt: skip
def grad_sums(
    x, dy, starts, out, owners, order, center, scale, arrivals, count: tl.float64, columns,
    center_stride, scale_at, scale_stride, out_at, members, normalisers, splits, outer, units,
    UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, OUTER: tl.constexpr,
    INNER: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Write each split's sums of ``dy`` and of ``dy * (x - center) * scale``.

    `owners` are for `center` and `scale`, whose first row is `scale_at` numbers from `scale`; `out`
    is ``[2, splits, blocks, C]``; `columns` is blocks * C. If there are `arrivals`, the last
    program to end its part of a normaliser's channels merges all parts of these, MERGED at a time,
    to rows that begin `out_at` numbers from `out`.
    """
    dtype = out.dtype.element_ty
    inner = units * UNIT
    block, split, tile, start, end, first, last = _share(
        starts, outer, inner, splits, CHANNELS_LAST, ROWS, OUTER, INNER
    )
    channels, exist = _channels(tile, outer, inner, CHANNELS_LAST, OUTER, INNER)
    row = block if owners is None else tl.load(owners + block)
    mean = tl.load(center + row * center_stride + channels, mask=exist, other=0)

    total = tl.zeros([OUTER, INNER], dtype)
    dot = tl.zeros([OUTER, INNER], dtype)
    for step in range(first, last):
        offsets, lanes, position, pitch, limit, jump, _ = _step(
            step, tile, start, end, outer, inner, CHANNELS_LAST, ROWS, OUTER, INNER
        )
        for r in tl.static_range(ROWS):
            exists = lanes & (position + r * pitch < limit)
            gradient = tl.load(dy + offsets + r * jump, mask=exists, other=0).to(dtype)
            values = tl.load(x + offsets + r * jump, mask=exists, other=0).to(dtype)
            total += gradient
            dot += gradient * (values - mean)

    factors = scale + scale_at + row * scale_stride + channels
    factor = tl.load(factors, mask=exist, other=0)
    position = out + _row_start(block, split, columns, outer, inner, CHANNELS_LAST) + channels
    tl.store(position, _per_channel(total, CHANNELS_LAST), mask=exist)
    size = splits.to(tl.int64) * columns
    tl.store(position + size, _per_channel(dot, CHANNELS_LAST) * factor, mask=exist)
    if arrivals is not None:
        LANES: tl.constexpr = INNER if CHANNELS_LAST else OUTER
        group, tiles, column = _merged(block, owners, tile, outer, inner, CHANNELS_LAST, LANES)
        if is_last(arrivals + group * tiles + tile, splits * members):
            merge_sums(
                out, order, center, out + out_at, count, group, normalisers, column, columns,
                inner if CHANNELS_LAST else outer, splits, members, MERGED, LANES,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "shift", "running_mean", "running_var", "number", "steps", "counts", "center_stride",
        "scale_at", "scale_stride", "shift_stride", "rows", "samples",
    ]
)  # fmt: skip
def affine(
    x, y, blocks, owners, center, scale, shift, running_mean, running_var, number, steps, counts,
    step: tl.float64, change: tl.float64, center_stride, scale_at, scale_stride, shift_stride, rows,
    samples, outer, units, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr,
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
    offsets, exists, block, channels, exist = _tile(
        blocks, samples, outer, inner, CHANNELS_LAST, ROWS, OUTER, INNER
    )
    owner = block if owners is None else tl.load(owners + block)
    values = tl.load(x + offsets, mask=exists, other=0).to(dtype)
    values -= _per_sample(center + owner * center_stride + channels, exist, CHANNELS_LAST)
    scale += scale_at
    values *= _per_sample(scale + owner * scale_stride + channels, exist, CHANNELS_LAST)
    if shift is not None:
        values += _per_sample(shift + owner * shift_stride + channels, exist, CHANNELS_LAST).to(
            dtype
        )
    tl.store(y + offsets, values.to(y.dtype.element_ty), mask=exists)
    if running_mean is not None:
        first, column, exist = _own_channels(outer, inner, CHANNELS_LAST, OUTER, INNER)
        if first:
            move_running(
                center, rows, center_stride, running_mean, running_var, number, steps, counts, step,
                change, column, exist,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "weight_grad", "bias_grad", "sums_at", "center_at", "center_stride", "scale_at",
        "scale_stride", "shift_at", "shift_stride", "factor_at", "factor_stride", "rows", "samples",
    ]
)  # fmt: skip
def grad_affine(
    x, y, dy, blocks, owners, users, center, scale, shift, factor, weight_grad, bias_grad, sums_at,
    center_at, center_stride, scale_at, scale_stride, shift_at, shift_stride, factor_at,
    factor_stride, rows, samples, outer, units, UNIT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Write ``y = dy * factor + (x - center) * scale + shift``.

    `users` are for `factor`; otherwise as in `affine`. The first program of each channel writes the
    gradients of weight and bias, if they are asked for, from rows that begin `sums_at` numbers from
    `scale`: see `triton_merge.sum_gradients`.
    """
    dtype = center.dtype.element_ty
    inner = units * UNIT
    offsets, exists, block, channels, exist = _tile(
        blocks, samples, outer, inner, CHANNELS_LAST, ROWS, OUTER, INNER
    )
    owner = block if owners is None else tl.load(owners + block)
    user = block if users is None else tl.load(users + block)
    values = tl.load(x + offsets, mask=exists, other=0).to(dtype)
    gradient = tl.load(dy + offsets, mask=exists, other=0).to(dtype)
    center += center_at
    values -= _per_sample(center + owner * center_stride + channels, exist, CHANNELS_LAST)
    slopes = scale + scale_at + owner * scale_stride + channels
    values *= _per_sample(slopes, exist, CHANNELS_LAST)
    shifts = shift + shift_at + owner * shift_stride + channels
    values += _per_sample(shifts, exist, CHANNELS_LAST)
    factors = factor + factor_at + user * factor_stride + channels
    values += gradient * _per_sample(factors, exist, CHANNELS_LAST)
    tl.store(y + offsets, values.to(y.dtype.element_ty), mask=exists)
    if weight_grad is not None or bias_grad is not None:
        first, column, exist = _own_channels(outer, inner, CHANNELS_LAST, OUTER, INNER)
        if first:
            sum_gradients(
                scale + sums_at, rows, scale_stride, weight_grad, bias_grad, column, exist
            )


@triton.jit
def _tile(
    blocks, samples, outer, inner,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Return this program's tile of ``[N, outer, inner]``, to be mapped value by value.

    Returns:
        offsets, exists: of its values, ``[OUTER, ROWS, INNER]``.
        block, channels, exist: of its rows' numbers, ``[ROWS, INNER]`` or ``[OUTER, ROWS]``.
    """
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
    if CHANNELS_LAST:
        block, channels, exist = block[:, None], i[None, :], there[:, None] & (i < inner)
    else:
        block, channels, exist = block[None, :], o[:, None], there & (o < outer)[:, None]
    return offsets, exists, block, channels, exist


@triton.jit
def _own_channels(
    outer, inner, CHANNELS_LAST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr
):
    """Return whether a program is the first of its channels, which these are, and which exist."""
    pieces = tl.cdiv(inner, INNER)
    heights = tl.cdiv(outer, OUTER)
    program = tl.program_id(0)
    if CHANNELS_LAST:
        first = program < pieces
        column = program % pieces * INNER + tl.arange(0, INNER)
        exist = column < inner
    else:
        first = (program % pieces == 0) & (program // pieces < heights)
        column = program // pieces % heights * OUTER + tl.arange(0, OUTER)
        exist = column < outer
    return first, column, exist


@triton.jit
def _per_sample(pointers, exist, CHANNELS_LAST: tl.constexpr):
    """Load ``[ROWS, INNER]`` or ``[OUTER, ROWS]`` numbers of rows, to broadcast with a tile."""
    row = tl.load(pointers, mask=exist, other=0)
    return row[None, :, :] if CHANNELS_LAST else row[:, :, None]


@triton.jit
def _share(
    starts, outer, inner, splits,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Return this program's block, split and tile of channels, its samples and its steps."""
    tiles = tl.cdiv(inner, INNER) if CHANNELS_LAST else tl.cdiv(outer, OUTER)
    program = tl.program_id(0)
    tile = program % tiles
    split = program // tiles % splits
    block = (program // tiles // splits).to(tl.int64)
    start, end = tl.load(starts + block), tl.load(starts + block + 1)
    if CHANNELS_LAST:
        steps = tl.cdiv((end - start) * outer, ROWS * OUTER)
    else:
        steps = tl.cdiv(end - start, ROWS) * tl.cdiv(inner, INNER)
    first = split * steps // splits
    last = (split + 1) * steps // splits
    return block, split, tile, start, end, first.to(tl.int32), last.to(tl.int32)


@triton.jit
def _step(
    step, tile, start, end, outer, inner,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Return the ROWS tiles ``[OUTER, INNER]`` of a step.

    Returns:
        offsets: of the first tile; the next ones are `jump` further each.
        lanes: which of their elements exist, but for those beyond the block:
        position, pitch, limit: of tile r those exist where ``position + r * pitch < limit``.
        jump: see `offsets`.
        count: the values per channel.
    """
    o = tl.arange(0, OUTER)[:, None]
    i = tl.arange(0, INNER)[None, :]
    if CHANNELS_LAST:
        # A run of the block's memory: where one sample ends and the next begins doesn't matter.
        first = start * outer + tl.cast(step, tl.int64) * (ROWS * OUTER)
        i += tile * INNER
        position = first + o
        pitch = OUTER
        limit = end * outer
        offsets = position * inner + i
        lanes = i < inner
        count = tl.minimum(limit - first, ROWS * OUTER)
    else:
        # A piece of the planes of some samples.
        pieces = tl.cdiv(inner, INNER)
        position = start + tl.cast(step // pieces, tl.int64) * ROWS
        column = step % pieces * INNER
        pitch = 1
        limit = end
        o += tile * OUTER
        i += column
        offsets = (position * outer + o) * inner + i
        lanes = (o < outer) & (i < inner)
        count = tl.minimum(limit - position, ROWS) * tl.minimum(inner - column, INNER)
    # In int64: a sample may have more than 2**31 / ROWS elements.
    jump = tl.cast(OUTER if CHANNELS_LAST else outer, tl.int64) * inner
    return offsets, lanes, position, pitch, limit, jump, count


@triton.jit
def _channels(
    tile, outer, inner, CHANNELS_LAST: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr
):  # fmt: skip
    """Return the channels of a tile, ``[1, INNER]`` or ``[OUTER, 1]``, and which of them exist."""
    if CHANNELS_LAST:
        channels = tile * INNER + tl.arange(0, INNER)[None, :]
        exist = channels < inner
    else:
        channels = tile * OUTER + tl.arange(0, OUTER)[:, None]
        exist = channels < outer
    return channels, exist


@triton.jit
def _per_channel(lanes, CHANNELS_LAST: tl.constexpr):
    """Sum ``[OUTER, INNER]`` over the axis that isn't channels, and keep the axis."""
    return tl.sum(lanes, axis=0 if CHANNELS_LAST else 1, keep_dims=True)


@triton.jit
def _merged(
    block, owners, tile, outer, inner, CHANNELS_LAST: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Return what merges a program's part: normaliser, tiles of it, channels ``[1, LANES]``."""
    group = block if owners is None else tl.load(owners + block)
    tiles = tl.cdiv(inner if CHANNELS_LAST else outer, LANES)
    return group, tiles, tile * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _row_start(block, split, columns, outer, inner, CHANNELS_LAST: tl.constexpr):
    """Return where a row begins in ``[splits, blocks, C]``."""
    return split.to(tl.int64) * columns + block * (inner if CHANNELS_LAST else outer)
