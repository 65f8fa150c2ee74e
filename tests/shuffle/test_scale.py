"""Routes of samples among up to 4,096 ranks: arithmetic only, no processes."""

import random

import pytest
import torch

from shuffle_batchnorm.shuffle.permutations import Key, Route, make_route, samples_sent_to


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
            assert sum(n > 0 for n in route.send_splits) <= sizes[rank]
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
