"""Forward and backward of one process in few launches of the Triton kernels.

Each direction is a reduction, a merge and an elementwise kernel. The last programs of the reduction
can merge as well, in which case there are two launches, not three.
"""

import math
import os
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import launch, triton_kernels, triton_merge
from .launch import Launch
from .layouts import as_layout, layout
from .local import Gradients, Rows
from .rows import Groups, Order, Running, Sizes, accumulation_dtype
from .tiles import elementwise, merge_tile, reduction

# No GPU has run programs that merge what others have written yet; until one has, a launch does it.
MERGE_LAST = os.environ.get("SHUFFLE_BATCHNORM_MERGE_LAST") == "1"
_MOST_PARTS = 64  # of a normaliser: to merge more takes the last program longer than a launch
_LANES = 1024  # numbers that the last program has in hand


class _Reduction(NamedTuple):
    """A reduction of blocks, and what merges their parts to rows of normalisers.

    Attributes:
        reduce: the launch.
        merge: that of the merge; None if the last programs of `reduce` merge.
        parts: shape of what programs leave.
        starts: where blocks start.
        order: the blocks of each normaliser.
        arrivals: how many counters the last programs need.
    """

    reduce: Launch
    merge: Launch | None
    parts: tuple[int, ...]
    starts: Tensor
    order: Tensor
    arrivals: int


