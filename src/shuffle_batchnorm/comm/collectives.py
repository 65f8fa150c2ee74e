"""Every message between ranks: four collectives, and what keeps their ranks from waiting in vain.

All ranks of a group call them in the same order. Each takes `call`, the name for an error's text,
and `doing`, what all ranks do in it in the same words, which is how ranks at different calls are
found out on the CPU.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import failures
from .world import World

# How long a rank on the CPU waits for its peers before it checks whether they can come.
_PATIENCE = timedelta(seconds=2)


def all_to_all(
    rows: Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    world: World,
    call: str,
    doing: str,
    incoming: Tensor | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Tensor:
    """Send rows ``[R, *]``, in rank order, ``send_splits[r]`` of them to rank r.

    Communication: one ``all_to_all_single``; no row but those asked for travels.

    Args:
        rows: contiguous, as many as all of `send_splits`.
        send_splits: for each rank.
        receive_splits: for each rank.
        world: the ranks.
        call: see the module.
        doing: see the module.
        incoming: memory for the rows received.
        meanwhile: what to do while they are under way.

    Returns:
        Tensor ``[R', *]``: the rows received, in rank order.
    """
    if incoming is None:
        incoming = rows.new_empty(sum(receive_splits), *rows.shape[1:])

    def start(async_op: bool) -> Any:
        splits = list(receive_splits), list(send_splits)
        return dist.all_to_all_single(incoming, rows, *splits, group=world.group, async_op=async_op)

    _finish(start, rows, world, call, doing, meanwhile)
    return incoming


def all_gather(row: Tensor, world: World, call: str, doing: str) -> Tensor:
    """Return every rank's row, ``[K]`` to ``[W, K]``.

    Communication: one ``all_gather``, ``W * K`` numbers per rank.
    """
    rows = row.new_empty(world.size, row.shape[0])

    def start(async_op: bool) -> Any:
        return dist.all_gather(list(rows), row, group=world.group, async_op=async_op)

    _finish(start, row, world, call, doing)
    return rows


def all_sum(numbers: Tensor, world: World, call: str, doing: str) -> Tensor:
    """Return the sum of every rank's tensor of one shape.

    Communication: one ``all_reduce``.
    """
    total = numbers.clone()

    def start(async_op: bool) -> Any:
        return dist.all_reduce(total, group=world.group, async_op=async_op)

    _finish(start, numbers, world, call, doing)
    return total


def _finish(
    start: Callable[[bool], Any],
    payload: Tensor,
    world: World,
    call: str,
    doing: str,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Run one collective to its end; on the CPU, end it with an error if a peer can't come."""
    if torch.compiler.is_compiling() or payload.device.type != "cpu":
        # NCCL's end in stream order and never block this thread. gloo, which copies a GPU's memory
        # through the host, waits here for the peers, until the group's time limit.
        start(False)
        meanwhile()
        return
    failures.begin(world, call)
    work = start(True)
    try:
        meanwhile()
        while not _wait(work, world, call):
            failures.check_peers(world, call, doing)
    except Exception as error:
        failures.abandon(world, str(error))  # the work may still be under way
        raise


def _wait(work: Any, world: World, call: str) -> bool:
    """Wait for a collective's end, and return whether it has come."""
    try:
        work.wait(_PATIENCE)
    except RuntimeError:
        if not work.is_completed():
            return False
        try:
            work.wait()  # it may have ended well, just after the wait
        except RuntimeError as error:
            raise RuntimeError(
                f"{call}: rank {world.rank} of {world.size} lost its peers in an exchange ({error})"
            ) from error
    return True
