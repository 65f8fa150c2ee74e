"""The shuffle's index arithmetic: no process, no network."""

import itertools
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from shuffle_batchnorm.shuffle.permutations import (
    ALL_SAMPLES,
    Key,
    Route,
    make_route,
    make_route_in_graph,
    permutation,
    samples_sent_to,
)

SIZES = [[8, 8], [6, 6, 6], [3, 3], [1, 1, 1, 1], [5, 3], [0, 4, 2], [0, 0], [7], [16] * 8]


def _deliver(routes: list[Route], batches: list[Tensor]) -> list[Tensor]:
    """What every rank gets, by the definition of a route: no process, no network."""
    messages = []
    for rank, (x, route) in enumerate(zip(batches, routes, strict=True)):
        messages.append(x[route.send_order].split(list(route.send_splits)))
        assert sum(route.receive_splits) == len(x), rank
    return [
        torch.cat([sent[rank] for sent in messages])[route.place_order]
        for rank, route in enumerate(routes)
    ]


@pytest.mark.parametrize("sizes", SIZES)
def test_routes_of_all_ranks_fit_and_keep_every_sample(sizes: list[int]) -> None:
    """Catches a sample lost or doubled, splits that don't match, and an inverse that isn't one."""
    batches = list(torch.arange(sum(sizes)).split(sizes))
    for step in range(5):
        key = Key(3, step)
        routes = [make_route(key, sizes, rank) for rank in range(len(sizes))]
        for (a, one), (b, other) in itertools.product(enumerate(routes), repeat=2):
            assert one.send_splits[b] == other.receive_splits[a]
        arrived = _deliver(routes, batches)
        assert [len(x) for x in arrived] == sizes
        assert torch.cat(arrived).sort().values.tolist() == list(range(sum(sizes)))
        for rank, x in enumerate(arrived):
            assert torch.equal(x, samples_sent_to(rank, key, sizes))
        back = _deliver([route.inverse() for route in routes], arrived)
        assert all(map(torch.equal, back, batches))


def test_a_stratified_shuffle_deals_every_rank_the_same_share() -> None:
    """Catches a permutation that keeps more than 1 / W of a batch's samples together."""
    sizes = [12] * 4
    for step in range(50):
        for rank in range(4):
            sources = samples_sent_to(rank, Key(0, step), sizes) // 12
            assert sources.bincount(minlength=4).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(("sizes", "steps"), [([4, 4], 4000), ([3, 5], 4000)])
def test_a_sample_lands_on_every_position_equally_often(sizes: list[int], steps: int) -> None:
    """Catches a biased permutation, and one that leaves the positions within a rank alone."""
    total = sum(sizes)
    counts = torch.zeros(total, total)
    for step in range(steps):
        arrived = [samples_sent_to(rank, Key(1, step), sizes) for rank in range(len(sizes))]
        counts[torch.arange(total), torch.cat(arrived)] += 1
    # chi squared with (total - 1)**2 = 49 degrees of freedom: above 90 once in 3,000 seeds
    expected = steps / total
    assert ((counts - expected).square() / expected).sum() < 90


def test_all_orders_of_four_samples_are_equally_frequent() -> None:
    """Catches an order that follows from its first element, or a hash with a pattern."""
    steps = 12_000
    counts = Counter(
        tuple(permutation(Key(5, step), ALL_SAMPLES, 0, 4).tolist()) for step in range(steps)
    )
    assert len(counts) == 24
    assert sum((n - steps / 24) ** 2 / (steps / 24) for n in counts.values()) < 55  # 23 degrees


def test_an_order_depends_on_every_number_and_on_nothing_else() -> None:
    """Catches a seed, step, kind or rank that is ignored, and the global random state."""
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (2**40, 0, 0, 0), (0, 1, 0, 0), (0, 2**40, 0, 0)]
    keys += [(0, 0, 1, 0), (0, 0, 0, 1)]
    before = torch.get_rng_state()
    orders = {tuple(permutation(Key(s, t), k, r, 64).tolist()) for s, t, k, r in keys}
    again = {tuple(permutation(Key(s, t), k, r, 64).tolist()) for s, t, k, r in keys}
    assert len(orders) == len(keys)
    assert orders == again
    assert torch.equal(before, torch.get_rng_state())


