"""Notes in a process group's store, for ranks that would otherwise wait in vain.

A rank that raises between two exchanges leaves peers waiting that it has no message for. It leaves
a notice in the store, where ranks that have waited for long look for one. So does a rank that
compares options, for peers that exchange statistics instead, and a layer in mode `local`, for peers
whose layer is in another mode by mistake.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from .world import CALL, World, resolve

# Seconds until a rank suspects that a peer's layer is in mode `local`, which may also be just slow.
_LONG = 10.0
_OUT_OF_STEP = (
    "the process group is out of step since an exchange was left before its end; go on with a new "
    "process group"
)


@dataclass
class _GroupState:
    """How far this rank is with a process group; `exchanges` is the same on all its ranks."""

    serial: int  # of the group in this process: names are used again, these are not
    exchanges: int = 0
    failed_at: int = -1  # the exchange at which this rank last raised, and its peers may have
    has_notice: bool = False
    out_of_step: bool = False  # an exchange was left before its end
    stopped_alone: bool = False  # before an exchange that its peers may have begun
    has_note: bool = False  # of where this rank waits


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


def break_off(world: World, message: str = "") -> None:
    """Note that this rank has left what all are doing before its end; tell its peers why.

    The group is of no use then: its next message would be taken for the one that peers wait for.
    """
    if world.size == 1 or _state(world).out_of_step:
        return
    _state(world).out_of_step = True
    if message:  # nothing to tell if a peer's notice was the reason
        report_failure(world, message)


def stop_alone(world: World, message: str) -> None:
    """Note that this rank raises before it knows whether its peers do; tell them why.

    The group is of no use if they don't: see `begin`.
    """
    if world.size > 1:
        report_failure(world, message)
        _state(world).stopped_alone = True
        _store().set(_key(world, "alone", world.rank), str(_state(world).exchanges))


def exchanges(world: World) -> int:
    """Return how many exchanges this rank has begun in the group."""
    return 0 if world.size == 1 else _state(world).exchanges


def note_handshake(world: World) -> None:
    """Note that this rank's next exchange compares options."""
    _store().set(_key(world, "handshake", _state(world).exchanges + 1), str(world.rank))


def note_local(world: World, channels: int) -> None:
    """Note that this rank's next layer to start does not communicate."""
    _store().set(_key(world, "local", _state(world).exchanges + 1, channels), str(world.rank))


def _state(world: World) -> _GroupState:
    if world.group not in _states:
        _states[world.group] = _GroupState(next(_serials))
    return _states[world.group]


def begin(world: World, call: str) -> None:
    """Count an exchange. Withdraw this rank's notice: its caller caught the error and goes on."""
    state = _state(world)
    if state.stopped_alone:
        state.stopped_alone = False
        if not _all_have_stopped(world):
            break_off(world)
    if state.out_of_step:
        if not _read(world, "stopped"):  # the first reason stays
            report_failure(world, _OUT_OF_STEP)
        raise RuntimeError(f"{call}: {_OUT_OF_STEP}")
    state.exchanges += 1
    if state.has_notice:
        state.has_notice = False
        # A peer's notice may have taken its place.
        if _read(world, "stopped").split(maxsplit=2)[1:2] == [str(world.rank)]:
            _store().set(_key(world, "stopped"), "")


def _all_have_stopped(world: World) -> bool:
    """Wait until all ranks have stopped alone before the same exchange, or one has begun it."""
    mine, since = str(_state(world).exchanges), time.monotonic()
    while not _read(world, "left") and time.monotonic() - since < _LONG:
        if all(_read(world, "alone", rank) == mine for rank in range(world.size)):
            return True
        time.sleep(0.01)
    return False


def raise_if_a_peer_failed(world: World, call: str) -> None:
    """Raise what made a peer stop before the exchange that this rank waits in."""
    notice = _read(world, "stopped") or _read(world, "left")
    if not notice:
        return
    exchange, rank, message = notice.split(maxsplit=2)
    # A rank that raised together with its peer, and goes on, expects the same of the peer.
    if int(exchange) > _state(world).failed_at:
        reason = f"{call}: rank {rank} stopped: {message}"
        _leave(world, reason)
        raise RuntimeError(reason)


