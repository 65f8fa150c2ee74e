"""Ranks on the CPU learn within seconds why a peer does not come."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from ranks import impatient, new_group, run_on_ranks
from shuffle_batchnorm.comm import collectives, failures
from shuffle_batchnorm.comm.world import World, resolve

SECONDS = 20.0  # the group's own limit is 30 s
OUT_OF_STEP = "the process group is out of step since an exchange was left before its end"


def _sum(world: World) -> float:
    return float(collectives.all_sum(torch.ones(1), world, "test", "adds"))


def _outcome(call: Callable[[], float]) -> str:
    start = time.monotonic()
    try:
        return f"{call():g}"
    except RuntimeError as error:
        assert time.monotonic() - start < SECONDS
        return str(error)


def _announced() -> list[str]:
    world = resolve(new_group(), "test")
    with impatient():
        _sum(world)
        if world.rank == 1:
            failures.announce(world, "out of luck")
        return [_outcome(lambda: _sum(world)) for _ in range(2)]


def test_a_rank_that_stops_tells_its_peers() -> None:
    """Catches peers that wait until the group's time limit, and messages of another step."""
    first, second, third = run_on_ranks(3, _announced)
    for texts in (first, third):
        assert texts[0] == "test: rank 1 stopped: out of luck"
    # It goes on at once, with the message of another step.
    for text in (first[1], *second, third[1]):
        assert OUT_OF_STEP in text


def _all_announced() -> list[str]:
    world = resolve(new_group(), "test")
    with impatient():
        time.sleep(0.1 * world.rank)
        for _ in range(1 + world.rank):  # as often as each likes
            failures.announce(world, "a mistake of all")
        time.sleep(0.4 * (world.rank == 1))  # longer than a waiting rank is patient
        texts = [_outcome(lambda: _sum(world))]
        time.sleep(0.4 * (world.rank == 0))
        return [*texts, _outcome(lambda: _sum(world))]


def test_ranks_that_fail_alike_go_on() -> None:
    """Catches an announcement that outlives the failure, where all ranks have caught theirs."""
    assert run_on_ranks(3, _all_announced) == [["3", "3"]] * 3


def _differ() -> str:
    world = resolve(new_group(), "test")
    with impatient():
        row = torch.ones(1)
        if world.rank:
            return _outcome(lambda: _sum(world))
        return _outcome(lambda: float(collectives.all_gather(row, world, "test", "gathers").sum()))


def test_ranks_at_different_calls_are_told() -> None:
    """Catches ranks that wait for each other until the group's time limit."""
    texts = run_on_ranks(2, _differ)
    assert all("ranks are at different calls: rank" in text for text in texts)
    assert "rank 0 gathers" in texts[0]
    assert "rank 1 adds" in texts[0]


def _slow() -> list[str]:
    world = resolve(new_group(), "test")
    with impatient():
        time.sleep(0.6 * world.rank)
        return [_outcome(lambda: _sum(world))]


def test_a_slow_rank_is_waited_for() -> None:
    """Catches patience that ends in an error though nothing is wrong."""
    assert run_on_ranks(2, _slow) == [["2"]] * 2


def _left(meanwhile_fails: bool) -> list[str]:
    world = resolve(new_group(), "test")
    with impatient():

        def fail() -> None:
            if meanwhile_fails and world.rank == 1:
                raise RuntimeError("no memory")

        send, texts = (1, 1), []
        try:
            row = torch.ones(2, 1)
            collectives.all_to_all(row, send, send, world, "test", "sends", meanwhile=fail)
        except RuntimeError as error:
            texts.append(str(error))
        return [*texts, _outcome(lambda: _sum(world))]


def test_a_group_left_in_mid_exchange_says_so() -> None:
    """Catches a next message that is taken for the one that peers wait for."""
    first, second = run_on_ranks(2, _left, True)
    assert second[0] == "no memory"
    assert OUT_OF_STEP in second[1]
    assert "rank 1 stopped: no memory" in first[-1]
    assert run_on_ranks(2, _left, False) == [["2"]] * 2


def _two_groups_of_one_name() -> list[str]:
    """Abandon a group, destroy it, and meet again: torch gives the new one the same name."""
    size, rank = dist.get_world_size(), dist.get_rank()
    store: Any = dist.distributed_c10d._get_default_store()
    name = resolve(None, "test").name
    failures.abandon(resolve(None, "test"), "the first")
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    assert resolve(None, "test").name == name
    with impatient():
        time.sleep(0.5 * rank)
        return [_outcome(lambda: _sum(resolve(None, "test")))]


def _after_a_group_that_one_rank_used(folder: str) -> list[str]:
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        failures.announce(resolve(None, "test"), "it is alone")
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=Path(folder, "meet").as_uri(), rank=rank, world_size=size
    )
    with impatient():
        if rank == 1:
            failures.announce(resolve(None, "test"), "out of luck")
        return [_outcome(lambda: _sum(resolve(None, "test")))]


def test_a_group_before_that_one_rank_used_does_not_matter(tmp_path: Path) -> None:
    """Catches ranks that count the groups of a name, each by itself, and look in other places."""
    first, _ = run_on_ranks(2, _after_a_group_that_one_rank_used, str(tmp_path), fresh=True)
    assert first == ["test: rank 1 stopped: out of luck"]


def test_a_later_group_of_the_same_name_is_another() -> None:
    """Catches keys that outlive their group, as under torchrun, whose store is kept."""
    assert run_on_ranks(2, _two_groups_of_one_name, fresh=True) == [["2"]] * 2


def _meet_and_die(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=Path(folder, "meet").as_uri(), rank=rank, world_size=3
    )
    world = resolve(None, "test")
    _sum(world)
    if rank == 1:
        os._exit(0)
    Path(folder, f"rank{rank}").write_text(_outcome(lambda: _sum(world)))
    os._exit(0)  # the group is broken: don't wait for its threads


def test_a_rank_that_dies_ends_its_peers(tmp_path: Path) -> None:
    """Catches peers that wait for the dead."""
    spawn(_meet_and_die, (str(tmp_path),), nprocs=3)
    for rank in (0, 2):
        text = (tmp_path / f"rank{rank}").read_text()
        assert f"test: rank {rank} of 3 lost its peers in an exchange" in text


def test_one_process_has_nobody_to_tell() -> None:
    world = resolve(None, "test")
    failures.announce(world, "nothing")
    failures.abandon(world, "nothing")
    assert failures.begun(world) == 0


@pytest.mark.parametrize("calls", [0, 3])
def test_collectives_are_counted(calls: int) -> None:
    """Catches a count by which ranks find their failures that is not the same on all."""
    assert run_on_ranks(2, _count, calls) == [calls, calls]


def _count(calls: int) -> int:
    world = resolve(None, "test")
    before = failures.begun(world)
    for _ in range(calls):
        _sum(world)
    return failures.begun(world) - before


def _alone_among_imagined_ranks() -> str:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    return _outcome(lambda: _sum(resolve(None, "test")))


def test_imagined_ranks_are_no_hindrance() -> None:
    """Catches a store of torch's for dry runs that has no more than it needs."""
    assert run_on_ranks(1, _alone_among_imagined_ranks, fresh=True) == ["1"]
