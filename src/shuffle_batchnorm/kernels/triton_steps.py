"""Triton code of what a program sums or maps: its tiles, steps and lanes, and their channels.

`triton_kernels` says what the arguments mean. `rows` are the positions of a block, or its samples
if LENGTH is 0; `step` is one of those that go over all rows, for a `piece` of the planes.
"""

import triton
import triton.language as tl


@triton.jit
def share(
    starts, outer, inner, splits, LENGTH: tl.constexpr, CHANNELS: tl.constexpr,
    ROWS: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Return what this program sums.

    Returns:
        block, split, tile: of channels.
        start, rows: the block's first sample; its positions, or samples if LENGTH is 0.
        per_piece: steps that go over all rows; there are as many for each piece of the planes.
        first, last: those of the steps that are this program's.
    """
    tiles = tl.cdiv(all_channels(outer, inner, LENGTH), CHANNELS)
    program = tl.program_id(0)
    tile = program % tiles
    split = program // tiles % splits
    block = (program // tiles // splits).to(tl.int64)
    start = tl.load(starts + block)
    rows = tl.load(starts + block + 1) - start
    if LENGTH:
        rows *= outer
    per_piece = tl.cdiv(rows, rows_of(1, LENGTH, ROWS, OUTER)).to(tl.int32)
    steps = per_piece if LENGTH else per_piece * tl.cdiv(inner, INNER)
    each, more = steps // splits, steps % splits
    first = split * each + tl.minimum(split, more)
    last = first + each + (split < more).to(tl.int32)
    return block, split, tile, start, rows, tl.maximum(per_piece, 1), first, last


@triton.jit
def first_step(
    tile, start, outer, inner, LENGTH: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Return the ROWS tiles of a block's first step, one below the other.

    In two dimensions, as the compiler spreads the last one over threads, and then the first, until
    each has one access; so the tiles are in the registers of a thread, which adds them up.

    Returns:
        offsets: of its values, in int64, ``[ROWS * OUTER, INNER]``.
        lanes: which are of channels of the tile, ``[1 or ROWS * OUTER, INNER]``.
        jump: the distance to the next step.
    """
    row = tl.arange(0, ROWS * OUTER)[:, None]
    i = tl.arange(0, INNER)[None, :]
    if LENGTH:
        # Rows of memory: where one sample ends and the next begins doesn't matter.
        lanes = i < CHANNELS * LENGTH
        i += tile * (CHANNELS * LENGTH)
        lanes &= i < inner
        offsets = (start * outer + row) * inner + i
        jump = tl.cast(inner, tl.int64)
    else:
        o = tile * OUTER + row % OUTER
        lanes = (o < outer) & (i < inner)
        offsets = ((start + row // OUTER) * outer + o) * inner + i
        jump = tl.cast(outer, tl.int64) * inner
    return offsets, lanes, jump * rows_of(1, LENGTH, ROWS, OUTER)


@triton.jit
def load_step(x, mask, dtype: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr):
    """Load a step, as ``[ROWS, OUTER, INNER]``."""
    values = tl.load(x, mask=mask, other=0).to(dtype)
    return tl.reshape(values, [x.shape[0] // OUTER, OUTER, INNER])


@triton.jit
def steps_of(
    piece, per_piece, first, last, rows, inner, LENGTH: tl.constexpr, ROWS: tl.constexpr,
    OUTER: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Return those of the steps from `first` to `last` that go over a piece of the planes.

    Three numbers: steps from the first to the second are whole; to the third, they aren't.
    """
    begin = tl.maximum(first - piece * per_piece, 0)
    end = tl.maximum(tl.minimum(last - piece * per_piece, per_piece), begin)
    whole = (rows // rows_of(1, LENGTH, ROWS, OUTER)).to(tl.int32)
    if LENGTH == 0:
        whole = tl.where(piece * INNER <= inner - INNER, whole, 0)
    return begin, tl.maximum(tl.minimum(whole, end), begin), end


@triton.jit
def existing(
    step, piece, rows, inner, LENGTH: tl.constexpr, ROWS: tl.constexpr, OUTER: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """Return which lanes of a step are neither beyond the block nor beyond the planes."""
    left = tl.minimum(rows - rows_of(step, LENGTH, ROWS, OUTER), rows_of(1, LENGTH, ROWS, OUTER))
    row = tl.arange(0, ROWS * OUTER)[:, None]
    row = row if LENGTH else row // OUTER
    exists = row < left.to(tl.int32)
    if LENGTH == 0:
        exists &= tl.arange(0, INNER)[None, :] < inner - piece * INNER
    return exists


@triton.jit
def count_values(
    begin, end, piece, rows, inner, LENGTH: tl.constexpr, ROWS: tl.constexpr, OUTER: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """Return how many values of a channel there are in steps over a piece of the planes."""
    before = rows_of(begin, LENGTH, ROWS, OUTER)
    count = tl.minimum(rows_of(end, LENGTH, ROWS, OUTER), rows) - before
    width = LENGTH if LENGTH else tl.minimum(inner - piece * INNER, INNER)  # noqa: FURB110
    return tl.maximum(count, 0) * width


@triton.jit
def rows_of(steps, LENGTH: tl.constexpr, ROWS: tl.constexpr, OUTER: tl.constexpr):
    """Return the rows of so many steps."""
    return tl.cast(steps, tl.int64) * (ROWS * OUTER if LENGTH else ROWS)


@triton.jit
def all_channels(outer, inner, LENGTH: tl.constexpr):
    """Return C."""
    return inner // LENGTH if LENGTH else outer


@triton.jit
def channels_of(tile, outer, inner, LENGTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the channels of a tile, shaped as `per_channel` does, and which of them exist."""
    channels = tile * CHANNELS + tl.arange(0, CHANNELS)
    channels = channels[None, :] if LENGTH == 1 else channels[:, None]
    return channels, channels < all_channels(outer, inner, LENGTH)


@triton.jit
def per_channel(lanes, LENGTH: tl.constexpr, CHANNELS: tl.constexpr, INNER: tl.constexpr):
    """Sum ``[OUTER, INNER]`` over all but channels: ``[1, CHANNELS]``, else ``[CHANNELS, 1]``."""
    sums = tl.sum(lanes, axis=0 if LENGTH else 1, keep_dims=True)
    if LENGTH > 1:
        width: tl.constexpr = INNER // CHANNELS
        i = tl.arange(0, width)[None, :]
        lane = tl.arange(0, CHANNELS)[:, None] * LENGTH + i
        sums = tl.gather(tl.reshape(sums, [INNER]), tl.reshape(lane, [INNER]), 0)
        sums = tl.where(i < LENGTH, tl.reshape(sums, [CHANNELS, width]), 0)
        sums = tl.sum(sums, axis=1, keep_dims=True)
    return sums


@triton.jit
def per_lane(channels, LENGTH: tl.constexpr, CHANNELS: tl.constexpr, INNER: tl.constexpr):
    """Spread numbers of channels, to broadcast with ``[ROWS, OUTER, INNER]``."""
    if LENGTH > 1:
        channel = tl.minimum(tl.arange(0, INNER) // LENGTH, CHANNELS - 1)
        channels = tl.gather(tl.reshape(channels, [CHANNELS]), channel, 0)[None, :]
    return channels[None, :, :]


@triton.jit
def row_start(block, split, columns, outer, inner, LENGTH: tl.constexpr):
    """Return where a row begins in ``[splits, blocks, C]``."""
    return split.to(tl.int64) * columns + block * all_channels(outer, inner, LENGTH)


@triton.jit
def tile_of(
    blocks, samples, outer, inner, LENGTH: tl.constexpr, ROWS: tl.constexpr, OUTER: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """Return this program's tile of ``[N, outer, inner]``, to be mapped value by value.

    Returns:
        offsets, exists: of its values, ``[OUTER, ROWS, INNER]``.
        block, channels, exist: of its rows' numbers, ``[ROWS, INNER]`` or ``[OUTER, ROWS]``.
        next_channel, is_next: for a run of memory, the distance to the channel in which it ends,
            and which values are of that.
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
    next_channel, is_next = block, exists  # of no use, but Triton 3.6 returns no None
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
    return offsets, exists, block, channels, exist, next_channel, is_next


@triton.jit
def own_channels(
    outer, inner, LENGTH: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr
):  # fmt: skip
    """Return whether a program is the first of some channels, which these are, and which exist."""
    pieces = tl.cdiv(inner, INNER)
    heights = tl.cdiv(outer, OUTER)
    program = tl.program_id(0)
    first = (program % pieces == 0) & (program // pieces < heights)
    column = program // pieces % heights * OUTER + tl.arange(0, OUTER)
    exist = column < outer
    if LENGTH == 1:
        first = program < pieces
        column = program % pieces * INNER + tl.arange(0, INNER)
        exist = column < inner
    if LENGTH > 1:
        # Those that begin in the runs of this program, of INNER values each: at most one in each.
        run = column * INNER
        column = (run + (LENGTH - 1)) // LENGTH
        exist &= column * LENGTH < run + INNER
    return first, column, exist


@triton.jit
def per_sample(pointers, exist, next_channel, is_next, LENGTH: tl.constexpr):
    """Load ``[ROWS, INNER]`` or ``[OUTER, ROWS]`` numbers of rows, to broadcast with a tile."""
    row = tl.load(pointers, mask=exist, other=0)
    row = row[None, :, :] if LENGTH == 1 else row[:, :, None]
    if LENGTH > 1:
        following = tl.load(pointers + next_channel, mask=exist, other=0)[:, :, None]
        row = tl.where(is_next, following, row)
    return row
