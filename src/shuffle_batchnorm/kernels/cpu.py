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
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .layouts import as_layout, layout
from .rows import (
    Pools,
    Sizes,
    accumulation_dtype,
    are_equal,
    block_sum,
    has_numbers,
    per_sample,
    pool_moments,
    pool_sum,
    samples_of_pools,
    take,
)

_SHARE = 16  # of the values, of which one makes a guess
_LONG = 2**14  # values of a plane
_LINES = 2**11  # of a thread: aten adds them one after the other, in the dtype of the values
_PART = 2**19  # values per thread that are gone through twice while they are in a cache
_CALL = 2**17  # values of a block in lines that take as long as calling aten for it
_SMALL = 2**22  # values that two passes over cached parts map faster than one pass over all


def block_moments(x: Tensor, sizes: Sizes, pools: Pools | None = None) -> tuple[Tensor, Tensor]:
    """See `reference.block_moments`."""
    x, lines = layout(_full(x))
    mean, std = _moments(x, sizes, pools, lines)
    if x.dtype == torch.float32 and has_numbers(x) and not math.isfinite(std.sum()):
        # A deviation fits float32 wherever the values do; its square may not.
        mean, std = (rows.float() for rows in _moments(x.double(), sizes, pools, lines))
    return mean, std


def _moments(x: Tensor, sizes: Sizes, pools: Pools | None, lines: bool) -> tuple[Tensor, Tensor]:
    if lines and not _are_many(x, sizes):
        blocks = [_line_moments(piece) for piece in _pieces(x, sizes)]
        mean, std = (torch.stack(rows) for rows in zip(*blocks, strict=True))
        return pool_moments(mean, std, sizes, pools)
    if pools is not None and pools.number * _SHARE < len(sizes):
        return pool_moments(*_moments(x, sizes, None, lines), sizes, pools)
    center = _guess(x, sizes, pools, lines)
    offset, square = _moments_about(center, x, sizes, pools, lines)
    # At most 4 bits cancel: the guess is at most sqrt(15) deviations off.
    variance = torch.addcmul(square, offset, offset, value=-1)
    return center.add_(offset), variance.clamp_(min=0).sqrt_()


