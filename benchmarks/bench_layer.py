"""Forward and backward of one layer on ResNet-50's shapes, against its peers.

    python benchmarks/bench_layer.py [--compiled] [--ranks 2] [--channels-last] [--save [NAME]]

Every contestant has its output and gradients checked first. Then all of them run once per round,
for `--seconds` per shape; naive torch, which takes as long as all others, in three rounds. Prints
the ratios to nn.BatchNorm2d: geometric mean over the shapes, largest (and on which shape), and of
all layers of a ResNet-50 together; then the peak memory of a training step of ResNet-18. `--save`
writes benchmarks/results/NAME.json (layer), with the median and the 20 and 80 percent points of
every shape and stage.
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import geometric_mean, laps_of, ratios, save, spread
from meters import peak_memory
from peers import MODES, NAIVE, PLAIN, SPLIT, check, contestants, staged
from torch import Tensor, nn

from shuffle_batchnorm import ShuffleBatchNorm
from shuffle_batchnorm.moco.networks import make_backbone
from shuffle_batchnorm.moco.ranks.launch import Rank, launch

STAGES = ("forward", "backward", "both", "host")  # host: on a GPU, until all is issued
Row = dict[str, Any]


class Options(NamedTuple):
    """What is measured, and how long."""

    shapes: list[tuple[int, int, int]]
    batch: int
    groups: list[int]
    dtype: torch.dtype
    channels_last: bool
    compiled: bool
    seconds: float
    rounds: int
    only: tuple[str, ...] = ()  # of the contestants, besides nn.BatchNorm2d; else all


@lru_cache
def resnet50_shapes() -> dict[tuple[int, int, int], int]:
    """(C, H, W) of the batch norms of a ResNet-50 at 224 x 224, and how many have it."""
    with torch.device("meta"):
        network, _ = make_backbone("resnet50", image_size=224)
    shapes: dict[tuple[int, int, int], int] = {}

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        channels, height, width = args[0].shape[1:]
        shape = (channels, height, width)
        shapes[shape] = shapes.get(shape, 0) + 1

    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(note)
    network(torch.empty(2, 3, 224, 224, device="meta"))
    return shapes


def measure(rank: Rank, options: Options) -> list[Row]:
    """The rows of all shapes, on one rank."""
    rows = []
    for shape in options.shapes:
        torch._dynamo.reset()
        torch.manual_seed(rank.index)
        rows += _measure_shape(rank, options, shape)
        if rank.index == 0:
            plain = next(
                row for row in rows if row["name"] == PLAIN and row["shape"][1:] == [*shape]
            )
            milliseconds = f"{1e3 * plain['both'].median:.2f} ms in {plain['rounds']} rounds"
            print(f"{_times(shape)}: {PLAIN} {milliseconds}", flush=True)
    return rows


def _measure_shape(rank: Rank, options: Options, shape: tuple[int, int, int]) -> list[Row]:
    device = rank.device.type
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    made = [
        torch.randn(options.batch, *shape, device=rank.device, dtype=options.dtype) for _ in "xy"
    ]
    x, noise = (tensor.contiguous(memory_format=layout) for tensor in made)
    # Noise alone would hide a gradient without the part that goes through the statistics.
    dy = noise + x
    field = contestants(
        shape[0], options.groups,
        channels_last=options.channels_last, on_cuda=device == "cuda", compiled=options.compiled,
    )  # fmt: skip
    if options.only:
        field = {name: one for name, one in field.items() if name in (PLAIN, *options.only)}
    checked = {}
    for name, contestant in field.items():
        contestant.layer.to(rank.device)
        contestant.truth.to(rank.device)
        begun = time.perf_counter()
        check(name, contestant, x, dy)
        checked[name] = time.perf_counter() - begun
    runs = {name: staged(contestant.layer, x, dy) for name, contestant in field.items()}
    laps = laps_of(runs, device, options.seconds, 5, options.rounds, slow=(NAIVE,))

    seconds: dict[str, dict[str, list[float]]] = {}
    for name, (stages, host) in laps.items():
        forward, backward = (list(values) for values in zip(*stages, strict=True))
        both = [sum(stage) for stage in stages]
        seconds[name] = {"forward": forward, "backward": backward, "both": both}
        if device == "cuda":
            seconds[name]["host"] = host
    peers = [name for name in (PLAIN, SPLIT, f"{PLAIN}, compiled") if name in seconds]
    return [
        {
            "shape": [options.batch, *shape],
            "layers": resnet50_shapes().get(shape, 1),
            "dtype": str(x.dtype).removeprefix("torch."),
            "channels_last": x.is_contiguous(memory_format=torch.channels_last),
            "name": name,
            "rounds": len(stages["both"]),
            "first_call": checked[name],
            **{stage: spread(values) for stage, values in stages.items()},
            "ratios": {
                peer: {
                    stage: ratios(values, seconds[peer][stage][: len(values)])  # as far as it ran
                    for stage, values in stages.items()
                }
                for peer in peers
            },
        }
        for name, stages in seconds.items()
    ]


def summarise(rows: list[Row]) -> list[Row]:
    """Per contestant and peer, the ratios of all shapes in one line."""
    return [
        {
            "name": name,
            "peer": peer,
            **{stage: _over_shapes(rows, name, peer, stage) for stage in rows[0]["ratios"][peer]},
        }
        for name in dict.fromkeys(row["name"] for row in rows)
        for peer in rows[0]["ratios"]
    ]


def _over_shapes(rows: list[Row], name: str, peer: str, stage: str) -> Row:
    mine, theirs = ([row for row in rows if row["name"] == who] for who in (name, peer))
    worst = max(mine, key=lambda row: float(row["ratios"][peer][stage].median))
    return {
        "geometric_mean": geometric_mean(row["ratios"][peer][stage].median for row in mine),
        "largest": worst["ratios"][peer][stage].median,
        "largest_shape": worst["shape"],
        "all_layers": _all_layers(mine, stage) / _all_layers(theirs, stage),
    }


def _all_layers(rows: list[Row], stage: str) -> float:
    return sum(float(row["layers"] * row[stage].median) for row in rows)


def print_summary(summary: list[Row]) -> None:
    for peer in dict.fromkeys(entry["peer"] for entry in summary):
        stages = [stage for stage in STAGES if stage in summary[0]]
        heads = "".join(f"{stage:>9}" for stage in stages)
        print(f"\nratio to {peer:29}{heads}   largest of both        all layers")
        for entry in summary:
            if entry["peer"] == peer:
                means = "".join(f"{entry[stage]['geometric_mean']:9.2f}" for stage in stages)
                both = entry["both"]
                worst = f"{both['largest']:.2f} at {_times(both['largest_shape'][1:])}"
                print(f"  {entry['name']:36}{means}   {worst:22}{both['all_layers']:11.2f}")


def peaks(
    device: str, batch: int, groups: Sequence[int], network_name: str = "resnet18"
) -> list[Row]:
    """Peak memory of a training step, as a ratio to plain batch norm's."""
    images = torch.randn(batch, 3, 64, 64, device=device)
    options = [(mode, count) for mode in MODES for count in groups]
    rows: list[Row] = []
    for mode, count in [(None, 1), *options]:
        network, _ = make_backbone(network_name, stem="imagenet")
        step = partial(_train_once, network.to(device), images)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of depth in swap, and of one group; sizes matter here
            if mode is not None:
                ShuffleBatchNorm.convert_shuffle_batchnorm(network, mode=mode, groups=count)
            step()  # what is made once and kept
        for parameter in network.parameters():
            parameter.grad = None
        peak = peak_memory(step, device)
        name = PLAIN if mode is None else f"{mode}, groups={count}"
        rows.append(
            {"name": name, "bytes": peak, "ratio": peak / (rows[0]["bytes"] if rows else peak)}
        )
    return rows


