"""Routes of rows among up to 4,096 ranks, against the definition of the modes: no processes."""

import time
import tracemalloc
from functools import lru_cache

import pytest

from shuffle_batchnorm.norm.mixing import Options, Plan, make_plan
from shuffle_batchnorm.norm.routes import Route, exchange_of, find_route

Block = tuple[int, int]  # of all ranks: group, block
# Every mode with messages; groups that wrap around their ranks, and back; B of 1 to G.
CASES = [
    Options(mode, groups, offset, blocks)
    for mode, blocks in (("swap", 1), ("regroup", 8), ("regroup", 3), ("regroup", 32))
    for groups, offset in ((1, 1), (1, -3), (1, 700), (3, 1), (8, 8), (8, 13), (8, -1), (5, 0))
]
SMALL = [
    Options(mode, groups, offset, blocks)
    for mode, blocks in (("swap", 1), ("regroup", 2), ("regroup", 8))
    for groups in (1, 2, 4)
    for offset in (1, -1, 2, 3, -3, 0)
]
RANKS = {2: (0, 1), 3: (0, 1, 2), 4: (0, 3), 16: (0, 5, 15), 255: (100,), 4096: (4095,)}


def _members(block: Block, plan: Plan, options: Options) -> list[Block]:
    """The blocks of the normaliser that a block uses, or that pass their sums back to it."""
    (group, c), total = block, plan.total_groups
    if options.mode == "swap":
        return [((group + options.offset) % total, 0)]
    if not plan.shuffles:  # each group is one block
        return [block]
    new_group = group + options.offset * c
    return [((new_group - options.offset * k) % total, k) for k in range(plan.per_group)]


def _arrived(rank: int, plan: Plan) -> list[Block]:
    """What a rank holds after the message: as its peers' routes send it, in rank order."""
    route, blocks = _route(plan, rank), _blocks(plan, rank)
    arrived: list[Block] = []
    for peer, n in enumerate(route.receive_splits):
        if n:
            theirs = _route(plan, peer)
            assert theirs.send_splits[rank] == n
            order = range(len(blocks)) if theirs.send_order is None else theirs.send_order
            start = sum(theirs.send_splits[:rank])
            parcel = [_blocks(plan, peer)[k] for k in order[start : start + n]]
            assert len(set(parcel)) == n, "a row goes once to a rank"
            assert peer != rank, "what stays is not sent"
            arrived += parcel
    return [*blocks, *arrived] if route.with_local else arrived


def _blocks(plan: Plan, rank: int) -> list[Block]:
    groups = range(rank * plan.groups, (rank + 1) * plan.groups)
    return [(group, c) for group in groups for c in range(plan.per_group)]


@lru_cache(maxsize=512)  # neighbours need each other's
def _route(plan: Plan, rank: int) -> Route:
    return find_route(plan._replace(rank=rank))


def _found(rank: int, plan: Plan) -> dict[Block, list[Block]]:
    """For each block of a rank the rows that its route brings together, in order."""
    route, there = _route(plan, rank), _arrived(rank, plan)
    members = there if route.members is None else [there[k] for k in route.members]
    normalisers = [members[k : k + plan.per_group] for k in range(0, len(members), plan.per_group)]
    blocks = _blocks(plan, rank)
    used = range(len(blocks)) if route.used is None else route.used
    return {block: normalisers[k] for block, k in zip(blocks, used, strict=True)}


@pytest.mark.parametrize("world_size", RANKS)
def test_blocks_get_the_rows_of_their_normaliser(world_size: int) -> None:
    """Catches ends of a message that disagree, where groups wrap around or blocks are few."""
    for options in SMALL if world_size < 16 else CASES:
        plan = make_plan(options, world_size, 0)
        if not plan.shuffles:
            continue
        for rank in RANKS[world_size]:
            for block, rows in _found(rank, plan).items():
                assert rows == _members(block, plan, options), (options, rank, block)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_kernels_merge_what_a_route_brings_together(world_size: int) -> None:
    """Catches a row taken from where another is, among those of blocks, those sent, those come."""
    for options in SMALL:
        plan = make_plan(options, world_size, 0)
        for rank in range(world_size) if plan.shuffles else ():
            for way in (plan, plan.transposed()):
                route, blocks = _route(way, rank), _blocks(way, rank)
                exchange = exchange_of(route, len(blocks))
                arrived = _arrived(rank, way)[len(blocks) if route.with_local else 0 :]
                assert len(arrived) == exchange.arriving
                there = [*blocks, *(blocks[k] for k in exchange.sent), *arrived]
                found = [[there[k] for k in members] for members in exchange.members]
                assert found == list(_found(rank, way).values()), (options, rank)


@pytest.mark.parametrize("world_size", RANKS)
def test_gradients_take_the_way_back(world_size: int) -> None:
    """Catches a transposed route that is not: every user's sums must reach every member."""
    for options in SMALL if world_size < 16 else CASES:
        plan = make_plan(options, world_size, 0)
        back = plan.transposed()
        if not plan.shuffles:
            continue
        for rank in RANKS[world_size]:
            for block, senders in _found(rank, back).items():
                # A partition is its own transpose; in swap the user is `offset` groups before.
                reverse = options._replace(offset=-options.offset)
                users = _members(block, plan, reverse if options.mode == "swap" else options)
                assert senders == users, (options, rank, block)


@pytest.mark.parametrize("world_size", [2, 3, 8, 255, 4096])
def test_rows_and_peers_are_few_whatever_the_world(world_size: int) -> None:
    """Catches traffic that grows with W, or fans out: a connection costs 0.2 s with NCCL."""
    for options in [*CASES, *SMALL]:
        plan = make_plan(options, world_size, world_size // 2)
        route, (groups, b) = find_route(plan), (plan.groups, plan.per_group)
        for splits in (route.send_splits, route.receive_splits):
            rows, peers = sum(splits), sum(n > 0 for n in splits)
            assert splits[plan.rank] == 0
            if not plan.shuffles:
                assert rows == 0
            elif options.mode == "swap":
                assert rows <= groups
                assert peers <= (1 if options.offset % groups == 0 else 2)
            elif groups == 1:
                assert rows <= b * b - b
                assert peers <= min(2 * b - 2, world_size - 1)
            else:
                assert rows <= groups * b * (min(b, world_size) - 1)


def test_rows_sent_do_not_depend_on_the_world() -> None:
    """Catches traffic that grows with W, or differs between ranks."""
    for options in CASES:
        sent = {
            sum(find_route(make_plan(options, world_size, rank)).send_splits)
            for world_size in (1023, 4096)  # no shift of the cases wraps around here
            for rank in (0, 77, world_size - 1)
        }
        assert len(sent) == 1, (options, sent)


def test_a_route_takes_memory_and_time_in_proportion_to_the_world() -> None:
    """Catches a table of all pairs of ranks, or the rows of all ranks, on every rank."""
    plans = [make_plan(Options("regroup", 8, 3), world_size, 5) for world_size in (1024, 4096)]
    peaks = []
    for plan in plans:
        tracemalloc.start()
        find_route(plan)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 5 * peaks[0]
    assert peaks[1] < 500_000  # bytes; two tuples of splits are 65,536

    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        find_route(plans[1])
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1  # takes 0.002