def block_affine(x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """See `reference.block_affine`."""
    dtype = x.dtype
    x, lines = layout(_full(x))
    y = torch.empty_like(x)
    shift = torch.addcmul(shift, center, scale, value=-1)
    if lines or x.numel() < _SMALL:
        views = (_samples(tensor, sizes, lines) for tensor in (y, x))
        out, source, *rows = *views, *_rows(sizes, lines, scale, shift)
        if lines:
            torch.addcmul(rows[1], source, rows[0], out=out)
            return y.to(dtype)
        for part, values, scales, shifts in _parts(out, source, *rows):
            torch.mul(values, scales, out=part).add_(shifts)
    else:
        _one_pass_affine(y, x, *_per_plane(sizes, scale, shift))
    return y.to(dtype)


def block_grad_sums(
    dy: Tensor, x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.block_grad_sums`."""
    x, lines = layout(_full(x))
    dy = as_layout(_full(dy), lines)
    if lines and _are_many(x, sizes):
        total, dot = _grad_sums_of_many(dy, x, sizes, center)
        return total, dot * scale
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
    views = (_samples(tensor, sizes, lines) for tensor in (dx, dy, x))
    for part in _parts(*views, *_rows(sizes, lines, a, b, center, c)):
        _write_grad(lines, *part)
    return dx.to(dtype)


def _write_grad(
    lines: bool, dx: Tensor, dy: Tensor, x: Tensor, a: Tensor, b: Tensor, center: Tensor, c: Tensor
) -> None:
    """Write ``a * dy + b * (x - center) + c``."""
    # x * b would be as large as the mean, and so would be what its rounding leaves.
    torch.sub(x, center, out=dx)
    if lines:
        torch.addcmul(c, dx, b, out=dx)
    else:  # aten's loops over planes are vectorised with one number per plane, not with two
        dx.mul_(b).add_(c)
    dx.addcmul_(dy, a)


def _full(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x))


def _samples(x: Tensor, sizes: Sizes, lines: bool) -> Tensor:
    """View ``[N, C, *]`` as ``[blocks, n, C, L]``, in lines as ``[blocks, n, L, C]``.

    Uneven blocks are taken sample by sample.
    """
    blocks = len(sizes) if are_equal(sizes) else x.shape[0]
    shape = blocks, x.shape[0] // blocks, x.shape[1], x.shape[2:].numel()
    if lines:
        return x.movedim(1, -1).view(*shape[:2], shape[3], shape[2])
    return x.view(shape)


def _rows(sizes: Sizes, lines: bool, *rows: Tensor) -> list[Tensor]:
    """View rows ``[blocks, C]`` to broadcast with `_samples`."""
    if not are_equal(sizes):
        rows = tuple(per_sample(row, sizes) for row in rows)
    last = (1, rows[0].shape[1]) if lines else (rows[0].shape[1], 1)
    return [row.view(len(row), 1, *last) for row in rows]


def _per_plane(sizes: Sizes, *rows: Tensor) -> tuple[Tensor, ...]:
    """Give each plane its number in rows ``[blocks, C]``: each ``[N * C]``, contiguous."""
    if sizes[0] == sizes[-1] == 1:
        return tuple(row.reshape(-1) for row in rows)
    if are_equal(sizes):
        spread = torch.stack(rows)[:, :, None].expand(-1, -1, sizes[0], -1)
        return spread.reshape(len(rows), -1).contiguous().unbind()
    return tuple(per_sample(row, sizes).view(-1) for row in rows)


def _guess(x: Tensor, sizes: Sizes, pools: Pools | None, lines: bool) -> Tensor:
    """Return the mean of at least a sixteenth of each pool's values, ``[pools, C]``."""
    values, axis = _samples(x, sizes, lines), _axis(lines)
    samples = at_hand = values.shape[1]
    if pools is not None:
        # Those of its first block are where its part begins: a slice is cheaper than an index.
        values = values.view(pools.number, -1, *values.shape[2:])
        samples, at_hand = values.shape[1], sizes[0]
    step = at_hand // -(-samples // _SHARE)
    seen = values[:, :at_hand:step]
    length = -(-values.shape[axis] * samples // (_SHARE * seen.shape[1]))
    # First per sample: the sum of all of them is the first to be infinite.
    few = seen.narrow(axis, 0, length).mean(dim=axis)
    few = few.mean(dim=1) if few.shape[1] > 1 else few[:, 0]
    if pools is None and not are_equal(sizes):
        few = block_sum(few, sizes) / samples_of_pools(sizes, None, few)
    # What is infinite in float32 is looked at again in float64.
    return few.nan_to_num_(0.0, 0.0, 0.0) if few.dtype == torch.float64 else few


def _moments_about(
    center: Tensor, x: Tensor, sizes: Sizes, pools: Pools | None, lines: bool
) -> tuple[Tensor, Tensor]:
    """Return the mean distance to a center, and the mean square of it, ``[pools, C]``."""
    values, axis = _samples(x, sizes, lines), _axis(lines)
    sums = _sums_of_samples(values, axis)
    totals, norms = sums.unbind()
    differences = values.new_empty(0)
    (rows,) = _rows(sizes, lines, take(center, None if pools is None else pools.owners))
    for part, centers, total, norm in _parts(values, rows, totals, norms, whole=4 - axis):
        difference = torch.sub(part, centers, out=differences.resize_(part.shape))
        torch.sum(difference, dim=axis, keepdim=True, out=total)
        if not lines and part.shape[axis] < _LONG:
            torch.linalg.vector_norm(difference, dim=axis, keepdim=True, out=norm)
        else:
            # A norm adds one after the other, in the dtype of the values; a sum in a tree.
            torch.sum(difference.square_(), dim=axis, keepdim=True, out=norm).sqrt_()
    norms.square_()
    size = samples_of_pools(sizes, pools, x) * x.shape[2:].numel()
    total, square = (pool_sum(rows, pools).div_(size) for rows in _of_blocks(sums, x, sizes))
    return total, square


def _grad_sums_of_many(dy: Tensor, x: Tensor, sizes: Sizes, center: Tensor) -> Sequence[Tensor]:
    """Return ``sum dy`` and ``sum dy * (x - center)`` of each block in lines."""
    values, gradients, axis = _samples(x, sizes, True), _samples(dy, sizes, True), _axis(True)
    sums = _sums_of_samples(values, axis)
    products = values.new_empty(0)
    tensors = values, gradients, *_rows(sizes, True, center), *sums.unbind()
    for part, grads, centers, total, dot in _parts(*tensors, whole=4 - axis):
        torch.sum(grads, dim=axis, keepdim=True, out=total)
        product = torch.sub(part, centers, out=products.resize_(part.shape)).mul_(grads)
        torch.sum(product, dim=axis, keepdim=True, out=dot)
    return _of_blocks(sums, x, sizes).unbind()


def _axis(lines: bool) -> int:
    """Return which axis of `_samples` a sum goes over."""
    return 2 if lines else 3


def _sums_of_samples(values: Tensor, axis: int) -> Tensor:
    """Return memory for two sums over an axis."""
    shape = list(values.shape)
    shape[axis] = 1
    return values.new_empty(2, *shape)


def _of_blocks(sums: Tensor, x: Tensor, sizes: Sizes) -> Tensor:
    """Sum two sums of each sample of `x` over the blocks, to ``[2, blocks, C]``."""
    samples = sums.view(2 * x.shape[0], x.shape[1])
    return block_sum(samples, sizes * 2).view(2, len(sizes), x.shape[1])


def _parts(*tensors: Tensor, whole: int = 1) -> Iterable[tuple[Tensor, ...]]:
    """Cut tensors that broadcast to the first into parts that stay in a cache.

    The last axes stay whole, as many as that.
    """
    room = _PART * torch.get_num_threads()
    return (tensors,) if tensors[0].numel() <= room else _cut(room, whole, *tensors)


def _cut(room: int, whole: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    shape, numel = tensors[0].shape, tensors[0].numel()
    axis = next((k for k, size in enumerate(shape[:-whole]) if size > 1), None)
    if numel <= room or axis is None:
        yield tensors
        return
    size = max(1, room * shape[axis] // numel)
    pieces = (
        tensor.split(size, axis) if tensor.shape[axis] > 1 else itertools.repeat(tensor)
        for tensor in tensors
    )
    for piece in zip(*pieces, strict=False):
        yield from _cut(room, whole, *piece)


def _one_pass_affine(y: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Write ``x * scale + shift``, with a number per plane."""
    # A batch norm in eval mode, with running statistics 0 and 1.
    zero, one, unused = torch.zeros_like(scale), torch.ones_like(scale), x.new_empty(0)
    planes = 1, len(scale), x.shape[2:].numel()
    torch.native_batch_norm(
        x.view(planes), scale, shift, zero, one, False, 0.0, 0.0,
        out=(y.view(planes), unused, unused.clone()),
    )  # fmt: skip


def _are_many(x: Tensor, sizes: Sizes) -> bool:
    """Return whether in lines a call per block costs more than two more passes over parts."""
    return len(sizes) > 1 and x.numel() <= len(sizes) * _CALL


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
