"""The kernels for GPUs, in Triton: activations are read once, and written once.

The first call for a kind of input compiles, and makes small index tensors on the device; capture
CUDA graphs after a warm-up. Later calls launch one kernel, or two where blocks are pooled, or few
blocks and channels split among more programs. Results have the same bits every time.
"""

import math

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import small, triton_kernels, triton_rows
from .layouts import as_layout, layout
from .rows import Pools, Sizes, accumulation_dtype, constant, pool_moments
from .rows import pool as pool_rows
from .small import Running
from .tiles import MERGED, elementwise, merge_tile, reduction, row_tile


def block_moments(x: Tensor, sizes: Sizes, pools: Pools | None = None) -> tuple[Tensor, Tensor]:
    """See `reference.block_moments`."""
    members = 1 if pools is None else pools.members
    if members > MERGED:
        return pool_moments(*block_moments(x, sizes), sizes, pools)
    x, lines = layout(x)
    tiles = reduction(x.shape, sizes, lines, x.itemsize, members)
    splits, (blocks, channels) = tiles.splits, (len(sizes), x.shape[1])
    merges = splits > 1 or pools is not None
    starts = constant(tiles.table, torch.int64, x)
    planes = (3, splits, blocks, channels) if merges else (2, blocks, channels)
    out = x.new_empty(planes, dtype=accumulation_dtype(x))
    with torch.cuda.device_of(x):
        triton_kernels.moments[(tiles.programs,)](
            x, starts, out, blocks * channels, splits=splits, SPLIT=merges, **tiles.arguments
        )
        if merges:
            number, dealt = _dealt(pools, blocks, x)
            parts, out = out, out.new_empty(2, number, channels)
            height, width = merge_tile(splits * members)
            triton_rows.merge_moments[(number * -(-channels // width),)](
                parts, dealt, out, blocks * channels, channels, splits, members,
                ROWS=height, COLUMNS=width,
            )  # fmt: skip
    return out[0], out[1]


def block_affine(
    x: Tensor,
    sizes: Sizes,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    pools: Pools | None = None,
) -> Tensor:
    """See `reference.block_affine`."""
    x, lines = layout(x)
    return _affine(x, sizes, lines, center, scale, shift, pools)


def block_grad_sums(
    dy: Tensor, x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor, pools: Pools | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.block_grad_sums`."""
    x, lines = layout(x)
    tiles = reduction(x.shape, sizes, lines, x.itemsize)
    rows = (len(sizes), x.shape[1])
    starts = constant(tiles.table, torch.int64, x)
    out = x.new_empty((2, tiles.splits, *rows), dtype=accumulation_dtype(x))
    with torch.cuda.device_of(x):
        triton_kernels.grad_sums[(tiles.programs,)](
            as_layout(dy, lines), x, starts, _owners(pools, x), *_row(center), *_row(scale),
            out, rows[0] * rows[1], splits=tiles.splits, **tiles.arguments,
        )  # fmt: skip
        if tiles.splits > 1 or pools is not None:
            number, dealt = _dealt(pools, rows[0], x)
            parts, out = out, out.new_empty(2, 1, number, rows[1])
            members = rows[0] // number
            height, width = row_tile(tiles.splits * members)
            triton_rows.merge_sums[(2 * number * -(-rows[1] // width),)](
                parts, dealt, out, rows[0] * rows[1], rows[1], tiles.splits, members, number,
                ROWS=height, COLUMNS=width,
            )  # fmt: skip
    return out[0, 0], out[1, 0]


def block_grad_affine(
    dy: Tensor,
    x: Tensor,
    sizes: Sizes,
    a: Tensor,
    b: Tensor,
    center: Tensor,
    c: Tensor,
    users: Pools | None = None,
    pools: Pools | None = None,
) -> Tensor:
    """See `reference.block_grad_affine`."""
    x, lines = layout(x)
    return _affine(x, sizes, lines, center, b, c, pools, as_layout(dy, lines), a, users)


def normaliser_rows(
    mean: Tensor,
    std: Tensor,
    weight: Tensor | None,
    eps: float,
    n: Tensor | int,
    running: Running | None,
) -> tuple[Tensor, Tensor]:
    """See `small.normaliser_rows`. Rows in float64 and running statistics with gaps go there."""
    moved = () if running is None else running[:2]
    # A kernel takes numbers in float32.
    if std.dtype == torch.float64 or not all(row.is_contiguous() for row in moved):
        return small.normaliser_rows(mean, std, weight, eps, n, running)
    out = std.new_empty(2, *std.shape)
    height, width = row_tile(len(std))
    weight = weight if weight is None else weight.contiguous()
    step = 0.0 if running is None else running.step
    step = step.to(std.dtype) if isinstance(step, Tensor) else float(step)
    with torch.cuda.device_of(std):
        triton_rows.normaliser_rows[(-(-std.shape[1] // width),)](
            *_row(mean), *_row(std), *_values(n), weight, *(moved or (None, None)), out,
            *std.shape, math.sqrt(eps), step, IN_MEMORY=isinstance(step, Tensor),
            ROWS=height, COLUMNS=width,
        )  # fmt: skip
    for row in moved:
        if not row.is_inference():  # a graph that has saved them must know
            increment_version(row)
    return out[0], out[1]


def pool(rows: Tensor) -> Tensor:
    """See `rows.pool`. More rows than one program can merge go there."""
    pools, members, numbers = rows.shape
    if members > MERGED:
        return pool_rows(rows)
    rows, out = rows.contiguous(), rows.new_empty(pools, 1, numbers)
    height, width = merge_tile(members)
    with torch.cuda.device_of(rows):
        triton_rows.pool[(pools * -(-(numbers // 2) // width),)](
            rows, out, members, numbers // 2, ROWS=height, COLUMNS=width
        )
    return out


def user_rows(total: Tensor, dot: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """See `small.user_rows`."""
    rows, channels = total.shape
    sums, weighted = total.new_empty(2, channels), total.new_empty(rows, 2, channels)
    weight = weight if weight is None else weight.contiguous()
    height, width = row_tile(rows)
    with torch.cuda.device_of(total):
        triton_rows.user_rows[(-(-channels // width),)](
            *_row(total), *_row(dot), weight, sums, weighted, rows, channels,
            ROWS=height, COLUMNS=width,
        )  # fmt: skip
    return sums[0], sums[1], weighted


def slopes(
    total: Tensor, dot: Tensor, rho: Tensor, factor: Tensor, n: Tensor | int
) -> tuple[Tensor, Tensor]:
    """See `small.slopes`."""
    b, c = _slopes(total, dot, rho, factor, n, None)
    return b, c


def gradient_rows(
    total: Tensor, dot: Tensor, rho: Tensor, factor: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `small.gradient_rows`."""
    sums = total.new_empty(2, total.shape[1])
    b, c = _slopes(total, dot, rho, factor, n, sums)
    return sums[0], sums[1], b, c


def _slopes(
    total: Tensor, dot: Tensor, rho: Tensor, factor: Tensor, n: Tensor | int, sums: Tensor | None
) -> Tensor:
    rows, channels = total.shape
    out = total.new_empty(2, rows, channels)
    height, width = row_tile(rows)
    with torch.cuda.device_of(total):
        triton_rows.slopes[(-(-channels // width),)](
            *_row(total), *_row(dot), *_row(rho), *_row(factor), *_values(n), sums, out, rows,
            channels, ROWS=height, COLUMNS=width,
        )  # fmt: skip
    return out


def _affine(
    x: Tensor,
    sizes: Sizes,
    lines: bool,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    pools: Pools | None,
    dy: Tensor | None = None,
    factor: Tensor | None = None,
    users: Pools | None = None,
) -> Tensor:
    tiles = elementwise(x.shape, sizes, lines, x.itemsize)
    blocks = constant(tiles.table, torch.int64, x)
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        triton_kernels.affine[(tiles.programs,)](
            x, y, blocks, _owners(pools, x), *_row(center), *_row(scale), *_row(shift),
            dy, _owners(users, x), *((None, 0) if factor is None else _row(factor)),
            x.shape[0], **tiles.arguments,
        )  # fmt: skip
    return y


def _dealt(pools: Pools | None, blocks: int, like: Tensor) -> tuple[int, Tensor]:
    """Return the number of pools, and their blocks in order; without pools each block is one."""
    number, dealt = (blocks, tuple(range(blocks))) if pools is None else pools[:2]
    return number, constant(dealt, torch.int64, like)


def _owners(pools: Pools | None, like: Tensor) -> Tensor | None:
    """Return the number of each block's row; None if it is its own."""
    return None if pools is None else constant(pools.owners, torch.int64, like)


def _row(row: Tensor) -> tuple[Tensor, int]:
    """Return rows ``[blocks, C]``, or of pools, and the distance from one to the next."""
    row = row if row.stride(1) == 1 else row.contiguous()
    return row, row.stride(0)


def _values(n: Tensor | int) -> tuple[Tensor | None, int, int]:
    """Return values per channel as rows, and the distance between them; or the number of all."""
    return (n, n.stride(0), 0) if isinstance(n, Tensor) else (None, 0, n)
