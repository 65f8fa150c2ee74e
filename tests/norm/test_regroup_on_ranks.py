"""`regroup` in one message, where that is small, and in two: which, and the same bits."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from meters import received_messages
from torch import Tensor

from ranks import run_on_ranks
from shuffle_batchnorm import shuffle_batch_norm
from shuffle_batchnorm.comm import collectives
from shuffle_batchnorm.comm.world import resolve
from shuffle_batchnorm.norm.mixing import Options, make_plan
from shuffle_batchnorm.norm.statistics import mix, mix_gradients
from truth import gradient


def _step(batch: int, channels: int, dtype: torch.dtype, **case: Any) -> tuple[list[Tensor], Any]:
    """Output, gradient and running statistics of one rank; its messages forward and backward."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, dy = torch.randn(2, batch, channels, generator=generator, dtype=dtype)
    x.mul_(1 + dist.get_rank()).requires_grad_()
    mean, var = torch.zeros(2, channels, dtype=dtype)
    shuffle_batch_norm(x, None, None, training=True, mode="regroup", **case)  # the handshake
    with received_messages() as forward:
        y = shuffle_batch_norm(x, mean, var, training=True, mode="regroup", **case)
    with received_messages() as backward:
        y.backward(dy)
    return [y.detach(), gradient(x), mean, var], (len(forward), len(backward))


def _rows(channels: int, options: Options) -> list[Tensor]:
    """The rows of statistics and of gradients that come back to a rank."""
    world = resolve(None)
    plan = make_plan(options, world.size, world.rank)
    generator = torch.Generator().manual_seed(world.rank)
    shape = (plan.groups, plan.per_group, 2 * channels + 1)
    blocks = torch.rand(shape, generator=generator)
    blocks[..., 0] = torch.randint(2, 9, shape[:2], generator=generator)
    return [mix(blocks, plan, world)[0], mix_gradients(blocks[..., 1:], plan, world)]


def _both_ways(channels: int, groups: int, offset: int) -> None:
    batch = groups * (11 + dist.get_rank())  # blocks of unequal sizes
    ways = []
    for limit, messages in ((0, 2), (2**40, 1)):
        with mock.patch.object(collectives, "ONE_MESSAGE_BYTES", limit):
            results, sent = _step(batch, channels, torch.float32, groups=groups, offset=offset)
            assert sent == (messages, messages)
            ways.append(results + _rows(channels, Options("regroup", groups, offset)))
    for two, one in zip(*ways, strict=True):
        assert torch.equal(two, one)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_message_gives_the_bits_of_two(world_size: int, groups: int) -> None:
    """Catches rows dealt to another group or pooled in another order, forward or backward."""
    for channels in (1, 5, 512):
        for offset in (1, -1, 2):
            if offset % (world_size * groups):  # a multiple shuffles nothing
                run_on_ranks(world_size, _both_ways, channels, groups, offset)


@pytest.mark.parametrize(
    ("channels", "dtype", "messages"),
    [
        # 64 rows come in: 256 (2C + 1) bytes forward and 512 C backward, against 524,288.
        (1023, torch.float32, (1, 1)),
        (1024, torch.float32, (2, 1)),
        (1025, torch.float32, (2, 2)),
        (512, torch.float64, (2, 1)),
    ],
    ids=str,
)
def test_rows_beyond_the_limit_take_two_messages(
    channels: int, dtype: torch.dtype, messages: tuple[int, int]
) -> None:
    """Catches a limit on the bytes of one rank's rows, of one row, or on numbers of any dtype."""
    for _, sent in run_on_ranks(2, _step, 16, channels, dtype, groups=4):
        assert sent == messages


def _unshuffled() -> Any:
    return _step(8, 3, torch.float32, offset=0)[1]


def test_blocks_that_stay_are_not_sent() -> None:
    """Catches a message with offset 0, which leaves every block where it is."""
    assert run_on_ranks(2, _unshuffled) == [(0, 0)] * 2
