"""Triton code for the rows that ranks exchange, before and after they do.

Forward a row is ``[count, mean, std]``, ``2 * C + 1`` numbers, backward ``[sum w dy, sum w dy
xhat]``, ``2 * C``. Each program writes one row, or COLUMNS channels of it; `order` are the
`members` of the first row, blocks or other rows, then of the second, and so on.
"""

import triton
import triton.language as tl

from .triton_merge import add, merge, target_of, write_moments


@triton.jit(do_not_specialize=["columns", "channels", "splits", "members"])
def pack_moments(
    parts, order, out, columns, channels, splits, members,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write rows to be sent, ``[R, 2 * C + 1]``, from parts as `moments` leaves them."""
    dtype = out.dtype.element_ty
    target, column, exist = target_of(channels, COLUMNS)
    size = splits.to(tl.int64) * columns
    count, mean, deviation = merge(
        parts, parts + size, parts + 2 * size, order, target, column, columns, channels, channels,
        splits, members, False, ROWS, COLUMNS,
    )  # fmt: skip
    out += target * (2 * channels + 1)
    tl.store(out + column * 0, count.to(dtype), mask=column == 0)
    tl.store(out + 1 + column, mean.to(dtype), mask=exist)
    tl.store(out + 1 + channels + column, deviation.to(dtype), mask=exist)


@triton.jit(do_not_specialize=["weight", "valid", "channels", "members", "blocks"])
def mix_moments(
    rows, order, starts, weight, out, valid, root: tl.float64, channels, members, blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge rows to those of the normaliser of each block; then, in `swap`, of the blocks' own.

    `out` is once or twice ``[4, blocks, C]``, as `finish_moments` has it, and counts ``[blocks]``:
    0 for a block without samples, which nothing normalises. `valid` becomes 0 if a normaliser that
    has to normalise something has less than 2 values per channel, or was rejected.
    """
    dtype = out.dtype.element_ty
    target, column, exist = target_of(channels, COLUMNS)
    count, mean, deviation = merge(
        rows + 1, rows + 1 + channels, rows, order, target, column, 0, 2 * channels + 1, channels,
        1, members, True, ROWS, COLUMNS,
    )  # fmt: skip
    block = target % blocks
    plane = blocks.to(tl.int64) * channels
    out += target // blocks * (4 * plane + blocks)
    write_moments(out + block * channels, plane, mean, deviation, root, weight, column, exist)
    is_filled = tl.load(starts + block + 1) > tl.load(starts + block)
    count = tl.where(is_filled, count, 0)
    tl.store(out + 4 * plane + block + column * 0, count.to(dtype), mask=column == 0)
    is_wrong = is_filled & (count < 2) & (target < blocks)
    tl.store(valid + column * 0, tl.zeros_like(column), mask=is_wrong & (column == 0))


@triton.jit(do_not_specialize=["weight", "columns", "channels", "splits", "members", "out_at"])
def pack_sums(
    parts, order, weight, sums, out, columns, channels, splits, members, out_at,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write rows to be sent, ``[R, 2 * C]``, from parts as `grad_sums` leaves them.

    If there are `sums`, what these are before they are weighted goes there, ``[2, blocks, C]`` from
    number `out_at` on.
    """
    target, column, exist = target_of(channels, COLUMNS)
    total, dot = add(
        parts, splits.to(tl.int64) * columns, order, target, column, columns, channels, channels,
        splits, members, ROWS, COLUMNS,
    )  # fmt: skip
    if sums is not None:
        position = sums + out_at + target * channels + column
        is_own = exist & (target * channels < columns)
        tl.store(position, total, mask=is_own)
        tl.store(position + columns, dot, mask=is_own)
    if weight is not None:
        factor = tl.load(weight + column, mask=exist, other=0).to(total.dtype)
        total *= factor
        dot *= factor
    out += target * 2 * channels
    tl.store(out + column, total, mask=exist)
    tl.store(out + channels + column, dot, mask=exist)


@triton.jit(do_not_specialize=["channels", "members", "blocks", "source_at", "out_at"])
def mix_sums(
    rows, order, normalisers, out, channels, members, blocks, source_at, out_at,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add rows to the sums over all users of what each block joins; write dx's coefficients.

    These are ``b = -rstd dot rstd / count`` and ``c = -rstd total / count``, ``[2, blocks, C]``
    from number `out_at` on, with rows of `normalisers`, as `mix_moments` has left them, from number
    `source_at` on.
    """
    target, column, exist = target_of(channels, COLUMNS)
    total, dot = add(
        rows, channels, order, target, column, 0, 2 * channels, channels, 1, members, ROWS, COLUMNS
    )
    plane = blocks.to(tl.int64) * channels
    position = target * channels + column
    normalisers += source_at
    count = tl.load(normalisers + 4 * plane + target)
    rstd = tl.load(normalisers + 2 * plane + position, mask=exist, other=0)
    step = rstd / -tl.maximum(count, 1)
    tl.store(out + out_at + position, step * dot * rstd, mask=exist)
    tl.store(out + out_at + plane + position, step * total, mask=exist)
