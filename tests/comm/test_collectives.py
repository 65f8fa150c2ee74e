"""The collectives: what arrives, in which order, and that a wait is no failure."""

import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ranks import run_on_ranks
from shuffle_batchnorm.comm import collectives
from shuffle_batchnorm.comm.world import resolve


def _collect(incoming: bool) -> dict[str, Tensor]:
    """Rank r sends k rows of value 10 r + k to rank k, and its number to all."""
    world = resolve(None, "test")
    splits = list(range(world.size))
    rows = torch.cat([torch.full((k, 2), 10.0 * world.rank + k) for k in splits])
    received = (world.rank,) * world.size
    memory = torch.empty(world.rank * world.size, 2) if incoming else None
    done: list[int] = []
    arrived = collectives.all_to_all(
        rows, splits, received, world, "test", "sends", memory, lambda: done.append(1)
    )
    assert done == [1]
    assert memory is None or arrived is memory
    row = torch.tensor([float(world.rank), 1.0])
    return {
        "all_to_all": arrived,
        "all_gather": collectives.all_gather(row, world, "test", "gathers"),
        "all_sum": collectives.all_sum(row, world, "test", "adds"),
    }


@pytest.mark.parametrize("incoming", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_what_arrives_is_in_rank_order(world_size: int, incoming: bool) -> None:
    """Catches rows of one rank taken for those of another, which a swap of two hides."""
    ranks = range(world_size)
    for rank, found in enumerate(run_on_ranks(world_size, _collect, incoming)):
        sent = [torch.full((rank, 2), 10.0 * other + rank) for other in ranks]
        assert torch.equal(found["all_to_all"], torch.cat(sent))
        gathered = torch.tensor([[float(other), 1.0] for other in ranks])
        assert torch.equal(found["all_gather"], gathered)
        assert torch.equal(found["all_sum"], gathered.sum(dim=0))


def _impatient() -> float:
    world, total = resolve(None, "test"), 0.0
    with mock.patch.object(collectives, "_PATIENCE", timedelta(milliseconds=1)):
        for _ in range(30):
            time.sleep(0.002 * dist.get_rank())
            total += float(collectives.all_sum(torch.ones(1), world, "test", "adds"))
    return total


def test_a_wait_that_ends_as_the_patience_does_is_a_success() -> None:
    """Catches a collective that ends just after the wait for it, taken for a loss of the peers."""
    assert run_on_ranks(2, _impatient) == [60.0, 60.0]