def test_orders_never_change() -> None:
    """Catches a new hash, which would make every seeded run another one."""
    assert permutation(Key(1, 2), ALL_SAMPLES, 3, 8).tolist() == [0, 3, 5, 6, 7, 1, 2, 4]
    key = Key(2**61 + 5, 2**40 + 31)
    arriving = [samples_sent_to(rank, key, [6, 6, 6]).tolist() for rank in range(3)]
    assert arriving[0] == [10, 13, 11, 15, 1, 2]
    assert arriving[1] == [16, 7, 4, 6, 12, 5]
    assert [samples_sent_to(rank, Key(1, 2), [3, 5]).tolist() for rank in range(2)] == [
        [0, 5, 4],
        [3, 2, 7, 1, 6],
    ]


@pytest.mark.parametrize("n", [8, 132])
def test_a_graph_has_the_orders_of_eager_calls(n: int) -> None:
    """Catches a step that a compiled graph reads at another time, or in another type."""
    for step, seed in itertools.product((0, 1, 2**40 + 31), (3, 2**61)):
        key, in_graph = Key(seed, step), Key(torch.tensor(seed), torch.tensor(step))
        route = make_route(key, (n,) * 4, 1)
        traced = make_route_in_graph(in_graph, (n,) * 4, 1, torch.device("cpu"))
        assert torch.equal(route.send_order, traced.send_order)
        assert torch.equal(route.place_order, traced.place_order)
        assert route[1::2] == traced[1::2]


def _landing(sample: int, sender: int, to: int, routes: dict[int, Route]) -> int:
    """The position at rank `to` of a sample that a rank sends there."""
    out, into = routes[sender], routes[to]
    in_message = out.send_order.tolist().index(sample) - sum(out.send_splits[:to])
    assert 0 <= in_message < out.send_splits[to]
    received = sum(into.receive_splits[:sender]) + in_message
    return into.place_order.tolist().index(received)


@pytest.mark.parametrize(("world_size", "n"), [(255, 255), (1024, 2048)])
def test_a_stratified_shuffle_sends_every_rank_its_share(world_size: int, n: int) -> None:
    """Catches a rank that gets more of another's samples than N / W, and a lost sample."""
    key, sizes = Key(7, 3), [n] * world_size
    some = random.Random(0).sample(range(world_size), 6)
    routes = {rank: make_route(key, sizes, rank) for rank in some}
    for route in routes.values():
        assert route.send_splits == route.receive_splits == (n // world_size,) * world_size
        assert route.send_order.sort().values.equal(torch.arange(n))
        assert route.place_order.sort().values.equal(torch.arange(n))
    arrived = samples_sent_to(some[0], key, sizes)
    assert arrived.unique().numel() == n
    assert (arrived // n).bincount(minlength=world_size).eq(n // world_size).all()
    for sender in some:
        for sample in routes[sender].send_order.split(n // world_size)[some[0]].tolist():
            assert arrived[_landing(sample, sender, some[0], routes)] == sender * n + sample


@pytest.mark.parametrize("world_size", [255, 1024])
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
            assert sum(route.send_splits) == sum(route.receive_splits) == sizes[rank]
            assert len(route.send_order) == len(route.place_order) == sizes[rank]
            for other in routes:
                assert route.send_splits[other] == routes[other].receive_splits[rank]
        for position, sample in enumerate(arrived.tolist()):
            sender, index = senders[sample]
            assert _landing(index, sender, receiver, routes) == position


def _owner(sample: int, sizes: list[int]) -> tuple[int, int]:
    """The rank that has a sample of all ranks', and which of its samples it is."""
    for rank, n in enumerate(sizes):
        if sample < n:
            return rank, sample
        sample -= n
    raise AssertionError(f"no sample {sample}")
