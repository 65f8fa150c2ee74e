"""batch_shuffle and batch_unshuffle against MoCo's all_gather and broadcast, on gloo ranks.

    python benchmarks/bench_batch_shuffle.py [--world-sizes 2 4 8] [--rounds 21] [--save]

One round trip: shuffle 32x3x96x96 float32 images per rank, unshuffle 32x128 features. Prints, per
number of ranks, how many times faster ours is (median and, in brackets, 20 and 80 percent
points), the same for the floor (the exchanges and the copies around them, with nothing checked and
no order made) and for the bare exchanges (into existing memory; nothing is permuted), peak
memory beyond the batch in batches, and bytes received per rank in batches. `--save` writes
benchmarks/results/batch_shuffle.json.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from harness import bind, interleaved, save
from meters import PeakMemory, received_messages
from torch import Tensor

from shuffle_batchnorm import batch_shuffle, batch_unshuffle
from shuffle_batchnorm.moco.ranks.launch import Rank, launch

IMAGES, FEATURES = (32, 3, 96, 96), (32, 128)


def _moco(images: Tensor, features: Tensor) -> None:
    """Every rank gets all samples and keeps its share; the order comes from rank 0."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with torch.no_grad():
        everything = gather_all(images)
        order = torch.randperm(len(everything))
        dist.broadcast(order, src=0)
        back = torch.argsort(order)
        everything[order.view(size, -1)[rank]]
        gather_all(features)[back.view(size, -1)[rank]]


def gather_all(x: Tensor) -> Tensor:
    parts = [torch.ones_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def _ours(images: Tensor, features: Tensor) -> None:
    with torch.no_grad():
        _, plan = batch_shuffle(images)
        batch_unshuffle(features, plan)


def _floor(images: Tensor, features: Tensor) -> None:
    """The same traffic with no header, no order and no plan: what any such shuffle has to do."""
    order = torch.arange(len(images))
    splits = [len(images) // dist.get_world_size()] * dist.get_world_size()
    for x in (images, features):
        sent = x.index_select(0, order)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, splits, splits)
        received.index_select(0, order)


def _bare(images: Tensor, features: Tensor) -> None:
    """The two collectives and nothing else: no shuffle that makes them can take less."""
    splits = [len(images) // dist.get_world_size()] * dist.get_world_size()
    for x in (images, features):
        dist.all_to_all_single(_memory_like(x), x, splits, splits)


@cache
def _memory_like(x: Tensor) -> Tensor:
    return torch.empty_like(x)


CONTESTANTS = {"MoCo": _moco, "ours": _ours, "floor": _floor, "bare": _bare}


def _costs(run: Callable[..., None], images: Tensor, features: Tensor) -> dict[str, float]:
    run(images, features)  # the first call agrees on a seed
    with received_messages() as messages:
        run(images, features)
    with PeakMemory() as memory:
        run(images, features)
    return {
        "messages": len(messages),
        "received": sum(size for _, size in messages) / images.nbytes,
        "peak": memory.peak / images.nbytes,
    }


def measure(rank: Rank, rounds: int) -> dict[str, dict[str, float]]:
    """The row of each contestant, on one rank."""
    bind(rank)
    images, features = torch.randn(IMAGES), torch.randn(FEATURES)
    # Between two contestants the ranks wait for each other, so that none pays for the other.
    contestants: dict[str, Callable[[], Any]] = {}
    for name, run in CONTESTANTS.items():
        contestants[name] = partial(run, images, features)
        contestants[f"wait after {name}"] = dist.barrier
    timings = interleaved(contestants, rounds)
    return {
        name: timings[name]._asdict() | _costs(run, images, features)
        for name, run in CONTESTANTS.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=21, help="round trips each (default 21)")
    parser.add_argument("--save", action="store_true", help="write the results' JSON")
    arguments = parser.parse_args(argv)

    results = []
    print(
        "ranks  MoCo ms  ours ms  times faster           floor                  bare"
        "                   peak batches    received batches"
    )
    for world_size in arguments.world_sizes:
        rows = launch(measure, arguments.rounds, ranks=world_size, device="cpu")
        moco, ours = rows["MoCo"], rows["ours"]
        faster, floor, bare = (
            "{:5.1f} ({:.1f} to {:.1f})".format(
                *(1 / row[name] for name in ("ratio", "ratio_p80", "ratio_p20"))
            )
            for row in (ours, rows["floor"], rows["bare"])
        )
        print(
            f"{world_size:5}  {1e3 * moco['median']:7.1f}  {1e3 * ours['median']:7.1f}  "
            f"{faster:22} {floor:22} {bare:22}  {moco['peak']:4.1f} | {ours['peak']:4.2f}     "
            f"{moco['received']:4.2f} | {ours['received']:5.3f}",
            flush=True,
        )
        results += [{"world_size": world_size, "name": name, **row} for name, row in rows.items()]
    if arguments.save:
        print(f"wrote {save('batch_shuffle', results, on_ranks=True, on_gpu=False)}")


if __name__ == "__main__":
    main()
