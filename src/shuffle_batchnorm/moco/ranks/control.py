"""What the ranks of a run send each other; all of them call a function in the same order.

Keys and gradients travel by the group of the device, all else by gloo and not through the device.
For one rank nothing is sent.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.futures import Future

from shuffle_batchnorm.comm.world import World

from .launch import Rank

T = TypeVar("T")


def gather_objects(rank: Rank, value: T) -> list[T]:
    """Return every rank's value on rank 0, in rank order, and an empty list elsewhere."""
    if rank.world_size == 1:
        return [value]
    everyones: list[Any] | None = [None] * rank.world_size if rank.index == 0 else None
    dist.gather_object(value, everyones, dst=0, group=rank.control)
    return everyones or []


def broadcast_object(rank: Rank, value: T) -> T:
    """Return rank 0's value."""
    if rank.world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=rank.control)
    return values[0]


def on_rank_0(rank: Rank, function: Callable[[], T]) -> T:
    """Call a function on rank 0 only; return what it returns, or raise what it raises, everywhere.

    Files are read and written by one rank, and no rank must go on without knowing the result.
    """
    value: T | None = None
    error: Exception | None = None
    if rank.index == 0:
        try:
            value = function()
        except Exception as caught:
            error = caught
            if rank.world_size == 1:
                raise
    value, error = broadcast_object(rank, (value, error))
    if error is not None:
        raise error
    return cast(T, value)


def sum_over_ranks(rank: Rank, numbers: Tensor) -> list[float]:
    """Return the sum of every rank's numbers ``[K]``; waits for the device."""
    total = numbers.detach().to("cpu", torch.float64, copy=True)
    if rank.world_size > 1:
        dist.all_reduce(total, group=rank.control)
    return [float(number) for number in total.tolist()]


class StopAgreement:
    """Lets all ranks stop after the same step when a signal has reached one of them.

    Each step sends one number and reads the result of the step before: nobody waits.
    """

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._signum = torch.zeros((), dtype=torch.int64)
        self._work: Any = None

    def ask(self) -> int:
        """Return the signal after which all ranks stop now, or 0."""
        signum = self.answer()
        if self._rank.world_size > 1 and not signum:
            self._signum.fill_(self._rank.stop.signum)
            group, most = self._rank.control, dist.ReduceOp.MAX
            self._work = dist.all_reduce(self._signum, most, group=group, async_op=True)
        return signum

    def answer(self) -> int:
        """Return the answer to the last question; nothing is under way afterwards."""
        if self._rank.world_size == 1:
            return self._rank.stop.signum
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._signum)


def gather_rows(rows: Tensor, world: World) -> Tensor:
    """Return the rows of all ranks, ``[N, *]`` to ``[W * N, *]``, in rank order.

    Communication: one all_gather.
    """
    everyones = rows.new_empty(world.size, *rows.shape)
    dist.all_gather(list(everyones), rows.contiguous(), group=world.group)
    return everyones.flatten(0, 1)


def average_in_rank_order(
    _state: None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> Future[Tensor]:
    """Average a bucket of gradients ``[K]`` over the ranks, always in the same order.

    A hook for DistributedDataParallel. gloo adds up in another order at every position of a bucket,
    and DistributedDataParallel deals the gradients to other buckets after the first step: a resumed
    run would differ in the last bits.

    Communication: each rank sends 1 / W of the bucket to every other, and gets as much back.
    """
    gradients, size = bucket.buffer(), dist.get_world_size()
    padded = F.pad(gradients, (0, -len(gradients) % size))
    received = torch.empty_like(padded)
    dist.all_to_all_single(received, padded)
    first, *others = received.view(size, -1)
    total = first.clone()
    for other in others:
        total += other
    averages = torch.empty_like(padded)
    dist.all_gather(list(averages.view(size, -1)), total / size)
    done: Future[Tensor] = Future()
    done.set_result(averages[: len(gradients)])
    return done
