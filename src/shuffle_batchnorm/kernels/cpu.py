"""The four kernels for the CPU, from aten's loops, at the speed of ``nn.BatchNorm2d``.

The affine kernels are broadcasts. The sums are aten's batch norms, which know channels, not blocks;
two ways turn blocks into channels without a copy:

- *pieces*: one call per block, on lines ``[n * L, C]`` of channels-last input, or on all of it;
- *planes*, for several blocks of contiguous input: each sample's channel, ``[1, N * C, L]``, is a
  channel of its own. The statistics of samples, ``1 / L`` of the data, are then pooled to blocks.
"""

import math

import torch
from torch import Tensor

from . import reference
from .rows import are_equal, block_sum, counts, per_sample

Sizes = tuple[int, ...]

_PART = 2**20  # values per thread


def block_moments(x: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """See `reference.block_moments`."""
    x, lines = _layout(x)
    if lines:
        blocks = [_moments(piece) for piece in _pieces(x, sizes)]
        return torch.stack([mean for mean, _ in blocks]), torch.stack([std for _, std in blocks])
    shape = x.shape[:2]
    planes = x.view(shape.numel(), -1)
    count = counts(sizes, planes.shape[1], planes).double().clamp(min=1)
    sums = planes.sum(dim=1).view(shape)
    mean = (block_sum(sums, sizes, torch.float64) / count).to(x.dtype)
    distances = _distances(planes, *_per_plane(sizes, mean)).view(shape)
    std = (block_sum(distances.double().square_(), sizes) / count).sqrt_()
    if not math.isfinite(float(std.sum())):
        # A square did not fit the dtype.
        mean, std = reference.block_moments(x.double(), sizes)
    return mean.to(x.dtype), std.to(x.dtype)


def block_affine(x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """See `reference.block_affine`."""
    x, lines = _layout(x)
    y = torch.empty_like(x)
    if not lines:
        # A batch norm in eval mode, with running statistics `center` and 1.
        center, scale, shift = _per_plane(sizes, center, scale, shift)
        unit, unused = torch.ones_like(center), x.new_empty(0)
        torch.native_batch_norm(
            _planes(x), scale, shift, center, unit, False, 0.0, 0.0,
            out=(_planes(y), unused, unused.clone()),
        )  # fmt: skip
        return y
    shift = torch.addcmul(shift, center, scale, value=-1)
    source, scales, shifts = _broadcast(x, sizes, lines, scale, shift)
    torch.addcmul(shifts, source, scales, out=_broadcast(y, sizes, lines)[0])
    return y


def block_grad_sums(
    dy: Tensor, x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.block_grad_sums`."""
    x, lines = _layout(x)
    dy = _as_layout(dy, lines)
    if lines:
        pieces = zip(_pieces(x, sizes), _pieces(dy, sizes), strict=True)
        sums = [_grad_sums(*piece, center[k], scale[k]) for k, piece in enumerate(pieces)]
        return torch.stack([total for total, _ in sums]), torch.stack([dot for _, dot in sums])
    total, dot = _grad_sums(_planes(x), _planes(dy), *_per_plane(sizes, center, scale))
    shape = x.shape[:2]
    return block_sum(total.view(shape), sizes), block_sum(dot.view(shape), sizes)


def block_grad_affine(
    dy: Tensor, x: Tensor, sizes: Sizes, a: Tensor, b: Tensor, center: Tensor, c: Tensor
) -> Tensor:
    """See `reference.block_grad_affine`."""
    x, lines = _layout(x)
    dy = _as_layout(dy, lines)
    dx = block_affine(x, sizes, center, b, c)
    gradient, scales = _broadcast(dy, sizes, lines, a)
    _broadcast(dx, sizes, lines)[0].addcmul_(gradient, scales)
    return dx


def _layout(x: Tensor) -> tuple[Tensor, bool]:
    """Return `x`, copied if it has neither layout, and whether it is in lines ``[N * L, C]``.

    ``L = 1`` is in lines too: planes of one value have nothing to sum.
    """
    if _in_lines(x):
        return x, True
    if not x.is_contiguous():
        dense = torch.empty_like(x)  # in the same order of axes: lines with gaps become lines
        if _in_lines(dense):
            return dense.copy_(x), True
    return x.contiguous(), False


def _in_lines(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


def _as_layout(dy: Tensor, lines: bool) -> Tensor:
    return dy.movedim(1, -1).contiguous().movedim(-1, 1) if lines else dy.contiguous()


def _pieces(x: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
    """Cut ``[N, C, *]`` in lines into its blocks, ``[n * L, C]``."""
    n, channels = x.shape[:2]
    length = x.shape[2:].numel()
    lengths = [size * length for size in sizes]
    return torch.split(x.movedim(1, -1).view(n * length, channels), lengths)


def _planes(x: Tensor) -> Tensor:
    """View contiguous ``[N, C, *]`` as ``[1, N * C, L]``."""
    return x.view(1, x.shape[0] * x.shape[1], x.shape[2:].numel())


def _per_plane(sizes: Sizes, *rows: Tensor) -> tuple[Tensor, ...]:
    """Give each plane its number in rows ``[blocks, C]``: each ``[N * C]``, contiguous."""
    if are_equal(sizes):
        spread = torch.stack(rows)[:, :, None].expand(-1, -1, sizes[0], -1)
        return spread.reshape(len(rows), -1).contiguous().unbind()
    return tuple(per_sample(row, sizes).view(-1) for row in rows)


def _broadcast(x: Tensor, sizes: Sizes, lines: bool, *rows: Tensor) -> tuple[Tensor, ...]:
    """View `x` as ``[blocks, n, C, L]`` or ``[blocks, n * L, C]``, and rows to broadcast with it.

    Uneven blocks are taken sample by sample.
    """
    channels, length = x.shape[1], x.shape[2:].numel()
    if not are_equal(sizes):
        rows = tuple(per_sample(row, sizes) for row in rows)
        sizes = (1,) * x.shape[0]
    if lines:
        view = x.movedim(1, -1).view(len(sizes), sizes[0] * length, channels)
        return (view, *(row[:, None, :] for row in rows))
    view = x.view(len(sizes), sizes[0], channels, length)
    return (view, *(row[:, None, :, None] for row in rows))


def _distances(planes: Tensor, centers: Tensor) -> Tensor:
    """Return the norm of each plane's distance to its center, ``[planes]``."""
    # In parts that stay in the cache: the difference is never as large as the input.
    rows = max(1, _PART * torch.get_num_threads() // planes.shape[1])
    parts = zip(planes.split(rows), centers[:, None].split(rows), strict=True)
    return torch.cat([torch.linalg.vector_norm(part - center, dim=1) for part, center in parts])


# What follows works on the channels, axis 1, of one block, or of all planes.


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        zeros = x.new_zeros(x.shape[1])
        return zeros, zeros
    mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
    return mean, variance.sqrt_()


def _grad_sums(x: Tensor, dy: Tensor, center: Tensor, inverse_std: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum dy`` and ``sum dy * (x - center) * inverse_std``."""
    if x.numel() == 0:
        zeros = torch.zeros_like(center)
        return zeros, zeros
    # The gradients of bias and weight of a batch norm with these saved statistics.
    _, dot, total = torch.ops.aten.native_batch_norm_backward(
        dy, x, inverse_std, None, None, center, inverse_std, True, 0.0, [False, True, True]
    )
    return total, dot
