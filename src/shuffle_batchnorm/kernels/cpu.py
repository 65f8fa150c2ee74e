"""The four kernels for the CPU, from aten's batch-norm loops, at the speed of ``nn.BatchNorm2d``.

aten knows channels, not blocks. Two layouts turn blocks into channels without a copy:

- *planes*, contiguous input: each sample's channel, ``[1, N * C, L]``, is a channel of its own.
  The statistics of samples, ``1 / L`` of the data, are then pooled to blocks.
- *lines*, channels last or ``L = 1``: a block is a run of lines of ``[N * L, C]``.
"""

import torch
from torch import Tensor

from .rows import block_sum, per_sample, reciprocal_counts

Sizes = tuple[int, ...]


def block_moments(x: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """See `reference.block_moments`."""
    x, lines = _layout(x)
    if lines:
        blocks = [_moments(block) for block in _split_lines(x, sizes)]
        return torch.stack([mean for mean, _ in blocks]), torch.stack([std for _, std in blocks])
    n, channels = x.shape[:2]
    mean, variance = torch.batch_norm_update_stats(_planes(x), None, None, 0.0)
    mean, variance = mean.view(n, channels), variance.view(n, channels)
    inverse = reciprocal_counts(sizes, 1, mean)
    block_mean = block_sum(mean, sizes) * inverse
    between = (mean - per_sample(block_mean, sizes)).square_()
    return block_mean, (block_sum(variance.add_(between), sizes) * inverse).sqrt_()


def block_affine(x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """See `reference.block_affine`."""
    x, lines = _layout(x)
    y = torch.empty_like(x)
    if lines:
        shift = torch.addcmul(shift, center, scale, value=-1)
        for k, (source, out) in _numbered(sizes, x, y):
            torch.addcmul(shift[k], source, scale[k], out=out)
    else:
        _plane_affine(x, sizes, center, scale, shift, out=y)
    return y


def block_grad_sums(
    dy: Tensor, x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.block_grad_sums`."""
    x, lines = _layout(x)
    dy = _as_layout(dy, lines)
    if lines:
        sums = [
            _grad_sums(source, gradient, center[k], scale[k])
            for k, (source, gradient) in _numbered(sizes, x, dy)
        ]
        return torch.stack([total for total, _ in sums]), torch.stack([dot for _, dot in sums])
    centers, scales = per_sample(center, sizes).reshape(-1), per_sample(scale, sizes).reshape(-1)
    total, dot = _grad_sums(_planes(x), _planes(dy), centers, scales)
    shape = x.shape[:2]
    return block_sum(total.view(shape), sizes), block_sum(dot.view(shape), sizes)


def block_grad_affine(
    dy: Tensor, x: Tensor, sizes: Sizes, a: Tensor, b: Tensor, center: Tensor, c: Tensor
) -> Tensor:
    """See `reference.block_grad_affine`."""
    x, lines = _layout(x)
    dy = _as_layout(dy, lines)
    dx = torch.empty_like(x)
    if lines:
        c = torch.addcmul(c, center, b, value=-1)
        for k, (source, gradient, out) in _numbered(sizes, x, dy, dx):
            torch.addcmul(c[k], source, b[k], out=out).addcmul_(gradient, a[k])
    else:
        _plane_affine(x, sizes, center, b, c, out=dx)
        _planes(dx).addcmul_(_planes(dy), per_sample(a, sizes).reshape(1, -1, 1))
    return dx


def _layout(x: Tensor) -> tuple[Tensor, bool]:
    """Return `x`, copied if it has neither layout, and whether it is in lines."""
    if _in_lines(x):
        return x, True
    if not x.is_contiguous():
        dense = torch.empty_like(x)  # keeps the order of the axes: lines with gaps become lines
        if _in_lines(dense):
            return dense.copy_(x), True
    return x.contiguous(), False


def _in_lines(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


def _as_layout(dy: Tensor, lines: bool) -> Tensor:
    return dy.movedim(1, -1).contiguous().movedim(-1, 1) if lines else dy.contiguous()


def _planes(x: Tensor) -> Tensor:
    """View contiguous ``[N, C, *]`` as ``[1, N * C, L]``."""
    return x.view(1, x.shape[0] * x.shape[1], x.shape[2:].numel())


def _split_lines(x: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
    """Cut channels-last ``[N, C, *]`` into its blocks' lines ``[n * L, C]``."""
    length = x.shape[2:].numel()
    lines = x.movedim(1, -1).view(x.shape[0] * length, x.shape[1])
    return torch.split(lines, [n * length for n in sizes])


def _numbered(sizes: Sizes, *tensors: Tensor) -> list[tuple[int, tuple[Tensor, ...]]]:
    """Number the blocks' lines of several tensors alike."""
    return list(enumerate(zip(*(_split_lines(t, sizes) for t in tensors), strict=True)))


def _moments(lines: Tensor) -> tuple[Tensor, Tensor]:
    if lines.shape[0] == 0:
        zeros = lines.new_zeros(lines.shape[1])
        return zeros, zeros
    mean, variance = torch.batch_norm_update_stats(lines, None, None, 0.0)
    return mean, variance.sqrt_()


def _grad_sums(x: Tensor, dy: Tensor, center: Tensor, inverse_std: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``sum dy`` and ``sum dy * (x - center) * inverse_std`` per channel (axis 1)."""
    if x.numel() == 0:
        zeros = torch.zeros_like(center)
        return zeros, zeros
    # The gradients of bias and weight of a batch norm with these saved statistics.
    _, dot, total = torch.ops.aten.native_batch_norm_backward(
        dy, x, inverse_std, None, None, center, inverse_std, True, 0.0, [False, True, True]
    )
    return total, dot


def _plane_affine(
    x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor, shift: Tensor, out: Tensor
) -> None:
    """Write ``(x - center) * scale + shift`` into `out`: a batch norm in eval mode, variance 1."""
    rows = [per_sample(row, sizes).reshape(-1) for row in (center, scale, shift)]
    unit, unused = torch.ones_like(rows[0]), x.new_empty(0)
    torch.native_batch_norm(
        _planes(x), rows[1], rows[2], rows[0], unit, False, 0.0, 0.0,
        out=(_planes(out), unused, unused.clone()),
    )  # fmt: skip
