"""Messages and bytes, counted: one or two packed messages per layer and direction for any W."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ranks import run_on_ranks
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


@pytest.mark.parametrize(("world_size", "blocks"), [(4, 3), (8, 4)])
def test_regroup_sends_to_the_ranks_of_its_blocks_only(world_size: int, blocks: int) -> None:
    """Catches block rows sent to everybody: the traffic must not grow with W."""
    others = blocks - 1
    for forward, backward, _ in run_on_ranks(
        world_size, _messages, "regroup", 1, blocks, torch.float32
    ):
        # All blocks but the first leave for their new groups; those groups' rows come back.
        expected = [("all_to_all_single", others * (2 * CHANNELS + 1) * 4, others)] * 2
        assert [(name, sent, len(to)) for name, sent, to in forward] == expected
        expected = [("all_to_all_single", others * 2 * CHANNELS * 4, others)] * 2
        assert [(name, sent, len(to)) for name, sent, to in backward] == expected


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_regroup_sends_all_rows_at_once_if_every_rank_deals_to_every_rank(world_size: int) -> None:
    """Catches a second message where the first can bring all that a rank needs."""
    others = list(range(world_size))
    for rank, (forward, backward, _) in enumerate(
        run_on_ranks(world_size, _messages, "regroup", 1, 8, torch.float32)
    ):
        to = others[:rank] + others[rank + 1 :]
        rows = len(to) * world_size
        assert forward == [("all_to_all_single", rows * (2 * CHANNELS + 1) * 4, to)]
        assert backward == [("all_to_all_single", rows * 2 * CHANNELS * 4, to)]


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


def _first_messages() -> list[Message]:
    layer = ShuffleBatchNorm(CHANNELS)
    with _counted() as messages:
        for _ in range(3):
            layer(torch.randn(4, CHANNELS)).sum().backward()
    return messages


def test_ranks_compare_their_options_once() -> None:
    """Catches a handshake at every step."""
    for messages in run_on_ranks(2, _first_messages):
        assert [name for name, *_ in messages] == ["all_gather"] + ["all_to_all_single"] * 6
        assert messages[0][1] == 2048
