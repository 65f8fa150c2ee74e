"""The four kernels for the CPU, from aten's batch norm, which knows channels, not blocks.

Input is cut into parts that aten takes as channels; what is found of parts is merged. Of contiguous
input each sample's channel is a part, in ``[1, N * C, L]``. Of channels-last input and ``[N, C]``
each block's are, in ``[n * L, C]``; small blocks are copied side by side, ``[n * L, blocks * C]``.

The numerics are those of ``nn.BatchNorm2d``: squares are of distances to a mean, so next to nothing
cancels. What is not finite is computed again in float64: a deviation may be where its square isn't.
"""

import math
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from .layouts import as_layout, layout
from .rows import Groups, Sizes, are_equal, block_sum, widen
from .rows import backward_rows as backward_rows
from .rows import dx_coefficients as dx_coefficients
from .rows import merge_moments as merge_moments
from .rows import normaliser_rows as normaliser_rows
from .rows import param_grads as param_grads

Cut = tuple[Sizes, Groups]  # parts of each block, and the groups of these
_SMALL = 2**14  # values of a block that are copied in less time than aten is called
_CHUNK = 2**17  # values per thread that stay in a cache from one pass to the next


def block_moments(x: Tensor, sizes: Sizes, groups: Groups = None) -> tuple[Tensor, Tensor]:
    """See `reference.block_moments`."""
    x, channels_last = _layout(x, sizes)
    batches, cut = _parts(channels_last, sizes, groups, x)
    moments = (torch.batch_norm_update_stats(part, None, None, 0.0) for (part,) in batches)
    mean, std = _merge(*_rows(moments, x), cut)
    if x.dtype == torch.float32 and not math.isfinite(std.sum()):
        mean, std = (row.float() for row in block_moments(x.double(), sizes, groups))
    return mean, std


def block_affine(
    x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor, shift: Tensor, groups: Groups = None
) -> Tensor:
    """See `reference.block_affine`."""
    like, (x, channels_last) = x, _layout(x, sizes)
    if channels_last:
        shift = torch.addcmul(shift, center, scale, value=-1)
        scale, shift = (_per_sample(row, x, sizes, groups, 1) for row in (scale, shift))
        return _as(like, x, torch.addcmul(shift, _flat(x, True), scale))
    owners = _owners(sizes, groups)
    scale, shift, center = (row.index_select(0, owners).view(-1) for row in (scale, shift, center))
    planes, one = x.view(1, len(scale), -1), torch.ones_like(scale)
    y = torch.native_batch_norm(planes, scale, shift, center, one, False, 0.0, 0.0)[0]
    return _as(like, x, y)


def block_grad_sums(
    dy: Tensor, x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor, groups: Groups = None
) -> tuple[Tensor, Tensor]:
    """See `reference.block_grad_sums`."""
    x, channels_last = _layout(x, sizes)
    dy = as_layout(widen(dy), channels_last)
    batches, cut = _parts(channels_last, sizes, groups, dy, x)
    if cut is not None:
        center, scale = (row.index_select(0, _owners(*cut)) for row in (center, scale))
    # aten reads rows as contiguous, whatever their strides.
    rows = [row.reshape(-1).contiguous() for row in (center, scale)]
    split = [[row] if len(batches) == 1 else row.chunk(len(batches)) for row in rows]
    total, dot = _rows(map(_grad_sums, batches, *split), x)
    return _sum(total, cut), _sum(dot, cut)


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
    like, (x, channels_last) = x, _layout(x, sizes)
    values, axis = _flat(x, channels_last), 1 if channels_last else 2
    # x * b is as large as the mean, and so is its rounding; yet smaller than that of aten's sum of
    # channels-last values, where a pass may be saved.
    centred = axis == 2 or x.ndim == 2
    c = c if centred else torch.addcmul(c, b, center, value=-1)
    a = _per_sample(a, x, sizes, users, axis)
    b, center, c = (_per_sample(row, x, sizes, groups, axis) for row in (b, center, c))
    grads = _flat(as_layout(widen(dy), channels_last), channels_last)
    if axis == 1:
        dx = torch.addcmul(c, values - center if centred else values, b).addcmul_(grads, a)
        return _as(like, x, dx)
    dx = torch.empty_like(values)
    for out, v, d, factor, slope, mean, shift in _chunks(dx, values, grads, a, b, center, c):
        torch.sub(v, mean, out=out).mul_(slope).add_(shift).addcmul_(d, factor)
    return _as(like, x, dx)


def _layout(x: Tensor, sizes: Sizes) -> tuple[Tensor, bool]:
    """See `layouts.layout`. Channels-last is what aten knows as such, in blocks of one size."""
    x, channels_last = layout(widen(x))
    known = are_equal(sizes) and (x.ndim != 3 or x.shape[2] == 1)
    return (x, True) if channels_last and known else (x.contiguous(), False)


