"""How the CPU kernels view and cut a batch, and the rows that go with it."""

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .rows import Sizes, are_equal, per_sample

PART = 2**19  # values per thread that are gone through twice while they are in a cache


def view_values(x: Tensor, sizes: Sizes, lines: bool) -> Tensor:
    """View ``[N, C, *]`` as ``[blocks, n, C, L]``, in lines as ``[blocks, n * L, C]``.

    Uneven blocks are taken sample by sample.
    """
    blocks = len(sizes) if are_equal(sizes) else x.shape[0]
    samples, length = x.shape[0] // blocks, x.shape[2:].numel()
    if lines:
        return x.movedim(1, -1).view(blocks, samples * length, x.shape[1])
    return x.view(blocks, samples, x.shape[1], length)


def view_rows(sizes: Sizes, lines: bool, *rows: Tensor) -> list[Tensor]:
    """View rows ``[blocks, C]`` to broadcast with `view_values`."""
    if not are_equal(sizes):
        rows = tuple(per_sample(row, sizes) for row in rows)
    return [row[:, None] if lines else row[:, None, :, None] for row in rows]


def per_plane(sizes: Sizes, *rows: Tensor) -> tuple[Tensor, ...]:
    """Give each plane its number in rows ``[blocks, C]``: each ``[N * C]``, contiguous."""
    if sizes[0] == sizes[-1] == 1:
        return tuple(row.reshape(-1) for row in rows)
    if are_equal(sizes):
        spread = torch.stack(rows)[:, :, None].expand(-1, -1, sizes[0], -1)
        return spread.reshape(len(rows), -1).contiguous().unbind()
    return tuple(per_sample(row, sizes).view(-1) for row in rows)


def blocks_of_lines(x: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
    """Cut ``[N, C, *]`` in lines into its blocks, ``[n * L, C]``."""
    length = x.shape[2:].numel()
    lines = x.movedim(1, -1).view(x.shape[0] * length, x.shape[1])
    return torch.split(lines, [size * length for size in sizes])


def in_parts(*tensors: Tensor, whole: int = 1, room: int = 1) -> Iterable[tuple[Tensor, ...]]:
    """Cut tensors that broadcast to the first into parts that stay in a cache.

    The last axes stay whole, as many as `whole`. A part has `room` times the usual values.
    """
    room *= PART * torch.get_num_threads()
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
