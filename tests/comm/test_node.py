"""node_group: which ranks are a node, that all ranks agree on it, and what layers do inside one."""

import os
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import pytest
import torch
import torch.distributed as dist
from meters import received_messages
from torch import Tensor, nn

import truth
from ranks import outcomes_on_ranks, run_on_ranks
from shuffle_batchnorm import (
    ShuffleBatchNorm,
    ShuffledEncoder,
    batch_shuffle,
    batch_unshuffle,
    mixing_matrix,
    node_group,
    shuffle_batch_norm,
)
from shuffle_batchnorm.comm import node
from truth import gradient

N, CHANNELS, GROUPS = 8, 3, 2


def test_one_process_needs_no_group() -> None:
    """Catches a script that runs without torchrun, and an option that is only read with it."""
    assert node_group() is node_group(8) is None
    with pytest.raises(ValueError, match=r"^node_group: ranks_per_node must be at least 1, got r"):
        node_group(0)
    with pytest.raises(TypeError, match=r"^node_group: ranks_per_node must be an int or None, got"):
        node_group("8")  # type: ignore[arg-type]


def _ranks(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group)


def _find_nodes() -> None:
    rank = dist.get_rank()
    assert node_group() is dist.group.WORLD is node_group(4)  # on one host, and no second group
    fresh = dist.group.WORLD
    pairs = node_group(2)
    assert _ranks(pairs) == [rank // 2 * 2, rank // 2 * 2 + 1]
    with received_messages() as messages:
        assert node_group(2) is pairs
        assert node_group() is fresh
    assert messages == []
    assert _ranks(node_group(1)) == [rank]


def test_consecutive_ranks_are_a_node() -> None:
    """Catches a second group for the same ranks, and later calls that compare again."""
    run_on_ranks(4, _find_nodes)


def _find_in_new_job(agents: list[int], hosts: list[str]) -> list[int]:
    """As if torchrun's agents of these numbers had started the ranks on these hosts."""
    rank = dist.get_rank()
    with (
        mock.patch.object(node, "_groups", WeakKeyDictionary()),
        mock.patch.dict(os.environ, {"GROUP_RANK": str(agents[rank])}),
        mock.patch("socket.gethostname", return_value=hosts[rank]),
    ):
        return _ranks(node_group())


@pytest.mark.parametrize(
    ("agents", "hosts"),
    [
        ([0, 0, 1, 1], "aabb"),
        ([0, 0, 1, 1], "aaaa"),  # containers that have one name
        ([0, 0, 0, 0], "abab"),  # started one by one, as with Slurm or MPI
        ([0, 0, 0, 1], "aaab"),
    ],
)
def test_ranks_of_one_host_and_agent_are_a_node(agents: list[int], hosts: str) -> None:
    """Catches nodes taken for equal in size, or their ranks for consecutive."""
    found = run_on_ranks(4, _find_in_new_job, agents, list(hosts))
    nodes = list(zip(agents, hosts, strict=True))
    assert found == [[r for r in range(4) if nodes[r] == node] for node in nodes]


def _refused(ranks_per_node: list[Any]) -> None:
    node_group(ranks_per_node[dist.get_rank()])


def test_what_does_not_fit_is_refused_on_every_rank() -> None:
    """Catches a rank that waits for one that has raised, and nodes that are cut at random."""
    for error in outcomes_on_ranks(3, _refused, [2, 2, 2]):
        assert isinstance(error, ValueError)
        assert str(error) == (
            "node_group: 3 ranks are not divisible by ranks_per_node=2; without it, nodes may "
            "differ in size"
        )
    for error in outcomes_on_ranks(2, _refused, [1, 2]):
        assert isinstance(error, ValueError)
        assert str(error) == (
            "node_group: ranks disagree on ranks_per_node: 1 on rank 0, 2 on rank 1"
        )
    one, other = outcomes_on_ranks(2, _refused, [1, 0])
    assert isinstance(one, RuntimeError)
    assert isinstance(other, ValueError)
    assert "ranks_per_node must be at least 1, got ranks_per_node=0" in str(other)


MODES = ("local", "sync", "swap", "regroup")


def _batch(rank: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rank)
    x, dy = torch.randn(2, N, CHANNELS, 2, dtype=torch.float64)
    return x * (1 + rank) + rank, dy


def _train(mode: str) -> list[Tensor]:
    """Output, gradient of the input and running statistics of a converted layer on this rank."""
    x, dy = _batch(dist.get_rank())
    model = ShuffleBatchNorm.convert_shuffle_batchnorm(
        nn.Sequential(nn.BatchNorm1d(CHANNELS, dtype=torch.float64)),
        node_group(2),
        mode=mode,
        groups=GROUPS,
    )
    y = model(x.requires_grad_())
    y.backward(dy)
    return [y.detach(), gradient(x), *list(model.buffers())[:2]]


def _expected(mode: str, ranks: tuple[int, ...]) -> list[list[Tensor]]:
    """The same of one node's ranks, from one process."""
    xs, dys = zip(*map(_batch, ranks), strict=True)
    leaves = [x.requires_grad_() for x in xs]
    plain = truth.shuffled([group for x in leaves for group in x.chunk(GROUPS)], mode)
    torch.cat(plain.outputs).backward(torch.cat(dys))
    results = []
    for k, leaf in enumerate(leaves):
        mine = range(k * GROUPS, (k + 1) * GROUPS)
        y = torch.cat([plain.outputs[i] for i in mine]).detach()
        results.append([y, gradient(leaf), *truth.running(plain, mine)])
    return results


@pytest.mark.parametrize("mode", MODES)
def test_layers_of_two_nodes_equal_one_process_for_each(mode: str) -> None:
    """Catches a group of the wrong ranks, and what leaves the node."""
    results = run_on_ranks(4, _train, mode)
    torch.testing.assert_close(results, _expected(mode, (0, 1)) + _expected(mode, (2, 3)))


def _move() -> tuple[list[int], float]:
    """Which samples are here after a shuffle, and the mean of those that an encoder meets here."""
    rank = dist.get_rank()
    ids = torch.arange(N) + 100 * rank
    moved, plan = batch_shuffle(ids, process_group=node_group(2))
    torch.testing.assert_close(batch_unshuffle(moved, plan), ids)
    norm = nn.BatchNorm1d(1, momentum=1)
    ShuffledEncoder(norm, process_group=node_group(2))(ids[:, None].float())
    assert norm.running_mean is not None
    return moved.tolist(), norm.running_mean.item()


def test_samples_stay_on_their_node() -> None:
    """Catches `batch_shuffle` and `ShuffledEncoder` that ask all ranks."""
    results = run_on_ranks(4, _move)
    for first in (0, 2):
        (here, met_here), (there, met_there) = results[first : first + 2]
        assert sorted(here + there) == [100 * r + k for r in (first, first + 1) for k in range(N)]
        assert {k // 100 for k in here} == {first, first + 1}
        for mean in (met_here, met_there):
            assert 100 * first < mean < 100 * (first + 1) + N


def _alone() -> None:
    x = torch.randn(N, CHANNELS)
    for mode in MODES:
        y = shuffle_batch_norm(
            x, None, None, training=True, mode=mode, groups=2, process_group=node_group(1)
        )
        want = truth.shuffled(x.chunk(2), mode).outputs
        torch.testing.assert_close(y, torch.cat(want))


def test_a_node_of_one_rank_is_one_process() -> None:
    run_on_ranks(2, _alone)


def _own_share(ranks: int, groups: int) -> float:
    """How much of a sample's normaliser is its own group, in `regroup`; the same for all."""
    batch = 8 * groups
    matrix = mixing_matrix("regroup", world_size=ranks, groups=groups, batch_size=batch)
    group = torch.arange(ranks * batch) // 8
    shares = (matrix * (group[:, None] == group)).sum(dim=1)
    torch.testing.assert_close(shares, shares[:1].expand_as(shares))
    return float(shares[0])


@pytest.mark.parametrize(
    ("ranks", "groups", "share"), [(64, 1, 1 / 8), (8, 1, 1 / 8), (2, 4, 1 / 8), (2, 1, 1 / 2)]
)
def test_a_node_mixes_as_the_documentation_says(ranks: int, groups: int, share: float) -> None:
    """Catches a table of docs/scale.md that is no longer true."""
    assert _own_share(ranks, groups) == pytest.approx(share)
