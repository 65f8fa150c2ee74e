"""`regroup` and `swap` across ranks: one message per direction, and the same bits on all ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from meters import received_messages
from torch import Tensor

from ranks import run_on_ranks
from shuffle_batchnorm import shuffle_batch_norm
from shuffle_batchnorm.comm.world import resolve
from shuffle_batchnorm.kernels.select import select
from shuffle_batchnorm.norm.mixing import Options, make_plan
from shuffle_batchnorm.norm.statistics import RowFormat, mix, mix_gradients, prepare_call

GROUPS = [1, 2, 4]
OFFSETS = [1, 3, -3]
BLOCKS = [2, 64]  # B < G and B = G, for all but one rank with one group


def _messages() -> dict[tuple[int, int, int], tuple[int, int]]:
    """The messages of a second step, forward and backward, for every groups, offset and blocks."""
    found = {}
    for case in [(g, o, b) for g in GROUPS for o in OFFSETS for b in [1, *BLOCKS]]:
        groups, offset, blocks = case
        if offset % (groups * dist.get_world_size()) == 0 or blocks == 1:
            continue  # that warns: see below
        options: Any = dict(mode="regroup", groups=groups, offset=offset, blocks=blocks)
        x = torch.randn(4 * groups, 3, requires_grad=True)
        shuffle_batch_norm(x, None, None, training=True, **options)  # compares options
        with received_messages() as forward:
            y = shuffle_batch_norm(x, None, None, training=True, **options)
        with received_messages() as backward:
            y.sum().backward()
        found[case] = (len(forward), len(backward))
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_regroup_takes_one_message_per_direction(world_size: int) -> None:
    """Catches a second message, whatever W, groups, offset and blocks."""
    for found in run_on_ranks(world_size, _messages):
        assert len(found) >= 13
        assert set(found.values()) == {(1, 1)}


def _unshuffled(options: Any) -> tuple[int, int]:
    x = torch.randn(8, 3, requires_grad=True)
    shuffle_batch_norm(x, None, None, training=True, mode="regroup", **options)
    with received_messages() as forward:
        y = shuffle_batch_norm(x, None, None, training=True, mode="regroup", **options)
    with received_messages() as backward:
        y.sum().backward()
    return len(forward), len(backward)


def _unshuffled_with_a_warning() -> tuple[int, int]:
    with pytest.warns(UserWarning, match="blocks=1 leaves each group whole"):
        return _unshuffled(dict(blocks=1))


def test_blocks_that_stay_are_not_sent() -> None:
    """Catches a message with offset 0, or of one block, which leaves every group whole."""
    assert run_on_ranks(2, _unshuffled, dict(offset=0)) == [(0, 0)] * 2
    assert run_on_ranks(2, _unshuffled_with_a_warning) == [(0, 0)] * 2


def _merged(groups: int, offset: int) -> dict[int, list[Tensor]]:
    """For every normaliser that this rank uses: its statistics, then its sums for each block."""
    world = resolve(None, "test")
    plan = make_plan(Options("regroup", groups, offset), world.size, world.rank)
    generator = torch.Generator().manual_seed(world.rank)
    rows = torch.rand(plan.groups * plan.per_group, 11, generator=generator)
    rows[:, 0] = torch.randint(2, 9, (len(rows),), generator=generator)
    call = prepare_call(plan, (), RowFormat(5, rows.dtype), select(rows))
    used = mix(rows, call, world)
    sums = mix_gradients(rows[:, 1:].contiguous().view(-1, 2, 5), call, world)
    first = plan.rank * plan.groups
    found: dict[int, list[Tensor]] = {}
    for k in range(len(rows)):
        group, block = first + k // plan.per_group, k % plan.per_group
        normaliser = plan.used(group, block)
        assert torch.equal(found.setdefault(normaliser, [used[k]])[0], used[k])
        found[normaliser].append(sums[k])
    return found


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_merge_to_the_same_bits(world_size: int, groups: int) -> None:
    """Catches rows that are merged in another order on another rank, forward or backward."""
    for offset in (1, -1, 2):
        seen: dict[int, list[Tensor]] = {}
        for found in run_on_ranks(world_size, _merged, groups, offset):
            for normaliser, (row, *sums) in found.items():
                first, *others = seen.setdefault(normaliser, [row, *sums])
                assert torch.equal(row, first)
                assert all(torch.equal(one, others[0]) for one in sums)
        assert len(seen) == world_size * groups
