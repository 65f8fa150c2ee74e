"""MoCo v2: two encoders whose batch norm is converted, DistributedDataParallel, a queue, resuming.

    python examples/moco_v2.py                          # on a laptop
    torchrun --nproc-per-node 2 examples/moco_v2.py     # two ranks, on CPUs or GPUs
    torchrun --nproc-per-node 8 examples/moco_v2.py --data FOLDER --arch resnet50 --batch-size 32 \
        --lr 0.03 --queue 65536 --temperature 0.2 --momentum 0.999 --steps 1000000 --workers 8

--resume goes on from --checkpoint, if there is one; common.py has the images and the networks.
"""

import argparse
import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import common
from shuffle_batchnorm import ShuffleBatchNorm, synchronize_running_stats

convert = ShuffleBatchNorm.convert_shuffle_batchnorm


class MoCo(nn.Module):
    """The two encoders and the queue, with their names in facebookresearch/moco."""

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, encoder_q: nn.Module, encoder_k: nn.Module, queue: int) -> None:
        super().__init__()
        self.encoder_q, self.encoder_k = encoder_q, encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue, 128), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def encode_key(self, images: Tensor, momentum: float) -> Tensor:
        """Let the key encoder follow the query encoder; encode, with no sample shuffled."""
        pairs = zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True)
        for key, query in pairs:
            key.lerp_(query, 1 - momentum)
        return F.normalize(self.encoder_k(images), dim=1)

    def contrast(self, queries: Tensor, keys: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Return the loss, and the share of queries that find their key among the queue's."""
        positive = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat([positive, queries @ self.queue.T], dim=1) / t
        first = torch.zeros_like(logits[:, 0], dtype=torch.int64)
        return F.cross_entropy(logits, first), (logits.argmax(1) == first).float().mean()

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys by those of all ranks."""
        keys = common.gather(keys)
        slots = self.queue_ptr + torch.arange(len(keys), device=keys.device)
        self.queue.index_copy_(0, slots % len(self.queue), keys)
        self.queue_ptr.copy_((self.queue_ptr + len(keys)) % len(self.queue))


def save(moco: MoCo, optimizer: torch.optim.Optimizer, step: int, path: Path) -> None:
    """Write a checkpoint; all ranks call it, the first one writes."""
    synchronize_running_stats(moco)  # each rank has seen other samples
    states = {"state_dict": moco.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    if common.rank_of_world()[0] == 0:
        torch.save(states, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)  # in one step: a kill leaves a whole file


def train(args: argparse.Namespace, device: torch.device) -> MoCo:
    """Train on all ranks, and return what was trained."""
    rank, world = common.rank_of_world()
    torch.manual_seed(0)  # the same encoders and queue on all ranks
    groups = common.fewest_groups(args.batch_size, world)
    # Queries: plain batch norm, group by group. Keys: samples of all groups, dealt to new ones.
    encoder_q = convert(common.network(args.arch), mode="local", groups=groups)
    encoder_k = convert(copy.deepcopy(encoder_q), mode="regroup", groups=groups)
    moco = MoCo(encoder_q, encoder_k, args.queue).to(device)
    encode_query = DistributedDataParallel(encoder_q) if world > 1 else encoder_q
    optimizer = torch.optim.SGD(encoder_q.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    first = 0
    if args.resume and args.checkpoint.exists():
        saved = torch.load(args.checkpoint, map_location=device)
        moco.load_state_dict(saved["state_dict"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    for step, views in enumerate(common.load(args, first), first + 1):
        view_1, view_2 = (view.to(device, non_blocking=True) for view in views)
        optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * step / args.steps)) / 2
        keys = moco.encode_key(view_2, args.momentum)
        queries = F.normalize(encode_query(view_1), dim=1)
        loss, accuracy = moco.contrast(queries, keys, args.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moco.enqueue(keys)
        if rank == 0 and step % 10 == 0:
            print(f"step {step}: loss {loss:.3f}, pretext accuracy {accuracy:.3f}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            save(moco, optimizer, step, args.checkpoint)
    return moco


def main() -> None:
    parser = common.flags(__doc__)
    parser.add_argument("--queue", type=int, default=1024, help="keys, of all ranks")
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.99, help="of the key encoder")
    parser.add_argument("--checkpoint", type=Path, default=Path("moco_v2.pt"))
    parser.add_argument("--save-every", type=int, default=1000, help="steps")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    train(parser.parse_args(), common.join_ranks())
    common.leave_ranks()


if __name__ == "__main__":
    main()
