"""Every call of ``torch.distributed``: rows between ranks, and what keeps ranks from hanging.

Rows of statistics are small: ``[groups, B, K]`` on each rank, with ``K = 2 * C + 1`` forward and
``2 * C`` backward. `exchange_samples` moves whole samples. Each function here sends one message to
each peer concerned; all ranks of the group call it in the same order.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .kernels.rows import constant
from .mixing import Plan, Rotation, rotation

CALL = "shuffle_batch_norm"
ProcessGroupLike = Any  # None, a ProcessGroup or a 1-D DeviceMesh

# How long a rank on the CPU waits for its peers before it looks whether one of them has failed.
_PATIENCE = timedelta(seconds=2)
ANSWER_BYTES = 1024


class World(NamedTuple):
    """The ranks that share statistics, seen from one of them; `group` is None for one rank."""

    rank: int = 0
    size: int = 1
    group: "dist.ProcessGroup | None" = None

    @property
    def name(self) -> str:
        """The group's name, the same on all its ranks; empty for one rank."""
        return "" if self.group is None else self.group.group_name


def check_process_group(call: str, process_group: ProcessGroupLike) -> None:
    """Raise a TypeError or ValueError unless `process_group` is a handle of a known kind."""
    if process_group is None or not dist.is_available():
        return
    if hasattr(process_group, "get_group"):
        if process_group.ndim != 1:
            raise ValueError(
                f"{call}: process_group must be a 1-D DeviceMesh, got {process_group.ndim}-D; "
                'pass one dimension of it, e.g. mesh["data"]'
            )
    elif not isinstance(process_group, dist.ProcessGroup) and not _is_non_member(process_group):
        raise TypeError(
            f"{call}: process_group must be None, a ProcessGroup or a 1-D DeviceMesh, "
            f"got {type(process_group).__name__}"
        )


def resolve(process_group: ProcessGroupLike, call: str = CALL) -> World:
    """Return this rank's view of a group; one rank if ``torch.distributed`` is not initialised."""
    if not dist.is_available() or not dist.is_initialized():
        return World()
    if process_group is None:
        process_group = dist.group.WORLD
    elif hasattr(process_group, "get_group"):
        process_group = process_group.get_group()
    rank = -1 if _is_non_member(process_group) else dist.get_rank(process_group)
    if rank < 0:
        raise RuntimeError(
            f"{call}: rank {dist.get_rank()} is not a member of the process_group given; "
            "call it on its members only"
        )
    return World(rank, dist.get_world_size(process_group), process_group)


def find_world(name: str) -> World:
    """Return this rank's view of the group of this name."""
    c10d: Any = dist.distributed_c10d
    return resolve(c10d._resolve_process_group(name)) if name else World()


