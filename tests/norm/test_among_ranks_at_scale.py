"""Eight ranks on gloo give what one process gives on the concatenated batch."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from meters import received_messages
from torch import Tensor

import truth
from ranks import run_on_ranks
from shuffle_batchnorm import batch_shuffle, batch_unshuffle, shuffle_batch_norm
from truth import gradient

RANKS, CHANNELS = 8, 3
NAMES = ("output", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var")
CASES: list[dict[str, Any]] = [
    dict(mode="local", groups=1, offset=1, blocks=8),
    dict(mode="sync", groups=2, offset=1, blocks=8),
    dict(mode="swap", groups=1, offset=1, blocks=8),
    dict(mode="swap", groups=2, offset=5, blocks=8),
    dict(mode="regroup", groups=1, offset=1, blocks=8),
    dict(mode="regroup", groups=2, offset=3, blocks=8),
    dict(mode="regroup", groups=1, offset=-1, blocks=3),  # to some of the ranks, not to all
]


def _batches(unequal: bool) -> list[tuple[Tensor, Tensor]]:
    """Input and gradient of each rank; means and scales of their own tell ranks apart."""
    torch.manual_seed(1)
    batches = []
    for rank in range(RANKS):
        shape = (8 + 8 * (rank % 3) * unequal, CHANNELS, 2)
        x, dy = torch.randn(2, *shape, dtype=torch.float64)
        batches.append((x * (1 + rank % 5) + rank, dy))
    return batches


def _parameters(rank: int) -> tuple[Tensor, Tensor]:
    """Weight and bias, different on every rank."""
    weight = torch.linspace(0.5, 1.5, CHANNELS, dtype=torch.float64) + 0.1 * rank
    return weight.requires_grad_(), (weight.detach() - 1).requires_grad_()


def _steps(unequal: bool) -> list[list[Tensor]]:
    """On one rank, for every case: what `NAMES` lists."""
    rank, results = dist.get_rank(), []
    for case in CASES:
        x, dy = _batches(unequal)[rank]
        leaves = x.requires_grad_(), *_parameters(rank)
        mean, var = torch.zeros(2, CHANNELS, dtype=torch.float64)
        y = shuffle_batch_norm(x, mean, var.fill_(1), *leaves[1:], training=True, **case)
        y.backward(dy)
        results.append([y.detach(), *(gradient(leaf) for leaf in leaves), mean, var])
    return results


def _expected(case: dict[str, Any], unequal: bool) -> list[list[Tensor]]:
    """The same from one process, for every rank."""
    groups = case["groups"]
    xs, dys = zip(*_batches(unequal), strict=True)
    leaves = [(x.requires_grad_(), *_parameters(rank)) for rank, x in enumerate(xs)]
    cut = [group for x in xs for group in x.chunk(groups)]
    plain = truth.shuffled(cut, case["mode"], case["offset"], case["blocks"])
    results = []
    for rank, (_, weight, bias) in enumerate(leaves):
        mine = range(rank * groups, (rank + 1) * groups)
        xhat = torch.cat([plain.outputs[i] for i in mine])
        y = xhat * weight.view(1, -1, 1) + bias.view(1, -1, 1)
        y.backward(dys[rank], retain_graph=True)
        results.append([y.detach(), *truth.running(plain, mine)])
    # The gradient of an input is whole when all ranks' losses have been through backward.
    return [
        [y, *(gradient(leaf) for leaf in mine), mean, var]
        for (y, mean, var), mine in zip(results, leaves, strict=True)
    ]


@pytest.mark.parametrize("unequal", [False, True])
def test_eight_ranks_equal_one_process(unequal: bool) -> None:
    """Catches what only shows when blocks go to some of the ranks, not to all."""
    results = run_on_ranks(RANKS, _steps, unequal, timeout=180)
    for k, case in enumerate(CASES):
        for rank, expected in enumerate(_expected(case, unequal)):
            for name, got, want in zip(NAMES, results[rank][k], expected, strict=True):
                error = (got - want).norm() / want.norm().clamp(min=1)
                assert error <= 1e-10, f"{name} of rank {rank}: {error:.1e} in {case}"


def _round_trip(sizes: list[int]) -> tuple[list[int], list[int]]:
    """Which samples a rank got, and what came in each message."""
    rank = dist.get_rank()
    ids = torch.arange(sizes[rank]) + 1000 * rank
    images = torch.randn(sizes[rank], 3, 4)
    with received_messages() as messages:
        (moved, there), plan = batch_shuffle((images, ids))
    again, back = batch_unshuffle((moved, there), plan)
    torch.testing.assert_close((again, back), (images, ids), rtol=0, atol=0)
    return there.tolist(), [size for _, size in messages]


@pytest.mark.parametrize("sizes", [[32] * RANKS, [5] * RANKS, [k % 4 for k in range(RANKS)]])
def test_samples_of_eight_ranks_travel_and_return(sizes: list[int]) -> None:
    """Catches routes that fit for few ranks only, with fewer samples than ranks as well."""
    results = run_on_ranks(RANKS, _round_trip, sizes, timeout=120)
    everyone = [1000 * rank + k for rank, n in enumerate(sizes) for k in range(n)]
    assert sorted(k for ids, _ in results for k in ids) == everyone
    for ids, received in results:
        sample = 3 * 4 * 4 + 8  # bytes
        assert received[-1] <= len(ids) * sample
        if sizes[0] == 32:
            sources = torch.tensor(ids) // 1000
            assert sources.bincount(minlength=RANKS).eq(4).all()
            assert received[-1] == 28 * sample


def _traffic() -> dict[str, list[tuple[int, int]]]:
    """Per mode, messages and bytes received in a second step, forward and backward."""
    counts = {}
    for mode in ("sync", "swap", "regroup"):
        x = torch.randn(8, CHANNELS, requires_grad=True)
        shuffle_batch_norm(x, None, None, training=True, mode=mode, blocks=3)
        with received_messages() as forward:
            y = shuffle_batch_norm(x, None, None, training=True, mode=mode, blocks=3)
        with received_messages() as backward:
            y.sum().backward()
        counts[mode] = [(len(m), sum(size for _, size in m)) for m in (forward, backward)]
    return counts


def test_traffic_of_eight_ranks_is_what_they_need() -> None:
    """Catches rows that reach more ranks than need them."""
    row, sums = 4 * (2 * CHANNELS + 1), 4 * 2 * CHANNELS
    for counts in run_on_ranks(RANKS, _traffic):
        assert counts["swap"] == [(1, row), (1, sums)]
        # To all ranks it would be 7 * 3 rows.
        assert counts["regroup"] == [(1, 6 * row), (1, 6 * sums)]
        assert counts["sync"][0] == (1, 7 * row)
