"""The four kernels for the CPU, from aten's loops, about as fast as ``nn.BatchNorm2d``.

aten's batch norms know channels, not blocks. Two ways turn blocks into channels without a copy:

- *planes*, for contiguous input: each sample's channel, L values in a row, is a channel of its own,
  in ``[1, N * C, L]``. aten reads planes in the order of memory, which takes half the time of its
  own batch norm's strides. What is summed per sample, ``1 / L`` of the data, is then pooled to
  blocks.
- *lines* ``[N * L, C]``, for channels-last input: the sums take one call per block, the affine
  kernels a broadcast.

aten takes half precision only with rows rounded to it, so that is copied to float32 and back.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .layouts import as_layout, layout
from .rows import accumulation_dtype, are_equal, block_sum, counts, per_sample

Sizes = tuple[int, ...]

_LONG = 2**14  # values of a plane
_LINES = 2**12  # aten adds lines one after the other, in the dtype of the values
_PART = 2**19  # values per thread that are gone through twice while they are in a cache
_SMALL = 2**22  # values that two passes over cached parts map faster than one pass over all


def block_moments(x: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """See `reference.block_moments`."""
    x, lines = layout(_full(x))
    if lines:
        blocks = [_line_moments(piece) for piece in _pieces(x, sizes)]
        return torch.stack([mean for mean, _ in blocks]), torch.stack([std for _, std in blocks])
    # A small tensor stays in a cache, where it can be read again for the mean itself.
    is_large = x.numel() >= _SMALL
    center = _means(x, sizes, only_some=is_large).nan_to_num_(0.0, 0.0, 0.0)
    offset, square = _moments_about(center, x, sizes)
    if is_large and _cancel(center, offset, square):
        center += offset.nan_to_num(0.0, 0.0, 0.0)
        offset, square = _moments_about(center, x, sizes)
    # square - offset**2; where the square is infinite, that of the offset may be as well.
    root, far = square.sqrt_(), offset.abs()
    variance = (root - far) * (root + far)
    return center.add_(offset), variance.clamp_(min=0).sqrt_()


def block_affine(x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """See `reference.block_affine`."""
    dtype = x.dtype
    x, lines = layout(_full(x))
    y = torch.empty_like(x)
    shift = torch.addcmul(shift, center, scale, value=-1)
    if lines:
        source, scales, shifts = _broadcast(x, sizes, scale, shift)
        torch.addcmul(shifts, source, scales, out=_broadcast(y, sizes)[0])
    else:
        _plane_affine(_planes(y), _planes(x), *_per_plane(sizes, scale, shift))
    return y.to(dtype)


def block_grad_sums(
    dy: Tensor, x: Tensor, sizes: Sizes, center: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.block_grad_sums`."""
    x, lines = layout(_full(x))
    dy = as_layout(_full(dy), lines)
    if lines:
        pieces = zip(_pieces(x, sizes), _pieces(dy, sizes), strict=True)
        sums = [_line_grad_sums(*piece, center[k], scale[k]) for k, piece in enumerate(pieces)]
        return torch.stack([total for total, _ in sums]), torch.stack([dot for _, dot in sums])
    total, dot = _grad_sums(_planes(x), _planes(dy), *_per_plane(sizes, center, scale))
    samples = x.shape[:2]
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
        views = _broadcast(dx, sizes)[0], _broadcast(dy, sizes)[0], source
        for part in _parts(*views, dim=1, width=source.shape[0] * source.shape[2]):
            _write_grad(*part, *rows)
        return dx.to(dtype)
    rows = [row[:, None] for row in _per_plane(sizes, a, b, center, c)]
    tensors = [_planes(tensor)[0] for tensor in (dx, dy, x)]
    for part in _parts(*tensors, *rows, dim=0, width=tensors[0].shape[1]):
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


def _planes(x: Tensor) -> Tensor:
    """View contiguous ``[N, C, *]`` as ``[1, N * C, L]``."""
    return x.view(1, x.shape[0] * x.shape[1], x.shape[2:].numel())


def _divisor(sizes: Sizes, length: int, like: Tensor) -> Tensor | int:
    """Return `length` times the samples of each block, at least 1."""
    if are_equal(sizes):
        return max(1, sizes[0] * length)
    return counts(sizes, length, like).clamp(min=1)


def _per_plane(sizes: Sizes, *rows: Tensor) -> tuple[Tensor, ...]:
    """Give each plane its number in rows ``[blocks, C]``: each ``[N * C]``, contiguous."""
    if sizes[0] == sizes[-1] == 1:
        return tuple(row.reshape(-1) for row in rows)
    if are_equal(sizes):
        spread = torch.stack(rows)[:, :, None].expand(-1, -1, sizes[0], -1)
        return spread.reshape(len(rows), -1).contiguous().unbind()
    return tuple(per_sample(row, sizes).view(-1) for row in rows)