def _as(like: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Give y, which is new and ordered as x in memory, the shape of x, and as `like` its dtype."""
    if y.shape != x.shape:
        y.as_strided_(x.size(), x.stride())  # in place: what follows may not change a view
    return y if like is x else torch.empty_like(like).copy_(y)


def _parts(
    channels_last: bool, sizes: Sizes, groups: Groups, *tensors: Tensor
) -> tuple[list[tuple[Tensor, ...]], Cut | None]:
    """Return batches whose channels, axis 1, are parts, and how these merge; None: not at all."""
    (samples, channels), number = tensors[0].shape[:2], groups.number if groups else len(sizes)
    if not channels_last:
        return [tuple(x.view(1, samples * channels, -1) for x in tensors)], (sizes, groups)
    flat = [x if x.ndim == 2 else _flat(x, True).reshape(-1, channels) for x in tensors]
    if number == 1:
        return [tuple(flat)], None
    if flat[0].numel() < _SMALL * len(sizes):
        order = _side_by_side(sizes, groups, flat[0].shape[0] // samples)
        return [tuple(x.index_select(0, order).view(-1, number * channels) for x in flat)], None
    blocks = (x.view(len(sizes), -1, channels).unbind() for x in flat)
    return list(zip(*blocks, strict=True)), groups and ((1,) * len(sizes), groups)


def _grad_sums(batch: tuple[Tensor, ...], center: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum dy`` and ``sum dy * (x - center) * scale`` of channels."""
    # The gradients of bias and weight of a batch norm whose saved mean and rstd these are.
    _, dot, total = torch.ops.aten.native_batch_norm_backward.default(
        *batch, None, None, None, center, scale, True, 0.0, [False, True, True]
    )
    return total, dot


def _rows(found: Iterable[tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two that were found of all batches as rows ``[parts, C]``."""
    first, second = (r[0] if len(r) == 1 else torch.cat(r) for r in zip(*found, strict=True))
    return first.view(-1, x.shape[1]), second.view(-1, x.shape[1])


def _sum(parts: Tensor, cut: Cut | None) -> Tensor:
    """Sum rows of parts to those of blocks or groups."""
    if cut is None or cut[1] is None:
        return parts if cut is None else block_sum(parts, cut[0])
    parts = parts.index_select(0, _side_by_side(*cut, 1))
    return parts.view(-1, cut[1].number, parts.shape[1]).sum(dim=0)


def _merge(mean: Tensor, var: Tensor, cut: Cut | None) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of blocks or groups; all parts have as many values."""
    if cut is None:
        return mean, var.sqrt_()
    total, owners = _sum(mean.double(), cut), _owners(*cut)
    size = owners.bincount(minlength=len(total)).clamp_(min=1).unsqueeze(1)
    center = (total / size).to(mean.dtype)
    distance = mean - center.index_select(0, owners)
    return center, _sum(torch.addcmul(var, distance, distance), cut).div_(size).sqrt_()


def _flat(x: Tensor, channels_last: bool) -> Tensor:
    """View ``[N, C, *]`` as ``[N, C, L]``, channels-last as ``[N, L, C]``; ``[N, C]`` stays."""
    if x.ndim == 2:
        return x
    return x.movedim(1, -1).flatten(1, -2) if channels_last else x.flatten(2)


def _per_sample(row: Tensor, x: Tensor, sizes: Sizes, groups: Groups, axis: int) -> Tensor:
    """Give each sample its row, to broadcast with `_flat`; one row is for all."""
    row = row if row.shape[0] == 1 else row.index_select(0, _owners(sizes, groups))
    return row if x.ndim == 2 else row.unsqueeze(axis)


def _chunks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Cut tensors along samples, for several passes over what stays in a cache."""
    samples = tensors[0].shape[0]
    size = max(1, _CHUNK * torch.get_num_threads() * samples // tensors[0].numel())
    return zip(*(x.expand(samples, *x.shape[1:]).split(size) for x in tensors), strict=True)


@lru_cache(maxsize=1024)
def _owners(sizes: Sizes, groups: Groups) -> Tensor:
    """Return the row of each sample or part: its block, or the group of that."""
    owners = torch.tensor(range(len(sizes)) if groups is None else groups.owners, device="cpu")
    return owners.repeat_interleave(torch.tensor(sizes, device="cpu"))


@lru_cache(maxsize=1024)
def _side_by_side(sizes: Sizes, groups: Groups, length: int) -> Tensor:
    """Return the first position of each block or group, then the second of each, and so on."""
    number = len(sizes) if groups is None else groups.number
    samples = _owners(sizes, groups).argsort(stable=True)[:, None]
    return (samples * length + torch.arange(length, device="cpu")).view(number, -1).t().flatten()
