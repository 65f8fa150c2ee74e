"""Two ranks whose tensors are on one GPU: what one process gives, on a stream of its own as well.

gloo carries the messages, since NCCL wants a GPU for each rank: it copies them through the host. On
the CPU the same steps run everywhere, so that the test itself is known to be right.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import truth
from ranks import run_on_ranks
from shuffle_batchnorm import (
    ShuffleBatchNorm,
    batch_shuffle,
    batch_unshuffle,
    synchronize_running_stats,
)
from truth import gradient

MODES = ("local", "sync", "swap", "regroup")
# Where the tensors are, and whether on a stream that is late.
DEVICES = [
    ("cpu", False),
    pytest.param("cuda", False, marks=pytest.mark.gpu),
    pytest.param("cuda", True, marks=pytest.mark.gpu),
]
SIZES, GROUPS, CHANNELS = (8, 12), 2, 5  # unequal batches


def _batch(rank: int) -> tuple[Tensor, Tensor]:
    """Input and gradient; means and scales of their own tell ranks apart."""
    torch.manual_seed(rank)
    x, dy = torch.randn(2, SIZES[rank], CHANNELS, 7, 6, dtype=torch.float64)
    return x * (1 + rank) + rank, dy


@contextmanager
def _late(data: Tensor, device: str, side_stream: bool) -> Iterator[Tensor]:
    """The data on the device; on a side stream, not there before the host is far ahead.

    So what reads or sends it on another stream has NaN.
    """
    if not side_stream:
        yield data.to(device)
        return
    stream, late = torch.cuda.Stream(), torch.full_like(data, torch.nan, device=device)
    ready = data.to(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # clock cycles, some 30 ms
        late.copy_(ready)
        yield late
    torch.cuda.current_stream().wait_stream(stream)


def _train(mode: str, device: str, side_stream: bool) -> list[Tensor]:
    """Output, gradients of input, weight and bias, running statistics, and their mean."""
    data, dy = _batch(dist.get_rank())
    layer = ShuffleBatchNorm(CHANNELS, mode=mode, groups=GROUPS, device=device, dtype=torch.float64)
    with _late(data, device, side_stream) as x:
        y = layer(x.requires_grad_())
        y.backward(dy.to(device))
        results = [y.detach(), *map(gradient, (x, *layer.parameters()))]
        results += [buffer.clone() for buffer in list(layer.buffers())[:2]]
        synchronize_running_stats(layer)
        results += list(layer.buffers())[:2]
    assert {result.device.type for result in results} == {device}
    return [result.cpu() for result in results]


def _expected(mode: str) -> list[list[Tensor]]:
    xs, dys = zip(*map(_batch, range(2)), strict=True)
    leaves = [x.requires_grad_() for x in xs]
    plain = truth.shuffled([group for x in leaves for group in x.chunk(GROUPS)], mode)
    outputs = torch.cat(plain.outputs)
    outputs.backward(torch.cat(dys))
    running = [truth.running(plain, range(r * GROUPS, (r + 1) * GROUPS)) for r in range(2)]
    mean = [torch.stack(each).mean(dim=0) for each in zip(*running, strict=True)]
    results = []
    for r, (y, dy) in enumerate(zip(outputs.detach().split(SIZES), dys, strict=True)):
        parameters = [(dy * y).sum(dim=(0, 2, 3)), dy.sum(dim=(0, 2, 3))]
        results.append([y, gradient(leaves[r]), *parameters, *running[r], *mean])
    return results


@pytest.mark.parametrize(("device", "side_stream"), DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_equal_one_process(mode: str, device: str, side_stream: bool) -> None:
    """Catches what stays on the CPU, and a kernel or message that does not wait for its input."""
    results = run_on_ranks(2, _train, mode, device, side_stream)
    torch.testing.assert_close(results, _expected(mode), rtol=1e-9, atol=1e-9)


def _move(device: str, side_stream: bool) -> list[int]:
    """The samples that came; back home, they and their gradients are what they were."""
    rank = dist.get_rank()
    data, dy = _batch(rank)
    ids = torch.arange(SIZES[rank], device=device) + 100 * rank
    last = data.float().contiguous(memory_format=torch.channels_last)
    with _late(last, device, side_stream) as x:
        (moved, there), plan = batch_shuffle((x.requires_grad_(), ids))
        back = batch_unshuffle(moved * there[:, None, None, None], plan)
        back.backward(dy.float().to(device))
        came: list[int] = there.tolist()
    factors = ids.cpu()[:, None, None, None]
    torch.testing.assert_close(back.detach().cpu(), last * factors)
    torch.testing.assert_close(gradient(x).cpu(), dy.float() * factors)
    return came


@pytest.mark.parametrize(("device", "side_stream"), DEVICES)
def test_samples_travel_and_return(device: str, side_stream: bool) -> None:
    """Catches samples that leave before they are there, and an order that stays on the CPU."""
    here, there = run_on_ranks(2, _move, device, side_stream)
    everyone = [100 * rank + k for rank, n in enumerate(SIZES) for k in range(n)]
    assert sorted(here + there) == everyone
    assert here != everyone[: SIZES[0]]
