"""The four kernels for the CPU, from aten's loops, about as fast as ``nn.BatchNorm2d``.

aten's batch norms know channels, not blocks. Two ways turn blocks into channels without a copy:

- *planes*, for contiguous input: each sample's channel, L values in a row. Rows ``[blocks, C]``
  broadcast with ``[blocks, n, C, L]``; aten's batch norm takes each plane for a channel, in
  ``[1, N * C, L]``, and reads it in the order of memory, in half the time of its own strides. What
  is summed per plane, ``1 / L`` of the data, is then pooled to blocks.
- *lines* ``[N * L, C]``, for channels-last input: the sums take one call per block, or what fits a
  cache plain operations for all blocks; the affine kernels a broadcast.

aten takes half precision only with rows rounded to it, so that is copied to float32 and back.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from .layouts import as_layout, layout
from .rows import (
    Pools,
    accumulation_dtype,
    are_equal,
    block_sum,
    constant,
    has_numbers,
    per_sample,
    pool_moments,
    pool_sum,
    samples_of_pools,
    take,
)

Sizes = tuple[int, ...]

_LONG = 2**14  # values of a plane
_LINES = 2**11  # of a thread: aten adds them one after the other, in the dtype of the values
_PART = 2**19  # values per thread that are gone through twice while they are in a cache
_SMALL = 2**22  # values that two passes over cached parts map faster than one pass over all


def block_moments(x: Tensor, sizes: Sizes, pools: Pools | None = None) -> tuple[Tensor, Tensor]:
    """See `reference.block_moments`."""
    x, lines = layout(_full(x))
    if pools is not None and not has_numbers(x):
        return pool_moments(*block_moments(x, sizes), sizes, pools)
    if lines and not _are_few(x, sizes):
        blocks = [_line_moments(piece) for piece in _pieces(x, sizes)]
        mean, std = (torch.stack(rows) for rows in zip(*blocks, strict=True))
        return pool_moments(mean, std, sizes, pools)
    if lines:
        center, offset, square = _moments_of_few(x, sizes, pools)
    else:
        center = _guess(x, sizes) if pools is None else _guess_of_pools(x, sizes, pools)
        offset, square = _moments_about(center, x, sizes, pools)
    # square - offset**2, of which at most 4 bits cancel: the guess is at most sqrt(15) deviations
    # off. Where the square is infinite, that of the offset may be as well.
    root = square.sqrt_()
    std = (root - offset).mul_(root + offset).clamp_(min=0).sqrt_()
    if pools is not None and not math.isfinite(std.sum()):
        # Blocks may be so far apart that the dtype doesn't hold the squares: pool in float64.
        return pool_moments(*block_moments(x, sizes), sizes, pools)
    return center.add_(offset), std


def block_affine(x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """See `reference.block_affine`."""
    dtype = x.dtype
    x, lines = layout(_full(x))
    y = torch.empty_like(x)
    shift = torch.addcmul(shift, center, scale, value=-1)
    if lines:
        source, scales, shifts = _broadcast(x, sizes, scale, shift)
        torch.addcmul(shifts, source, scales, out=_broadcast(y, sizes)[0])
    elif x.numel() < _SMALL:
        tensors = _planes(y, sizes), _planes(x, sizes), *_rows(sizes, scale, shift)
        for out, part, scales, shifts in _parts(*tensors):
            torch.mul(part, scales, out=out).add_(shifts)
    else:
        _one_pass_affine(y, x, *_per_plane(sizes, scale, shift))
    return y.to(dtype)


def block_grad_sums(
    dy: Tensor, x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.block_grad_sums`."""
    x, lines = layout(_full(x))
    dy = as_layout(_full(dy), lines)
    if lines and _are_few(x, sizes):
        values = _samples(dy)
        products = _samples(x) - per_sample(center, sizes)[:, None]
        dots = products.mul_(values).sum(dim=1)
        return block_sum(values.sum(dim=1), sizes), block_sum(dots, sizes) * scale
    if lines:
        pieces = zip(_pieces(x, sizes), _pieces(dy, sizes), strict=True)
        sums = [_line_grad_sums(*piece, center[k], scale[k]) for k, piece in enumerate(pieces)]
        return torch.stack([total for total, _ in sums]), torch.stack([dot for _, dot in sums])
    samples = x.shape[:2]
    planes = 1, samples.numel(), x.shape[2:].numel()
    total, dot = _grad_sums(x.view(planes), dy.view(planes), *_per_plane(sizes, center, scale))
    return block_sum(total.view(samples), sizes), block_sum(dot.view(samples), sizes)


