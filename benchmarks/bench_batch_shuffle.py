"""batch_shuffle and batch_unshuffle against MoCo's all_gather and broadcast, on gloo ranks.

    python benchmarks/bench_batch_shuffle.py [--world-sizes 2 4 8] [--rounds 21] [--save]

One round trip: shuffle 32x3x96x96 float32 images per rank, unshuffle 32x128 features. Prints, per
number of ranks, how many times faster ours is (median and, in brackets, 20 and 80 percent
points), peak memory beyond the batch in batches, and bytes received per rank in batches. `--save`
writes benchmarks/results/batch_shuffle.json.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import interleaved, save
from meters import PeakMemory, received_messages
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from shuffle_batchnorm import batch_shuffle, batch_unshuffle

IMAGES, FEATURES = (32, 3, 96, 96), (32, 128)


def _moco(images: Tensor, features: Tensor) -> None:
    """Every rank gets all samples and keeps its share; the order comes from rank 0."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with torch.no_grad():
        everything = _gather_all(images)
        order = torch.randperm(len(everything))
        dist.broadcast(order, src=0)
        back = torch.argsort(order)
        everything[order.view(size, -1)[rank]]
        _gather_all(features)[back.view(size, -1)[rank]]


def _gather_all(x: Tensor) -> Tensor:
    parts = [torch.ones_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def _ours(images: Tensor, features: Tensor) -> None:
    with torch.no_grad():
        _, plan = batch_shuffle(images)
        batch_unshuffle(features, plan)


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


def _measure(rank: int, world_size: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = Path(folder, "meet").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    images, features = torch.randn(IMAGES), torch.randn(FEATURES)
    # Between two contestants the ranks wait for each other, so that none pays for the other.
    contestants: dict[str, Callable[[], Any]] = {
        "MoCo": lambda: _moco(images, features),
        "wait": dist.barrier,
        "ours": lambda: _ours(images, features),
        "wait again": dist.barrier,
    }
    timings = interleaved(contestants, rounds)
    costs = {
        name: _costs(run, images, features) for name, run in (("MoCo", _moco), ("ours", _ours))
    }
    if rank == 0:
        rows = {name: {**timings[name]._asdict(), **costs[name]} for name in costs}
        torch.save(rows, Path(folder, "rows"))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=21, help="round trips each (default 21)")
    parser.add_argument("--save", action="store_true", help="write the results' JSON")
    arguments = parser.parse_args()

    results = []
    print("ranks  MoCo ms  ours ms  times faster           peak batches    received batches")
    for world_size in arguments.world_sizes:
        with tempfile.TemporaryDirectory() as folder:
            args = (world_size, arguments.rounds, folder)
            spawn(_measure, args, nprocs=world_size)
            rows = torch.load(Path(folder, "rows"))
        moco, ours = rows["MoCo"], rows["ours"]
        faster = [1 / ours[name] for name in ("ratio", "ratio_p80", "ratio_p20")]
        print(
            f"{world_size:5}  {1e3 * moco['median']:7.1f}  {1e3 * ours['median']:7.1f}  "
            f"{faster[0]:5.1f} ({faster[1]:.1f} to {faster[2]:.1f})".ljust(45)
            + f"  {moco['peak']:4.1f} | {ours['peak']:4.2f}     "
            f"{moco['received']:4.2f} | {ours['received']:5.3f}",
            flush=True,
        )
        results += [{"world_size": world_size, "name": name, **row} for name, row in rows.items()]
    if arguments.save:
        print(f"wrote {save('batch_shuffle', results)}")


if __name__ == "__main__":
    main()
