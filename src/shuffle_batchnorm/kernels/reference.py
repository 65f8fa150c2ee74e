"""The four kernels in plain torch: the truth for every other version, and what compile traces.

Tensors are ``[N, C, *]``; a block is a run of samples. Rows are ``[blocks, C]`` in float32, or
float64 for float64 input, and so is every sum, whatever the input's dtype.
"""

import math

import torch
from torch import Tensor

from .rows import (
    Pools,
    Sizes,
    block_sum,
    counts,
    per_sample,
    pool_moments,
    pool_sum,
    take_pools,
    widen,
)
from .rows import pool as pool
from .small import gradient_rows as gradient_rows
from .small import normaliser_rows as normaliser_rows
from .small import slopes as slopes
from .small import user_rows as user_rows


def block_moments(x: Tensor, sizes: Sizes, pools: Pools | None = None) -> tuple[Tensor, Tensor]:
    """Return each block's mean and (biased) standard deviation, 0 for an empty block.

    With pools those of each pool, ``[pools, C]``.

    Two passes over each sample's channel, its plane, then the planes of a block are pooled. Every
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
    return pool_moments(mean + offset, variance.clamp(min=0).sqrt(), sizes, pools)


def block_affine(
    x: Tensor,
    sizes: Sizes,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    pools: Pools | None = None,
) -> Tensor:
    """Return ``y = (x - center) * scale + shift`` with each block's rows, in x's dtype and layout.

    Args:
        x: ``[N, C, *]``.
        sizes: samples per block.
        center: ``[blocks, C]``; with pools ``[pools, C]``, a row for all blocks of a pool.
        scale: likewise.
        shift: likewise.
        pools: of blocks.
    """
    rows = take_pools(pools, center, scale, shift)
    center, scale, shift = _spread(sizes, x.ndim, *rows)
    return _cast((widen(x) - center) * scale + shift, x.dtype)


def block_grad_sums(
    dy: Tensor, x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor, pools: Pools | None = None
) -> tuple[Tensor, Tensor]:
    """Return each block's sums of ``dy`` and of ``dy * (x - center) * scale``, ``[blocks, C]``.

    With pools all rows are ``[pools, C]``, as in `block_affine`: the sums of each pool.
    """
    dy_planes, x_planes = _planes(dy), _planes(x)
    products = (dy_planes * (x_planes - _spread(sizes, 3, *take_pools(pools, center))[0])).sum(
        dim=2
    )
    sums = (block_sum(rows, sizes) for rows in (dy_planes.sum(dim=2), products))
    total, dot = (pool_sum(rows, pools) for rows in sums)
    return total, dot * scale


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
    """Return ``dx = a * dy + b * (x - center) + c`` with each block's rows ``[blocks, C]``.

    Or with rows of pools, as in `block_affine`: `a` of the pools `users`, the others of `pools`.
    """
    rows = *take_pools(users, a), *take_pools(pools, b, center, c)
    a, b, center, c = _spread(sizes, x.ndim, *rows)
    dx = (widen(x) - center) * b + c
    return _cast(dx + widen(dy) * a, x.dtype)


def _planes(x: Tensor) -> Tensor:
    """View ``[N, C, *]`` as ``[N, C, L]`` in the dtype of its statistics."""
    return widen(x.reshape(x.shape[0], x.shape[1], x.shape[2:].numel()))


def _spread(sizes: Sizes, ndim: int, *rows: Tensor) -> tuple[Tensor, ...]:
    """Give each sample its numbers in rows ``[blocks, C]``: each ``[N, C, 1, ...]``."""
    # Side by side, a compiler has to write them down, and can't work them out for every value.
    spread = per_sample(torch.cat(rows, dim=1), sizes)
    return spread.view(*spread.shape, *[1] * (ndim - 2)).chunk(len(rows), dim=1)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    # torch 2.11 compiles an output that was cast to the same dtype to a gradient of zeros.
    return x if x.dtype == dtype else x.to(dtype)