def block_grad_affine(
    dy: Tensor, x: Tensor, sizes: Sizes, a: Tensor, b: Tensor, center: Tensor, c: Tensor
) -> Tensor:
    """See `reference.block_grad_affine`."""
    dtype = x.dtype
    x, lines = layout(_full(x))
    dy, dx = as_layout(_full(dy), lines), torch.empty_like(x)
    if lines:
        source, *rows = _broadcast(x, sizes, a, b, center, c)
        views = _broadcast(dx, sizes)[0], _broadcast(dy, sizes)[0], source, *rows
    else:
        rows = _rows(sizes, a, b, center, c)
        views = _planes(dx, sizes), _planes(dy, sizes), _planes(x, sizes), *rows
    for part in _parts(*views):
        _write_grad(*part)
    return dx.to(dtype)


def _write_grad(
    dx: Tensor, dy: Tensor, x: Tensor, a: Tensor, b: Tensor, center: Tensor, c: Tensor
) -> None:
    """Write ``a * dy + b * (x - center) + c``."""
    # x * b would be as large as the mean, and so would be what its rounding leaves.
    torch.sub(x, center, out=dx).mul_(b).add_(c).addcmul_(dy, a)


def _full(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x))


def _planes(x: Tensor, sizes: Sizes) -> Tensor:
    """View contiguous ``[N, C, *]`` as ``[blocks, n, C, L]``; uneven blocks sample by sample."""
    blocks = len(sizes) if are_equal(sizes) else x.shape[0]
    return x.view(blocks, x.shape[0] // blocks, x.shape[1], x.shape[2:].numel())


def _rows(sizes: Sizes, *rows: Tensor) -> list[Tensor]:
    """View rows ``[blocks, C]`` to broadcast with `_planes`."""
    if not are_equal(sizes):
        rows = tuple(per_sample(row, sizes) for row in rows)
    return [row.view(len(row), 1, row.shape[1], 1) for row in rows]


def _per_plane(sizes: Sizes, *rows: Tensor) -> tuple[Tensor, ...]:
    """Give each plane its number in rows ``[blocks, C]``: each ``[N * C]``, contiguous."""
    if sizes[0] == sizes[-1] == 1:
        return tuple(row.reshape(-1) for row in rows)
    if are_equal(sizes):
        spread = torch.stack(rows)[:, :, None].expand(-1, -1, sizes[0], -1)
        return spread.reshape(len(rows), -1).contiguous().unbind()
    return tuple(per_sample(row, sizes).view(-1) for row in rows)


def _guess(x: Tensor, sizes: Sizes) -> Tensor:
    """Return the mean of at least a sixteenth of each block's values, ``[blocks, C]``."""
    values = _planes(x, sizes)
    samples, length = values.shape[1], values.shape[3]
    step = min(samples, 16)
    # First per plane: the sum of all of them is the first to be infinite.
    few = values[:, ::step, :, : -(-length * step // 16)].mean(dim=3).mean(dim=1)
    if not are_equal(sizes):
        few = block_sum(few, sizes) / samples_of_pools(sizes, None, few)
    return few.nan_to_num_(0.0, 0.0, 0.0)


def _guess_of_pools(x: Tensor, sizes: Sizes, pools: Pools) -> Tensor:
    """Return the mean of at least a sixteenth of each pool's values, ``[pools, C]``."""
    samples, length = x.shape[0] // pools.number, x.shape[2:].numel()
    step = min(samples, 16)
    seen = constant(_every(step, sizes, pools), torch.int64, x)
    few = x.view(*x.shape[:2], length)[:, :, : -(-length * step // 16)].index_select(0, seen)
    few = few.mean(dim=2).view(pools.number, -1, x.shape[1]).mean(dim=1)
    return few.nan_to_num_(0.0, 0.0, 0.0)


@lru_cache(maxsize=1024)
def _every(step: int, sizes: Sizes, pools: Pools) -> tuple[int, ...]:
    """Return the first sample of each pool and every `step`-th of its samples after it."""
    ends = tuple(itertools.accumulate(sizes))
    order = [k for block in pools.dealt for k in range(ends[block] - sizes[block], ends[block])]
    n = len(order) // pools.number
    return tuple(k for place, k in enumerate(order) if place % n % step == 0)


def _moments_about(
    center: Tensor, x: Tensor, sizes: Sizes, pools: Pools | None
) -> tuple[Tensor, Tensor]:
    """Return the mean distance to a center, and the mean square of it, ``[pools, C]``."""
    values = _planes(x, sizes)
    sums = values.new_empty(2, *values.shape[:3], 1)
    differences = values.new_empty(0)
    (rows,) = _rows(sizes, take(center, None if pools is None else pools.owners))
    for part, centers, total, norm in _parts(values, rows, *sums.unbind()):
        difference = torch.sub(part, centers, out=differences.resize_(part.shape))
        torch.sum(difference, dim=3, keepdim=True, out=total)
        if part.shape[3] < _LONG:
            torch.linalg.vector_norm(difference, dim=3, keepdim=True, out=norm)
        else:
            # A norm adds one after the other, in the dtype of the values; a sum in a tree.
            torch.sum(difference.square_(), dim=3, keepdim=True, out=norm).sqrt_()
    # A mean square may fit the dtype where the sum doesn't. Powers of 2 round nothing.
    half = 2.0 ** ((x.numel() // x.shape[1]).bit_length() // 2)
    sums[1].div_(half).square_()
    moments = block_sum(sums.view(2 * x.shape[0], x.shape[1]), sizes * 2)
    offset, square = pool_sum(moments.view(2, len(sizes), -1), pools).unbind()
    size = samples_of_pools(sizes, pools, x) * values.shape[3]
    return offset.div_(size), square.div_(size / half**2)


def _parts(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Cut tensors that broadcast to the first into parts that stay in a cache.

    The last axis stays whole.
    """
    room = _PART * torch.get_num_threads()
    return (tensors,) if tensors[0].numel() <= room else _cut(room, *tensors)


def _cut(room: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    shape, numel = tensors[0].shape, tensors[0].numel()
    axis = next((k for k, size in enumerate(shape[:-1]) if size > 1), None)
    if numel <= room or axis is None:
        yield tensors
        return
    size = max(1, room * shape[axis] // numel)
    pieces = (
        tensor.split(size, axis) if tensor.shape[axis] > 1 else itertools.repeat(tensor)
        for tensor in tensors
    )
    for piece in zip(*pieces, strict=False):
        yield from _cut(room, *piece)


def _one_pass_affine(y: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Write ``x * scale + shift``, with a number per plane."""
    # A batch norm in eval mode, with running statistics 0 and 1.
    zero, one, unused = torch.zeros_like(scale), torch.ones_like(scale), x.new_empty(0)
    planes = 1, len(scale), x.shape[2:].numel()
    torch.native_batch_norm(
        x.view(planes), scale, shift, zero, one, False, 0.0, 0.0,
        out=(y.view(planes), unused, unused.clone()),
    )  # fmt: skip


def _are_few(x: Tensor, sizes: Sizes) -> bool:
    """Return whether a call per block costs more than its values; never for a large tensor."""
    return len(sizes) > 1 and x.numel() <= min(_PART, len(sizes) * 2**15)


def _samples(x: Tensor) -> Tensor:
    """View ``[N, C, *]`` in lines as ``[N, L, C]``."""
    return x.movedim(1, -1).view(x.shape[0], -1, x.shape[1])


def _moments_of_few(x: Tensor, sizes: Sizes, pools: Pools | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return a center of each pool, and `_moments_about` it."""
    values, size = _samples(x), samples_of_pools(sizes, pools, x)

    def pooled(samples: Tensor) -> Tensor:
        return pool_sum(block_sum(samples, sizes), pools) / size

    center = pooled(values.mean(dim=1)).nan_to_num_(0.0, 0.0, 0.0)
    owners = None if pools is None else pools.owners
    differences = values - per_sample(take(center, owners), sizes)[:, None]
    offset = pooled(differences.mean(dim=1))
    return center, offset, pooled(differences.square_().mean(dim=1))


def _pieces(x: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
    """Cut ``[N, C, *]`` in lines into its blocks, ``[n * L, C]``."""
    length = x.shape[2:].numel()
    lines = x.movedim(1, -1).view(x.shape[0] * length, x.shape[1])
    return torch.split(lines, [size * length for size in sizes])


def _line_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation ``[C]`` of one block in lines."""
    if x.numel() == 0:
        zeros = x.new_zeros(x.shape[1])
        return zeros, zeros
    parts = x.split(_lines_of_a_part())
    moments = [torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts]
    if len(parts) == 1:
        return moments[0][0], moments[0][1].sqrt_()
    share = torch.tensor([len(part) / len(x) for part in parts], dtype=torch.float64)[:, None]
    means, variances = (torch.stack(rows).double() for rows in zip(*moments, strict=True))
    mean = (share * means).sum(dim=0)
    variance = (share * (means - mean).square_().add_(variances)).sum(dim=0)
    return mean.to(x.dtype), variance.sqrt_().to(x.dtype)


def _lines_of_a_part() -> int:
    return _LINES * torch.get_num_threads()


def _broadcast(x: Tensor, sizes: Sizes, *rows: Tensor) -> tuple[Tensor, ...]:
    """View `x` in lines as ``[blocks, n * L, C]``, and rows to broadcast with it.

    Uneven blocks are taken sample by sample.
    """
    if not are_equal(sizes):
        rows = tuple(per_sample(row, sizes) for row in rows)
        sizes = (1,) * x.shape[0]
    view = x.movedim(1, -1).view(len(sizes), sizes[0] * x.shape[2:].numel(), x.shape[1])
    return (view, *(row[:, None, :] for row in rows))


def _line_grad_sums(
    x: Tensor, dy: Tensor, center: Tensor, inverse_std: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `_grad_sums` of one block in lines."""
    lines = _lines_of_a_part()
    parts = zip(x.split(lines), dy.split(lines), strict=True)
    sums = [_grad_sums(*part, center, inverse_std) for part in parts]
    if len(sums) == 1:
        return sums[0]
    total, dot = (
        torch.stack(rows).sum(dim=0, dtype=torch.float64) for rows in zip(*sums, strict=True)
    )
    return total.to(x.dtype), dot.to(x.dtype)


def _grad_sums(x: Tensor, dy: Tensor, center: Tensor, inverse_std: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum dy`` and ``sum dy * (x - center) * inverse_std`` of channels, axis 1."""
    if x.numel() == 0:
        zeros = torch.zeros_like(center)
        return zeros, zeros
    # The gradients of bias and weight of a batch norm with these saved statistics.
    _, dot, total = torch.ops.aten.native_batch_norm_backward(
        dy, x, inverse_std, None, None, center, inverse_std, True, 0.0, [False, True, True]
    )
    return total, dot
