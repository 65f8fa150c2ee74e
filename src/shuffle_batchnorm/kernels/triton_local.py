"""Forward and backward of one process in few launches of the Triton kernels.

Each direction is a reduction, a merge and an elementwise kernel. The last programs of the reduction
can merge as well, in which case there are two launches, not three.
"""

import math
import os

import torch
from torch import Tensor

from . import triton_kernels, triton_merge
from .local import Gradients, Rows
from .rows import Groups, Running, Sizes
from .triton_prepared import Prepared, on_own_device, table

# No GPU has run programs that merge what others have written yet; until one has, a launch does it.
MERGE_LAST = os.environ.get("SHUFFLE_BATCHNORM_MERGE_LAST") == "1"
_MOST_PARTS = 64  # of a normaliser: to merge more takes the last program longer than a launch


class TritonLocal(Prepared):
    """Calls of one kind: shape, dtype, layout, device, eps, blocks. See `local.Local`."""

    def __init__(self, x: Tensor, eps: float, sizes: Sizes, groups: Groups, users: Groups) -> None:
        normalisers = len(sizes) if groups is None else groups.number
        super().__init__(x, eps, sizes, normalisers)
        count = x.shape[2:].numel() * (x.shape[0] // normalisers)
        self._count, self._change = float(count), count / (count - 1)
        self._owners = None if groups is None else table(groups.owners, x.device)
        self._users = None if users is None else table(users.owners, x.device)
        members, own = len(sizes) // normalisers, tuple(range(len(sizes)))
        self._moments = self.reduction(
            triton_kernels.moments, triton_merge.finish_moments, 3, x, members,
            own if groups is None else groups.order, {}, dict(SPLIT=True),
        )  # fmt: skip
        self._sums = self.reduction(
            triton_kernels.grad_sums, triton_merge.finish_sums, 2, x, members,
            own if users is None else users.order,
            dict(center_stride=x.shape[1], scale_at=2 * self._plane, scale_stride=x.shape[1]), {},
        )  # fmt: skip
        self.elementwise(x, math.prod(self._sums.parts), 0)
        self._merge_moments, self._merge_sums = (
            None if MERGE_LAST and work.merged <= _MOST_PARTS else work.merge
            for work in (self._moments, self._sums)
        )

    def statistics(
        self, _x: Tensor, _weight: Tensor | None, _running: Running | None
    ) -> tuple[Rows, None]:
        """Return nothing: all is done in `forward`."""
        return (), None

    @on_own_device
    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, _rows: Rows,
        running: Running | None,
    ) -> tuple[Tensor, Rows]:  # fmt: skip
        """Return y and rows ``[4, R, C]`` in one tensor. Moves statistics, counts the batch."""
        x, stream = self.dense(x), self.stream()
        aligned = self.aligned(x)
        rows = self._find(x, weight, aligned, stream)
        return self.affine(aligned, stream, x, bias, rows, running, None, self._change), (rows,)

    def _find(self, x: Tensor, weight: Tensor | None, aligned: bool, stream: int) -> Tensor:
        """Return rows: mean, deviation, rstd and ``rstd * weight``."""
        work, merge = self._moments, self._merge_moments
        parts = x.new_empty(work.parts, dtype=self._dtype)
        rows = x.new_empty(self._rows, dtype=self._dtype)
        counters = _counters(self._device, stream, work.arrivals) if merge is None else None
        work.reduce(
            aligned, stream, x, work.starts, parts, self._owners, work.order, weight, rows,
            counters, self._root,
        )  # fmt: skip
        if merge is not None:
            merge(aligned, stream, parts, work.order, weight, rows, self._root)
        return rows

    @on_own_device
    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, bias_dtype: torch.dtype | None,
        rows: Rows, needs_dx: bool,
    ) -> Gradients:  # fmt: skip
        """See `local.Local.gradients`."""
        (packed,) = rows
        x, dy, stream = self.dense(x), self.dense(dy), self.stream()
        aligned = self.aligned(x, dy, packed)
        work, merge = self._sums, self._merge_sums
        scratch = packed.new_empty(self._scratch)
        counters = _counters(self._device, stream, work.arrivals) if merge is None else None
        work.reduce(
            aligned, stream, x, dy, work.starts, scratch, self._users, work.order, packed, packed,
            counters, self._count,
        )  # fmt: skip
        if merge is not None:
            merge(aligned, stream, scratch, work.order, packed, self._count)
        if not needs_dx:
            return self.param_grads(scratch)
        return self.grad_affine(aligned, stream, dy, x, weight, bias_dtype, packed, scratch)

    @on_own_device
    def moments(self, x: Tensor, _rows: Rows, _std: None) -> tuple[Tensor, Tensor]:
        """See `local.Local.moments`."""
        # Unaligned, as it were: without a weight these are launches of another kind.
        mean, std, _, _ = self._find(self.dense(x), None, False, self.stream())
        return mean, std


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
