"""BYOL: a predictor, no negatives, and a target network that is shuffled as MoCo's key encoder is.

    python examples/byol.py                             # on a laptop
    torchrun --nproc-per-node 2 examples/byol.py        # two ranks, on CPUs or GPUs

The leak is how much better a view is told from others by its batch's statistics. BYOL tells none
from others: the leak is not defined here. With this conversion a target shares with the online
network's output as little of the batch as MoCo's keys do with queries. Whether BYOL's features are
better or worse for it, nobody has measured here.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import common
from shuffle_batchnorm import ShuffleBatchNorm

convert = ShuffleBatchNorm.convert_shuffle_batchnorm


class BYOL(nn.Module):
    """Online encoder and predictor, plain in groups; a target encoder, dealt to new groups."""

    def __init__(self, encoder: nn.Module, groups: int, dim: int = 128) -> None:
        super().__init__()
        layers = nn.Linear(dim, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, dim)
        self.online = convert(encoder, mode="local", groups=groups)
        self.predictor = convert(nn.Sequential(*layers), mode="local", groups=groups)
        self.target = convert(copy.deepcopy(self.online), mode="regroup", groups=groups)
        self.target.requires_grad_(False)

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Let the target follow the online encoder."""
        pairs = zip(self.target.parameters(), self.online.parameters(), strict=True)
        for target, online in pairs:
            target.lerp_(online, 1 - momentum)

    def forward(self, view_1: Tensor, view_2: Tensor) -> Tensor:
        """Return the loss of both directions, from 0 to 4."""
        return self.regress(view_1, view_2) + self.regress(view_2, view_1)

    def regress(self, view: Tensor, other: Tensor) -> Tensor:
        prediction = F.normalize(self.predictor(self.online(view)), dim=1)
        with torch.no_grad():
            target = F.normalize(self.target(other), dim=1)
        return 2 - 2 * (prediction * target).sum(1).mean()


def train(args: argparse.Namespace, device: torch.device) -> BYOL:
    """Train on all ranks, and return what was trained."""
    rank, world = common.rank_of_world()
    torch.manual_seed(0)  # the same networks on all ranks
    model = BYOL(common.network(args.arch), common.fewest_groups(args.batch_size, world)).to(device)
    loss_of = DistributedDataParallel(model) if world > 1 else model
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, args.lr, momentum=0.9, weight_decay=1e-4)
    for step, views in enumerate(common.load(args), 1):
        view_1, view_2 = (view.to(device, non_blocking=True) for view in views)
        loss = loss_of(view_1, view_2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(args.momentum)
        if rank == 0 and step % 10 == 0:
            print(f"step {step}: loss {loss:.3f}", flush=True)
    return model


def main() -> None:
    parser = common.flags(__doc__)
    parser.add_argument("--momentum", type=float, default=0.99, help="of the target encoder")
    train(parser.parse_args(), common.join_ranks())
    common.leave_ranks()


if __name__ == "__main__":
    main()
