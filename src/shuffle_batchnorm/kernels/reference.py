"""The four kernels in plain torch: the truth for every other version, and what compile traces.

Tensors are ``[N, C, *]``; a block is a run of samples. Rows are ``[blocks, C]``, or ``[groups, C]``
where blocks are in groups: then all blocks of a group share its row, and its sums are over all of
them. Rows and sums are in float32, in float64 for float64 input.
"""

import math

import torch
from torch import Tensor

from .rows import (
    Groups,
    Sizes,
    block_sum,
    cast,
    counts,
    group_sum,
    merge_blocks,
    per_sample,
    take,
    widen,
)
from .rows import backward_rows as backward_rows
from .rows import dx_coefficients as dx_coefficients
from .rows import merge_moments as merge_moments
from .rows import normaliser_rows as normaliser_rows
from .rows import param_grads as param_grads


def block_moments(x: Tensor, sizes: Sizes, groups: Groups = None) -> tuple[Tensor, Tensor]:
    """Return the mean and (biased) standard deviation of blocks or groups, 0 if empty.

    Two passes over each sample's channel, its plane, then the planes of a block are merged. Every
    square is of a distance to a mean, so next to nothing cancels; the sum of the distances is what
    was rounded off that mean. The standard deviation has the input's scale; where a square doesn't
    fit the dtype it is infinite.
    """
    planes = _planes(x)
    length, size = max(1, planes.shape[2]), counts(sizes, 1, planes).clamp(min=1)
    # A compiler writes these rows down, and goes through a plane while it is in a cache.
    means = planes.sum(dim=2) / length
    distances = planes - means[:, :, None]
    rest = distances.sum(dim=2) / length
    squares = distances.square().sum(dim=2) / length

    mean = block_sum(means, sizes) / size
    shift = means - per_sample(mean, sizes)
    # Where the mean is infinite, nothing has been rounded off it.
    offset = (block_sum(shift + rest, sizes) / size).nan_to_num(0.0, 0.0, 0.0)
    # x - mean = distance + shift
    variance = block_sum(squares + shift * (shift + 2 * rest), sizes) / size
    # Squares beyond the dtype are infinite; inf - inf would be NaN.
    variance = torch.where(variance < math.inf, variance - offset.square(), variance)
    return merge_blocks(mean + offset, variance.clamp(min=0).sqrt(), sizes, groups)


def block_affine(
    x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor, shift: Tensor, groups: Groups = None
) -> Tensor:
    """Return ``y = (x - center) * scale + shift`` in x's dtype and layout.

    Args:
        x: ``[N, C, *]``.
        sizes: samples per block.
        center: ``[blocks, C]``, or ``[groups, C]``.
        scale: likewise.
        shift: likewise.
        groups: of blocks.
    """
    center, scale, shift = _spread(x.ndim, sizes, _of_blocks(groups, center, scale, shift))
    return cast((widen(x) - center) * scale + shift, x.dtype)


def block_grad_sums(
    dy: Tensor, x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor, groups: Groups = None
) -> tuple[Tensor, Tensor]:
    """Return the sums of ``dy`` and of ``dy * (x - center) * scale`` over blocks or groups."""
    dy_planes, x_planes = _planes(dy), _planes(x)
    (centers,) = _spread(3, sizes, _of_blocks(groups, center))
    products = (dy_planes * (x_planes - centers)).sum(dim=2)
    total, dot = (
        group_sum(block_sum(rows, sizes), groups) for rows in (dy_planes.sum(dim=2), products)
    )
    return total, dot * scale


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
    """Return ``dx = a * dy + b * (x - center) + c``, in x's dtype and layout.

    The rows of `a` are of the groups `users`, those of `b`, `center` and `c` of `groups`.
    """
    rows = _of_blocks(users, a) + _of_blocks(groups, b, center, c)
    a, b, center, c = _spread(x.ndim, sizes, rows)
    dx = (widen(x) - center) * b + c
    # In place: a sum of two empty tensors would lose their layout.
    return cast(dx.add_(widen(dy) * a), x.dtype)


def _planes(x: Tensor) -> Tensor:
    """View ``[N, C, *]`` as ``[N, C, L]`` in the dtype of its statistics."""
    return widen(x.reshape(x.shape[0], x.shape[1], x.shape[2:].numel()))


def _of_blocks(groups: Groups, *rows: Tensor) -> tuple[Tensor, ...]:
    """Give each block the row of its group."""
    return rows if groups is None else tuple(take(row, groups.owners) for row in rows)


def _spread(ndim: int, sizes: Sizes, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give each sample its numbers in rows ``[blocks, C]``: each ``[N, C, 1, ...]``."""
    # Side by side, a compiler has to write them down, and can't work them out for every value.
    spread = per_sample(torch.cat(rows, dim=1), sizes)
    return spread.view(*spread.shape, *[1] * (ndim - 2)).chunk(len(rows), dim=1)
