"""What keeps ranks on the CPU from waiting in vain: notes in the process group's store.

A rank that raises between two collectives announces it, for peers that wait for it in the next one.
It goes on only if all ranks have failed there: else its next message would be taken for the one
that peers wait for. A rank that has waited for long says in which call it is, and looks whether a
peer is in another. A rank that leaves a collective before its end abandons the group.
"""

import time
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .world import World

_LONG = 10.0  # seconds in which ranks that fail alike do so
_ABANDONED = (
    "the process group is out of step since an exchange was left before its end; go on with a new "
    "process group"
)


@dataclass
class _Progress:
    """How far this rank is with a process group.

    Attributes:
        prefix: of the group's keys in the store; another one for a later group of the same name.
        begun: collectives that this rank has begun, the same number on all ranks.
        announced: the collective that this rank did not begin when it last announced a failure.
        abandoned: whether a collective was left before its end.
    """

    prefix: str
    begun: int = 0
    announced: int = 0
    abandoned: bool = False


_groups: WeakKeyDictionary[Any, _Progress] = WeakKeyDictionary()
_names: dict[str, Counter[str]] = {}  # by the store, since some ranks may have had no use for one


def announce(world: World, message: str) -> None:
    """Tell the ranks that will wait for this one in the next collective why it does not come."""
    if world.size == 1:
        return
    progress = _progress(world)
    if progress.announced == progress.begun + 1:  # not the first mistake in this place
        return
    progress.announced = progress.begun + 1
    _write(world, f"failed/{progress.announced}", f"rank {world.rank} stopped: {message}")
    _count_failures(world, 1)


def abandon(world: World, message: str) -> None:
    """Give up a group whose collectives this rank can't go through with, and tell its peers why."""
    if world.size == 1 or _progress(world).abandoned:
        return
    _progress(world).abandoned = True
    if not _read(world, "abandoned"):  # the first reason stays
        _write(world, "abandoned", f"rank {world.rank} stopped: {message}")


def begun(world: World) -> int:
    """Return how many collectives this rank has begun in the group."""
    return 0 if world.size == 1 else _progress(world).begun


def begin(world: World, call: str) -> None:
    """Count a collective.

    Raises:
        RuntimeError: an earlier one was left before its end, or a peer waits for one in which this
            rank has not taken part.
    """
    progress = _progress(world)
    if progress.announced == progress.begun + 1 and not _all_have_failed(world):
        abandon(world, _read(world, f"failed/{progress.announced}"))
    if progress.abandoned:
        raise RuntimeError(f"{call}: {_ABANDONED}")
    progress.begun += 1


def check_peers(world: World, call: str, doing: str) -> None:
    """Raise if a peer can't come to the collective in which this rank has waited for long.

    Args:
        world: the ranks.
        call: for the error's text.
        doing: what all ranks do in this collective, in the same words.
    """
    progress = _progress(world)
    failure = ""
    # Ranks that have failed before the same collective, and have come to it all the same, go on.
    if progress.announced != progress.begun:
        failure = _read(world, f"failed/{progress.begun}")
    if not failure and (reason := _read(world, "abandoned")):
        failure = f"{reason}; {_ABANDONED}"
    failure = failure or _find_other_call(world, doing) or find_join()
    if failure:
        raise RuntimeError(f"{call}: {failure}")


def find_join() -> str:
    """Return why this call can't be in the DDP ``join()`` around it; an empty string if it can.

    Torch demands the same of every model with messages of its own in its forward.
    """
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or not ddp._join_config.enable or ddp._join_config.throw_on_early_termination:
        return ""
    return (
        "in DDP's join() a rank that has run out of inputs does not take part in this exchange, "
        "and its peers would wait for it; call join(throw_on_early_termination=True)"
    )


def _find_other_call(world: World, doing: str) -> str:
    """Return which peer waits in another call for this rank, which waits for it here."""
    begun = _progress(world).begun
    _write(world, f"waits/{world.rank}", f"{begun} {doing}")
    for peer in range(world.size):
        collective, _, theirs = _read(world, f"waits/{peer}").partition(" ")
        if collective == str(begun) and theirs != doing:
            return f"ranks are at different calls: rank {world.rank} {doing}, rank {peer} {theirs}"
    return ""


def _all_have_failed(world: World) -> bool:
    """Wait until all ranks have failed before the same collective, or one has left it."""
    until = time.monotonic() + _LONG
    while not _read(world, "abandoned") and time.monotonic() < until:
        if _count_failures(world, 0) == world.size:
            return True
        time.sleep(0.01)
    return False


def _count_failures(world: World, more: int) -> int:
    """Return how many ranks have failed before the same collective as this one."""
    progress = _progress(world)
    return int(_store().add(f"{progress.prefix}/failures/{progress.announced}", more))


def _progress(world: World) -> _Progress:
    if world.group not in _groups:
        # Torch uses names again, and under torchrun the store outlives its groups.
        names = _names.setdefault(_name_of_store(), Counter())
        names[world.name] += 1
        _groups[world.group] = _Progress(f"shuffle_batchnorm/{world.name}/{names[world.name]}")
    return _groups[world.group]


def _name_of_store() -> str:
    """Return what the first rank to ask has named the store, the same on all ranks."""
    try:
        name: bytes = _store().compare_set("shuffle_batchnorm/store", "", uuid.uuid4().hex)
    except RuntimeError:  # torch's FakeStore, whose other ranks are imagined, can't
        return ""
    return name.decode()


def _write(world: World, key: str, text: str) -> None:
    _store().set(f"{_progress(world).prefix}/{key}", text)


def _read(world: World, key: str) -> str:
    """Return what a rank has left in the store, or an empty string."""
    # Keys are never deleted: to get one that is gone waits for it.
    key = f"{_progress(world).prefix}/{key}"
    text: str = _store().get(key).decode() if _store().check([key]) else ""
    return text


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
