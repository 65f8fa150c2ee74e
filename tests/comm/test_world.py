"""Which ranks belong together, by every kind of handle."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ranks import run_on_ranks
from shuffle_batchnorm.comm.world import (
    World,
    check_process_group,
    default_device,
    find_world,
    resolve,
    usable_device,
)


def test_one_process_is_a_world() -> None:
    assert resolve(None, "test") == find_world("", "test") == World(0, 1, None)
    assert World().name == ""
    assert usable_device(World(), torch.device("meta")) == torch.device("meta")


def _handles() -> None:
    rank = dist.get_rank()
    world = resolve(None, "test")
    assert world == (rank, 3, dist.group.WORLD)
    assert resolve(dist.group.WORLD, "test") == world == resolve(None, "test")
    assert find_world(world.name, "test") == world
    reverse: Any = dist.new_group([2, 0])  # torch sorts them
    if rank == 1:
        with pytest.raises(RuntimeError, match="test: rank 1 is not a member of the process_group"):
            resolve(reverse, "test")
        check_process_group("test", reverse)  # a stand-in, which the call will refuse
    else:
        assert resolve(reverse, "test")[:2] == (rank // 2, 2)
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("data",))
    assert resolve(mesh, "test")[:2] == (rank, 3)
    assert default_device(world) == torch.device("cpu")
    assert usable_device(world, torch.device("meta")) == torch.device("cpu")
    with pytest.raises(ValueError, match="test: process_group must be a 1-D DeviceMesh, got 2-D"):
        check_process_group("test", init_device_mesh("cpu", (3, 1)))


def test_every_handle_is_resolved_on_three_ranks() -> None:
    """Catches global ranks taken for ranks in the group, and a cache that mixes groups up."""
    run_on_ranks(3, _handles)


@pytest.mark.parametrize("handle", [7, "data"])
def test_what_is_no_process_group_is_refused(handle: object) -> None:
    """Catches torch's stand-in for non-members, a number, opening the door to all numbers."""
    with pytest.raises(TypeError, match="test: process_group must be None, a ProcessGroup or"):
        check_process_group("test", handle)
