"""The forward pass of a key encoder, shuffled in each of the ways there are, on gloo ranks.

    python benchmarks/bench_key_encoder.py [--world-sizes 2 4] [--networks small resnet18] [--save]

16 images of 3x64x64 per rank, no gradient, one thread per rank. Prints the milliseconds that a way
adds to plain per-rank batch norm (median and, in brackets, 20 and 80 percent points, round by
round), its messages and the bytes that it brings to a rank. `--save` writes
benchmarks/results/key_encoder.json.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from bench_batch_shuffle import gather_all
from harness import bind, save, seconds_of, spread
from meters import received_messages
from torch import Tensor, nn

from shuffle_batchnorm import ShuffleBatchNorm, ShuffledEncoder, batch_shuffle, batch_unshuffle
from shuffle_batchnorm.moco.networks import make_backbone
from shuffle_batchnorm.moco.ranks.launch import Rank, launch

IMAGES = (16, 3, 64, 64)


def _moco(encoder: nn.Module, images: Tensor) -> Tensor:
    """Every rank gets all samples, encodes its share, and gets all features."""
    rank, size = dist.get_rank(), dist.get_world_size()
    everything = gather_all(images)
    order = torch.randperm(len(everything))
    dist.broadcast(order, src=0)
    features = encoder(everything[order.view(size, -1)[rank]])
    return gather_all(features)[torch.argsort(order).view(size, -1)[rank]]


def _contestants(network: str) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    encoder, _ = make_backbone(network, stem="imagenet")
    images = torch.randn(IMAGES)
    regrouped = ShuffleBatchNorm.convert_shuffle_batchnorm(copy.deepcopy(encoder), mode="regroup")
    shuffled = ShuffledEncoder(copy.deepcopy(encoder))
    plan = batch_shuffle(images)[1]  # as a sampler's, whose images were loaded where they belong
    return {
        "local": partial(encoder, images),
        "regroup": partial(regrouped, images),
        "batch_shuffle": partial(shuffled, images),
        "sampler": lambda: batch_unshuffle(encoder(images), plan),
        "MoCo": partial(_moco, encoder, images),
    }


@torch.no_grad()
def measure(rank: Rank, network: str, rounds: int) -> list[dict[str, Any]]:
    """The row of each way, on one rank."""
    bind(rank)
    contestants = _contestants(network)
    together: dict[str, Callable[[], Any]] = {}
    for name, run in contestants.items():
        for _ in range(6):  # the first of a kind is compared
            run()
        together |= {name: run, f"wait after {name}": dist.barrier}
    seconds = seconds_of(together, rounds)
    rows = []
    for name, run in contestants.items():
        with received_messages() as messages:
            run()
        added = [mine - plain for mine, plain in zip(seconds[name], seconds["local"], strict=True)]
        median, p20, p80 = spread(added)
        rows.append(
            {
                "world_size": rank.world_size,
                "network": network,
                "name": name,
                "median": spread(seconds[name]).median,
                "added": median,
                "added_p20": p20,
                "added_p80": p80,
                "messages": len(messages),
                "received": sum(size for _, size in messages),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--networks", nargs="+", default=["small", "resnet18"])
    parser.add_argument("--rounds", type=int, default=21, help="forward passes each (default 21)")
    parser.add_argument("--save", action="store_true", help="write the results' JSON")
    arguments = parser.parse_args(argv)

    results = []
    print("ranks  network   way            pass ms  added ms                 messages  received KB")
    for world_size in arguments.world_sizes:
        for network in arguments.networks:
            rows = launch(measure, network, arguments.rounds, ranks=world_size, device="cpu")
            for row in rows:
                points = (1e3 * row[key] for key in ("added", "added_p20", "added_p80"))
                added = "{:6.1f} ({:.1f} to {:.1f})".format(*points)
                print(
                    f"{world_size:5}  {network:8}  {row['name']:13}  {1e3 * row['median']:7.1f}  "
                    f"{added:23}  {row['messages']:8}  {row['received'] / 1e3:11.1f}",
                    flush=True,
                )
            results += rows
    if arguments.save:
        print(f"wrote {save('key_encoder', results, on_ranks=True, on_gpu=False)}")


if __name__ == "__main__":
    main()
