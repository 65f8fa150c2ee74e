"""What calls of one kind on the Triton kernels share, in one process and among ranks.

Everything that follows from the kind alone is found when it is prepared, so that a call has little
more to do than its launches.
"""

import math
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import launch, triton_kernels
from .launch import ALIGNMENT, Launch
from .layouts import as_layout, layout
from .local import Gradients
from .rows import Order, Running, Sizes, accumulation_dtype
from .tiles import elementwise, merge_tile, reduction

_LANES = 1024  # numbers that the last program has in hand
_NOTHING = Running(None, None, 0.0)  # type: ignore[arg-type]
_Method = TypeVar("_Method", bound=Callable[..., Any])


def on_own_device(method: _Method) -> _Method:
    """Launch on the device of the input, which need not be the current one."""

    @wraps(method)
    def call(self: Any, *arguments: Any) -> Any:
        if self.index is None or launch.current_device() == self.index:
            return method(self, *arguments)
        with torch.cuda.device(self.index):
            return method(self, *arguments)

    return cast(_Method, call)


class Reduction(NamedTuple):
    """A reduction of blocks, and what merges their parts to other rows.

    Attributes:
        reduce: the launch.
        merge: that of the merge, if the last programs have not.
        parts: shape of what programs leave.
        starts: where blocks start.
        order: the blocks of each row.
        arrivals: how many counters the last programs would need to merge.
        merged: how many parts a row has.
    """

    reduce: Launch
    merge: Launch
    parts: tuple[int, ...]
    starts: Tensor
    order: Tensor
    arrivals: int
    merged: int


