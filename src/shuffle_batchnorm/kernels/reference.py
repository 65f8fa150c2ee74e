"""The four kernels in plain torch: the truth for every other version, and what compile traces.

Tensors are ``[N, C, *]``; a block is a run of samples. Rows are ``[blocks, C]``, or ``[groups, C]``
where blocks are in groups: then all blocks of a group share its row, and its sums are over all of
them. Rows and sums are in float32, in float64 for float64 input.
"""

import math

import torch
from torch import Tensor

from .block_groups import group_sum, merge_blocks, of_blocks
from .rows import (
    Groups,
    Sizes,
    are_equal,
    block_sum,
    cast,
    counts,
    is_known,
    per_sample,
    widen,
)
from .rows import backward_rows as backward_rows
from .rows import dx_coefficients as dx_coefficients
from .rows import merge_moments as merge_moments
from .rows import normaliser_rows as normaliser_rows
from .rows import param_grads as param_grads


def block_moments(x: Tensor, sizes: Sizes, groups: Groups = None) -> tuple[Tensor, Tensor]:
    """Return the mean and (biased) standard deviation of blocks or groups, 0 if empty.

    Every square is of a distance to a mean, so next to nothing cancels. The standard deviation has
    the input's scale; where a square doesn't fit the dtype it is infinite. Compiled, moments have
    the digits of compiled ``nn.BatchNorm``.
    """
    parts = _parts(x, sizes)
    if is_known(parts.numel() == 0):
        mean = variance = parts.new_zeros(len(sizes), x.shape[1])
    elif torch.compiler.is_compiling() and _is_cut(x, sizes):
        # As torch's own batch norm is compiled: to one reduction. (The mean of `torch.var_mean` is
        # no number where it should be infinite.)
        mean, variance = parts.mean(dim=(1, 3)), parts.var(dim=(1, 3), correction=0)
    else:
        mean, variance = _moments_by_planes(parts.flatten(0, 1), sizes)
    return merge_blocks(mean, variance.sqrt(), sizes, groups)


def _moments_by_planes(planes: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Return the mean and variance of blocks: of each sample's channel, its plane, then merged.

    Compiled for blocks of several sizes, and for channels_last, of which a CPU then keeps samples
    in its cache. The sum of the distances to a mean is what was rounded off that mean.
    """
    length, size = planes.shape[2], counts(sizes, 1, planes).clamp(min=1)
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
    return mean + offset, variance.clamp(min=0)


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
    center, scale, shift = _spread(x, sizes, _of_blocks(groups, center, scale, shift))
    return cast((_cut(widen(x), x, sizes) - center) * scale + shift, x.dtype).view(x.shape)


def block_grad_sums(
    dy: Tensor, x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor, groups: Groups = None
) -> tuple[Tensor, Tensor]:
    """Return the sums of ``dy`` and of ``dy * (x - center) * scale`` over blocks or groups."""
    dy_parts, x_parts = _parts(dy, sizes), _parts(x, sizes)
    (centers,) = _of_blocks(groups, center)
    if not are_equal(sizes):
        centers = per_sample(centers, sizes)
    centers = centers[:, None, :, None]
    sums = _sum(dy_parts), _sum(dy_parts * (x_parts - centers))
    if not are_equal(sizes):
        sums = block_sum(sums[0], sizes), block_sum(sums[1], sizes)
    total, dot = (group_sum(rows, groups) for rows in sums)
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
    a, b, center, c = _spread(x, sizes, rows)
    dx = (_cut(widen(x), x, sizes) - center) * b + c
    # In place: a sum of two empty tensors would lose their layout.
    return cast(dx.add_(_cut(widen(dy), x, sizes) * a), x.dtype).view(x.shape)


def _is_cut(x: Tensor, sizes: Sizes) -> bool:
    """Return whether a view cuts ``[N, C, *]`` into blocks, as it is."""
    # An elementwise operation on a view of channels_last would be compiled to another layout.
    return are_equal(sizes) and x.stride(1) != 1


def _cut(x: Tensor, like: Tensor, sizes: Sizes) -> Tensor:
    """View ``[N, C, *]`` as ``[blocks, n, C, *]``, if `like` can be cut."""
    return x.unflatten(0, (len(sizes), sizes[0])) if _is_cut(like, sizes) else x


def _parts(x: Tensor, sizes: Sizes) -> Tensor:
    """View ``[N, C, *]`` as ``[P, n, C, L]``, by blocks or by samples, as their statistics are."""
    planes = widen(x.reshape(x.shape[0], x.shape[1], x.shape[2:].numel()))
    samples = (len(sizes), sizes[0]) if are_equal(sizes) else (x.shape[0], 1)
    parts: Tensor = planes.unflatten(0, samples)
    return parts


def _sum(parts: Tensor) -> Tensor:
    """Sum ``[P, n, C, L]`` to ``[P, C]``."""
    # Compiled for a CPU, one sum over channels_last goes through all samples for a few channels.
    if parts.stride(2) == 1:
        return parts.sum(dim=3).sum(dim=1)
    return parts.sum(dim=(1, 3))


def _of_blocks(groups: Groups, *rows: Tensor) -> tuple[Tensor, ...]:
    """Give each block the row of its group."""
    if groups is None:
        return rows
    # Side by side, a compiler has to write them down, and can't work them out wherever it reads.
    return of_blocks(torch.cat(rows, dim=1), groups).chunk(len(rows), dim=1)


def _spread(x: Tensor, sizes: Sizes, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give x, cut if it can be, its numbers in rows ``[blocks, C]``."""
    space = [1] * (x.ndim - 2)
    if _is_cut(x, sizes):
        return tuple(row.view(row.shape[0], 1, row.shape[1], *space) for row in rows)
    # Side by side: see `_of_blocks`.
    spread = per_sample(torch.cat(rows, dim=1), sizes)
    return spread.view(*spread.shape, *space).chunk(len(rows), dim=1)
