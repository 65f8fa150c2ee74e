"""What the CPU kernels sum: moments of blocks or groups, and the two sums of a gradient."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .cpu_views import blocks_of_lines, in_parts, per_plane, view_rows, view_values
from .rows import BlockGroups, Sizes, are_equal, block_sum, constant, counts, group_sum, take

SHARE = 16  # of the values, of which a guess sees one
_LONG = 2**14  # values of a plane
_LINES = 2**11  # lines that a thread may add one after the other
_COLUMNS = 2**10  # of lines side by side: their sums stay in the nearest cache
_CALL = 2**17  # values of a block in lines from which on calling aten for each takes less time


def moments(
    x: Tensor, sizes: Sizes, groups: BlockGroups | None, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation ``[groups, C]``; without groups, ``[blocks, C]``."""
    center = _guess(x, sizes, groups, channels_last)
    offset, square = _moments_about(center, x, sizes, groups, channels_last)
    # At most 4 bits cancel: the guess is at most sqrt(15) deviations off.
    variance = torch.addcmul(square, offset, offset, value=-1)
    if x.dtype == torch.float64:  # nothing wider will look again, and inf - inf is NaN
        variance = torch.where(square < math.inf, variance, square)
    return center.add_(offset), variance.clamp_(min=0).sqrt_()


