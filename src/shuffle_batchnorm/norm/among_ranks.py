"""Forward and backward of a rank that has peers to ask: see `kernels.local.Local`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from shuffle_batchnorm.comm import collectives
from shuffle_batchnorm.comm.world import World
from shuffle_batchnorm.kernels.local import Gradients, Rows, affine
from shuffle_batchnorm.kernels.rows import Running, are_equal, counts, move, unbiased_variance

from .mixing import CALL
from .routes import Route
from .statistics import Call, assert_valid, check_counts, mix_gradients, statistics_of


class AmongRanks(NamedTuple):
    """A call with peers. Each local block has its own row, that of the normaliser it uses.

    Attributes:
        call: what was prepared.
        world: the ranks.
        eps: added to the variance.
    """

    call: Call
    world: World
    eps: float

    def statistics(
        self, x: Tensor, weight: Tensor | None, running: Running | None
    ) -> tuple[Rows, Tensor]:
        """Return deviations, after rows: mean, rstd, ``rstd * weight`` (None without one), count.

        The last rows are count, mean and rstd of what the blocks join, where they do not use it.
        Moves the running statistics.

        Communication: that of `statistics.mix`.
        """
        call = self.call
        with torch.no_grad():
            (count, mean, std), source = statistics_of(x, call, self.world)
            check_counts(count, call, self.world, x.shape)
            if running is not None:
                sizes = call.sizes if x.shape[2:].numel() > 0 else (0,) * len(call.sizes)
                if not are_equal(sizes) or sizes[0] == 0:
                    self._move_running(running, count, mean, std, sizes)
                    running = None
            # Else each normaliser has as many blocks here: their average is that over the blocks.
            rows = call.kernels.normaliser_rows
            rstd, scale = rows(mean, std, weight, self.eps, count, running)
            # A compiler refuses the same tensor twice.
            found = mean, rstd, None if weight is None else scale, count
            if source is None:
                return (*found, None, None, None), std
            source_rstd, _ = rows(source.mean, source.std, None, self.eps, source.counts, None)
            return (*found, source.counts, source.mean, source_rstd), std

    def _move_running(
        self, running: Running, count: Tensor, mean: Tensor, std: Tensor, sizes: tuple[int, ...]
    ) -> None:
        """Move the running statistics towards those used, averaged over the blocks with samples.

        In `regroup` the mean over all ranks of these averages is that over all new groups.
        """
        var = unbiased_variance(std, count)
        # In sync an empty rank learns what the others have seen.
        sync = self.call.plan.mode == "sync"
        filled = count > 0 if sync else counts(sizes, 1, count) > 0
        number = filled.sum()
        step = running.step * (number > 0).to(count.dtype)
        for old, batch in ((running.mean, mean), (running.var, var)):
            move(old, torch.where(filled, batch, 0).sum(dim=0) / number.clamp(min=1), step)

    def forward(
        self, x: Tensor, _weight: Tensor | None, bias: Tensor | None, rows: Rows,
        _running: Running | None,
    ) -> tuple[Tensor, Rows]:  # fmt: skip
        """Return ``y = (x - mean) * rstd * weight + bias``, and what `gradients` needs."""
        return affine(self.call.kernels, x, bias, self.call.sizes, rows, None), rows

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, _bias_dtype: torch.dtype | None,
        rows: Rows, needs_dx: bool,
    ) -> Gradients:  # fmt: skip
        """Return the gradients of x, unless it needs none, of weight and of bias.

        Communication: that of `statistics.mix_gradients`, also where no gradient of x is needed: a
        peer may need one.
        """
        kernels, sizes = self.call.kernels, self.call.sizes
        mean, rstd, scale, *source = rows
        if source[1] is not None:
            count, source_mean, source_rstd = source[1:]
        else:
            count, source_mean, source_rstd = source[0], mean, rstd
        total, dot = kernels.block_grad_sums(dy, x, sizes, mean, rstd)
        dweight, dbias, weighted = kernels.param_grads(total, dot, weight)
        total, dot = mix_gradients(weighted, self.call, self.world).unbind(dim=1)
        if not needs_dx:
            return None, dweight, dbias
        # What has arrived is weighted already.
        b, c = kernels.dx_coefficients(total, dot, source_rstd, source_rstd, count)
        scale = rstd if scale is None else scale
        dx = kernels.block_grad_affine(dy, x, sizes, scale, b, source_mean, c)
        return dx, dweight, dbias

    def moments(self, _x: Tensor, rows: Rows, std: Tensor) -> tuple[Tensor, Tensor]:
        """See `kernels.local.Local.moments`."""
        return rows[0], std


class PreparedRanks(NamedTuple):
    """The same in fewer operations, by kernels that have prepared for such a call.

    Attributes:
        call: what was prepared.
        world: the ranks.
    """

    call: Call
    world: World

    def statistics(
        self, x: Tensor, weight: Tensor | None, _running: Running | None
    ) -> tuple[Rows, None]:
        """Return rows of normalisers in one tensor.

        Communication: that of `statistics.mix`.
        """
        call, own = self.call, self.call.ranks
        with torch.no_grad():
            messages = own.pack_moments(own.dense(x))
            if call.plan.mode == "sync":
                sent = messages.rows.view(-1)
                received = collectives.all_gather(sent, self.world, CALL, call.doing[0])
            else:
                received = self._exchange(messages, call.route, call.doing[0])
            rows = own.mix_moments(received, weight)
            if x.device.type == "cpu":
                check_counts(own.counts(rows), call, self.world, x.shape)
            else:
                assert_valid(own.valid)
        return (rows,), None

    def _exchange(self, messages: Any, route: Route | None, doing: str) -> Tensor:
        """Return all rows, once those sent have been exchanged for those that arrive."""
        if route is not None and messages.sent is not None:
            splits = route.send_splits, route.receive_splits
            collectives.all_to_all(
                messages.sent, *splits, self.world, CALL, doing, messages.arrived
            )
        rows: Tensor = messages.rows
        return rows

    def forward(
        self, x: Tensor, _weight: Tensor | None, bias: Tensor | None, rows: Rows,
        running: Running | None,
    ) -> tuple[Tensor, Rows]:  # fmt: skip
        """Return y, and what `gradients` needs. Moves statistics, counts the batch."""
        own = self.call.ranks
        return own.forward(own.dense(x), bias, rows[0], running), rows

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, bias_dtype: torch.dtype | None,
        rows: Rows, needs_dx: bool,
    ) -> Gradients:  # fmt: skip
        """See `AmongRanks.gradients`."""
        call, own = self.call, self.call.ranks
        dy, x = own.dense(dy), own.dense(x)
        scratch, messages = own.pack_sums(dy, x, weight, rows[0])
        if call.plan.mode == "sync":
            received = collectives.all_sum(messages.rows, self.world, CALL, call.doing[1])
        else:
            received = self._exchange(messages, call.back, call.doing[1])
        found: Gradients = (
            own.gradients(dy, x, weight, bias_dtype, rows[0], scratch, received)
            if needs_dx
            else own.param_grads(scratch)
        )
        return found

    def moments(self, _x: Tensor, rows: Rows, _std: None) -> tuple[Tensor, Tensor]:
        """See `kernels.local.Local.moments`."""
        mean, std = self.call.ranks.moments(rows[0])
        return mean, std