def _train_once(network: nn.Module, images: Tensor) -> None:
    F.normalize(network(images)).square().sum().backward()


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--batch", type=int, default=256 if cuda else 32, help="per rank")
    parser.add_argument(
        "--shapes", nargs="+", metavar="CxHxW", help="default: all of ResNet-50's at 224 x 224"
    )
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 8], help="default 1 8")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compiled", action="store_true", help="layers under torch.compile")
    parser.add_argument("--ranks", type=int, default=1, help="gloo, or NCCL with as many GPUs")
    parser.add_argument("--seconds", type=float, default=10.0, help="per shape (default 10)")
    parser.add_argument("--rounds", type=int, default=401, help="at most, per shape (default 401)")
    parser.add_argument(
        "--memory-batch", type=int, default=32, help="images for peak memory; 0: don't (default 32)"
    )
    parser.add_argument("--save", nargs="?", const="layer", metavar="NAME")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    shapes = list(resnet50_shapes())
    if arguments.shapes:
        shapes = [tuple(map(int, text.split("x"))) for text in arguments.shapes]  # type: ignore[misc]
    options = Options(
        shapes, arguments.batch, arguments.groups, getattr(torch, arguments.dtype),
        arguments.channels_last, arguments.compiled, arguments.seconds, arguments.rounds,
    )  # fmt: skip
    device = "cuda" if torch.cuda.device_count() >= arguments.ranks else "cpu"
    rows = launch(measure, options, ranks=arguments.ranks, device=device)
    summary = summarise(rows)
    print_summary(summary)
    memory = []
    if arguments.memory_batch and arguments.ranks == 1 and not arguments.compiled:
        memory = peaks(device, arguments.memory_batch, arguments.groups)
        print("\npeak memory of a step of ResNet-18")
        for row in memory:
            print(f"  {row['name']:36}{row['bytes'] / 2**20:8.1f} MiB{row['ratio']:8.3f}")
    if arguments.save:
        where = dict(on_ranks=arguments.ranks > 1, on_gpu=device == "cuda")
        path = save(arguments.save, rows, **where, summary=summary, memory=memory)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