def _guess(x: Tensor, sizes: Sizes, groups: BlockGroups | None, channels_last: bool) -> Tensor:
    """Return the mean of at least a sixteenth of each pool's values, ``[groups, C]``."""
    values = view_values(x, sizes, channels_last)
    number = at_hand = values.shape[1]  # samples, or lines
    if groups is not None:
        # Those of its first block are where its part begins: a slice is cheaper than an index.
        values = values.view(groups.number, -1, *values.shape[2:])
        number, at_hand = values.shape[1], sizes[0] * (x.shape[2:].numel() if channels_last else 1)
    seen = values[:, : at_hand : at_hand // -(-number // SHARE)]
    if not channels_last:
        # First per plane: the sum of all of them is the first to be infinite.
        length = -(-values.shape[3] * number // (SHARE * seen.shape[1]))
        seen = seen[..., :length].mean(dim=3)
    few = seen.mean(dim=1) if seen.shape[1] > 1 else seen[:, 0]
    if groups is None and not are_equal(sizes):
        few = block_sum(few, sizes) / group_counts(sizes, None, few)
    return few.nan_to_num(0.0, 0.0, 0.0)


def _moments_about(
    center: Tensor, x: Tensor, sizes: Sizes, groups: BlockGroups | None, channels_last: bool
) -> Iterable[Tensor]:
    """Return the mean distance to a center, and the mean square of it, ``[groups, C]``."""
    values, axis = view_values(x, sizes, channels_last), 1 if channels_last else 3
    sums = _pair_of_sums(values, axis)
    totals, squares = sums
    differences = values.new_empty(0)
    rows = view_rows(sizes, channels_last, take(center, None if groups is None else groups.owners))
    # A norm adds one after the other, in the dtype of the values; a sum in a tree.
    takes_norms = not channels_last and values.shape[axis] < _LONG
    tensors = values, *rows, totals, squares
    for part, centers, total, square in in_parts(*tensors, whole=values.ndim - axis):
        difference = torch.sub(part, centers, out=differences.resize_(part.shape))
        torch.sum(difference, dim=axis, keepdim=True, out=total)
        if takes_norms:
            torch.linalg.vector_norm(difference, dim=axis, keepdim=True, out=square)
        else:
            torch.sum(difference.square_(), dim=axis, keepdim=True, out=square)
    if takes_norms:
        squares.square_()
    size = group_counts(sizes, groups, x) * x.shape[2:].numel()
    return (group_sum(rows, groups).div_(size) for rows in _of_blocks(sums, sizes, x.shape[1]))


def plane_grad_sums(
    dy: Tensor, x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `reference.block_grad_sums` of contiguous input."""
    samples = x.shape[:2]
    planes = 1, samples.numel(), x.shape[2:].numel()
    sums = _grad_sums(dy.view(planes), x.view(planes), *per_plane(sizes, center, scale))
    total, dot = (block_sum(rows.view(samples), sizes) for rows in sums)
    return total, dot


def line_grad_sums(
    dy: Tensor, x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `reference.block_grad_sums` of input in lines."""
    if are_small(x, sizes):
        return _grad_sums_of_small(dy, x, sizes, center, scale)
    blocks = blocks_of_lines(dy, sizes), blocks_of_lines(x, sizes), center, scale
    total, dot = _stack([_grad_sums_of_lines(*block) for block in zip(*blocks, strict=True)])
    return total, dot


def _grad_sums_of_small(
    dy: Tensor, x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    values, gradients = view_values(x, sizes, True), view_values(dy, sizes, True)
    sums = _pair_of_sums(values, 1)
    products = values.new_empty(0)
    tensors = values, gradients, *view_rows(sizes, True, center), *sums
    for part, grads, centers, total, dot in in_parts(*tensors, whole=2):
        torch.sum(grads, dim=1, keepdim=True, out=total)
        product = torch.sub(part, centers, out=products.resize_(part.shape)).mul_(grads)
        torch.sum(product, dim=1, keepdim=True, out=dot)
    total, dot = _of_blocks(sums, sizes, x.shape[1])
    return total, dot * scale


def _pair_of_sums(values: Tensor, axis: int) -> Tensor:
    """Return memory for two sums over an axis, which is kept."""
    shape = list(values.shape)
    shape[axis] = 1
    return values.new_empty(2, *shape)


def _of_blocks(sums: Tensor, sizes: Sizes, channels: int) -> Tensor:
    """Sum pairs of sums, of each block or each sample, to ``[2, blocks, C]``."""
    rows = sums.view(-1, channels)
    if len(rows) > 2 * len(sizes) or not are_equal(sizes):
        rows = block_sum(rows, sizes * 2)
    return rows.view(2, len(sizes), channels)


def are_small(x: Tensor, sizes: Sizes) -> bool:
    """Return whether to call aten for each block in lines costs more than to go over all twice."""
    # Uneven blocks are summed by samples first, which is as much again where L is small.
    return len(sizes) > 1 and x.numel() < len(sizes) * (_CALL if are_equal(sizes) else _CALL // 4)


def line_moments(x: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation ``[blocks, C]`` of input in lines, block by block."""
    blocks = [_moments_of_lines(block) for block in blocks_of_lines(x, sizes)]
    mean, variance = _stack(blocks)
    return mean, variance.sqrt_()


def _stack(blocks: list[Sequence[Tensor]]) -> Sequence[Tensor]:
    """Return what was found of each block, ``[C]``, as rows ``[blocks, C]``."""
    if len(blocks) == 1:
        return [row[None] for row in blocks[0]]
    return [torch.stack(rows) for rows in zip(*blocks, strict=True)]


def _moments_of_lines(x: Tensor) -> Sequence[Tensor]:
    """Return mean and variance ``[C]`` of one block in lines."""
    if x.numel() == 0:
        zeros = x.new_zeros(x.shape[1])
        return zeros, zeros
    pieces = _pieces(x)
    found = [torch.batch_norm_update_stats(piece, None, None, 0.0) for piece in pieces]
    if pieces[0] is x:
        return found[0]
    means, variances = (_rows_of_lines(rows, x) for rows in zip(*found, strict=True))
    channels_last = [len(piece) for piece in pieces for _ in range(piece.shape[1] // x.shape[1])]
    share = constant(tuple(n / len(x) for n in channels_last), x.dtype, x)[:, None]
    mean = (share * means).sum(dim=0)
    return mean, (share * (means - mean).square_().add_(variances)).sum(dim=0)


def _grad_sums_of_lines(
    dy: Tensor, x: Tensor, center: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `_grad_sums` of one block in lines."""
    pieces = _pieces(x)
    if pieces[0] is x:
        return _grad_sums(dy, x, center, scale)
    sums = []
    for grads, values in zip(_pieces(dy), pieces, strict=True):
        side = values.shape[1] // x.shape[1]
        sums.append(_grad_sums(grads, values, center.repeat(side), scale.repeat(side)))
    total, dot = (_rows_of_lines(rows, x).sum(dim=0) for rows in zip(*sums, strict=True))
    return total, dot


def _pieces(x: Tensor) -> list[Tensor]:
    """Cut lines ``[R, C]`` into pieces that leave a thread few lines to add.

    Short lines are taken side by side, k as one, ``[r, k * C]``; what that leaves is the last
    piece, ``[r, C]`` with r < k. (aten adds the lines of a thread one after the other, in the
    dtype of the values.)
    """
    most, side = _LINES * torch.get_num_threads(), 1
    while len(x) > side * most and 2 * side * x.shape[1] <= _COLUMNS:
        side *= 2
    if len(x) <= most:
        return [x]
    even = len(x) // side * side
    beside = x[:even].view(-1, side * x.shape[1])
    return [*beside.split(most), *([x[even:]] if even < len(x) else [])]


def _rows_of_lines(rows: Iterable[Tensor], x: Tensor) -> Tensor:
    """Return what was found of pieces, a row ``[C]`` for each of the lines side by side."""
    return torch.cat([row.view(-1, x.shape[1]) for row in rows])


def _grad_sums(dy: Tensor, x: Tensor, center: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum dy`` and ``sum dy * (x - center) * scale`` of channels, axis 1."""
    if x.numel() == 0:
        zeros = torch.zeros_like(center)
        return zeros, zeros
    # The gradients of bias and weight of a batch norm whose saved inverse deviation is the scale.
    _, dot, total = torch.ops.aten.native_batch_norm_backward(
        dy, x, scale, None, None, center, scale, True, 0.0, [False, True, True]
    )
    return total, dot


def take_groups(groups: BlockGroups | None, *rows: Tensor) -> tuple[Tensor, ...]:
    """Give each block the row of its group."""
    return rows if groups is None else tuple(take(row, groups.owners) for row in rows)


def group_counts(sizes: Sizes, groups: BlockGroups | None, like: Tensor) -> Tensor | int:
    """Return the samples of each group, at least 1."""
    if groups is not None:
        return max(1, sum(sizes) // groups.number)
    if are_equal(sizes):
        return max(1, sizes[0])
    return counts(sizes, 1, like).clamp(min=1)
