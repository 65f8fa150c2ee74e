"""Under DistributedDataParallel, as in training: two ranks learn what one process learns."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ranks import run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm

STEPS, BATCH = 3, 8


class Net(nn.Module):
    """Two blocks of conv, BN and ReLU, the second one recomputed in backward if asked."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.reentrant is None or not self.training:
            x = self.block(x)
        else:
            x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def _model(mode: str, groups: int, reentrant: bool | None = None) -> nn.Module:
    torch.manual_seed(1)
    return ShuffleBatchNorm.convert_shuffle_batchnorm(
        Net(reentrant).double(), mode=mode, groups=groups
    )


def _data(step: int, world_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(world_size * BATCH, 3, 7, 7, generator=generator, dtype=torch.float64)
    return x * torch.linspace(0.5, 2, len(x)).view(-1, 1, 1, 1)


def _train(
    model: nn.Module, xs: list[Tensor], views: int, check: nn.Module | None = None
) -> dict[str, Tensor]:
    """Train; the loss is a mean, so that DDP's average over ranks is that of one process."""
    optimizer = torch.optim.SGD((check or model).parameters(), lr=0.002)
    for x in xs:
        optimizer.zero_grad()
        # As in contrastive learning: several views forward, then one backward.
        outputs = [model(x.roll(v, dims=3)) for v in range(views)]
        torch.stack([y.pow(3) + y for y in outputs]).mean().backward()
        optimizer.step()
    return copy.deepcopy((check or model).state_dict())


def _ddp(mode: str, views: int, **options: Any) -> dict[str, Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    reentrant = options.pop("reentrant", None)
    # torch 2.13 renames the option; 2.11 does not know the new name.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    model = _model(mode, 2, reentrant)
    xs = [_data(step, size).chunk(size)[rank] for step in range(STEPS)]
    return _train(DistributedDataParallel(model, **options), xs, views, check=model)


def _compare(mode: str, world_size: int, views: int = 1, **options: Any) -> None:
    results = run_on_ranks(world_size, _ddp, mode, views, **options)
    model = _model(mode, 2 * world_size)
    expected = _train(model, [_data(step, world_size) for step in range(STEPS)], views)
    for name, want in expected.items():
        got = torch.stack([result[name].double() for result in results])
        if "running" in name and not options.get("broadcast_buffers", True):
            got = got.mean(dim=0, keepdim=True)  # each rank has seen other statistics
        elif "running" in name and mode != "sync":
            continue  # rank 0's buffers went to all ranks: those of one process are an average
        for value in got:
            torch.testing.assert_close(value, want.double(), rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("broadcast_buffers", [True, False])
@pytest.mark.parametrize("mode", ["local", "sync", "swap", "regroup"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ddp_learns_what_one_process_learns(
    mode: str, world_size: int, broadcast_buffers: bool
) -> None:
    """Catches gradients scaled by W (fairchem#2135) and buffers broadcast under autograd's feet."""
    _compare(mode, world_size, broadcast_buffers=broadcast_buffers)


@pytest.mark.parametrize("broadcast_buffers", [True, False])
@pytest.mark.parametrize("mode", ["sync", "swap", "regroup"])
def test_two_forwards_before_one_backward(mode: str, broadcast_buffers: bool) -> None:
    """Catches buffers saved for backward and changed by the second view (pytorch#22095)."""
    _compare(mode, 2, views=2, broadcast_buffers=broadcast_buffers)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["sync", "swap", "regroup"])
def test_checkpointed_layers_learn_the_same(mode: str, reentrant: bool) -> None:
    """Catches a second update of buffers by the recomputation (fairscale#694)."""
    results = [
        run_on_ranks(2, _ddp, mode, 1, broadcast_buffers=False, reentrant=how)
        for how in (None, reentrant)
    ]
    for plain, again in zip(*results, strict=True):
        assert plain["stem.1.num_batches_tracked"] == STEPS
        for name, want in plain.items():
            torch.testing.assert_close(again[name], want, msg=name)


def _sync_on_cpu() -> tuple[Tensor, dict[str, Tensor]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    # As in a script written for GPUs: SyncBatchNorm, then ours in its place.
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(Net().double())
    model = ShuffleBatchNorm.convert_shuffle_batchnorm(synced, mode="sync")
    ddp = DistributedDataParallel(model)
    out = ddp(_data(0, size).chunk(size)[rank])
    out.pow(2).mean().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_sync_is_sync_batchnorm_on_the_cpu() -> None:
    """Catches other results than BN on the whole batch; SyncBatchNorm itself refuses the CPU."""
    torch.manual_seed(1)
    whole = Net().double()
    out = whole(_data(0, 2))
    out.pow(2).mean().backward()
    results = run_on_ranks(2, _sync_on_cpu)
    torch.testing.assert_close(torch.cat([y for y, _ in results]), out.detach())
    for _, gradients in results:
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-10)
