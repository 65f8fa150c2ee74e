"""MoCo on several ranks is MoCo on one with as many groups in all."""

from inspect import signature
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ranks import outcomes_on_ranks, run_on_ranks
from shuffle_batchnorm.moco.build import normalise_key, normalise_query
from shuffle_batchnorm.moco.config import NetworkConfig, Norm, NormConfig
from shuffle_batchnorm.moco.model import MoCo
from shuffle_batchnorm.moco.networks import make_encoder

_GROUPS, _BATCH, _STEPS = 6, 36, 3


def _no_buffers() -> dict[str, Any]:
    """DDP's option not to send buffers, which torch 2.13 has given another name."""
    new, old = "forward_sync_buffers", "broadcast_buffers"
    return {new if new in signature(DistributedDataParallel).parameters else old: False}


def _train(world_size: int, bn: Norm, symmetric: bool) -> dict[str, Any]:
    """A few steps of this rank's part; losses and accuracies are means over the ranks."""
    torch.manual_seed(0)
    norm, rank = NormConfig(bn=bn, groups=_GROUPS // world_size), 0
    encoders = [make_encoder(NetworkConfig(dim=8), 1, 8).double() for _ in "qk"]
    moco = MoCo(
        normalise_query(encoders[0], norm), normalise_key(encoders[1], norm),
        queue=100, dim=8, momentum=0.9, symmetric=symmetric,
        buffers="momentum" if bn == "eman" else "own", in_batch=bn == "simclr",
    ).double()  # fmt: skip
    model: nn.Module = moco
    if world_size > 1:
        model, rank = DistributedDataParallel(moco, **_no_buffers()), dist.get_rank()
    optimizer = torch.optim.SGD(moco.encoder_q.parameters(), lr=0.1, momentum=0.9)
    generator, curve = torch.Generator().manual_seed(1), []
    for _ in range(_STEPS):
        base = torch.randn(_BATCH, 1, 8, 8, generator=generator).double()
        views = [base + 0.2 * torch.randn(base.shape, generator=generator) for _ in "12"]
        step = model(*(view.chunk(world_size)[rank] for view in views))
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        point = torch.stack([step.loss.detach(), step.accuracy]) / world_size
        if world_size > 1:
            dist.all_reduce(point)
        curve.append(point)
    weights = [p.detach() for p in moco.parameters()]
    averages = [] if bn != "eman" else [b for b in moco.encoder_k.buffers() if b.ndim]
    return dict(
        curve=curve, queue=moco.queue, pointer=int(moco.queue_pointer), weights=weights,
        averages=averages,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("bn", "symmetric", "world_size"),
    [
        ("local", False, 2),
        ("sync", False, 2),
        ("swap", False, 3),
        ("regroup", False, 2),
        ("regroup", True, 3),
        ("eman", False, 2),
        ("eman", True, 3),
        ("simclr", True, 2),
        ("simclr", False, 3),
    ],
)
def test_ranks_train_as_one(bn: Norm, symmetric: bool, world_size: int) -> None:
    """Loss, weights and queue; catches keys enqueued in another order, and gradients summed.

    And running statistics of EMAN that are each rank's own, so that its keys are normalised with
    others than those of the next rank; and negatives that are a rank's own keys only.
    """
    whole = _train(1, bn, symmetric)
    for part in run_on_ranks(world_size, _train, world_size, bn, symmetric):
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)
    filled = 0 if bn == "simclr" else _STEPS * _BATCH * (1 + symmetric)
    assert whole["pointer"] == filled % 100


def _train_shuffled() -> Tensor:
    queue: Tensor = _train(2, "batch-shuffle", False)["queue"]
    return queue


def test_batch_shuffle_keeps_the_queue_alike() -> None:
    """Its permutation depends on the ranks, so there is no single rank to compare with."""
    queues = run_on_ranks(2, _train_shuffled)
    torch.testing.assert_close(queues[0], queues[1], rtol=0, atol=0)
    torch.testing.assert_close(queues[0].norm(dim=1), torch.ones(100).double())


class _Directions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


def _too_small() -> None:
    moco = MoCo(_Directions(), _Directions(), queue=7, dim=3)
    moco(torch.randn(4, 3), torch.randn(4, 3))


def test_queue_smaller_than_the_batch_of_all_ranks() -> None:
    for outcome in outcomes_on_ranks(2, _too_small):
        assert isinstance(outcome, ValueError)
        assert str(outcome) == ("MoCo: queue 7 is smaller than the 2 ranks x 4 = 8 keys of a step")