def _means(x: Tensor, sizes: Sizes, *, only_some: bool) -> Tensor:
    """Return the means of blocks, ``[blocks, C]``, or only of some values here and there."""
    length = x.shape[2:].numel()
    values = x.view(*x.shape[:2], length)
    if only_some:
        values = values[:, :, :: -(-length // 16)]
        if are_equal(sizes):  # then four samples of each block will do
            values = values.unflatten(0, (len(sizes), sizes[0]))[:, :: -(-sizes[0] // 4)]
            few: Tensor = values.mean(dim=3).mean(dim=1)
            return few
    return block_sum(values.mean(dim=2), sizes) / _divisor(sizes, 1, x)


def _moments_about(center: Tensor, x: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Return the mean distance to a center, and the mean square of it, ``[blocks, C]``."""
    planes, (n, channels) = _planes(x)[0], x.shape[:2]
    sums = _distance_sums(planes, *_per_plane(sizes, center)).view(2 * n, channels)
    count = _divisor(sizes, planes.shape[1], planes)
    offset, square = (total / count for total in block_sum(sums, sizes * 2).chunk(2))
    return offset, square


def _cancel(center: Tensor, offset: Tensor, square: Tensor) -> bool:
    """Whether a center is so far off that ``square - offset**2`` loses digits.

    That is, over four deviations, and more than rounding.
    """
    # A tensor without numbers is taken at its word.
    if type(center) is not Tensor:
        return False
    rounding = 16 * torch.finfo(center.dtype).eps * center
    cancels = square - offset.square() < square / 17
    return bool((cancels & (square > rounding.square())).any())


def _distance_sums(planes: Tensor, centers: Tensor) -> Tensor:
    """Return the sums of each plane's distances to its center and of their squares, ``[2, P]``."""
    length = planes.shape[1]
    differences = planes.new_empty(min(_rows_of_a_part(length), len(planes)), length)
    sums = planes.new_empty(2, len(planes))
    tensors = planes, centers[:, None], *sums.unbind()
    for part, center, total, square in _parts(*tensors, dim=0, width=length):
        difference = torch.sub(part, center, out=differences[: len(part)])
        torch.sum(difference, dim=1, out=total)
        if length < _LONG:
            torch.linalg.vector_norm(difference, dim=1, out=square).square_()
        else:
            # A norm adds one after the other, in the dtype of the values; a sum in a tree.
            torch.sum(difference.square_(), dim=1, out=square)
    return sums


def _parts(*tensors: Tensor, dim: int, width: int) -> Iterable[tuple[Tensor, ...]]:
    """Cut tensors alike along an axis, `width` values wide, into parts that stay in a cache."""
    rows = _rows_of_a_part(width)
    if tensors[0].shape[dim] <= rows:
        return (tensors,)
    return zip(*(tensor.split(rows, dim) for tensor in tensors), strict=True)


def _rows_of_a_part(width: int) -> int:
    return max(1, _PART * torch.get_num_threads() // width)


def _plane_affine(y: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Write ``x * scale + shift``, ``[1, planes, L]`` with a number per plane."""
    if x.numel() < _SMALL:
        tensors = y[0], x[0], scale[:, None], shift[:, None]
        for out, part, scales, shifts in _parts(*tensors, dim=0, width=x.shape[2]):
            torch.mul(part, scales, out=out).add_(shifts)
    else:
        # A batch norm in eval mode, with running statistics 0 and 1.
        zero, one, unused = torch.zeros_like(scale), torch.ones_like(scale), x.new_empty(0)
        torch.native_batch_norm(
            x, scale, shift, zero, one, False, 0.0, 0.0, out=(y, unused, unused.clone())
        )


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
    parts = x.split(_LINES)
    moments = [torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts]
    if len(parts) == 1:
        return moments[0][0], moments[0][1].sqrt_()
    share = torch.tensor([len(part) / len(x) for part in parts], dtype=torch.float64)[:, None]
    means, variances = (torch.stack(rows).double() for rows in zip(*moments, strict=True))
    mean = (share * means).sum(dim=0)
    variance = (share * (means - mean).square_().add_(variances)).sum(dim=0)
    return mean.to(x.dtype), variance.sqrt_().to(x.dtype)


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
    parts = zip(x.split(_LINES), dy.split(_LINES), strict=True)
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