class TritonLocal:
    """Calls of one kind: shape, dtype, layout, device, eps, blocks. See `local.Local`."""

    def __init__(self, x: Tensor, eps: float, sizes: Sizes, groups: Groups, users: Groups) -> None:
        dense, self._channels_last = layout(x)
        self._is_dense, self._strides = dense is x, dense.stride()
        self._dtype, self._device = accumulation_dtype(x), x.device
        blocks, channels = len(sizes), x.shape[1]
        normalisers = blocks if groups is None else groups.number
        count = x.shape[2:].numel() * (x.shape[0] // normalisers)
        self._root, self._count = (math.sqrt(eps),), (float(count),)
        self._change = count / max(count - 1, 1)
        self._rows = (4, normalisers, channels)
        plane = normalisers * channels
        self._owners = None if groups is None else _table(groups.owners, x.device)
        self._users = None if users is None else _table(users.owners, x.device)

        self._moments = self._reduction(
            triton_kernels.moments, triton_merge.finish_moments, 1, 3, x, sizes, groups,
            {}, dict(SPLIT=True),
        )  # fmt: skip
        self._sums = self._reduction(
            triton_kernels.grad_sums, triton_merge.finish_sums, 2, 2, x, sizes, users,
            dict(center_stride=channels, scale_at=2 * plane, scale_stride=channels), {},
        )  # fmt: skip
        tiles = elementwise(x.shape, sizes, self._channels_last, x.itemsize)
        self._blocks = _table(tiles.table, x.device)
        shape = dict(center_stride=channels, scale_stride=channels, rows=normalisers,
                     samples=x.shape[0])  # fmt: skip
        self._affine = Launch(
            triton_kernels.affine, tiles.programs, 2,
            dict(scale_at=3 * plane, shift_stride=0) | shape, tiles.arguments,
        )  # fmt: skip
        self._grad_affine = Launch(
            triton_kernels.grad_affine, tiles.programs, 3,
            dict(scale_at=2 * plane, shift_at=3 * plane, shift_stride=channels,
                 factor_at=3 * plane, factor_stride=channels) | shape, tiles.arguments,
        )  # fmt: skip

    def _reduction(
        self, kernel: Any, merge: Any, vectors: int, planes: int, x: Tensor, sizes: Sizes,
        groups: Groups, numbers: dict[str, int], constants: dict[str, int | bool],
    ) -> _Reduction:  # fmt: skip
        blocks, (_, normalisers, channels) = len(sizes), self._rows
        members = blocks // normalisers
        tiles = reduction(x.shape, sizes, self._channels_last, x.itemsize, members)
        splits, parts = tiles.splits, tiles.splits * members
        lanes = tiles.arguments["INNER" if self._channels_last else "OUTER"]
        shared = dict(columns=blocks * channels, splits=splits, members=members)
        reduce = Launch(
            kernel, tiles.programs, vectors, numbers | shared | dict(normalisers=normalisers),
            tiles.arguments | constants | dict(MERGED=max(1, _LANES // lanes)),
        )  # fmt: skip
        height, width = merge_tile(parts)
        programs = normalisers * -(-channels // width)
        alone = Launch(merge, programs, 0, shared | dict(channels=channels),
                       dict(ROWS=height, COLUMNS=width))  # fmt: skip
        order = tuple(range(blocks)) if groups is None else groups.order
        is_merged = MERGE_LAST and parts <= _MOST_PARTS
        return _Reduction(
            reduce, None if is_merged else alone, (planes, splits, blocks, channels),
            _table(tiles.table, x.device), _table(order, x.device),
            normalisers * (tiles.programs // (splits * blocks)),
        )  # fmt: skip

    def statistics(
        self, x: Tensor, weight: Tensor | None, _running: Running | None
    ) -> tuple[Rows, None]:
        """Return one tensor of rows, mean, deviation, rstd and ``rstd * weight``: ``[4, R, C]``."""
        stream = self._stream()
        x = x if self._is_dense else layout(x)[0]
        reduce, merge, shape, starts, order, arrivals = self._moments
        parts, rows = (
            x.new_empty(shape, dtype=self._dtype),
            x.new_empty(self._rows, dtype=self._dtype),
        )
        counters = None if merge is not None else _counters(self._device, stream, arrivals)
        reduce(stream, x, starts, parts, self._owners, order, weight, rows, counters,
               floats=self._root)  # fmt: skip
        if merge is not None:
            merge(stream, parts, order, weight, rows, floats=self._root)
        return (rows,), None

    def affine(self, x: Tensor, bias: Tensor | None, rows: Rows, running: Running | None) -> Tensor:
        """Return y; move the running statistics and count the batch."""
        (packed,) = rows
        x = x if self._is_dense else layout(x)[0]
        y = torch.empty_like(x)
        mean = var = steps = number = None
        step = 0.0
        if running is not None:
            mean, var, share, number = running
            if isinstance(share, Tensor):
                steps = share.to(self._device, self._dtype)
            else:
                step = float(share)
        self._affine(
            self._stream(), x, y, self._blocks, self._users, packed, packed, bias, mean, var,
            number, steps, floats=(step, self._change),
        )  # fmt: skip
        if running is not None:
            for moved in (mean, var, number):
                # A graph that has saved them must know.
                if moved is not None and not moved.is_inference():
                    increment_version(moved)
        return y

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, bias_dtype: torch.dtype | None,
        rows: Rows, needs_dx: bool,
    ) -> Gradients:  # fmt: skip
        """See `local.Local.gradients`."""
        (packed,) = rows
        stream = self._stream()
        x = x if self._is_dense else layout(x)[0]
        if dy.stride() != self._strides:
            dy = as_layout(dy, self._channels_last)
        reduce, merge, shape, starts, order, arrivals = self._sums
        parts, sums = x.new_empty(shape, dtype=self._dtype), torch.empty_like(packed)
        counters = None if merge is not None else _counters(self._device, stream, arrivals)
        reduce(stream, x, dy, starts, parts, self._users, order, packed, packed, sums, counters,
               floats=self._count)  # fmt: skip
        if merge is not None:
            merge(stream, parts, order, packed, sums, floats=self._count)
        if not needs_dx:
            total, dot = sums[0].sum(dim=0), sums[1].sum(dim=0)
            return None, dot, total
        dx = torch.empty_like(x)
        dweight = None if weight is None else torch.empty_like(weight)
        dbias = None if bias_dtype is None else x.new_empty(self._rows[2], dtype=bias_dtype)
        self._grad_affine(
            stream, x, dx, dy, self._blocks, self._owners, self._users, packed, sums, sums, packed,
            dweight, dbias,
        )  # fmt: skip
        return dx, dweight, dbias

    def moments(self, rows: Rows, _std: None) -> tuple[Tensor, Tensor]:
        """See `local.Local.moments`."""
        (packed,) = rows
        return packed[0], packed[1]

    def _stream(self) -> int:
        return 0 if self._device.type == "cpu" else launch.current_stream(self._device.index)


# What a captured CUDA graph reads must outlive it: there is a small table per kind, kept for good.
@cache
def _table(values: Order, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


_arrivals: dict[tuple[torch.device, int], Tensor] = {}


def _counters(device: torch.device, stream: int, number: int) -> Tensor:
    """Return zeros that kernels on this stream, one after the other, leave as zeros."""
    if stream and torch.cuda.is_current_stream_capturing():
        # Of the graph's own, which may run beside what this stream does then.
        return torch.zeros(number, dtype=torch.int32, device=device)
    counters = _arrivals.get((device, stream))
    if counters is None or len(counters) < number:
        counters = torch.zeros(max(number, 4096), dtype=torch.int32, device=device)
        _arrivals[device, stream] = counters
    return counters