def _leave(world: World, reason: str) -> None:
    """Note for good that this rank leaves an exchange before its end.

    A peer may withdraw its own notice, or have written it over another, and then wait for this
    rank, which has gone.
    """
    _store().set(_key(world, "left"), f"{_state(world).exchanges} {world.rank} {reason}")


def raise_if_a_peer_compares(world: World) -> None:
    """Raise if a peer is in a handshake while this rank is in another exchange."""
    rank = _read(world, "handshake", _state(world).exchanges)
    if rank:
        message = (
            f"ranks are not at the same call: rank {rank} is at a first call, of a new layer or "
            f"with new options, channels or dtype, while rank {world.rank} exchanges statistics"
        )
        report_failure(world, message)
        raise RuntimeError(f"{CALL}: {message}")


def raise_if_a_peer_is_local(world: World, since: float, channels: int) -> None:
    """Raise if this rank has waited for long in a handshake that a peer's layer does not need."""
    if time.monotonic() - since < _LONG:
        return
    rank = _read(world, "local", _state(world).exchanges, channels)
    if rank:
        raise ValueError(
            f"{CALL}: ranks disagree on mode: 'local' on rank {rank}, another mode on rank "
            f"{world.rank}"
        )


def raise_if_a_peer_waits_elsewhere(world: World, call: str) -> None:
    """Raise if a peer waits in another group for this rank, which waits for it here.

    Leaves a note of where this rank waits, until `stop_waiting`. Only a note of an exchange in
    which this rank has not taken part counts: that one can't have ended.
    """
    state = _state(world)
    state.has_note = True
    _store().set(_waiting_key(dist.get_rank()), f"{world.name} {state.exchanges} {call}")
    for peer in dist.get_process_group_ranks(world.group):
        note = "" if peer == dist.get_rank() else _text(_waiting_key(peer))
        if not note:
            continue
        name, exchange, their_call = note.split(maxsplit=2)
        other = _world_named(name)
        if other is None or other == world or _state(other).exchanges >= int(exchange):
            continue
        message = (
            f"ranks wait for each other in different process groups: rank {dist.get_rank()} in "
            f"{call} in group {world.name!r}, rank {peer} in {their_call} in group {name!r}"
        )
        for group in (other, world):  # peers may come here later
            report_failure(group, message)
        _leave(world, message)
        raise RuntimeError(f"{call}: {message}")


def stop_waiting(world: World) -> None:
    """Take back the note of where this rank waits, if there is one."""
    state = _state(world)
    if state.has_note:
        state.has_note = False
        _store().set(_waiting_key(dist.get_rank()), "")


def report_everywhere(message: str) -> None:
    """Tell the peers in every group with which this rank has exchanged anything."""
    for group in list(_states):
        world = _world_named(group.group_name)
        if world is not None:
            report_failure(world, message)


def _world_named(name: str) -> World | None:
    """Return this rank's view of a group; None if it isn't in it, or the group is gone."""
    groups = dist.distributed_c10d._world.pg_names.items()
    return next((resolve(group) for group, other in groups if other == name), None)


def _waiting_key(rank: int) -> str:
    return f"shuffle_batchnorm/waiting/{rank}"


def _read(world: World, *parts: str | int) -> str:
    """Return what a rank has left in the store, or an empty string."""
    return _text(_key(world, *parts))


def _text(key: str) -> str:
    """Return the text of a key, or an empty string if there is none."""
    # Keys are emptied and never deleted: to get one that is gone waits for it, and then raises.
    text: str = _store().get(key).decode() if _store().check([key]) else ""
    return text


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _key(world: World, *parts: str | int) -> str:
    return "/".join(("shuffle_batchnorm", world.name, *map(str, parts)))
