"""Every call of ``torch.distributed``: rows between ranks, and what keeps ranks from hanging.

Rows of statistics are small: ``[groups, B, K]`` on each rank, with ``K = 2 * C + 1`` forward and
``2 * C`` backward. `exchange_samples` moves whole samples. Each function here sends one message to
each peer concerned; all ranks of the group call it in the same order.
"""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shuffle_batchnorm.kernels.rows import constant
from shuffle_batchnorm.norm.mixing import Plan, Rotation, kept, rotation

from . import failures
from .failures import Waiting
from .world import CALL, World

# How long a rank on the CPU waits for its peers before it looks whether one of them has failed.
_PATIENCE = timedelta(seconds=2)
ANSWER_BYTES = 2048
# All rows in one message are W / 2 times the bytes of the two rotations of `regroup`, and faster
# while a message costs more than its bytes and than pooling all groups. Measured on gloo: 1.4 to
# 2.1 times faster up to 262 KB per rank (W = 8, C = 512); with 1 MB (C = 2,048) half as fast
# forward and equal backward.
ONE_MESSAGE_BYTES = 2**19


def rotate(rows: Tensor, plan: Plan, world: World, *, inverse: bool = False) -> Tensor:
    """Move row ``(i, c)`` of every rank to group ``(i + shifts[c]) mod G``, or back.

    Communication: one ``all_to_all_single`` with constant splits. `swap` (B = 1) sends
    ``groups`` rows to at most two peers, `regroup` ``groups * B`` rows to at most B
    ranks, or 2 B if the offset is more than ``groups`` and no multiple of it.

    Args:
        rows: ``[groups, B, K]``, this rank's rows; or ``[groups, 1, K]``, to send each B times.
        plan: how the ranks mix.
        world: the ranks.
        inverse: move every row back instead.

    Returns:
        Tensor ``[groups, B, K]``: at ``[s, c]`` the row that came to this rank's group ``s``.
    """
    shape = (plan.groups, plan.per_group, rows.shape[-1])
    if not any(plan.shifts):
        return rows.expand(shape)
    route = _find_route(plan, inverse, plan.per_group // rows.shape[1])
    outgoing = _take(rows.flatten(0, 1), route.send_order)
    if world.size == 1:
        return outgoing.view(shape)
    incoming = torch.empty_like(outgoing)
    _all_to_all(incoming, outgoing, route.receive_splits, route.send_splits, world)
    return _take(incoming, route.place_order).view(shape)


@kept
def _find_route(plan: Plan, inverse: bool, copies: int) -> Rotation:
    """Return the rotation of `copies` of each row; on one rank, all of it in the sending order."""
    route = rotation(plan.world_size, plan.rank, plan.groups, plan.shifts)
    if inverse:
        route = route.inverse()
    order = tuple(k // copies for k in route.send_order)
    if plan.world_size == 1:
        order = tuple(order[k] for k in route.place_order)
    return route._replace(send_order=order)


def fits_one_message(rows: Tensor, plan: Plan) -> bool:
    """Return whether `regroup` sends all rows to all ranks at once, in place of two rotations.

    It does if all G groups are dealt to all, within `ONE_MESSAGE_BYTES` per rank. Ranks decide
    alike: they have agreed on the options and on the form of the rows.
    """
    deals = plan.world_size > 1 and any(plan.shifts)
    received = plan.world_size * rows.numel() * rows.element_size()
    return deals and plan.per_group == plan.total_groups and received <= ONE_MESSAGE_BYTES


def send_to_all(rows: Tensor, world: World) -> Tensor:
    """Return the rows of all groups, ``[groups, B, K]`` to ``[G, B, K]``.

    Communication: ``groups * B`` rows to every rank by one all_to_all, as in `gather_numbers`.
    """
    splits = (len(rows),) * world.size
    outgoing = rows.repeat(world.size, 1, 1)
    incoming = torch.empty_like(outgoing)
    _all_to_all(incoming, outgoing, splits, splits, world)
    return incoming


def gather(
    row: Tensor, world: World, call: str = CALL, while_waiting: Waiting | None = None
) -> Tensor:
    """Return every rank's row, ``[K]`` to ``[W, K]``.

    Communication: one ``all_gather``, ``W * K`` numbers per rank.
    """
    rows = row.new_empty(world.size, row.shape[0])

    def start(async_op: bool) -> Any:
        return dist.all_gather(list(rows), row, group=world.group, async_op=async_op)

    _finish(start, row, world, call, while_waiting)
    return rows


def all_sum(row: Tensor, world: World) -> Tensor:
    """Return the sum of every rank's row ``[K]``.

    Communication: one ``all_reduce`` of K numbers per rank.
    """
    total = row.clone()

    def start(async_op: bool) -> Any:
        return dist.all_reduce(total, group=world.group, async_op=async_op)

    _finish(start, row, world)
    return total


def gather_answers(answer: bytes, channels: int, device: torch.device, world: World) -> list[bytes]:
    """Return every rank's answer to a handshake, in rank order.

    Communication: one all_gather of `ANSWER_BYTES` per rank, whatever the ranks disagree on, and
    one note in the group's store.
    """
    since = time.monotonic()
    failures.note_handshake(world)
    return _gather_bytes(
        answer, device, world, CALL, lambda w: failures.raise_if_a_peer_is_local(w, since, channels)
    )


def gather_numbers(
    numbers: Sequence[int], device: torch.device, world: World, call: str
) -> list[list[int]]:
    """Return every rank's K numbers, in rank order.

    Communication: 8 K bytes to every rank by one all_to_all: gloo's all_gather takes W - 1 hops in
    a row, which is more than twice the time for 8 ranks. On a GPU it waits for the stream.
    """
    row = torch.tensor(numbers, device=device)
    rows = torch.empty(world.size, len(numbers), dtype=row.dtype, device=device)
    ones = (1,) * world.size
    _all_to_all(rows, row.expand_as(rows).contiguous(), ones, ones, world, call)
    return [[int(number) for number in row] for row in rows.tolist()]


def gather_texts(text: str, device: torch.device, world: World, call: str) -> list[str]:
    """Return what every rank has to say, cut to `ANSWER_BYTES`, in rank order.

    Communication: one all_gather of `ANSWER_BYTES` per rank.
    """
    texts = _gather_bytes(text.encode(), device, world, call)
    return [other.decode(errors="ignore").rstrip() for other in texts]


def _gather_bytes(
    text: bytes,
    device: torch.device,
    world: World,
    call: str,
    while_waiting: Waiting | None = None,
) -> list[bytes]:
    """Return what every rank has to say, cut or padded to `ANSWER_BYTES`, in rank order."""
    padded = bytearray(text[:ANSWER_BYTES].ljust(ANSWER_BYTES))
    row = torch.frombuffer(padded, dtype=torch.uint8).to(device)
    return [bytes(other) for other in gather(row, world, call, while_waiting).tolist()]


def exchange_samples(
    samples: Tensor,
    send_splits: tuple[int, ...],
    receive_splits: tuple[int, ...],
    world: World,
    call: str,
    incoming: Tensor | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Tensor:
    """Send the rows ``[N, K]``, in rank order, ``send_splits[r]`` of them to rank r.

    Communication: one ``all_to_all_single``; no row but those asked for travels.

    Args:
        samples: the rows.
        send_splits: for each rank.
        receive_splits: for each rank.
        world: the ranks.
        call: for an error's text.
        incoming: memory for the rows received.
        meanwhile: what to do while they are under way; on a GPU, then.

    Returns:
        Tensor ``[N', K]``: the rows received, in rank order.
    """
    if incoming is None:
        incoming = samples.new_empty(sum(receive_splits), samples.shape[1])
    _all_to_all(incoming, samples, receive_splits, send_splits, world, call, meanwhile)
    return incoming


def _all_to_all(
    incoming: Tensor,
    outgoing: Tensor,
    receive_splits: Sequence[int],
    send_splits: Sequence[int],
    world: World,
    call: str = CALL,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    def start(async_op: bool) -> Any:
        return dist.all_to_all_single(
            incoming,
            outgoing,
            list(receive_splits),
            list(send_splits),
            group=world.group,
            async_op=async_op,
        )

    _finish(start, outgoing, world, call, meanwhile=meanwhile)


def _finish(
    start: Callable[[bool], Any],
    payload: Tensor,
    world: World,
    call: str = CALL,
    while_waiting: Waiting | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Run one collective to its end; on the CPU, end it with a peer's error if a peer failed."""
    if torch.compiler.is_compiling() or payload.device.type != "cpu":
        # A GPU's collectives end in stream order and never block this thread.
        start(False)
        meanwhile()
        return
    failures.begin(world, call)
    work = start(True)
    try:
        try:
            meanwhile()
        except Exception as error:
            failures.break_off(world, str(error))  # the work is under way
            raise
        _wait(work, world, call, while_waiting or failures.raise_if_a_peer_compares)
    finally:
        failures.stop_waiting(world)


def _wait(work: Any, world: World, call: str, while_waiting: Waiting) -> None:
    """Wait for a collective's end, and look now and then whether it can come."""
    while True:
        try:
            work.wait(_PATIENCE)
        except RuntimeError:
            if work.is_completed():
                break
            try:
                failures.raise_if_a_peer_failed(world, call)
                while_waiting(world)
                failures.raise_if_a_peer_waits_elsewhere(world, call)
            except (RuntimeError, ValueError):
                failures.break_off(world)  # the work is still under way
                raise
        else:
            return
    try:
        work.wait()  # it may have ended well, just after the wait
    except RuntimeError as error:
        failures.break_off(world)
        raise RuntimeError(
            f"{call}: rank {world.rank} of {world.size} lost its peers in an exchange ({error})"
        ) from error


def _take(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return ``rows[order]``."""
    if len(order) == 1 == len(rows):
        return rows
    return rows.index_select(0, constant(order, torch.int64, rows))
