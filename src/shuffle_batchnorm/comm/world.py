"""Which ranks belong together, seen from one of them."""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

ProcessGroupLike = Any  # None, a ProcessGroup or a 1-D DeviceMesh


class World(NamedTuple):
    """The ranks that share statistics, seen from one of them; `group` is None for one rank."""

    rank: int = 0
    size: int = 1
    group: "dist.ProcessGroup | None" = None

    @property
    def name(self) -> str:
        """The group's name, the same on all its ranks; empty for one rank."""
        return find_name(self)


def find_name(world: World) -> str:
    """Return `World.name`, also in a graph: compilers before torch 2.10 know no property of it."""
    return "" if world.group is None else world.group.group_name


def check_process_group(call: str, process_group: ProcessGroupLike) -> None:
    """Raise a TypeError or ValueError unless `process_group` is a handle of a known kind."""
    if process_group is None or not dist.is_available():
        return
    # Of a handle's attributes the compiler knows too little to be asked.
    if isinstance(process_group, DeviceMesh):
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


def resolve(process_group: ProcessGroupLike, call: str) -> World:
    """Return this rank's view of a group; one rank if ``torch.distributed`` is not initialised."""
    if not dist.is_available() or not dist.is_initialized():
        return _ALONE
    if process_group is None:
        process_group = dist.group.WORLD
    elif isinstance(process_group, DeviceMesh):
        process_group = process_group.get_group()
    if torch.compiler.is_compiling():
        return _find_position(process_group, call)
    if process_group not in _positions:
        world = _find_position(process_group, call)
        _positions[process_group] = world.rank, world.size
        return world
    return World(*_positions[process_group], process_group)


_ALONE = World()
_positions: "WeakKeyDictionary[Any, tuple[int, int]]" = WeakKeyDictionary()


def _find_position(process_group: Any, call: str) -> World:
    rank = -1 if _is_non_member(process_group) else dist.get_rank(process_group)
    if rank < 0:
        raise RuntimeError(
            f"{call}: rank {dist.get_rank()} is not a member of the process_group given; "
            "call it on its members only"
        )
    return World(rank, dist.get_world_size(process_group), process_group)


def find_world(name: str, call: str) -> World:
    """Return this rank's view of the group of this name."""
    c10d: Any = dist.distributed_c10d
    return resolve(c10d._resolve_process_group(name), call) if name else _ALONE


def default_device(world: World) -> torch.device:
    """Return a device on which the group can communicate, the CPU if that is one."""
    kinds = _device_kinds(world)
    if "cuda" in kinds and "cpu" not in kinds:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def usable_device(world: World, device: torch.device) -> torch.device:
    """Return a device on which the group can communicate: the one given, if it can."""
    if world.group is None or torch.compiler.is_compiling():
        return device
    return device if device.type in _device_kinds(world) else default_device(world)


_kinds: "WeakKeyDictionary[Any, set[str]]" = WeakKeyDictionary()


def _device_kinds(world: World) -> set[str]:
    """Return the kinds of device on which the group can communicate."""
    if world.group is None:
        return set()
    if world.group not in _kinds:
        _kinds[world.group] = {kind.type for kind in world.group._device_types}
    return _kinds[world.group]


def _is_non_member(process_group: ProcessGroupLike) -> bool:
    # torch's stand-in for a group that this rank is not in is a plain number.
    return isinstance(process_group, int) and process_group == dist.GroupMember.NON_GROUP_MEMBER
