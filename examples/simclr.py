"""SimCLR: negatives from the batches of all ranks, gradients through both views, one encoder.

    python examples/simclr.py                           # on a laptop
    torchrun --nproc-per-node 2 examples/simclr.py      # two ranks, on CPUs or GPUs
    python examples/simclr.py --mode local              # without the cure: compare the leaks

With batch norm per device or group, a view finds the other one by the statistics of its group. Here
the first view is normalised as ever, and the second with samples of other groups. If statistics are
those of all samples (SyncBatchNorm over all ranks), encode both views in one pass: then all views
have the same, and nothing is to be done. In `regroup` never put both views in one pass: an image's
two views would have the same other samples again.
"""

import argparse
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import common
from shuffle_batchnorm import LeakReport, ShuffleBatchNorm, measure_leak, shuffle_offset


class Gather(torch.autograd.Function):
    """Rows of all ranks; the gradients of all ranks' losses come back to the rows' owners."""

    @staticmethod
    def forward(_: Any, rows: Tensor) -> Tensor:
        return common.gather(rows)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Return the loss of views ``[N, D]`` of unit length; the negatives are all ranks' others."""
    rank, world = common.rank_of_world()
    own = torch.stack([first, second], dim=1).flatten(0, 1)  # the views of an image side by side
    everyones = Gather.apply(own) if world > 1 else own  # type: ignore[no-untyped-call]
    index = torch.arange(len(own), device=own.device) + rank * len(own)
    logits = (own @ everyones.T / temperature).scatter(1, index[:, None], -torch.inf)
    return F.cross_entropy(logits, index ^ 1)  # the other view of 2i is 2i + 1, and the reverse


class SimCLR(nn.Module):
    """An encoder that normalises the second view with other samples than the first."""

    def __init__(self, encoder: nn.Module, groups: int, mode: str = "regroup") -> None:
        super().__init__()
        convert = ShuffleBatchNorm.convert_shuffle_batchnorm
        self.encoder = convert(encoder, mode=mode, groups=groups)

    def encode_first(self, images: Tensor) -> Tensor:
        with shuffle_offset(self.encoder, 0):  # plain batch norm, group by group
            return F.normalize(self.encoder(images), dim=1)

    def encode_second(self, images: Tensor) -> Tensor:
        return F.normalize(self.encoder(images), dim=1)

    def forward(self, view_1: Tensor, view_2: Tensor, temperature: float) -> Tensor:
        return nt_xent(self.encode_first(view_1), self.encode_second(view_2), temperature)


def train(args: argparse.Namespace, device: torch.device) -> SimCLR:
    """Train on all ranks, and return what was trained."""
    rank, world = common.rank_of_world()
    torch.manual_seed(0)  # the same encoder on all ranks
    model = SimCLR(
        common.network(args.arch), common.fewest_groups(args.batch_size, world), args.mode
    ).to(device)
    # Both passes in one forward, so that DistributedDataParallel sees one.
    loss_of = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    for step, views in enumerate(common.load(args), 1):
        view_1, view_2 = (view.to(device, non_blocking=True) for view in views)
        loss = loss_of(view_1, view_2, args.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 10 == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)
    return model


def leak_of(model: SimCLR, batch_size: int, batches: int) -> LeakReport:
    """Measure the leak on digits; all ranks call it."""
    _, world = common.rank_of_world()
    groups = world * common.fewest_groups(batch_size, world)

    device = next(model.parameters()).device

    def augment(images: Tensor) -> Tensor:
        return common.shift_and_blend(images).to(device)

    return measure_leak(
        model.encode_first,
        model.encode_second,
        common.Digits(),
        augment,
        batch_size=world * batch_size,
        batches=batches,
        keys_per_batch=2 * groups,
        keys_per_pass=groups,  # one of each group
    )


def main() -> None:
    parser = common.flags(__doc__)
    parser.add_argument("--mode", default="regroup", help="local: the second view as the first")
    parser.add_argument("--temperature", type=float, default=0.2)
    parser.add_argument("--batches", type=int, default=16, help="in which a leak is measured")
    args = parser.parse_args()
    model = train(args, common.join_ranks())
    if args.data is None:
        report = leak_of(model, args.batch_size, args.batches)
        if common.rank_of_world()[0] == 0:
            print(report)
    common.leave_ranks()


if __name__ == "__main__":
    main()
