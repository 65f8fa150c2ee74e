"""Triton code that ends the two reductions: from the parts of blocks to the rows of normalisers.

A *part* is what one program has found of a block's channels, one of `splits`. A normaliser merges
the parts of its blocks, `members` of them, always in one order; `order` are the blocks of the first
normaliser, then of the second, and so on, and `columns` is blocks * C. Rows of normalisers are
``[4, R, C]``: forward mean, deviation, ``rstd`` and ``rstd * weight``; backward the sums of ``dy``
and of ``dy * xhat``, and the two coefficients of dx.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["weight", "columns", "channels", "splits", "members"])
def finish_moments(
    parts, order, weight, out, root: tl.float64, columns, channels, splits, members,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge the moments of each normaliser in a program of its own: see `merge_moments`."""
    normaliser, column, _ = target_of(channels, COLUMNS)
    normalisers = tl.num_programs(0) // tl.cdiv(channels, COLUMNS)
    merge_moments(
        parts, order, weight, out, root, normaliser, normalisers, column, columns,
        channels, splits, members, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def target_of(channels, COLUMNS: tl.constexpr):
    """Return the row that this program writes, and which channels of it exist."""
    tiles = tl.cdiv(channels, COLUMNS)
    target = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return target, column, column < channels


@triton.jit
def merge_moments(
    parts, order, weight, out, root, normaliser, normalisers, column, columns, channels, splits,
    members, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write a normaliser's mean, deviation, ``1 / sqrt(std**2 + root**2)``, and that times weight.

    By Chan's formula, in float64. `parts` are ``[3, splits, blocks, C]``: mean, sum of squares
    about it, and count.
    """
    exist = column < channels
    size = splits.to(tl.int64) * columns
    _, mean, deviation = merge(
        parts, parts + size, parts + 2 * size, order, normaliser, column, columns, channels,
        channels, splits, members, False, ROWS, COLUMNS,
    )  # fmt: skip
    plane = normalisers.to(tl.int64) * channels
    write_moments(out + normaliser * channels, plane, mean, deviation, root, weight, column, exist)


@triton.jit
def merge(
    means, spreads, counts, order, target, column, columns, pitch, channels, splits, members,
    SENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return count, mean and deviation, ``[1, COLUMNS]``, by Chan's formula, in float64.

    Of `members` rows, or of the `splits` parts of each; `pitch` is the distance from one to the
    next. Spreads are sums of squares about the mean. In rows that were SENT they are deviations,
    and the count is one for all channels; a count of -inf is that of all that it is merged with.
    """
    exist = column < channels
    totals = tl.zeros([ROWS, COLUMNS], tl.float64)
    sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    for first in range(0, splits * members, ROWS):
        offsets, there = _parts(first, order, target, column, columns, pitch, splits, members, ROWS)
        there = there & exist
        count = _count(counts, offsets, column, there, SENT)
        totals += count
        sums += count * tl.load(means + offsets, mask=there, other=0).to(tl.float64)
    total = tl.sum(totals, axis=0, keep_dims=True)
    divisor = tl.maximum(total, 1)
    mean = tl.sum(sums, axis=0, keep_dims=True) / divisor
    squares = tl.zeros([ROWS, COLUMNS], tl.float64)
    for first in range(0, splits * members, ROWS):
        offsets, there = _parts(first, order, target, column, columns, pitch, splits, members, ROWS)
        there = there & exist
        count = _count(counts, offsets, column, there, SENT)
        other = tl.load(means + offsets, mask=there, other=0).to(tl.float64)
        distance = tl.where(there, other - mean, 0)
        inside = tl.load(spreads + offsets, mask=there, other=0).to(tl.float64)
        if SENT:
            inside *= count * inside
        squares += inside + count * distance * distance
    return total, mean, tl.sqrt(tl.sum(squares, axis=0, keep_dims=True) / divisor)


@triton.jit
def _count(counts, offsets, column, there, SENT: tl.constexpr):
    """Load the counts of rows."""
    if SENT:
        offsets -= column
    return tl.load(counts + offsets, mask=there, other=0).to(tl.float64)


@triton.jit
def write_moments(out, plane, mean, deviation, root, weight, column, exist):
    """Write mean, deviation, ``1 / sqrt(std**2 + root**2)``, and that times weight to 4 planes."""
    dtype = out.dtype.element_ty
    position = out + column
    deviation = deviation.to(dtype)
    tl.store(position, mean.to(dtype), mask=exist)
    tl.store(position + plane, deviation, mask=exist)
    rstd = inverse_deviation(deviation, number(root, dtype))
    tl.store(position + 2 * plane, rstd, mask=exist)
    if weight is not None:
        rstd *= tl.load(weight + column, mask=exist, other=0).to(dtype)
    tl.store(position + 3 * plane, rstd, mask=exist)


@triton.jit(do_not_specialize=["columns", "channels", "splits", "members", "out_at"])
def finish_sums(
    parts, order, rows, count: tl.float64, columns, channels, splits, members, out_at,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge the sums of each normaliser in a program of its own: see `merge_sums`.

    The rows are written `out_at` numbers from `parts`.
    """
    normaliser, column, _ = target_of(channels, COLUMNS)
    normalisers = tl.num_programs(0) // tl.cdiv(channels, COLUMNS)
    merge_sums(
        parts, order, rows, parts + out_at, count, normaliser, normalisers, column,
        columns, channels, splits, members, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def merge_sums(
    parts, order, rows, out, count, normaliser, normalisers, column, columns, channels, splits,
    members, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the sums over a normaliser's users, and the coefficients of dx that follow from them.

    These are ``b = -scale dot rstd / count`` and ``c = -scale total / count``, with the last two
    of the forward `rows`. `parts` are ``[2, splits, blocks, C]``: total and dot.
    """
    dtype = out.dtype.element_ty
    exist = column < channels
    total, dot = add(
        parts, splits.to(tl.int64) * columns, order, normaliser, column, columns, channels,
        channels, splits, members, ROWS, COLUMNS,
    )  # fmt: skip
    plane = normalisers.to(tl.int64) * channels
    position = normaliser * channels + column
    rstd = tl.load(rows + 2 * plane + position, mask=exist, other=0)
    step = tl.load(rows + 3 * plane + position, mask=exist, other=0) / -number(count, dtype)
    tl.store(out + position, total, mask=exist)
    tl.store(out + plane + position, dot, mask=exist)
    tl.store(out + 2 * plane + position, step * dot * rstd, mask=exist)
    tl.store(out + 3 * plane + position, step * total, mask=exist)


@triton.jit
def add(
    totals, to_dots, order, target, column, columns, pitch, channels, splits, members,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return total and dot, ``[1, COLUMNS]``: sums of rows as `merge` has them."""
    exist = column < channels
    total = tl.zeros([ROWS, COLUMNS], totals.dtype.element_ty)
    dot = tl.zeros([ROWS, COLUMNS], totals.dtype.element_ty)
    for first in range(0, splits * members, ROWS):
        offsets, there = _parts(first, order, target, column, columns, pitch, splits, members, ROWS)
        total += tl.load(totals + offsets, mask=there & exist, other=0)
        dot += tl.load(totals + to_dots + offsets, mask=there & exist, other=0)
    return tl.sum(total, axis=0, keep_dims=True), tl.sum(dot, axis=0, keep_dims=True)


@triton.jit
def is_last(arrivals, programs):
    """Return whether this program is the last of several to arrive here; nobody waits.

    What the others have stored before is then seen by loads that come after. `arrivals` is 0 before
    the first one and after the last.
    """
    # All threads have stored; one of them tells, and by its order for all of them.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def _parts(
    first, order, target, column, columns, pitch, splits, members, ROWS: tl.constexpr
):  # fmt: skip
    """Return where some parts of a normaliser are, ``[ROWS, COLUMNS]``, and which of them exist."""
    row = first + tl.arange(0, ROWS)[:, None]
    there = row < splits * members
    block = tl.load(order + target * members + row % members, mask=there, other=0)
    return (row // members).to(tl.int64) * columns + block * pitch + column, there


@triton.jit
def move_running(
    rows, normalisers, stride, running_mean, running_var, number_tracked, steps, counts, step,
    change, column, exist,
):  # fmt: skip
    """Move running statistics a share `step` towards the averages of normalisers; count the batch.

    `rows` are means, then deviations; `change` makes their squares unbiased. If there are `counts`,
    they do so instead: they come after 4 planes of rows, and a row of none is left out. `steps`, if
    there is one, is where the share is in memory.
    """
    dtype = rows.dtype.element_ty
    mean = tl.zeros_like(column).to(dtype)
    variance = tl.zeros_like(column).to(dtype)
    averaged = tl.zeros_like(column).to(dtype)
    for row in range(normalisers):
        position = rows + row * stride + column
        there = exist
        factor = number(change, dtype)
        if counts is not None:
            position_of_count = counts + 4 * normalisers * stride + row + column * 0
            count = tl.load(position_of_count, mask=exist, other=1)
            there = exist & (count > 0)
            factor = count / tl.maximum(count - 1, 1)
            averaged += tl.where(count > 0, 1, 0).to(dtype)
        mean += tl.load(position, mask=there, other=0)
        deviation = tl.load(position + normalisers * stride, mask=there, other=0)
        variance += deviation * deviation * factor
    if counts is None:
        averaged += normalisers.to(dtype)
    share = number(step, dtype)
    if steps is not None:
        share = tl.load(steps).to(dtype)
    move(running_mean + column, mean / averaged, share, exist)
    move(running_var + column, variance / averaged, share, exist)
    if number_tracked is not None:
        counts = tl.program_id(0) == 0
        tl.store(number_tracked, tl.load(number_tracked, mask=counts) + 1, mask=counts)


@triton.jit
def sum_gradients(rows, normalisers, stride, weight_grad, bias_grad, column, exist):
    """Write the gradients of weight and bias: the sums of `rows`, which are totals, then dots."""
    weight = tl.zeros_like(column).to(rows.dtype.element_ty)
    bias = tl.zeros_like(column).to(rows.dtype.element_ty)
    for row in range(normalisers):
        position = rows + row * stride + column
        bias += tl.load(position, mask=exist, other=0)
        weight += tl.load(position + normalisers * stride, mask=exist, other=0)
    if weight_grad is not None:
        tl.store(weight_grad + column, weight.to(weight_grad.dtype.element_ty), mask=exist)
    if bias_grad is not None:
        tl.store(bias_grad + column, bias.to(bias_grad.dtype.element_ty), mask=exist)


@triton.jit
def move(running, new, step, exist):
    """Move running statistics a share `step` towards new ones."""
    old = tl.load(running, mask=exist, other=0).to(new.dtype)
    distance = new - old
    # As torch does it: all the way is exactly there.
    moved = tl.where(step < 0.5, old + step * distance, new - distance * (1 - step))
    tl.store(running, moved.to(running.dtype.element_ty), mask=exist)


@triton.jit
def inverse_deviation(deviation, root):
    """Return ``1 / sqrt(deviation**2 + root**2)``, also where a square would not fit the dtype."""
    # No maximum: it would hide a NaN.
    larger = tl.where(deviation > root, deviation, root)
    smaller = tl.where(deviation > root, root, deviation)
    divisor = tl.where(larger == 0, 1, larger)
    if deviation.dtype == tl.float64:
        ratio = smaller / divisor
        inverse = 1 / (larger * tl.sqrt(1 + ratio * ratio))
    else:  # Triton divides and takes roots less exactly, unless told
        ratio = tl.div_rn(smaller, divisor)
        inverse = tl.div_rn(1.0, larger * tl.sqrt_rn(1 + ratio * ratio))
    return inverse


@triton.jit
def number(value, dtype: tl.constexpr):
    """Return a float64 argument, in the interpreter a plain number, in the dtype of rows."""
    return tl.full([1], value, dtype)
