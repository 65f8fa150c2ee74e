"""Forward and backward of a rank that has peers to ask, in few launches of the Triton kernels.

Each direction is a reduction of blocks, a kernel that packs the rows that ranks exchange, one that
merges what has come, and an elementwise kernel. `norm.among_ranks` exchanges the rows.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import triton_kernels, triton_messages
from .local import Gradients
from .rows import Exchange, Running, Sizes
from .triton_prepared import Prepared, on_own_device, table


class Messages(NamedTuple):
    """Rows in one piece of memory.

    Attributes:
        rows: those of this rank's blocks, then those sent, then those that arrive.
        sent: these alone; None if no row leaves or arrives.
        arrived: memory for these.
    """

    rows: Tensor
    sent: Tensor | None
    arrived: Tensor | None


class TritonRanks(Prepared):
    """Calls of one kind; each block has its own row, that of the normaliser it uses.

    Args:
        x: the input.
        eps: added to the variance.
        sizes: samples of each block.
        there: of rows ``[count, mean, std]``.
        back: of rows ``[sum w dy, sum w dy xhat]``.
    """

    def __init__(
        self, x: Tensor, eps: float, sizes: Sizes, there: Exchange, back: Exchange
    ) -> None:
        super().__init__(x, eps, sizes, len(sizes))
        blocks, (_, channels) = len(sizes), x.shape[:2]
        self._there, self._back = there, back
        # Of what the blocks use, and in `swap` then of themselves.
        self._set = blocks * (4 * channels + 1)
        self._numbers = len(there.members) // blocks * self._set
        source_at = self._numbers - self._set
        own = tuple(range(blocks))
        self._moments = self.reduction(
            triton_kernels.moments, triton_messages.pack_moments, 3, x, 1, own + there.sent, {},
            dict(SPLIT=True),
        )  # fmt: skip
        self._sums = self.reduction(
            triton_kernels.grad_sums, triton_messages.pack_sums, 2, x, 1, own + back.sent,
            dict(center_stride=channels, scale_at=2 * self._plane, scale_stride=channels), {},
        )  # fmt: skip
        self._members, self._users_of = (
            table(tuple(row for rows in side.members for row in rows), x.device)
            for side in (there, back)
        )
        self._mix_moments, self._mix_sums = (
            self.merge(kernel, len(side.members), each, dict(members=each, blocks=blocks) | at)
            for kernel, side, at in (
                (triton_messages.mix_moments, there, {}),
                (triton_messages.mix_sums, back,
                 dict(source_at=source_at, out_at=math.prod(self._sums.parts) + 2 * self._plane)),
            )
            for each in (len(side.members[0]),)
        )  # fmt: skip
        self.elementwise(x, math.prod(self._sums.parts), source_at)
        self.valid = _valid(x.device)

    @on_own_device
    def pack_moments(self, x: Tensor) -> Messages:
        """Return the rows of the blocks, and those to be sent."""
        work, stream = self._moments, self.stream()
        parts = x.new_empty(work.parts, dtype=self._dtype)
        messages = self._messages(parts, 2 * self._channels + 1, self._there)
        work.reduce(self.aligned(x), stream, x, work.starts, parts, None, None, None,
                    None, None, 0.0)  # fmt: skip
        work.merge(True, stream, parts, work.order, messages.rows)
        return messages

    @on_own_device
    def mix_moments(self, received: Tensor, weight: Tensor | None) -> Tensor:
        """Return the rows of normalisers in one tensor; see `triton_messages.mix_moments`."""
        rows = received.new_empty(self._numbers)
        self._mix_moments(
            True, self.stream(), received, self._members, self._moments.starts, weight, rows,
            self.valid, self._root,
        )  # fmt: skip
        return rows

    @on_own_device
    def forward(
        self, x: Tensor, bias: Tensor | None, rows: Tensor, running: Running | None
    ) -> Tensor:
        """Return y. Moves statistics, counts the batch."""
        return self.affine(self.aligned(x), self.stream(), x, bias, rows, running, rows, 0.0)

    @on_own_device
    def pack_sums(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, rows: Tensor
    ) -> tuple[Tensor, Messages]:
        """Return scratch memory that begins with sums, and their rows, and those to be sent."""
        work, stream = self._sums, self.stream()
        scratch = rows.new_empty(self._scratch)
        messages = self._messages(rows, 2 * self._channels, self._back)
        work.reduce(
            self.aligned(x, dy, rows), stream, x, dy, work.starts, scratch,
            None, None, rows, rows, None, 0.0,
        )  # fmt: skip
        work.merge(True, stream, scratch, work.order, weight, scratch, messages.rows)
        return scratch, messages

    @on_own_device
    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, bias_dtype: torch.dtype | None,
        rows: Tensor, scratch: Tensor, received: Tensor,
    ) -> Gradients:  # fmt: skip
        """See `local.Local.gradients`."""
        aligned, stream = self.aligned(x, dy, rows), self.stream()
        self._mix_sums(aligned, stream, received, self._users_of, rows, scratch)
        return self.grad_affine(aligned, stream, dy, x, weight, bias_dtype, rows, scratch)

    def counts(self, rows: Tensor) -> Tensor:
        """Return the values per channel of what each block uses, ``[blocks, 1]``; 0 if empty."""
        return rows[4 * self._plane : self._set, None]

    def moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the normaliser that each block uses."""
        mean, std = rows[: 2 * self._plane].view(2, self._normalisers, self._channels)
        return mean, std

    def _messages(self, like: Tensor, numbers: int, exchange: Exchange) -> Messages:
        blocks, leaving, arriving = self._normalisers, len(exchange.sent), exchange.arriving
        rows = like.new_empty(blocks + leaving + arriving, numbers)
        if not leaving + arriving:
            return Messages(rows, None, None)
        _, sent, arrived = rows.split_with_sizes((blocks, leaving, arriving))
        return Messages(rows, sent, arrived)


# For good, as tables are. Once it is 0 an assertion has ended all work on the device.
@cache
def _valid(device: torch.device) -> Tensor:
    return torch.tensor(1, device=device)
