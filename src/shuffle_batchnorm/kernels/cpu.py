"""The four kernels for the CPU, from aten's loops, about as fast as ``nn.BatchNorm2d``.

aten's batch norms know channels, not blocks. Two ways turn blocks into channels without a copy:

- *planes*, for contiguous input: each sample's channel, L values in a row. Rows ``[blocks, C]``
  broadcast with ``[blocks, n, C, L]``; aten's batch norm takes each plane for a channel, in
  ``[1, N * C, L]``, and reads it in the order of memory, in half the time of its own strides. What
  is summed per plane, ``1 / L`` of the data, is then pooled to blocks.
- *lines* ``[N * L, C]``, for channels-last input: the sums of large blocks take a call for each,
  those of small ones plain operations for all; the affine kernels broadcast.

aten takes half precision only with rows rounded to it, so that is copied to float32 and back.
"""

import math
from functools import cache

import torch
from torch import Tensor

from .cpu_sums import (
    SHARE,
    are_small,
    line_grad_sums,
    line_moments,
    moments,
    plane_grad_sums,
    take_groups,
)
from .cpu_views import PART, in_parts, per_plane, view_rows, view_values
from .layouts import as_layout, layout
from .rows import BlockGroups, Sizes, group_sum, has_numbers, merge_blocks, widen
from .rows import backward_rows as backward_rows
from .rows import dx_coefficients as dx_coefficients
from .rows import merge_moments as merge_moments
from .rows import normaliser_rows as normaliser_rows
from .rows import param_grads as param_grads

_MANY = 2**10  # lines with the same row, whose gradient takes two passes
_SMALL = 2**22  # values that two passes over cached parts map faster than one pass over all


def block_moments(
    x: Tensor, sizes: Sizes, groups: BlockGroups | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.block_moments`."""
    _keep_freed_memory()
    x, channels_last = layout(widen(x))
    can_look = has_numbers(x)
    # Not traced: a graph for any size can't hold aten's batch norm.
    if channels_last and can_look and not are_small(x, sizes):
        mean, std = merge_blocks(*line_moments(x, sizes), sizes, groups)
    elif groups is not None and groups.number * SHARE < len(sizes):
        # The first block of a pool is less than a guess has to see.
        return merge_blocks(*block_moments(x, sizes), sizes, groups)
    else:
        mean, std = moments(x, sizes, groups, channels_last)
    if x.dtype == torch.float32 and can_look and not math.isfinite(std.sum()):
        _look_again(x, sizes, groups, mean, std)
    return mean, std


@cache
def _keep_freed_memory() -> None:
    """Let glibc keep up to 64 MiB that a step frees for the next step.

    It keeps twice the largest block up to 32 MiB that the process has freed. The output, gradient
    and sums of a layer by itself are more, so that a loop over one would get new pages at each
    step, and take up to three times as long. The block that is freed here has no pages.
    """
    bytes(2**25 - 2**14)


def _look_again(
    x: Tensor, sizes: Sizes, groups: BlockGroups | None, mean: Tensor, std: Tensor
) -> None:
    """Write the moments whose squares float32 doesn't hold: a deviation fits where values do."""
    channels = (mean.isfinite() & ~std.isfinite()).any(dim=0).nonzero()[:, 0]
    if len(channels) == 0:  # the values themselves are infinite
        return
    for some in channels.split(max(1, PART * x.shape[1] // x.numel())):
        again = block_moments(x[:, some].double(), sizes, groups)
        for rows, new in zip((mean, std), again, strict=True):
            rows[:, some] = new.to(rows.dtype)


def block_affine(
    x: Tensor,
    sizes: Sizes,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    groups: BlockGroups | None = None,
) -> Tensor:
    """See `reference.block_affine`."""
    dtype = x.dtype
    x, channels_last = layout(widen(x))
    y = torch.empty_like(x)
    scale, shift = take_groups(groups, scale, torch.addcmul(shift, center, scale, value=-1))
    if not channels_last and x.numel() >= _SMALL:
        _one_pass_affine(y, x, *per_plane(sizes, scale, shift))
        return y.to(dtype)
    views = (view_values(tensor, sizes, channels_last) for tensor in (y, x))
    rows = view_rows(sizes, channels_last, scale, shift)
    if channels_last:
        out, values = views
        torch.addcmul(rows[1], values, rows[0], out=out)
    else:
        for out, values, scales, shifts in in_parts(*views, *rows):
            torch.mul(values, scales, out=out).add_(shifts)
    return y.to(dtype)


def block_grad_sums(
    dy: Tensor,
    x: Tensor,
    sizes: Sizes,
    center: Tensor,
    scale: Tensor,
    groups: BlockGroups | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.block_grad_sums`."""
    x, channels_last = layout(widen(x))
    dy = as_layout(widen(dy), channels_last)
    sums_of_blocks = line_grad_sums if channels_last else plane_grad_sums
    total, dot = sums_of_blocks(dy, x, sizes, *take_groups(groups, center, scale))
    return group_sum(total, groups), group_sum(dot, groups)


def block_grad_affine(
    dy: Tensor,
    x: Tensor,
    sizes: Sizes,
    a: Tensor,
    b: Tensor,
    center: Tensor,
    c: Tensor,
    users: BlockGroups | None = None,
    groups: BlockGroups | None = None,
) -> Tensor:
    """See `reference.block_grad_affine`."""
    dtype = x.dtype
    x, channels_last = layout(widen(x))
    dy, dx = as_layout(widen(dy), channels_last), torch.empty_like(x)
    views = (view_values(tensor, sizes, channels_last) for tensor in (dx, dy, x))
    (a,) = take_groups(users, a)
    if channels_last and x.numel() >= _MANY * b.numel():
        # The error of aten's mean of so many lines is larger than that of a shift by it.
        b, c = take_groups(groups, b, torch.addcmul(c, b, center, value=-1))
        rows = view_rows(sizes, channels_last, a, b, c)
        for out, grads, values, factors, dx_coefficients, shifts in in_parts(*views, *rows, room=2):
            torch.addcmul(shifts, values, dx_coefficients, out=out).addcmul_(grads, factors)
        return dx.to(dtype)
    rows = view_rows(sizes, channels_last, a, *take_groups(groups, b, center, c))
    for out, grads, values, factors, dx_coefficients, centers, shifts in in_parts(*views, *rows):
        # x * b would be as large as the mean, and so would be what its rounding leaves.
        torch.sub(values, centers, out=out)
        if channels_last:
            torch.addcmul(shifts, out, dx_coefficients, out=out)
        else:  # over planes, aten vectorises an operation with one number per plane, not with two
            out.mul_(dx_coefficients).add_(shifts)
        out.addcmul_(grads, factors)
    return dx.to(dtype)


def _one_pass_affine(y: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Write ``x * scale + shift``, with a number per plane."""
    # A batch norm in eval mode, with running statistics 0 and 1.
    zero, one, unused = torch.zeros_like(scale), torch.ones_like(scale), x.new_empty(0)
    planes = 1, len(scale), x.shape[2:].numel()
    torch.native_batch_norm(
        x.view(planes), scale, shift, zero, one, False, 0.0, 0.0,
        out=(y.view(planes), unused, unused.clone()),
    )  # fmt: skip
