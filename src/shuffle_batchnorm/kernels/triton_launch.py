"""The kernels for GPUs, in Triton: activations are read once, and written once.

The first call for a kind of input compiles, and makes small index tensors on the device; capture
CUDA graphs after a warm-up. Layers run `TritonLocal` and `TritonRanks`, which prepare launches.
These functions are for the rest. Results have the same bits every time.
"""

import torch
from torch import Tensor

from . import triton_kernels, triton_merge, triton_messages
from .layouts import as_layout, layout
from .rows import Groups, Sizes, accumulation_dtype, constant
from .rows import backward_rows as backward_rows
from .rows import dx_coefficients as dx_coefficients
from .rows import merge_moments as merge_moments
from .rows import normaliser_rows as normaliser_rows
from .rows import param_grads as param_grads
from .tiles import elementwise, merge_tile, reduction
from .triton_local import TritonLocal as TritonLocal
from .triton_ranks import TritonRanks as TritonRanks


def block_moments(x: Tensor, sizes: Sizes, groups: Groups = None) -> tuple[Tensor, Tensor]:
    """See `reference.block_moments`."""
    members = 1 if groups is None else groups.members
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
        if not merges:
            return out[0], out[1]
        number, order = _order(groups, blocks, x)
        merged = out.new_empty(4, number, channels)
        height, width = merge_tile(splits * members)
        triton_merge.finish_moments[(number * -(-channels // width),)](
            out, order, None, merged, 1.0, blocks * channels, channels, splits, members,
            ROWS=height, COLUMNS=width,
        )  # fmt: skip
    return merged[0], merged[1]


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
            None, None, None, None, None, 0.0, 0.0, center_stride=center.stride(0), scale_at=0,
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
        if tiles.splits == 1 and groups is None:
            return out[0, 0], out[1, 0]
        number, order = _order(groups, rows[0], x)
        merged = out.new_empty(number, 2, rows[1])
        members = rows[0] // number
        height, width = merge_tile(tiles.splits * members)
        triton_messages.pack_sums[(number * -(-rows[1] // width),)](
            out, order, None, None, merged, rows[0] * rows[1], rows[1], tiles.splits, members, 0,
            ROWS=height, COLUMNS=width,
        )  # fmt: skip
    total, dot = merged.transpose(0, 1).contiguous()
    return total, dot


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
            center_at=0, center_stride=center.stride(0), scale_at=0, scale_stride=b.stride(0),
            shift_at=0, shift_stride=c.stride(0), factor_at=0, factor_stride=a.stride(0),
            rows=len(center), samples=x.shape[0], **tiles.arguments,
        )  # fmt: skip
    return dx


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
