"""The kernels for GPUs, in Triton: activations are read once, and written once.

The first call for a kind of input compiles, and makes small index tensors on the device; capture
CUDA graphs after a warm-up. Later calls launch one kernel, or two where blocks are merged, or few
blocks and channels split among more programs. Results have the same bits every time.
"""

import math

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import rows as torch_rows
from . import triton_kernels, triton_rows
from .block_groups import merge_blocks
from .layouts import as_layout, layout
from .rows import Groups, Running, Sizes, accumulation_dtype, constant
from .rows import merge_moments as merge_in_torch
from .tiles import MERGED, elementwise, merge_tile, reduction, row_tile
from .triton_local import TritonLocal as TritonLocal


def block_moments(x: Tensor, sizes: Sizes, groups: Groups = None) -> tuple[Tensor, Tensor]:
    """See `reference.block_moments`."""
    members = 1 if groups is None else groups.members
    if members > MERGED:
        return merge_blocks(*block_moments(x, sizes), sizes, groups)
    x, channels_last = layout(x)
    tiles = reduction(x.shape, sizes, channels_last, x.itemsize, members)
    splits, (blocks, channels) = tiles.splits, (len(sizes), x.shape[1])
    merges = splits > 1 or groups is not None
    starts = constant(tiles.table, torch.int64, x)
    planes = (3, splits, blocks, channels) if merges else (2, blocks, channels)
    out = x.new_empty(planes, dtype=accumulation_dtype(x))
    with torch.cuda.device_of(x):
        triton_kernels.moments[(tiles.programs,)](
            x, starts, out, None, None, None, None, None, 0.0, blocks * channels, members=1,
            normalisers=blocks, splits=splits, SPLIT=merges, MERGED=1, **tiles.arguments,
        )  # fmt: skip
        if merges:
            number, order = _order(groups, blocks, x)
            parts, out = out, out.new_empty(2, number, channels)
            height, width = merge_tile(splits * members)
            triton_rows.merge_moments[(number * -(-channels // width),)](
                parts, order, out, blocks * channels, channels, splits, members,
                ROWS=height, COLUMNS=width,
            )  # fmt: skip
    return out[0], out[1]


def block_affine(
    x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor, shift: Tensor, groups: Groups = None
) -> Tensor:
    """See `reference.block_affine`."""
    x, channels_last = layout(x)
    tiles = elementwise(x.shape, sizes, channels_last, x.itemsize)
    center, scale, shift = (_dense(row) for row in (center, scale, shift))
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        triton_kernels.affine[(tiles.programs,)](
            x, y, constant(tiles.table, torch.int64, x), _owners(groups, x), center, scale, shift,
            None, None, None, None, 0.0, 0.0, center_stride=center.stride(0), scale_at=0,
            scale_stride=scale.stride(0), shift_stride=shift.stride(0), rows=len(center),
            samples=x.shape[0], **tiles.arguments,
        )  # fmt: skip
    return y


def block_grad_sums(
    dy: Tensor, x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor, groups: Groups = None
) -> tuple[Tensor, Tensor]:
    """See `reference.block_grad_sums`."""
    x, channels_last = layout(x)
    center, scale = _dense(center), _dense(scale)
    tiles = reduction(x.shape, sizes, channels_last, x.itemsize)
    rows = (len(sizes), x.shape[1])
    starts = constant(tiles.table, torch.int64, x)
    out = x.new_empty((2, tiles.splits, *rows), dtype=accumulation_dtype(x))
    with torch.cuda.device_of(x):
        triton_kernels.grad_sums[(tiles.programs,)](
            x, as_layout(dy, channels_last), starts, out, _owners(groups, x), None, center, scale,
            None, 0.0, columns=rows[0] * rows[1], center_stride=center.stride(0), scale_at=0,
            scale_stride=scale.stride(0), out_at=0, members=1, normalisers=rows[0],
            splits=tiles.splits, MERGED=1, **tiles.arguments,
        )  # fmt: skip
        if tiles.splits > 1 or groups is not None:
            number, order = _order(groups, rows[0], x)
            parts, out = out, out.new_empty(2, 1, number, rows[1])
            members = rows[0] // number
            height, width = row_tile(tiles.splits * members)
            triton_rows.merge_sums[(2 * number * -(-rows[1] // width),)](
                parts, order, out, rows[0] * rows[1], rows[1], tiles.splits, members, number,
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
    users: Groups = None,
    groups: Groups = None,
) -> Tensor:
    """See `reference.block_grad_affine`."""
    x, channels_last = layout(x)
    tiles = elementwise(x.shape, sizes, channels_last, x.itemsize)
    a, b, center, c = (_dense(row) for row in (a, b, center, c))
    dx = torch.empty_like(x)
    with torch.cuda.device_of(x):
        triton_kernels.grad_affine[(tiles.programs,)](
            x, dx, as_layout(dy, channels_last), constant(tiles.table, torch.int64, x),
            _owners(groups, x), _owners(users, x), center, b, c, a, None, None, sums_at=0,
            center_stride=center.stride(0), scale_at=0, scale_stride=b.stride(0), shift_at=0,
            shift_stride=c.stride(0), factor_at=0, factor_stride=a.stride(0), rows=len(center),
            samples=x.shape[0], **tiles.arguments,
        )  # fmt: skip
    return dx


def normaliser_rows(
    mean: Tensor,
    std: Tensor,
    weight: Tensor | None,
    eps: float,
    count: Tensor | int,
    running: Running | None,
) -> tuple[Tensor, Tensor]:
    """See `rows.normaliser_rows`. Rows in float64 and running statistics with gaps go there."""
    moved = () if running is None else running[:2]
    # A kernel takes numbers in float32.
    if std.dtype == torch.float64 or not all(row.is_contiguous() for row in moved):
        return torch_rows.normaliser_rows(mean, std, weight, eps, count, running)
    out = std.new_empty(2, *std.shape)
    height, width = row_tile(len(std))
    weight = weight if weight is None else weight.contiguous()
    step = 0.0 if running is None else running.step
    step = step.to(std.dtype) if isinstance(step, Tensor) else float(step)
    with torch.cuda.device_of(std):
        triton_rows.normaliser_rows[(-(-std.shape[1] // width),)](
            *_row(mean), *_row(std), *_counts(count), weight, *(moved or (None, None)), out,
            *std.shape, math.sqrt(eps), step, IN_MEMORY=isinstance(step, Tensor),
            ROWS=height, COLUMNS=width,
        )  # fmt: skip
    for row in moved:
        if not row.is_inference():  # a graph that has saved them must know
            increment_version(row)
    return out[0], out[1]


def merge_moments(rows: Tensor) -> Tensor:
    """See `rows.merge_moments`. More rows than one program can merge go there."""
    merged, members, numbers = rows.shape
    if members > MERGED:
        return merge_in_torch(rows)
    rows, out = rows.contiguous(), rows.new_empty(merged, 1, numbers)
    height, width = merge_tile(members)
    with torch.cuda.device_of(rows):
        triton_rows.merge_rows[(merged * -(-(numbers // 2) // width),)](
            rows, out, members, numbers // 2, ROWS=height, COLUMNS=width
        )
    return out


def param_grads(total: Tensor, dot: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """See `rows.param_grads`."""
    rows, channels = total.shape
    sums, weighted = total.new_empty(2, channels), total.new_empty(rows, 2, channels)
    weight = weight if weight is None else weight.contiguous()
    height, width = row_tile(rows)
    with torch.cuda.device_of(total):
        triton_rows.param_grads[(-(-channels // width),)](
            *_row(total), *_row(dot), weight, sums, weighted, rows, channels,
            ROWS=height, COLUMNS=width,
        )  # fmt: skip
    return sums[0], sums[1], weighted


def dx_coefficients(
    total: Tensor, dot: Tensor, rstd: Tensor, factor: Tensor, count: Tensor | int
) -> tuple[Tensor, Tensor]:
    """See `rows.dx_coefficients`."""
    b, c = _coefficients(total, dot, rstd, factor, count, None)
    return b, c


def backward_rows(
    total: Tensor, dot: Tensor, rstd: Tensor, factor: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `rows.backward_rows`."""
    sums = total.new_empty(2, total.shape[1])
    b, c = _coefficients(total, dot, rstd, factor, count, sums)
    return sums[0], sums[1], b, c


def _coefficients(
    total: Tensor,
    dot: Tensor,
    rstd: Tensor,
    factor: Tensor,
    count: Tensor | int,
    sums: Tensor | None,
) -> Tensor:
    rows, channels = total.shape
    out = total.new_empty(2, rows, channels)
    height, width = row_tile(rows)
    with torch.cuda.device_of(total):
        triton_rows.dx_coefficients[(-(-channels // width),)](
            *_row(total), *_row(dot), *_row(rstd), *_row(factor), *_counts(count), sums, out, rows,
            channels, ROWS=height, COLUMNS=width,
        )  # fmt: skip
    return out


def _order(groups: Groups, blocks: int, like: Tensor) -> tuple[int, Tensor]:
    """Return the number of groups, and their blocks in order; without groups each block is one."""
    if groups is None:
        return blocks, constant(tuple(range(blocks)), torch.int64, like)
    return groups.number, constant(groups.order, torch.int64, like)


def _owners(groups: Groups, like: Tensor) -> Tensor | None:
    """Return the number of each block's row; None if it is its own."""
    return None if groups is None else constant(groups.owners, torch.int64, like)


def _dense(row: Tensor) -> Tensor:
    """Return rows whose numbers lie side by side."""
    return row if row.stride(1) == 1 else row.contiguous()


def _row(row: Tensor) -> tuple[Tensor, int]:
    """Return rows ``[blocks, C]``, or of groups, and the distance from one to the next."""
    row = _dense(row)
    return row, row.stride(0)


def _counts(count: Tensor | int) -> tuple[Tensor | None, int, int]:
    """Return values per channel as rows, and the distance between them; or the number of all."""
    return (count, count.stride(0), 0) if isinstance(count, Tensor) else (None, 0, count)
