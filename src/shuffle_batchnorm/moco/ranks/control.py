"""What the ranks of a run tell each other besides gradients and keys: by gloo, past the device.

Every function is called by all ranks in the same order, and does nothing for one rank.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .launch import Place

T = TypeVar("T")


def gather_objects(place: Place, value: T) -> list[T]:
    """Return every rank's value on rank 0, in rank order, and an empty list elsewhere."""
    if place.world_size == 1:
        return [value]
    everyones: list[Any] | None = [None] * place.world_size if place.rank == 0 else None
    dist.gather_object(value, everyones, dst=0, group=place.control)
    return everyones or []


def broadcast_object(place: Place, value: T) -> T:
    """Return rank 0's value."""
    if place.world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=place.control)
    return values[0]


def on_rank_0(place: Place, function: Callable[[], T]) -> T:
    """Call a function on rank 0 only; return what it returns, or raise what it raises, everywhere.

    Files are read and written by one rank, and no rank must go on without what came of it.
    """
    value: T | None = None
    error: Exception | None = None
    if place.rank == 0:
        try:
            value = function()
        except Exception as caught:
            error = caught
            if place.world_size == 1:
                raise
    value, error = broadcast_object(place, (value, error))
    if error is not None:
        raise error
    return cast(T, value)


def sum_over_ranks(place: Place, numbers: Tensor) -> list[float]:
    """Return the sum of every rank's numbers ``[K]``; waits for the device."""
    total = numbers.detach().to("cpu", torch.float64, copy=True)
    if place.world_size > 1:
        dist.all_reduce(total, group=place.control)
    return [float(number) for number in total.tolist()]


class StopAgreement:
    """Lets all ranks stop after the same step when a signal has reached one of them.

    Each step sends one number and looks at what came of the step before: nobody waits.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._signum = torch.zeros((), dtype=torch.int64)
        self._work: Any = None

    def ask(self) -> int:
        """Return the signal after which all ranks stop now, or 0."""
        if self._place.world_size == 1:
            return self._place.stop.signum
        signum = self.settle()
        if not signum:
            self._signum.fill_(self._place.stop.signum)
            group, most = self._place.control, dist.ReduceOp.MAX
            self._work = dist.all_reduce(self._signum, most, group=group, async_op=True)
        return signum

    def settle(self) -> int:
        """Return the answer to the last question; nothing is under way afterwards."""
        if self._place.world_size == 1:
            return self._place.stop.signum
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._signum)
