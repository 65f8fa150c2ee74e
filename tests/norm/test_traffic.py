"""Messages and bytes, counted: one packed message per layer and direction for any W."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ranks import new_group, run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm

CHANNELS = 5
COLLECTIVES = [
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all",
    "all_to_all_single", "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list",
    "gather", "irecv", "isend", "monitored_barrier", "recv", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "scatter", "send",
]  # fmt: skip
Message = tuple[str, int, list[int]]  # collective, bytes sent to others, whom to


@contextmanager
def _counted() -> Iterator[list[Message]]:
    """Note every collective of this rank, and let it happen."""
    messages: list[Message] = []
    rank = dist.get_rank()

    def spy(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "all_to_all_single":
                _, sent, _, splits = args[:4]
                row = sent[0].nbytes
                to = [r for r, n in enumerate(splits) if n and r != rank]
                messages.append((name, sum(splits[r] for r in to) * row, to))
            else:
                tensor = args[1] if name == "all_gather" else args[0]
                others = [r for r in range(dist.get_world_size()) if r != rank]
                messages.append((name, tensor.nbytes, others))
            return original(*args, **kwargs)

        return call

    with mock.patch.multiple(dist, **{name: spy(name) for name in COLLECTIVES}):
        yield messages


def _messages(mode: str, groups: int, blocks: int, dtype: torch.dtype) -> list[list[Message]]:
    """The messages of a second step: forward, backward; and of a forward in eval mode."""
    layer = ShuffleBatchNorm(CHANNELS, mode=mode, groups=groups, blocks=blocks, dtype=dtype)
    x = torch.randn(8 * groups, CHANNELS, 3, dtype=dtype)
    layer(x)
    with _counted() as forward:
        loss = layer(x).square().sum()
    with _counted() as backward:
        loss.backward()
    with _counted() as evaluation:
        layer.eval()(x)
    return [forward, backward, evaluation]


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_swap_sends_one_row_to_one_peer(world_size: int, dtype: torch.dtype) -> None:
    """Catches the seed's three all_gathers, and a backward that sends nothing or too much."""
    for rank, (forward, backward, _) in enumerate(
        run_on_ranks(world_size, _messages, "swap", 1, 8, dtype)
    ):
        user, normaliser = (rank - 1) % world_size, (rank + 1) % world_size
        size = dtype.itemsize
        assert forward == [("all_to_all_single", (2 * CHANNELS + 1) * size, [user])]
        assert backward == [("all_to_all_single", 2 * CHANNELS * size, [normaliser])]


def test_swap_of_many_groups_sends_one_row_to_the_next_rank() -> None:
    """Catches rows of groups that stay on their rank being sent."""
    for forward, backward, _ in run_on_ranks(4, _messages, "swap", 4, 8, torch.float32):
        assert [(name, sent) for name, sent, _ in forward] == [("all_to_all_single", 44)]
        assert [(name, sent) for name, sent, _ in backward] == [("all_to_all_single", 40)]


@pytest.mark.parametrize(
    ("world_size", "groups", "blocks"), [(2, 1, 8), (4, 1, 3), (8, 1, 4), (4, 4, 8)]
)
def test_regroup_sends_a_row_to_the_ranks_that_use_its_group(
    world_size: int, groups: int, blocks: int
) -> None:
    """Catches block rows sent to everybody, or one by one: traffic must not grow with W."""
    b = min(world_size * groups, blocks)
    most = b * b - b if groups == 1 else groups * b * (min(b, world_size) - 1)
    for forward, backward, _ in run_on_ranks(
        world_size, _messages, "regroup", groups, blocks, torch.float32
    ):
        for messages, numbers in ((forward, 2 * CHANNELS + 1), (backward, 2 * CHANNELS)):
            [(name, sent, to)] = messages
            assert name == "all_to_all_single"
            assert sent <= most * numbers * 4
            assert len(to) <= min(2 * b - 2, world_size - 1)
            if groups == 1 and 2 * b - 2 < world_size:  # then all of a group's ranks are others
                assert sent == most * numbers * 4


@pytest.mark.parametrize("world_size", [2, 4])
def test_sync_gathers_one_row_and_reduces_one(world_size: int) -> None:
    """Catches a row per virtual group where one per rank is enough."""
    for forward, backward, _ in run_on_ranks(world_size, _messages, "sync", 2, 8, torch.float32):
        assert [(name, sent) for name, sent, _ in forward] == [("all_gather", 44)]
        assert [(name, sent) for name, sent, _ in backward] == [("all_reduce", 40)]


def test_local_and_eval_send_nothing() -> None:
    """Catches eval that communicates (pytorch#48988), and a local mode that does."""
    for mode in ("local", "sync", "swap", "regroup"):
        for forward, backward, evaluation in run_on_ranks(2, _messages, mode, 1, 8, torch.float32):
            assert evaluation == []
            if mode == "local":
                assert forward == backward == []


def _first_messages() -> list[list[Message]]:
    """Of a layer, of another of the same kind with other batches, and of one of another kind."""
    rank, found, group = dist.get_rank(), [], new_group()
    for channels in (CHANNELS, CHANNELS, CHANNELS + 1):
        layer = ShuffleBatchNorm(channels, process_group=group)
        with _counted() as messages:
            for step in range(3):
                layer(torch.randn(4 + step + rank, channels)).sum().backward()
        found.append(messages)
    return found


def test_ranks_compare_a_kind_of_call_once() -> None:
    """Catches a comparison at every step, for every layer, or for every size of a batch."""
    exchanges = ["all_to_all_single"] * 6
    for first, alike, other in run_on_ranks(2, _first_messages):
        assert [name for name, *_ in first] == ["all_gather", *exchanges]
        assert first[0][1] == 2048
        assert [name for name, *_ in alike] == exchanges
        assert [name for name, *_ in other] == ["all_gather", *exchanges]