def default_device(world: World) -> torch.device:
    """Return a device on which the group can communicate."""
    if world.group is not None and dist.get_backend(world.group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _is_non_member(process_group: ProcessGroupLike) -> bool:
    return isinstance(process_group, type(dist.GroupMember.NON_GROUP_MEMBER)) and not isinstance(
        process_group, dist.ProcessGroup
    )


def rotate(rows: Tensor, plan: Plan, world: World, *, inverse: bool = False) -> Tensor:
    """Move row ``(i, c)`` of every rank to group ``(i + shifts[c]) mod G``, or back.

    Communication: one ``all_to_all_single`` with constant splits. `swap` (B = 1) sends
    ``groups`` rows to at most two peers, `regroup` ``groups * B`` rows to at most B ranks.

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
    # The compiler traces the arithmetic once and warns of caches.
    find = _find_route if torch.compiler.is_compiling() else _cached_route
    route = find(plan, inverse, plan.per_group // rows.shape[1])
    outgoing = _take(rows.reshape(-1, rows.shape[-1]), route.send_order)
    if world.size == 1:
        return outgoing.view(shape)
    incoming = torch.empty_like(outgoing)
    _all_to_all(incoming, outgoing, route.receive_splits, route.send_splits, world)
    return _take(incoming, route.place_order).view(shape)


def _find_route(plan: Plan, inverse: bool, copies: int) -> Rotation:
    """Return the rotation of `copies` of each row; on one rank, all of it in the sending order."""
    route = rotation(plan.world_size, plan.rank, plan.groups, plan.shifts)
    if inverse:
        route = route.inverse()
    order = tuple(k // copies for k in route.send_order)
    if plan.world_size == 1:
        order = tuple(order[k] for k in route.place_order)
    return route._replace(send_order=order)


_cached_route = lru_cache(maxsize=1024)(_find_route)


def gather(row: Tensor, world: World) -> Tensor:
    """Return every rank's row, ``[K]`` to ``[W, K]``.

    Communication: one ``all_gather``, ``W * K`` numbers per rank.
    """
    return _all_gather(row, world)


def all_sum(row: Tensor, world: World) -> Tensor:
    """Return the sum of every rank's row ``[K]``.

    Communication: one ``all_reduce`` of K numbers per rank.
    """
    total = row.clone()

    def start(async_op: bool) -> Any:
        return dist.all_reduce(total, group=world.group, async_op=async_op)

    _finish(start, row, world)
    return total


def gather_answers(answer: bytes, device: torch.device, world: World) -> list[bytes]:
    """Return every rank's answer to a handshake, in rank order.

    Communication: one all_gather of `ANSWER_BYTES` per rank, whatever the ranks disagree on.
    """
    ordinal = _next_handshake(world)
    text = torch.frombuffer(bytearray(answer.ljust(ANSWER_BYTES)), dtype=torch.uint8).to(device)
    answers = _all_gather(
        text, world, while_waiting=lambda: _raise_if_a_peer_is_local(world, ordinal)
    )
    return [bytes(row) for row in answers.tolist()]


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
    padded = bytearray(text.encode()[:ANSWER_BYTES].ljust(ANSWER_BYTES))
    row = torch.frombuffer(padded, dtype=torch.uint8).to(device)
    texts = _all_gather(row, world, call).tolist()
    return [bytes(other).decode(errors="ignore").rstrip() for other in texts]


def exchange_samples(
    samples: Tensor,
    send_splits: tuple[int, ...],
    receive_splits: tuple[int, ...],
    world: World,
    call: str,
) -> Tensor:
    """Send the rows ``[N, K]``, in rank order, ``send_splits[r]`` of them to rank r.

    Communication: one ``all_to_all_single``; no row but those asked for travels.

    Returns:
        Tensor ``[N', K]``: the rows received, in rank order.
    """
    incoming = samples.new_empty(sum(receive_splits), samples.shape[1])
    _all_to_all(incoming, samples, receive_splits, send_splits, world, call)
    return incoming


def _all_gather(
    row: Tensor,
    world: World,
    call: str = CALL,
    while_waiting: Callable[[], None] | None = None,
) -> Tensor:
    rows = row.new_empty(world.size, row.shape[0])

    def start(async_op: bool) -> Any:
        return dist.all_gather(list(rows), row, group=world.group, async_op=async_op)

    _finish(start, row, world, call, while_waiting)
    return rows


def _all_to_all(
    incoming: Tensor,
    outgoing: Tensor,
    receive_splits: Sequence[int],
    send_splits: Sequence[int],
    world: World,
    call: str = CALL,
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

    _finish(start, outgoing, world, call)


def _finish(
    start: Callable[[bool], Any],
    payload: Tensor,
    world: World,
    call: str = CALL,
    while_waiting: Callable[[], None] | None = None,
) -> None:
    """Run one collective to its end; on the CPU, end it with a peer's error if a peer failed."""
    if torch.compiler.is_compiling() or payload.device.type != "cpu":
        # A GPU's collectives end in stream order and never block this thread.
        start(False)
        return
    _begin(world)
    work = start(True)
    while True:
        try:
            work.wait(_PATIENCE)
        except RuntimeError as error:
            if work.is_completed():
                raise RuntimeError(
                    f"{call}: rank {world.rank} of {world.size} lost its peers in an exchange "
                    f"({error})"
                ) from error
            _raise_if_a_peer_failed(world, call)
            if while_waiting is not None:
                while_waiting()
        else:
            return


# A rank that raises between two exchanges leaves peers waiting that it has no message for. It
# leaves a notice in the group's store, where ranks that have waited for long look for one. A layer
# in mode `local` leaves a note too, for peers whose layer is in another mode by mistake.


@dataclass
class _Progress:
    """How far this rank is with a group; the counts are the same on all its ranks."""

    exchanges: int = 0
    handshakes: int = 0
    failed_at: int = -1  # the exchange at which this rank last raised, and its peers may have
    has_notice: bool = False


_progress: defaultdict[str, _Progress] = defaultdict(_Progress)


def report_failure(world: World, message: str) -> None:
    """Tell the ranks that will wait for this one in vain why it stopped."""
    if world.size == 1:
        return
    progress = _progress[world.name]
    progress.failed_at, progress.has_notice = progress.exchanges, True
    notice = f"{progress.exchanges} rank {world.rank} stopped: {message}"
    _store().set(_key(world, "stopped"), notice)


def note_local(world: World) -> None:
    """Note that this rank's next layer to start does not communicate."""
    _store().set(_key(world, "local", _next_handshake(world), world.rank), "")


def _next_handshake(world: World) -> int:
    _progress[world.name].handshakes += 1
    return _progress[world.name].handshakes


def _begin(world: World) -> None:
    """Count an exchange. Withdraw this rank's notice: its caller caught the error and goes on."""
    progress = _progress[world.name]
    progress.exchanges += 1
    if progress.has_notice:
        progress.has_notice = False
        _store().delete_key(_key(world, "stopped"))


def _raise_if_a_peer_failed(world: World, call: str) -> None:
    key = _key(world, "stopped")
    if not _store().check([key]):
        return
    exchange, message = _store().get(key).decode().split(maxsplit=1)
    # A rank that raised together with its peer, and goes on, expects the same of the peer.
    if int(exchange) > _progress[world.name].failed_at:
        raise RuntimeError(f"{call}: {message}")


def _raise_if_a_peer_is_local(world: World, ordinal: int) -> None:
    for rank in range(world.size):
        if _store().check([_key(world, "local", ordinal, rank)]):
            raise ValueError(
                f"{CALL}: ranks disagree on mode: 'local' on rank {rank}, another mode on rank "
                f"{world.rank}"
            )


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _key(world: World, *parts: str | int) -> str:
    return "/".join(("shuffle_batchnorm", world.name, *map(str, parts)))


def _take(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return ``rows[order]``."""
    if len(order) == 1 == len(rows):
        return rows
    return rows.index_select(0, constant(order, torch.int64, rows))
