"""One layer's exchange of statistics against the seed's pattern and SyncBatchNorm's, on gloo ranks.

    python benchmarks/bench_exchange.py [--world-sizes 2 4 8 16] [--rounds 21] [--save]

Rows of C float32 channels, one group per rank, one thread per rank. Contestants: the seed's three
all_gathers forward and nothing backward; SyncBatchNorm's all_gather of 2C + 1 numbers forward and
all_reduce of 2C backward (SyncBatchNorm itself refuses CPU tensors); the library's `swap`,
`regroup` and `sync` through the calls of a training step; and, forward, what carries the row of
`swap` with nothing around it: a bare all_to_all_single, and a bare isend and irecv.

A time is the mean over ranks of what a call took from a common start. Prints milliseconds, times
faster than the seed's pattern (forward) and than SyncBatchNorm's (forward, backward): medians and,
in brackets, 20 and 80 percent points. `--save` writes benchmarks/results/exchange.json.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from harness import ratios, save, seconds_of, spread
from meters import received_messages
from torch import Tensor

from shuffle_batchnorm.comm.world import resolve
from shuffle_batchnorm.kernels.select import select
from shuffle_batchnorm.moco.ranks.launch import Rank, launch
from shuffle_batchnorm.norm.mixing import Options, make_plan
from shuffle_batchnorm.norm.statistics import RowFormat, mix, mix_gradients, prepare_call

SEED, SYNC_BN = "seed", "SyncBatchNorm"
MODES = ("swap", "regroup", "sync")
Contestants = dict[str, Callable[[], object]]


def _gathered(row: Tensor) -> None:
    dist.all_gather([torch.empty_like(row) for _ in range(dist.get_world_size())], row)


def _seed(row: Tensor) -> None:
    """Gather every rank's means, mean squares and count, each by a call of its own."""
    channels = len(row) // 2
    for part in row.split((1, channels, channels)):
        _gathered(part)


def _bare_all_to_all(row: Tensor) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    receive = [int(peer == (rank + 1) % world) for peer in range(world)]
    send = [int(peer == (rank - 1) % world) for peer in range(world)]
    dist.all_to_all_single(torch.empty_like(row[None]), row[None], receive, send)


def _bare_send(row: Tensor) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    arriving = dist.irecv(torch.empty_like(row), (rank + 1) % world)
    leaving = dist.isend(row, (rank - 1) % world)
    for work in (arriving, leaving):
        if work is not None:
            work.wait()


def _contestants(channels: int) -> tuple[Contestants, Contestants]:
    """What each does in one layer forward, and backward."""
    world = resolve(None, "bench_exchange")
    row, sums = torch.rand(2 * channels + 1), torch.rand(2 * channels)
    row[0] = 32 * 49  # a count
    forward: Contestants = {SEED: partial(_seed, row), SYNC_BN: partial(_gathered, row)}
    backward: Contestants = {SYNC_BN: lambda: dist.all_reduce(sums)}
    for mode in MODES:
        plan = make_plan(Options(mode), world.size, world.rank)
        call = prepare_call(plan, (), RowFormat(channels, row.dtype), select(row))
        blocks = plan.groups * plan.per_group
        forward[mode] = partial(mix, row.expand(blocks, -1).contiguous(), call, world)
        of_blocks = sums.view(2, -1).expand(blocks, -1, -1).contiguous()
        backward[mode] = partial(mix_gradients, of_blocks, call, world)
    forward |= {"all_to_all": partial(_bare_all_to_all, row), "isend": partial(_bare_send, row)}
    return forward, backward


def _seconds(contestants: Contestants, rounds: int) -> dict[str, list[float]]:
    """Return what each contestant took in each round, on average over ranks."""
    # Between two contestants the ranks wait for each other, so that none pays for the other.
    together: Contestants = {}
    for name, run in contestants.items():
        together |= {f"wait before {name}": dist.barrier, name: run}
    mine = seconds_of(together, rounds)
    times = torch.tensor([mine[name] for name in contestants], dtype=torch.float64)
    dist.all_reduce(times)
    return dict(zip(contestants, (times / dist.get_world_size()).tolist(), strict=True))


def _rows(contestants: Contestants, rounds: int) -> list[dict[str, Any]]:
    seconds = _seconds(contestants, rounds)
    rows = []
    for name, run in contestants.items():
        with received_messages() as messages:
            run()
        median, p20, p80 = spread(seconds[name])
        peers = (peer for peer in (SEED, SYNC_BN) if peer in seconds)
        faster = {peer: ratios(seconds[peer], seconds[name]) for peer in peers}
        rows.append(
            {
                "name": name,
                "median": median,
                "p20": p20,
                "p80": p80,
                "times_faster_than": faster,
                "messages": len(messages),
                "received": sum(size for _, size in messages),
            }
        )
    return rows


def measure(rank: Rank, channels: list[int], rounds: int) -> list[dict[str, Any]]:
    """The rows of all layers and directions, on one rank."""
    results = []
    for count in channels:
        forward, backward = _contestants(count)
        for direction, contestants in (("forward", forward), ("backward", backward)):
            where = {"world_size": rank.world_size, "channels": count, "direction": direction}
            results += [where | row for row in _rows(contestants, rounds)]
    return results


def _print(row: dict[str, Any]) -> None:
    faster = {
        peer: "{:5.1f} ({:.1f} to {:.1f})".format(*points)
        for peer, points in row["times_faster_than"].items()
    }
    print(
        f"{row['world_size']:5}  {row['channels']:8}  {row['direction']:9}  {row['name']:13}  "
        f"{1e3 * row['median']:7.2f}  {faster.get(SEED, ''):20}  {faster.get(SYNC_BN, ''):20}  "
        f"{row['messages']:8}  {row['received']:14}",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--rounds", type=int, default=21, help="exchanges each (default 21)")
    parser.add_argument("--save", action="store_true", help="write the results' JSON")
    arguments = parser.parse_args(argv)

    results = []
    print(
        "ranks  channels  direction  name                ms  than the seed         "
        "than SyncBatchNorm    messages  received bytes"
    )
    for world_size in arguments.world_sizes:
        rows = launch(measure, arguments.channels, arguments.rounds, ranks=world_size, device="cpu")
        for row in rows:
            _print(row)
        results += rows
    if arguments.save:
        print(f"wrote {save('exchange', results, on_ranks=True, on_gpu=False)}")


if __name__ == "__main__":
    main()
