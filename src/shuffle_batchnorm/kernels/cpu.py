"""The four kernels for the CPU, from aten's loops, at the speed of ``nn.BatchNorm2d``.

The affine kernels are broadcasts. The sums are aten's batch norms, which know channels, not blocks;
two ways turn blocks into channels without a copy:

- *pieces*: one call per block, on lines ``[n * L, C]`` of channels-last input, or on all of it;
- *planes*, for several blocks of contiguous input: each sample's channel, ``[1, N * C, L]``, is a
  channel of its own. The statistics of samples, ``1 / L`` of the data, are then pooled to blocks.
"""

import torch
from torch import Tensor

from .layouts import as_layout, layout
from .rows import are_equal, block_sum, counts, per_sample

Sizes = tuple[int, ...]

_SHORT = 64  # values in a plane below which a broadcast spends its time between planes


def block_moments(x: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """See `reference.block_moments`."""
    x, lines = layout(x)
    if lines or len(sizes) == 1:
        blocks = [_moments(piece) for piece in _pieces(x, sizes, lines)]
        return torch.stack([mean for mean, _ in blocks]), torch.stack([std for _, std in blocks])
    shape = x.shape[:2]
    mean, variance = torch.batch_norm_update_stats(_planes(x), None, None, 0.0)
    mean, variance = mean.view(shape), variance.view(shape)
    # Pooled by Chan's formula: the samples of a block have the same number of values.
    count = counts(sizes, 1, mean).clamp(min=1)
    block_mean = block_sum(mean, sizes) / count
    between = block_sum((mean - per_sample(block_mean, sizes)).square_(), sizes)
    return block_mean, (block_sum(variance, sizes).add_(between) / count).sqrt_()


def block_affine(x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """See `reference.block_affine`."""
    x, lines = layout(x)
    y = torch.empty_like(x)
    if not lines and x.shape[2:].numel() < _SHORT:
        # A batch norm in eval mode, with running statistics `center` and 1.
        scale, shift, center = (per_sample(row, sizes).view(-1) for row in (scale, shift, center))
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
    x, lines = layout(x)
    dy = as_layout(dy, lines)
    if lines or len(sizes) == 1:
        pieces = zip(_pieces(x, sizes, lines), _pieces(dy, sizes, lines), strict=True)
        sums = [_grad_sums(*piece, center[k], scale[k]) for k, piece in enumerate(pieces)]
        return torch.stack([total for total, _ in sums]), torch.stack([dot for _, dot in sums])
    centers, scales = (per_sample(row, sizes).view(-1) for row in (center, scale))
    total, dot = _grad_sums(_planes(x), _planes(dy), centers, scales)
    shape = x.shape[:2]
    return block_sum(total.view(shape), sizes), block_sum(dot.view(shape), sizes)


def block_grad_affine(
    dy: Tensor, x: Tensor, sizes: Sizes, a: Tensor, b: Tensor, center: Tensor, c: Tensor
) -> Tensor:
    """See `reference.block_grad_affine`."""
    x, lines = layout(x)
    dy = as_layout(dy, lines)
    dx = block_affine(x, sizes, center, b, c)
    gradient, scales = _broadcast(dy, sizes, lines, a)
    _broadcast(dx, sizes, lines)[0].addcmul_(gradient, scales)
    return dx


def _pieces(x: Tensor, sizes: Sizes, lines: bool) -> tuple[Tensor, ...]:
    """Cut ``[N, C, *]`` into its blocks, as lines ``[n * L, C]`` or as they are, ``[n, C, L]``."""
    n, channels = x.shape[:2]
    length = x.shape[2:].numel()
    if lines:
        lengths = [size * length for size in sizes]
        return torch.split(x.movedim(1, -1).view(n * length, channels), lengths)
    return torch.split(x.view(n, channels, length), list(sizes))


def _planes(x: Tensor) -> Tensor:
    """View contiguous ``[N, C, *]`` as ``[1, N * C, L]``."""
    return x.view(1, x.shape[0] * x.shape[1], x.shape[2:].numel())


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
