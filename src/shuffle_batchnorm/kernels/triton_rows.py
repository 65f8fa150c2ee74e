"""Triton code between the heavy kernels: what sums leave is merged, and rows become other rows.

Rows are ``[R, C]``, and come with the distance from one to the next. A program takes COLUMNS
channels and goes over all rows that it needs, ROWS at a time.
"""

import triton
import triton.language as tl

from .triton_merge import inverse_deviation, move


@triton.jit(do_not_specialize=["columns", "channels", "splits", "members"])
def merge_moments(
    parts, order, out, columns, channels, splits, members,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge the moments of the splits of a group's blocks, all at once and always in one order.

    In float64, by Chan's formula. `parts` are as `moments` writes them, ``[3, splits, blocks, C]``;
    `order` are the blocks of the first group, `members` of them, then of the second, and so on;
    `out` is ``[2, groups, C]``.
    """
    dtype = out.dtype.element_ty
    tiles = tl.cdiv(channels, COLUMNS)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    there = row < splits * members
    block = tl.load(order + group * members + row % members, mask=there, other=0)
    offsets = (row // members).to(tl.int64) * columns + block * channels + column
    exists = there & (column < channels)
    size = splits.to(tl.int64) * columns
    mean = tl.load(parts + offsets, mask=exists, other=0).to(tl.float64)
    squares = tl.load(parts + size + offsets, mask=exists, other=0).to(tl.float64)
    count = tl.load(parts + 2 * size + offsets, mask=exists, other=0).to(tl.float64)

    _, merged, std = _merge(count, mean, squares / tl.maximum(count, 1))
    position = group * channels + column
    groups = tl.num_programs(0) // tiles
    tl.store(out + position, merged.to(dtype), mask=column < channels)
    tl.store(out + groups.to(tl.int64) * channels + position, std.to(dtype), mask=column < channels)


@triton.jit(do_not_specialize=["columns", "channels", "splits", "members", "groups"])
def merge_sums(
    parts, order, out, columns, channels, splits, members, groups,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the sums of the splits of a group's blocks, always in one order.

    `parts` are as `grad_sums` writes them, ``[2, splits, blocks, C]``; `order` are the blocks of
    the first group, `members` of them, then of the second, and so on; `out` is ``[2, groups, C]``.
    """
    dtype = out.dtype.element_ty
    tiles = tl.cdiv(channels, COLUMNS)
    program = tl.program_id(0)
    group = (program // tiles % groups).to(tl.int64)
    which = (program // tiles // groups).to(tl.int64)
    column = program % tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exist = column < channels
    parts += which * splits * columns
    total = tl.zeros([ROWS, COLUMNS], dtype)
    for first in range(0, splits * members, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        there = row < splits * members
        block = tl.load(order + group * members + row % members, mask=there, other=0)
        offsets = (row // members).to(tl.int64) * columns + block * channels + column
        total += tl.load(parts + offsets, mask=there & exist, other=0)
    position = out + (which * groups + group) * channels + column
    tl.store(position, tl.sum(total, axis=0, keep_dims=True), mask=exist)


@triton.jit(do_not_specialize=["members", "channels"])
def merge_rows(rows, out, members, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Merge rows ``[R, members, 2 * channels + 1]`` to ``[R, 1, 2 * channels + 1]``, all at once.

    A row is count, means, standard deviations. In float64, as in `merge_moments`.
    """
    dtype = out.dtype.element_ty
    tiles = tl.cdiv(channels, COLUMNS)
    which = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exist = column < channels
    row = tl.arange(0, ROWS)[:, None]
    there = row < members
    numbers = 2 * channels + 1
    position = rows + (which * members + row) * numbers
    count = tl.load(position, mask=there, other=0).to(tl.float64)
    mean = tl.load(position + 1 + column, mask=there & exist, other=0).to(tl.float64)
    std = tl.load(position + 1 + channels + column, mask=there & exist, other=0).to(tl.float64)

    total, merged, std = _merge(count, mean, std * std)
    out += which * numbers
    tl.store(out + column * 0, total.to(dtype), mask=column == 0)
    tl.store(out + 1 + column, merged.to(dtype), mask=exist)
    tl.store(out + 1 + channels + column, std.to(dtype), mask=exist)


@triton.jit
def _merge(count, mean, variance):
    """Merge rows of moments by Chan's formula: return count, mean and standard deviation."""
    total = tl.sum(count, axis=0, keep_dims=True)
    share = count / tl.maximum(total, 1)  # 1 also where a row was rejected
    merged = tl.sum(share * mean, axis=0, keep_dims=True)
    distance = mean - merged
    std = tl.sqrt(tl.sum(share * (variance + distance * distance), axis=0, keep_dims=True))
    return total, merged, std


@triton.jit(do_not_specialize=["count", "channels", "rows"])
def normaliser_rows(
    mean, mean_stride, std, std_stride, counts, counts_stride, count, weight, running_mean,
    running_var, out, rows, channels, root, step, IN_MEMORY: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write ``rstd = 1 / sqrt(std**2 + root**2)`` and ``rstd * weight``; move running statistics.

    `out` is ``[2, rows, channels]``. The running ones, if there are any, move a share `step`
    towards the averages of means and of unbiased variances, of `counts` values, or `count` in all;
    `step` is a number, or IN_MEMORY where one is. Without a `weight`, it is 1.
    """
    dtype = out.dtype.element_ty
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exist = column < channels
    means = tl.zeros([ROWS, COLUMNS], dtype)
    variances = tl.zeros([ROWS, COLUMNS], dtype)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        exists = (row < rows) & exist
        deviation = _load(std, std_stride, row, column, exists)
        rstd = inverse_deviation(deviation, root)
        position = row * channels + column
        tl.store(out + position, rstd, mask=exists)
        if weight is not None:
            rstd *= tl.load(weight + column, mask=exist, other=0).to(dtype)
        tl.store(out + rows * channels + position, rstd, mask=exists)
        if running_mean is not None:
            means += _load(mean, mean_stride, row, column, exists)
            values = _values(counts, counts_stride, count, row, rows, dtype)
            less = values - 1
            variances += deviation * deviation * (values / tl.where(less < 1, 1, less))
    if running_mean is not None:
        if IN_MEMORY:
            step = tl.load(step)
        average = tl.sum(means, axis=0, keep_dims=True) / rows
        move(running_mean + column, average, step, exist)
        average = tl.sum(variances, axis=0, keep_dims=True) / rows
        move(running_var + column, average, step, exist)


@triton.jit
def _load(rows, stride, row, column, exists):
    """Load a tile of rows."""
    return tl.load(rows + row * stride + column, mask=exists, other=0)


@triton.jit
def _values(counts, counts_stride, count, row, rows, dtype: tl.constexpr):
    """Return the values per channel of rows, ``[ROWS, 1]``, or of all."""
    if counts is not None:
        count = tl.load(counts + row * counts_stride, mask=row < rows, other=1)
    return count.to(dtype)


@triton.jit(do_not_specialize=["rows", "channels"])
def param_grads(
    total, total_stride, dot, dot_stride, weight, sums, weighted, rows, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the sums of `dot` and `total` over all rows, and both times the weight.

    `sums` is ``[2, channels]``, `weighted` ``[rows, 2, channels]``, total before dot.
    """
    dtype = sums.dtype.element_ty
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exist = column < channels
    weights = tl.zeros([ROWS, COLUMNS], dtype)
    biases = tl.zeros([ROWS, COLUMNS], dtype)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        exists = (row < rows) & exist
        totals = _load(total, total_stride, row, column, exists)
        dots = _load(dot, dot_stride, row, column, exists)
        weights += dots
        biases += totals
        if weight is not None:
            factor = tl.load(weight + column, mask=exist, other=0).to(dtype)
            totals *= factor
            dots *= factor
        position = weighted + 2 * row * channels + column
        tl.store(position, totals, mask=exists)
        tl.store(position + channels, dots, mask=exists)
    _store_sums(sums, weights, biases, channels, column, exist)


@triton.jit(do_not_specialize=["count", "rows", "channels"])
def dx_coefficients(
    total, total_stride, dot, dot_stride, rstd, rstd_stride, factor, factor_stride,
    counts, counts_stride, count, sums, out, rows, channels, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write each row's coefficients, and the sums of `dot` and `total` over all rows.

    These are ``-factor dot rstd / n`` and ``-factor total / n``, n the row's number in `counts`, or
    `count`.
    `out` is ``[2, rows, channels]``, `sums`, if there are any, ``[2, channels]``.
    """
    dtype = out.dtype.element_ty
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exist = column < channels
    weights = tl.zeros([ROWS, COLUMNS], dtype)
    biases = tl.zeros([ROWS, COLUMNS], dtype)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        exists = (row < rows) & exist
        totals = _load(total, total_stride, row, column, exists)
        dots = _load(dot, dot_stride, row, column, exists)
        inverse = _load(rstd, rstd_stride, row, column, exists)
        values = _values(counts, counts_stride, count, row, rows, dtype)
        values = tl.where(values < 1, 1, values)
        step = _load(factor, factor_stride, row, column, exists) / -values
        position = row * channels + column
        tl.store(out + position, step * dots * inverse, mask=exists)
        tl.store(out + rows * channels + position, step * totals, mask=exists)
        weights += dots
        biases += totals
    if sums is not None:
        _store_sums(sums, weights, biases, channels, column, exist)


@triton.jit
def _store_sums(sums, weights, biases, channels, column, exist):
    """Write the gradients of weight and bias, of which each lane has a part."""
    tl.store(sums + column, tl.sum(weights, axis=0, keep_dims=True), mask=exist)
    tl.store(sums + channels + column, tl.sum(biases, axis=0, keep_dims=True), mask=exist)
