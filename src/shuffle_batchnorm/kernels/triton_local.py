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
from .launch import ALIGNMENT, Launch
from .layouts import as_layout, layout
from .local import Gradients, Rows
from .rows import Groups, Order, Running, Sizes, accumulation_dtype
from .tiles import elementwise, merge_tile, reduction

# No GPU has run programs that merge what others have written yet; until one has, a launch does it.
MERGE_LAST = os.environ.get("SHUFFLE_BATCHNORM_MERGE_LAST") == "1"
_MOST_PARTS = 64  # of a normaliser: to merge more takes the last program longer than a launch
_LANES = 1024  # numbers that the last program has in hand


_NOTHING = Running(None, None, 0.0)  # type: ignore[arg-type]


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
        self._strides, self._dtype = dense.stride(), accumulation_dtype(x)
        self._device, self._index = x.device, x.device.index
        blocks, channels = len(sizes), x.shape[1]
        normalisers = blocks if groups is None else groups.number
        count = x.shape[2:].numel() * (x.shape[0] // normalisers)
        self._root, self._count, self._change = math.sqrt(eps), float(count), count / (count - 1)
        self._rows = (4, normalisers, channels)
        plane = normalisers * channels
        self._owners = None if groups is None else _table(groups.owners, x.device)
        self._users = None if users is None else _table(users.owners, x.device)

        self._moments = self._reduction(
            triton_kernels.moments, triton_merge.finish_moments, 3, x, sizes, groups,
            {}, dict(SPLIT=True),
        )  # fmt: skip
        self._sums = self._reduction(
            triton_kernels.grad_sums, triton_merge.finish_sums, 2, x, sizes, users,
            dict(center_stride=channels, scale_at=2 * plane, scale_stride=channels), {},
        )  # fmt: skip
        # Coefficients come after the parts of which they are made.
        self._sums_at = parts = math.prod(self._sums.parts)
        self._scratch = parts + 4 * plane
        tiles = elementwise(x.shape, sizes, self._channels_last, x.itemsize)
        self._blocks = _table(tiles.table, x.device)
        shape = dict(center_stride=channels, scale_stride=channels, rows=normalisers,
                     samples=x.shape[0])  # fmt: skip
        self._affine = Launch(
            triton_kernels.affine, tiles.programs,
            dict(scale_at=3 * plane, shift_stride=0) | shape, tiles.arguments,
        )  # fmt: skip
        self._grad_affine = Launch(
            triton_kernels.grad_affine, tiles.programs,
            dict(sums_at=parts, scale_at=parts + 2 * plane, shift_at=parts + 3 * plane,
                 shift_stride=channels, factor_at=3 * plane, factor_stride=channels) | shape,
            tiles.arguments,
        )  # fmt: skip

    def _reduction(
        self, kernel: Any, merge: Any, planes: int, x: Tensor, sizes: Sizes, groups: Groups,
        numbers: dict[str, int], constants: dict[str, int | bool],
    ) -> _Reduction:  # fmt: skip
        blocks, (_, normalisers, channels) = len(sizes), self._rows
        members = blocks // normalisers
        tiles = reduction(x.shape, sizes, self._channels_last, x.itemsize, members)
        splits, parts = tiles.splits, (planes, tiles.splits, blocks, channels)
        lanes = tiles.arguments["CHANNELS"]
        shared = dict(columns=blocks * channels, splits=splits, members=members)
        if planes == 2:
            shared["out_at"] = math.prod(parts)
        reduce = Launch(
            kernel, tiles.programs, numbers | shared | dict(normalisers=normalisers),
            tiles.arguments | constants | dict(MERGED=max(1, _LANES // lanes)),
        )  # fmt: skip
        height, width = merge_tile(splits * members)
        alone = Launch(
            merge, normalisers * -(-channels // width), shared | dict(channels=channels),
            dict(ROWS=height, COLUMNS=width),
        )  # fmt: skip
        order = tuple(range(blocks)) if groups is None else groups.order
        is_merged = MERGE_LAST and splits * members <= _MOST_PARTS
        return _Reduction(
            reduce, None if is_merged else alone, parts, _table(tiles.table, x.device),
            _table(order, x.device), normalisers * (tiles.programs // (splits * blocks)),
        )  # fmt: skip

    def statistics(
        self, _x: Tensor, _weight: Tensor | None, _running: Running | None
    ) -> tuple[Rows, None]:
        """Return nothing: all is done in `forward`."""
        return (), None

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, _rows: Rows,
        running: Running | None,
    ) -> tuple[Tensor, Rows]:  # fmt: skip
        """Return y and rows ``[4, R, C]`` in one tensor. Moves statistics, counts the batch."""
        if x.stride() != self._strides:
            x = as_layout(x, self._channels_last)
        aligned, stream = x.data_ptr() % ALIGNMENT == 0, self._stream()
        rows = self._find(x, weight, aligned, stream)
        y = torch.empty_like(x)
        mean, var, step, number = running or _NOTHING
        steps = None
        if isinstance(step, Tensor):
            steps, step = step.to(self._device, self._dtype), 0.0
        # Rows of 16 bytes are read at once where channels lie side by side.
        aligned = aligned and (bias is None or bias.data_ptr() % ALIGNMENT == 0)
        self._affine(
            aligned, stream, x, y, self._blocks, self._users, rows, rows, bias, mean, var, number,
            steps, step, self._change,
        )  # fmt: skip
        if running is not None and not mean.is_inference():
            # A graph that has saved them must know.
            increment_version((mean, var) if number is None else (mean, var, number))
        return y, (rows,)

    def _find(self, x: Tensor, weight: Tensor | None, aligned: bool, stream: int) -> Tensor:
        """Return rows: mean, deviation, rstd and ``rstd * weight``."""
        reduce, merge, shape, starts, order, arrivals = self._moments
        parts = x.new_empty(shape, dtype=self._dtype)
        rows = x.new_empty(self._rows, dtype=self._dtype)
        counters = None if merge is not None else _counters(self._device, stream, arrivals)
        reduce(aligned, stream, x, starts, parts, self._owners, order, weight, rows, counters,
               self._root)  # fmt: skip
        if merge is not None:
            merge(True, stream, parts, order, weight, rows, self._root)
        return rows

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, bias_dtype: torch.dtype | None,
        rows: Rows, needs_dx: bool,
    ) -> Gradients:  # fmt: skip
        """See `local.Local.gradients`."""
        (packed,) = rows
        if x.stride() != self._strides:
            x = as_layout(x, self._channels_last)
        if dy.stride() != self._strides:
            dy = as_layout(dy, self._channels_last)
        aligned, stream = (x.data_ptr() | dy.data_ptr()) % ALIGNMENT == 0, self._stream()
        reduce, merge, _, starts, order, arrivals = self._sums
        scratch = packed.new_empty(self._scratch)
        counters = None if merge is not None else _counters(self._device, stream, arrivals)
        reduce(aligned, stream, x, dy, starts, scratch, self._users, order, packed, packed,
               counters, self._count)  # fmt: skip
        if merge is not None:
            merge(True, stream, scratch, order, packed, self._count)
        if not needs_dx:
            total, dot, _, _ = scratch[self._sums_at :].view(self._rows).sum(dim=1)
            return None, dot, total
        dx = torch.empty_like(x)
        dweight = None if weight is None else torch.empty_like(weight)
        dbias = None if bias_dtype is None else x.new_empty(self._rows[2], dtype=bias_dtype)
        self._grad_affine(
            aligned, stream, x, dx, dy, self._blocks, self._owners, self._users, packed, scratch,
            scratch, packed, dweight, dbias,
        )  # fmt: skip
        return dx, dweight, dbias

    def moments(self, x: Tensor, _rows: Rows, _std: None) -> tuple[Tensor, Tensor]:
        """See `local.Local.moments`."""
        mean, std, _, _ = self._find(as_layout(x, self._channels_last), None, False, self._stream())
        return mean, std

    def _stream(self) -> int:
        return 0 if self._index is None else launch.current_stream(self._index)


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
