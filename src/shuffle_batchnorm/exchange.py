"""Every call of ``torch.distributed``: rows between ranks, and what keeps ranks from hanging.

Rows of statistics are small: ``[groups, B, K]`` on each rank, with ``K = 2 * C + 1`` forward and
``2 * C`` backward. `exchange_samples` moves whole samples. Each function here sends one message to
each peer concerned; all ranks of the group call it in the same order.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .kernels.rows import constant
from .mixing import Plan, Rotation, rotation

CALL = "shuffle_batch_norm"
ProcessGroupLike = Any  # None, a ProcessGroup or a 1-D DeviceMesh

# How long a rank on the CPU waits for its peers before it looks whether one of them has failed.
_PATIENCE = timedelta(seconds=2)
# Seconds until it suspects that a peer's layer is in mode `local`, which may also be just slow.
_LONG = 10.0
ANSWER_BYTES = 2048


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
    # torch's stand-in for a group that this rank is not in is a plain number.
    return isinstance(process_group, int) and process_group == dist.GroupMember.NON_GROUP_MEMBER


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


def gather(
    row: Tensor, world: World, call: str = CALL, while_waiting: "Waiting | None" = None
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
    _store().set(_key(world, "handshake", _state(world).exchanges + 1), str(world.rank))
    return _gather_bytes(
        answer, device, world, CALL, lambda w: _raise_if_a_peer_is_local(w, since, channels)
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
    while_waiting: "Waiting | None" = None,
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
) -> Tensor:
    """Send the rows ``[N, K]``, in rank order, ``send_splits[r]`` of them to rank r.

    Communication: one ``all_to_all_single``; no row but those asked for travels.

    Returns:
        Tensor ``[N', K]``: the rows received, in rank order.
    """
    incoming = samples.new_empty(sum(receive_splits), samples.shape[1])
    _all_to_all(incoming, samples, receive_splits, send_splits, world, call)
    return incoming


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
    while_waiting: "Waiting | None" = None,
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
        except RuntimeError:
            if work.is_completed():
                break
            _raise_if_a_peer_failed(world, call)
            (while_waiting or _raise_if_a_peer_compares)(world)
        else:
            return
    try:
        work.wait()  # it may have ended well, just after the wait
    except RuntimeError as error:
        raise RuntimeError(
            f"{call}: rank {world.rank} of {world.size} lost its peers in an exchange ({error})"
        ) from error


# A rank that raises between two exchanges leaves peers waiting that it has no message for. It
# leaves a notice in the process group's store, where ranks that have waited for long look for one.
# So does a rank that compares options, for peers that exchange statistics instead, and a layer in
# mode `local`, for peers whose layer is in another mode by mistake.


@dataclass
class _GroupState:
    """How far this rank is with a process group; `exchanges` is the same on all its ranks."""

    serial: int  # of the group in this process: names are used again, these are not
    exchanges: int = 0
    failed_at: int = -1  # the exchange at which this rank last raised, and its peers may have
    has_notice: bool = False


Waiting = Callable[[World], None]
_states: WeakKeyDictionary[Any, _GroupState] = WeakKeyDictionary()
_serials = itertools.count()


def serial(world: World) -> int:
    """Return a number for the process group that no other group in this process has had."""
    return _state(world).serial


def report_failure(world: World, message: str) -> None:
    """Tell the ranks that will wait for this one in vain why it stopped."""
    if world.size == 1:
        return
    state = _state(world)
    state.failed_at, state.has_notice = state.exchanges, True
    notice = f"{state.exchanges} {world.rank} {message}"
    _store().set(_key(world, "stopped"), notice)


def note_local(world: World, channels: int) -> None:
    """Note that this rank's next layer to start does not communicate."""
    _store().set(_key(world, "local", _state(world).exchanges + 1, channels), str(world.rank))


def _state(world: World) -> _GroupState:
    if world.group not in _states:
        _states[world.group] = _GroupState(next(_serials))
    return _states[world.group]


def _begin(world: World) -> None:
    """Count an exchange. Withdraw this rank's notice: its caller caught the error and goes on."""
    state = _state(world)
    state.exchanges += 1
    if state.has_notice:
        state.has_notice = False
        # A peer's notice may have taken its place.
        if _read(world, "stopped").split(maxsplit=2)[1:2] == [str(world.rank)]:
            _store().delete_key(_key(world, "stopped"))


def _raise_if_a_peer_failed(world: World, call: str) -> None:
    notice = _read(world, "stopped")
    if not notice:
        return
    exchange, rank, message = notice.split(maxsplit=2)
    # A rank that raised together with its peer, and goes on, expects the same of the peer.
    if int(exchange) > _state(world).failed_at:
        raise RuntimeError(f"{call}: rank {rank} stopped: {message}")


def _raise_if_a_peer_compares(world: World) -> None:
    rank = _read(world, "handshake", _state(world).exchanges)
    if rank:
        message = (
            f"ranks are not at the same call: rank {rank} is at a first call, of a new layer or "
            f"with new options, channels or dtype, while rank {world.rank} exchanges statistics"
        )
        report_failure(world, message)
        raise RuntimeError(f"{CALL}: {message}")


def _raise_if_a_peer_is_local(world: World, since: float, channels: int) -> None:
    if time.monotonic() - since < _LONG:
        return
    rank = _read(world, "local", _state(world).exchanges, channels)
    if rank:
        raise ValueError(
            f"{CALL}: ranks disagree on mode: 'local' on rank {rank}, another mode on rank "
            f"{world.rank}"
        )


def _read(world: World, *parts: str | int) -> str:
    """Return what a rank has left in the store, or an empty string."""
    key = _key(world, *parts)
    text: str = _store().get(key).decode() if _store().check([key]) else ""
    return text


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _key(world: World, *parts: str | int) -> str:
    return "/".join(("shuffle_batchnorm", world.name, *map(str, parts)))


def _take(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return ``rows[order]``."""
    if len(order) == 1 == len(rows):
        return rows
    return rows.index_select(0, constant(order, torch.int64, rows))
