"""W ranks give what one process gives on the concatenated batch, in every mode."""

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import truth
from ranks import run_on_ranks
from shuffle_batchnorm import shuffle_batch_norm
from truth import gradient

NAMES = ("output", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var")
SPACES = [(), (5,), (3, 2), (2, 1, 3)]
CASES = [
    dict(mode=mode, groups=groups, offset=offset, blocks=blocks)
    for mode, groups in itertools.product(("local", "sync", "swap", "regroup"), (1, 2, 4))
    for offset, blocks in [(1, 8), (0, 8), (2, 3), (-1, 2), (5, 4)]
    if mode in ("swap", "regroup") or (offset, blocks) == (1, 8)
]


def _inputs(
    batches: list[int], space: tuple[int, ...], dtype: torch.dtype, channels: int = 3
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(space) + sum(batches))

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    # Ranks with means and scales of their own: whose statistics are used must be seen.
    xs = [make(n, channels, *space) * (r + 1) + 3 * r for r, n in enumerate(batches)]
    return xs, [make(*x.shape) for x in xs], make(channels), make(channels)


def _run_cases(batches: list[int], dtype: torch.dtype, cases: list[dict[str, Any]]) -> list[Any]:
    """On one rank: output, gradients and running statistics of every case and input rank."""
    rank, results = dist.get_rank(), []
    # Some offsets are multiples of some numbers of groups: worth testing, and warned of elsewhere.
    warnings.filterwarnings("ignore", "shuffle_batch_norm: .* shuffles nothing")
    for case, space in itertools.product(cases, SPACES):
        xs, dys, weight, bias = _inputs(batches, space, dtype)
        x, weight, bias = (t.requires_grad_() for t in (xs[rank], weight, bias))
        mean, var = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
        y = shuffle_batch_norm(x, mean, var, weight, bias, training=True, **case)
        y.backward(dys[rank])
        leaves = (x, weight, bias)
        results.append([y.detach(), *(gradient(leaf) for leaf in leaves), mean, var])
    return results


def _expected(
    batches: list[int], space: tuple[int, ...], dtype: torch.dtype, case: dict[str, Any]
) -> list[Any]:
    """The same for all ranks from one process, in float64 whatever the dtype of the input."""
    xs, dys, weight, bias = _inputs(batches, space, dtype)
    xs, dys = [x.double().requires_grad_() for x in xs], [dy.double() for dy in dys]
    weight, bias = weight.double(), bias.double()
    results = []
    groups = case["groups"]
    cut = [g for x in xs for g in (x.chunk(groups) if len(x) else [x] * groups)]
    weights = [weight.clone().requires_grad_() for _ in xs]
    biases = [bias.clone().requires_grad_() for _ in xs]
    # One affine per rank, as each rank has its own copy of the parameters.
    plain = truth.shuffled(cut, case["mode"], case["offset"], case["blocks"])
    for r, dy in enumerate(dys):
        mine = range(r * groups, (r + 1) * groups)
        xhat = torch.cat([plain.outputs[i] for i in mine])
        shape = (1, -1, *[1] * len(space))
        y = xhat * weights[r].view(shape) + biases[r].view(shape)
        y.backward(dy, retain_graph=True)
        mean, var = truth.running(plain, mine)
        results.append([y.detach(), None, weights[r].grad, biases[r].grad, mean, var])
    for result, x in zip(results, xs, strict=True):
        result[1] = x.grad
    return results


def _compare(batches: list[int], dtype: torch.dtype, cases: list[dict[str, Any]]) -> None:
    results = run_on_ranks(len(batches), _run_cases, batches, dtype, cases, timeout=120)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for k, (case, space) in enumerate(itertools.product(cases, SPACES)):
        expected = _expected(batches, space, dtype, case)
        for rank, result in enumerate(results):
            for name, got, want in zip(NAMES, result[k], expected[rank], strict=True):
                assert got.dtype == dtype
                error = (got.double() - want).norm() / want.norm().clamp(min=1)
                assert error <= tolerance, f"{name} of rank {rank}: {error:.1e} in {case}, {space}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_equal_one_process_in_float64(world_size: int) -> None:
    """Catches a wrong peer, a wrong sign of a rotation, a count or a weight lost on the way."""
    _compare([8] * world_size, torch.float64, CASES)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_equal_one_process_in_float32(world_size: int) -> None:
    """Catches statistics that lose digits when they travel in float32."""
    # 8 samples in the smallest group: with 2, dx is a small difference of large terms in any BN.
    _compare([32] * world_size, torch.float32, CASES[::3])


@pytest.mark.parametrize("batches", [[8, 16], [24, 8, 16], [16, 8, 24, 8]])
def test_unequal_batches_weigh_by_their_samples(batches: list[int]) -> None:
    """Catches ranks pooled as if they were equal (pytorch#36382)."""
    _compare(batches, torch.float64, CASES)


def _grad_weight_of_unequal_weights() -> Tensor:
    rank = dist.get_rank()
    x = torch.randn(4, 2, 3, dtype=torch.float64) + rank
    x.requires_grad_()
    weight = torch.full((2,), rank + 1.0, dtype=torch.float64)
    y = shuffle_batch_norm(x, None, None, weight, training=True, mode="swap")
    y.pow(3).sum().backward()
    return gradient(x)


def test_gradient_uses_the_weight_of_the_rank_that_used_the_statistics() -> None:
    """Catches sums sent back without the user's weight: wrong when ranks' weights differ."""
    xs = [(torch.manual_seed(0), torch.randn(4, 2, 3, dtype=torch.float64))[1] + r for r in (0, 1)]
    for x in xs:
        x.requires_grad_()
    plain = truth.shuffled(xs, "swap").outputs
    torch.stack([((r + 1.0) * y).pow(3).sum() for r, y in enumerate(plain)]).sum().backward()
    for got, x in zip(run_on_ranks(2, _grad_weight_of_unequal_weights), xs, strict=True):
        torch.testing.assert_close(got, x.grad, rtol=1e-10, atol=1e-10)


def _loss(x: Tensor, case: dict[str, Any]) -> Tensor:
    y = shuffle_batch_norm(x, None, None, training=True, **case)
    return (y.pow(3) * torch.arange(1.0, 1 + y.numel(), dtype=y.dtype).view_as(y)).sum()


def _finite_differences(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The gradient of rank 0's own loss by every rank's input, by backward and by differences."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(4, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    loss = _loss(x, case)
    # Only rank 0 has a loss; the others take part in the backward pass with a zero gradient.
    (loss if rank == 0 else loss * 0).backward()
    step, numeric = 1e-6, torch.zeros_like(x)
    for owner in range(size):
        for k in range(x.numel()):
            values = []
            for sign in (1, -1):
                moved = x.detach().clone()
                if rank == owner:
                    moved.view(-1)[k] += sign * step
                loss0 = _loss(moved, case).clone()
                dist.broadcast(loss0, src=0)
                values.append(loss0)
            if rank == owner:
                numeric.view(-1)[k] = (values[0] - values[1]) / (2 * step)
    return gradient(x), numeric


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "case",
    [
        dict(mode="sync"),
        dict(mode="swap"),
        dict(mode="swap", groups=2, offset=3),
        dict(mode="regroup"),
        dict(mode="regroup", groups=2, blocks=2),
    ],
    ids=str,
)
def test_gradient_across_ranks_is_that_of_finite_differences(
    world_size: int, case: dict[str, Any]
) -> None:
    """Perturb one rank's input, see rank 0's loss. Catches a backward that sends nothing."""
    for rank, (got, numeric) in enumerate(run_on_ranks(world_size, _finite_differences, case)):
        error = (got - numeric).norm() / numeric.norm().clamp(min=1)
        assert error < 1e-6, f"rank {rank}: {error:.1e}"
