"""Routes of rows and samples among up to 4,096 ranks: arithmetic only, no processes."""

import random
import time
import tracemalloc
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch

from shuffle_batchnorm.norm.mixing import Options, Plan, Rotation, make_plan, rotation
from shuffle_batchnorm.shuffle.permutations import Key, Route, make_route, samples_sent_to

WORLDS = [2, 16, 255, 1024, 4096]
CASES = [
    Options(mode, groups, offset, blocks)
    for mode, blocks in (("swap", 1), ("regroup", 8), ("regroup", 3), ("regroup", 32))
    for groups, offset in ((1, 1), (1, -3), (1, 700), (3, 1), (8, 8), (8, 13), (8, -1), (5, 0))
]
ROWS = [(2, (0, 1)), (16, (0, 5, 15)), (255, (0, 100)), (1024, (17, 1023)), (4096, (0, 4095))]


class Place(NamedTuple):
    """A row of a rank."""

    rank: int
    row: int


def _destination(place: Place, world_size: int, options: Options, per_group: int) -> Place:
    """Where a row has to go, by the definition of the modes."""
    mode, groups, offset, _ = options
    j, c = divmod(place.row, per_group)
    i = place.rank * groups + j
    # In swap group i is normalised by group i + offset, so its own row goes to i - offset.
    to = (i - offset if mode == "swap" else i + offset * c) % (world_size * groups)
    return Place(to // groups, to % groups * per_group + c)


def _arrivals(rank: int, route: Rotation, routes: dict[int, Rotation]) -> dict[Place, Place]:
    """Where each row of a rank lands: by its place in its message, as the receiver's route says."""
    found, start = {}, 0
    for to, n in enumerate(route.send_splits):
        if n:
            receiver = routes[to]
            assert receiver.receive_splits[rank] == n
            before = sum(receiver.receive_splits[:rank])
            for k, row in enumerate(route.send_order[start : start + n]):
                found[Place(rank, row)] = Place(to, receiver.place_order.index(before + k))
        start += n
    return found


def _routes(plan: Plan, ranks: set[int]) -> dict[int, Rotation]:
    return {r: _rotation(plan.world_size, r, plan.groups, plan.shifts) for r in ranks}


_rotation = lru_cache(maxsize=128)(rotation)  # neighbours need each other's


@pytest.mark.parametrize(("world_size", "ranks"), ROWS, ids=str)
def test_rows_land_where_the_mode_says_and_come_back(
    world_size: int, ranks: tuple[int, ...]
) -> None:
    """Catches ends of a message that disagree, in splits or order, where groups wrap around."""
    for options in CASES:
        plan = make_plan(options, world_size, 0)
        rows = range(plan.groups * plan.per_group)
        for rank in ranks:
            places = [Place(rank, row) for row in rows]
            expected = {
                place: _destination(place, world_size, options, plan.per_group) for place in places
            }
            routes = _routes(plan, {rank} | {to.rank for to in expected.values()})
            mine = routes[rank]
            assert sorted(mine.send_order) == sorted(mine.place_order) == list(rows)
            assert sum(mine.send_splits) == sum(mine.receive_splits) == len(rows)
            assert _arrivals(rank, mine, routes) == expected

            # Back from the receivers, by the inverse routes.
            inverses = {r: route.inverse() for r, route in routes.items()}
            assert inverses[rank].inverse() == mine
            sources = {source.rank for source in expected.values()}
            for source in sources:
                back = _routes(plan, _peers(inverses[source].send_splits))
                back = {r: route.inverse() for r, route in back.items()}
                returned = _arrivals(source, inverses[source], back)
                for start, end in expected.items():
                    assert end.rank != source or returned[end] == start


def _peers(splits: tuple[int, ...]) -> set[int]:
    return {rank for rank, n in enumerate(splits) if n}


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_rank_has_few_peers(world_size: int) -> None:
    """Catches a route that fans out: connections cost 0.2 s each with NCCL."""
    for options in CASES:
        plan = make_plan(options, world_size, 0)
        for rank in {0, world_size // 2, world_size - 1}:
            route = rotation(world_size, rank, plan.groups, plan.shifts)
            for splits in (route.send_splits, route.receive_splits):
                peers = _peers(splits) - {rank}
                if options.mode == "swap":
                    assert len(peers) <= (1 if options.offset % options.groups == 0 else 2)
                elif abs(options.offset) <= options.groups or options.offset % options.groups == 0:
                    assert len(peers) < plan.per_group
                else:  # a shift that is no multiple of `groups` leads to two ranks
                    assert len(peers) <= 2 * (plan.per_group - 1)


def test_rows_sent_do_not_depend_on_the_world() -> None:
    """Catches traffic that grows with W, or differs between ranks."""
    for options in CASES:
        sent = set()
        for world_size in (1024, 4096):  # no shift of the cases wraps around to its own rank here
            plan = make_plan(options, world_size, 0)
            for rank in (0, 77, world_size - 1):
                splits = rotation(world_size, rank, plan.groups, plan.shifts).send_splits
                sent.add(sum(splits) - splits[rank])
        assert len(sent) == 1, (options, sent)
        assert sent.pop() <= plan.groups * plan.per_group


def test_a_route_takes_memory_and_time_in_proportion_to_the_world() -> None:
    """Catches a table of all pairs of ranks, or the rows of all ranks, on every rank."""

    def build(world_size: int) -> Rotation:
        plan = make_plan(Options("regroup", 8, 3), world_size, 5)
        return rotation(world_size, 5, plan.groups, plan.shifts).inverse()

    peaks = []
    for world_size in (1024, 4096):
        tracemalloc.start()
        build(world_size)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 5 * peaks[0]
    assert peaks[1] < 500_000  # bytes; two tuples of splits are 65,536

    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        build(4096)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05  # takes 0.0005


def _landing(sample: int, sender: int, to: int, routes: dict[int, Route]) -> int:
    """The place at rank `to` of a sample that a rank sends there."""
    out, into = routes[sender], routes[to]
    sent = out.send_order.tolist().index(sample)
    if sender == to:
        received = sent - sum(out.send_splits) + sum(into.receive_splits)
        assert received >= sum(into.receive_splits)
    else:
        in_message = sent - sum(out.send_splits[:to])
        assert 0 <= in_message < out.send_splits[to]
        received = sum(into.receive_splits[:sender]) + in_message
    return into.place_order.tolist().index(received)


@pytest.mark.parametrize(
    ("world_size", "n"), [(16, 64), (255, 255), (1024, 2048), (4096, 4096)], ids=str
)
def test_a_stratified_shuffle_sends_every_rank_its_share(world_size: int, n: int) -> None:
    """Catches a rank that gets more of another's samples than N / W, and a lost sample."""
    key, sizes = Key(7, 3), [n] * world_size
    some = random.Random(0).sample(range(world_size), 6)
    routes = {rank: make_route(key, sizes, rank) for rank in some}
    for rank, route in routes.items():
        share = [n // world_size if other != rank else 0 for other in range(world_size)]
        assert list(route.send_splits) == list(route.receive_splits) == share
        assert route.send_order.sort().values.equal(torch.arange(n))
        assert route.place_order.sort().values.equal(torch.arange(n))
    arrived = samples_sent_to(some[0], key, sizes)
    assert arrived.unique().numel() == n
    assert (arrived // n).bincount(minlength=world_size).eq(n // world_size).all()
    for sender in some:
        *others, stays = routes[sender].send_order.split(n // world_size)
        others.insert(sender, stays)
        for sample in others[some[0]].tolist():
            place = _landing(sample, sender, some[0], routes)
            assert arrived[place] == sender * n + sample


@pytest.mark.parametrize("world_size", [255, 1024, 4096])
def test_a_uniform_shuffle_fits_at_both_ends(world_size: int) -> None:
    """Catches splits that differ between ends, with fewer samples than ranks and empty ranks."""
    draw = random.Random(1)
    for sizes in ([12] * world_size, [draw.randrange(5) for _ in range(world_size)]):
        key = Key(1, 2)
        some = [0, world_size - 1, *draw.sample(range(1, world_size - 1), 3)]
        routes = {rank: make_route(key, sizes, rank) for rank in some}
        receiver = max(some, key=lambda rank: sizes[rank])
        arrived = samples_sent_to(receiver, key, sizes)
        senders = {int(k): _owner(int(k), sizes) for k in arrived}
        routes |= {rank: make_route(key, sizes, rank) for rank in {r for r, _ in senders.values()}}
        for rank, route in routes.items():
            assert route.send_splits[rank] == route.receive_splits[rank] == 0
            assert sum(route.send_splits) == sum(route.receive_splits) <= sizes[rank]
            assert len(route.send_order) == len(route.place_order) == sizes[rank]
            assert len(_peers(route.send_splits)) <= sizes[rank]
            for other in routes:
                assert route.send_splits[other] == routes[other].receive_splits[rank]
        for place, sample in enumerate(arrived.tolist()):
            sender, index = senders[sample]
            assert _landing(index, sender, receiver, routes) == place


def _owner(sample: int, sizes: list[int]) -> tuple[int, int]:
    """The rank that has a sample of all ranks', and which of its samples it is."""
    for rank, n in enumerate(sizes):
        if sample < n:
            return rank, sample
        sample -= n
    raise AssertionError(f"no sample {sample}")


@pytest.mark.parametrize(
    ("case", "shift"),
    [
        (Options("swap", 1, 1), 4095),
        (Options("regroup", 1, 1, 8), 1),
        (Options("regroup", 2, 3, 8), 3),
    ],
    ids=str,
)
def test_normalisers_match_the_routes(case: Options, shift: int) -> None:
    """Catches a plan whose `normaliser`, which the errors name, is not whence the rows come."""
    plan = make_plan(case, 4096, 9)
    assert shift in plan.shifts
    for j in range(plan.groups):
        group = 9 * plan.groups + j
        for c in range(plan.per_group):
            j_c = Place(9, j * plan.per_group + c)
            to = _destination(j_c, 4096, case, plan.per_group)
            joined = to.rank * plan.groups + to.row // plan.per_group
            if case.mode == "regroup":
                assert plan.normaliser(group, c) == plan.source(group, c) == joined
            else:
                assert plan.normaliser(joined, c) == plan.source(group, c) == group
