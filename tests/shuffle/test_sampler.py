"""ShuffledPairSampler: it loads what a shuffle would have sent."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from meters import received_messages
from torch.utils.data import DataLoader

from ranks import run_on_ranks
from shuffle_batchnorm import ShuffledPairSampler, batch_shuffle, batch_unshuffle
from shuffle_batchnorm.comm.world import World


@pytest.mark.parametrize(
    ("options", "error", "rule"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be from 1 to 2**62, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an int, got 2.0"),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got True"),
        ({"batch_size": 2, "seed": -1}, ValueError, "seed must be from 0 to 2**62, got -1"),
        ({"batch_size": 2, "seed": None}, TypeError, "seed must be an int, got None"),
    ],
)
def test_bad_options_of_the_sampler_are_refused(
    options: dict[str, Any], error: type[Exception], rule: str
) -> None:
    """Catches an error that comes much later, from the arithmetic of a permutation."""
    with pytest.raises(error, match=re.escape(f"ShuffledPairSampler: {rule}")):
        ShuffledPairSampler(range(8), **options)


def _sampled(length: int, drop_last: bool) -> int:
    images = torch.randn(length, 3, generator=torch.Generator().manual_seed(0))
    sampler = ShuffledPairSampler(images, batch_size=4, seed=5, drop_last=drop_last)
    loader = DataLoader(sampler.dataset, batch_sampler=sampler)
    seen = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for step, (queries, keys) in enumerate(loader):
            plan = sampler.plan(step)
            assert torch.equal(batch_shuffle(queries, plan=plan)[0], keys)
            assert torch.equal(batch_unshuffle(keys, plan), queries)
            seen.append(tuple(keys.flatten().tolist()))
    assert len(set(seen)) == len(seen) == 2 * len(sampler)
    return sum(map(len, seen)) // 3


@pytest.mark.parametrize(
    ("world_size", "length", "drop_last", "read"),
    [
        (2, 29, True, 24),
        (2, 29, False, 29),
        (3, 29, True, 24),
        (2, 63, False, 63),  # the last step has (4, 3) samples: one rank has as many as ever
        (3, 25, False, 24),  # one sample is left for three ranks
    ],
)
def test_the_sampler_loads_what_the_shuffle_would_send(
    world_size: int, length: int, drop_last: bool, read: int
) -> None:
    """Catches a key loaded on the wrong rank or at the wrong position, and a repeated epoch."""
    assert sum(run_on_ranks(world_size, _sampled, length, drop_last)) == 2 * read


def _sampler_before_the_group() -> list[str]:
    sampler = ShuffledPairSampler(range(16), batch_size=2)
    sampler._world = World()  # as it is before init_process_group
    texts = []
    for use in (lambda: next(iter(sampler)), lambda: sampler.plan(0)):
        with pytest.raises(RuntimeError, match="make it after init_process_group") as caught:
            use()
        texts.append(str(caught.value))
    return texts


def test_a_sampler_made_before_the_group_is_refused() -> None:
    """Catches ranks that load the same samples and shuffle nothing."""
    for rank, texts in enumerate(run_on_ranks(2, _sampler_before_the_group)):
        assert all(f"rank 0 of 1, but this is rank {rank} of 2" in text for text in texts)


def _different_samplers(options: list[dict[str, Any]]) -> str:
    mine = options[dist.get_rank()]
    epoch = mine.pop("epoch", 0)
    sampler = ShuffledPairSampler(range(mine.pop("length", 16)), batch_size=4, **mine)
    sampler.set_epoch(epoch)
    with pytest.raises(ValueError, match="ranks disagree on order") as caught:
        batch_unshuffle(torch.randn(4, 2), sampler.plan(0))
    return str(caught.value)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"length": 17}, "17 samples"),
        ({"shuffle": False}, "shuffle=False"),
        ({"epoch": 1}, "epoch 1 of"),
    ],
)
def test_ranks_whose_samplers_differ_are_told(other: dict[str, Any], said: str) -> None:
    """Catches features brought to the queries of other images: the plans alone are the same."""
    for text in run_on_ranks(2, _different_samplers, [{}, other]):
        assert "16 samples, batch_size=4, seed=0, shuffle=True, drop_last=True" in text
        assert said in text


def _keys_by_epoch() -> list[list[int]]:
    sampler = ShuffledPairSampler(range(64), batch_size=32, shuffle=False)
    keys = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        keys.append([key for _, key in next(iter(sampler))])
    return keys


def test_each_epoch_has_other_keys() -> None:
    """Catches an epoch that the shuffles don't know of, where the order of the data is kept."""
    for first, second in run_on_ranks(2, _keys_by_epoch):
        assert first != second


def _messages_by_epoch() -> list[list[int]]:
    group = dist.new_group()  # that has agreed on nothing yet
    sampler = ShuffledPairSampler(range(24), batch_size=4, process_group=group)
    counts: list[list[int]] = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        counts.append([])
        for step in range(3):
            with received_messages() as messages:
                batch_unshuffle(torch.randn(4, 2), sampler.plan(step))
            counts[-1].append(len(messages))
    return counts


def test_an_epoch_is_compared_once() -> None:
    """Catches an epoch that ranks set differently, or one that is compared at every step."""
    assert run_on_ranks(2, _messages_by_epoch) == [[[2, 1, 1], [2, 1, 1], [1, 1, 1]]] * 2