class Prepared:
    """Calls of one kind: shape, dtype, layout, device, eps, blocks.

    Rows of normalisers are ``[4, R, C]``, forward and backward as `triton_merge` has them.
    """

    def __init__(self, x: Tensor, eps: float, sizes: Sizes, normalisers: int) -> None:
        dense, self._channels_last = layout(x)
        self._strides, self._dtype = dense.stride(), accumulation_dtype(x)
        self._device, self.index = x.device, x.device.index
        self._sizes, self._normalisers, self._channels = sizes, normalisers, x.shape[1]
        self._root, self._plane = math.sqrt(eps), normalisers * x.shape[1]
        self._rows = 4, normalisers, x.shape[1]
        self._owners: Tensor | None = None
        self._users: Tensor | None = None

    def reduction(
        self, kernel: Any, merge: Any, planes: int, x: Tensor, members: int, order: Order,
        numbers: dict[str, int], constants: dict[str, int | bool],
    ) -> Reduction:  # fmt: skip
        """Prepare one of blocks, and the merge of `members` of these to each row."""
        sizes, channels = self._sizes, self._channels
        tiles = reduction(x.shape, sizes, self._channels_last, x.itemsize, members)
        splits, parts = tiles.splits, (planes, tiles.splits, len(sizes), channels)
        lanes = tiles.arguments["CHANNELS"]
        shared = dict(columns=len(sizes) * channels, splits=splits, members=members)
        if planes == 2:
            shared["out_at"] = math.prod(parts)
        normalisers = len(sizes) // members
        reduce = Launch(
            kernel, tiles.programs, numbers | shared | dict(normalisers=normalisers),
            tiles.arguments | constants | dict(MERGED=max(1, _LANES // lanes)),
        )  # fmt: skip
        alone = self.merge(merge, len(order) // members, splits * members, shared)
        return Reduction(
            reduce, alone, parts, table(tiles.table, x.device), table(order, x.device),
            normalisers * (tiles.programs // (splits * len(sizes))), splits * members,
        )  # fmt: skip

    def merge(self, kernel: Any, rows: int, merged: int, numbers: dict[str, int]) -> Launch:
        """Prepare a launch that writes so many rows, each from `merged` parts or other rows."""
        height, width = merge_tile(merged)
        return Launch(
            kernel, rows * -(-self._channels // width),
            numbers | dict(channels=self._channels), dict(ROWS=height, COLUMNS=width),
        )  # fmt: skip

    def elementwise(self, x: Tensor, parts: int, center_at: int) -> None:
        """Prepare what reads coefficients, which come after so many `parts`."""
        tiles = elementwise(x.shape, self._sizes, self._channels_last, x.itemsize)
        self._blocks = table(tiles.table, x.device)
        # Coefficients come after the parts of which they are made.
        self._parts, self._scratch = parts, parts + 4 * self._plane
        plane = self._plane
        shape = dict(center_stride=self._channels, scale_stride=self._channels,
                     rows=self._normalisers, samples=x.shape[0])  # fmt: skip
        self._affine = Launch(
            triton_kernels.affine, tiles.programs,
            dict(scale_at=3 * plane, shift_stride=0) | shape, tiles.arguments,
        )  # fmt: skip
        self._grad_affine = Launch(
            triton_kernels.grad_affine, tiles.programs,
            dict(sums_at=parts, scale_at=parts + 2 * plane, shift_at=parts + 3 * plane,
                 shift_stride=self._channels, factor_at=3 * plane, factor_stride=self._channels,
                 center_at=center_at) | shape,
            tiles.arguments,
        )  # fmt: skip

    def dense(self, x: Tensor) -> Tensor:
        """Return x, or its gradient, in the layout of this kind, copied if it has another."""
        return x if x.stride() == self._strides else as_layout(x, self._channels_last)

    def affine(
        self, aligned: bool, stream: int, x: Tensor, bias: Tensor | None, rows: Tensor,
        running: Running | None, counts: Tensor | None, change: float,
    ) -> Tensor:  # fmt: skip
        """Return y. Moves statistics, counts the batch."""
        y = torch.empty_like(x)
        mean, var, step, number = running or _NOTHING
        steps = None
        if isinstance(step, Tensor):
            steps, step = step.to(self._device, self._dtype), 0.0
        # A bias, too, is read 16 bytes at a time where channels lie side by side.
        if bias is not None and bias.data_ptr() % ALIGNMENT:
            aligned = False
        self._affine(
            aligned, stream, x, y, self._blocks, self._users, rows, rows, bias, mean, var, number,
            steps, counts, step, change,
        )  # fmt: skip
        if running is not None and not mean.is_inference():
            # A graph that has saved them must know.
            increment_version((mean, var) if number is None else (mean, var, number))
        return y

    def grad_affine(
        self, aligned: bool, stream: int, dy: Tensor, x: Tensor, weight: Tensor | None,
        bias_dtype: torch.dtype | None, rows: Tensor, scratch: Tensor,
    ) -> Gradients:  # fmt: skip
        """Return the gradients, from sums and coefficients that were written to `scratch`."""
        dx = torch.empty_like(x)
        dweight = None if weight is None else torch.empty_like(weight)
        dbias = None if bias_dtype is None else x.new_empty(self._channels, dtype=bias_dtype)
        self._grad_affine(
            aligned, stream, x, dx, dy, self._blocks, self._owners, self._users, rows, scratch,
            scratch, rows, dweight, dbias,
        )  # fmt: skip
        return dx, dweight, dbias

    def param_grads(self, scratch: Tensor) -> Gradients:
        """Return the gradients of weight and bias alone, from sums that are in `scratch`."""
        rows = scratch[self._parts :].view(self._rows)
        total, dot = rows[:2].sum(dim=1)
        return None, dot, total

    @staticmethod
    def aligned(x: Tensor, dy: Tensor | None = None, rows: Tensor | None = None) -> bool:
        """Return whether kernels for aligned memory can read these."""
        address: int = x.data_ptr()
        if dy is not None and rows is not None:  # a hook may have moved saved rows
            address |= dy.data_ptr() | rows.data_ptr()
        return address % ALIGNMENT == 0

    def stream(self) -> int:
        """Return the number of the current stream."""
        return 0 if self.index is None else launch.current_stream(self.index)


# What a captured CUDA graph reads must outlive it: there is a small table per kind, kept for good.
@cache
def table(values: Order, device: torch.device) -> Tensor:
    """Return integers on a device."""
    return torch.tensor(values, dtype=torch.int64, device=device)
