"""Whole training steps of ResNet-18 on gloo ranks, eager or compiled, by kind of batch norm.

    python benchmarks/bench_step.py [--ranks 2] [--compiled] [--steps moco] [--floor] [--save]

`moco` is a step of MoCo: queries forward and backward, keys forward, loss against the queue, moving
the key encoder, SGD; `--bn` is the key encoder's. `supervised` is a step of a classifier all of
whose layers are converted, against nn.BatchNorm2d; with `--floor`, on several ranks, also against
one that gets a number from a peer in each direction of each layer, to wait for it as all must that
share statistics. Both under DistributedDataParallel, one thread per rank. Prints, as a ratio
to `local` and to nn.BatchNorm2d, median and, in brackets, 20 and 80 percent points; and what
compiling took. `--save NAME` writes benchmarks/results/NAME.json (step, or step_compiled).
"""

import argparse
import inspect
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import bind, laps_of, ratios, save, spread
from meters import peak_memory
from peers import IN_STEP, PLAIN, InStepBatchNorm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shuffle_batchnorm import ShuffleBatchNorm
from shuffle_batchnorm.moco.build import normalise_key, normalise_query
from shuffle_batchnorm.moco.config import NetworkConfig, NormConfig
from shuffle_batchnorm.moco.model import MoCo
from shuffle_batchnorm.moco.networks import make_backbone, make_encoder
from shuffle_batchnorm.moco.ranks.launch import Rank, launch

CLASSES = 100
STEPS_ON_A_GPU = 5  # in a lap: the host prepares one while the GPU is at another
Row = dict[str, Any]


class Options(NamedTuple):
    """What is measured, and how long."""

    steps: list[str]
    bn: list[str]
    network: str
    batch: int
    size: int
    groups: int
    compiled: bool
    bf16: bool
    channels_last: bool
    floor: bool
    seconds: float
    rounds: int


def measure(rank: Rank, options: Options) -> list[Row]:
    """The rows of all steps, on one rank."""
    bind(rank)
    warnings.simplefilter("ignore")  # swap grows with depth; here only its time matters
    rows = []
    for step in options.steps:
        torch._dynamo.reset()
        rows += _measure_step(rank, options, step)
    return rows


def first_step(rank: Rank, options: Options, bn: str) -> float:
    """Seconds of the first supervised step, which compiles what this process has not compiled."""
    run = _prepare(rank, options, "supervised", bn, *_batch(rank, options))
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _batch(rank: Rank, options: Options) -> tuple[list[Tensor], Tensor]:
    """Two views of the images, and labels."""
    torch.manual_seed(rank.index)
    shape, device = (options.batch, 3, options.size, options.size), rank.device
    layout = _layout(options)
    views = [torch.randn(shape, device=device).contiguous(memory_format=layout) for _ in "12"]
    return views, torch.randint(CLASSES, (options.batch,), device=device)


def _layout(options: Options) -> torch.memory_format:
    return torch.channels_last if options.channels_last else torch.contiguous_format


def _prepare(
    rank: Rank, options: Options, step: str, bn: str, views: list[Tensor], labels: Tensor
) -> Callable[[], None]:
    """Return a training step with one kind of batch norm."""
    torch.manual_seed(0)
    if step == "moco":
        model = _moco(options, bn)
        loss: Callable[[nn.Module], Tensor] = lambda model: model(*views).loss  # noqa: E731
    else:
        model = _classifier(options, bn)
        loss = lambda model: F.cross_entropy(model(views[0]), labels)  # noqa: E731
    model.to(memory_format=_layout(options))  # type: ignore[call-overload]
    return partial(_train_once, *_ready(model, rank), loss, options.bf16)


def _measure_step(rank: Rank, options: Options, step: str) -> list[Row]:
    device = rank.device
    batch = _batch(rank, options)
    names = options.bn if step == "moco" else _layers(options, rank)
    runs: dict[str, Callable[[], None]] = {}
    first_call: dict[str, float] = {}
    peaks: dict[str, int] = {}
    for bn in names:
        runs[bn] = _prepare(rank, options, step, bn, *batch)
        begun = time.perf_counter()
        runs[bn]()
        first_call[bn] = time.perf_counter() - begun
        # The second one comes after DistributedDataParallel has dealt its buckets anew.
        runs[bn]()
        # A compiled graph's own tensors can't be seen on the CPU.
        if device.type == "cuda" or not options.compiled:
            peaks[bn] = peak_memory(runs[bn], device.type)
        if rank.index == 0:
            print(f"{step}, {bn}: first call {first_call[bn]:.1f} s", flush=True)
    steps = STEPS_ON_A_GPU if device.type == "cuda" else 1
    laps = laps_of(
        {name: partial(_steps, run, steps) for name, run in runs.items()},
        "cpu", options.seconds, 3, options.rounds,
    )  # fmt: skip
    seconds = {name: [stages[0] / steps for stages in laps[name].stages] for name in names}
    return [
        {
            "step": step,
            "bn": bn,
            "compiled": options.compiled,
            "ranks": rank.world_size,
            "network": options.network,
            "images": list(batch[0][0].shape),
            "groups": options.groups,
            "bf16": options.bf16,
            "channels_last": options.channels_last,
            "rounds": len(values),
            "first_call": first_call[bn],
            "seconds": spread(values),
            "ratio": ratios(values, seconds[names[0]]),
            "peak": peaks.get(bn),
            "peak_ratio": peaks[bn] / peaks[names[0]] if peaks else None,
        }
        for bn, values in seconds.items()
    ]


def _steps(run: Callable[[], None], steps: int, lap: Callable[[], None]) -> None:
    """Train so many steps back to back; a GPU must have done them all, with what the host took."""
    for _ in range(steps):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    lap()


def _layers(options: Options, rank: Rank) -> list[str]:
    peers = [PLAIN, IN_STEP] if options.floor and rank.world_size > 1 else [PLAIN]
    return peers + [bn for bn in options.bn if bn != "batch-shuffle"]


def _moco(options: Options, bn: str) -> nn.Module:
    network, norm = NetworkConfig(network=options.network), NormConfig(bn=bn, groups=options.groups)  # type: ignore[arg-type]
    encoder_q = normalise_query(make_encoder(network, 3, options.size), norm)
    encoder_k = normalise_key(make_encoder(network, 3, options.size), norm)
    if options.compiled:
        encoder_q.compile(dynamic=False)
        encoder_k.compile(dynamic=False)
    return MoCo(encoder_q, encoder_k, queue=4096)


def _classifier(options: Options, bn: str) -> nn.Module:
    backbone, features = make_backbone(options.network, image_size=options.size)
    model: nn.Module = nn.Sequential(backbone, nn.Linear(features, CLASSES))
    if bn == IN_STEP:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.__class__ = InStepBatchNorm
    elif bn != PLAIN:
        model = ShuffleBatchNorm.convert_shuffle_batchnorm(model, mode=bn, groups=options.groups)
    if options.compiled:
        model.compile(dynamic=False)
    return model


def _ready(model: nn.Module, rank: Rank) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model where it trains, and its optimizer."""
    model.to(rank.device)
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # So slow that swap, whose activations grow, stays finite.
    optimizer = torch.optim.SGD(learns, lr=1e-6, momentum=0.9, weight_decay=1e-4)
    if rank.world_size == 1:
        return model, optimizer
    # Running statistics are each rank's own. torch 2.13 has another name for it.
    names = inspect.signature(DistributedDataParallel).parameters
    new, old = "forward_sync_buffers", "broadcast_buffers"
    buffers: dict[str, Any] = {new if new in names else old: False}
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **buffers), optimizer


def _train_once(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[nn.Module], Tensor],
    bf16: bool,
) -> None:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=bf16):
        value = loss(model)
    value.backward()
    optimizer.step()


def print_rows(rows: list[Row]) -> None:
    print(f"\n{'':34}step ms   ratio                   first call s   peak MiB     ratio")
    for row in rows:
        name = f"{row['step']}, {row['bn']}{', compiled' if row['compiled'] else ''}"
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio"])
        milliseconds = 1e3 * row["seconds"].median
        line = f"{name:34}{milliseconds:7.1f}   {ratio:22}{row['first_call']:14.1f}"
        if row["peak"] is not None:
            line += f"{row['peak'] / 2**20:11.1f}{row['peak_ratio']:10.3f}"
        print(line)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    kinds = ["local", "swap", "regroup", "sync", "batch-shuffle"]
    parser.add_argument("--steps", nargs="+", default=["moco", "supervised"])
    parser.add_argument(
        "--bn", nargs="+", default=kinds, choices=kinds, help="the first one is the peer"
    )
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--ranks", type=int, default=2, help="gloo, or NCCL with as many GPUs")
    parser.add_argument("--batch", type=int, default=16, help="images per rank (default 16)")
    parser.add_argument("--size", type=int, default=32, help="of the images (default 32)")
    parser.add_argument("--groups", type=int, default=2, help="on each rank (default 2)")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--floor", action="store_true", help="what waiting for a peer costs")
    parser.add_argument("--seconds", type=float, default=30.0, help="per kind of step (default 30)")
    parser.add_argument("--rounds", type=int, default=21, help="at most (default 21)")
    parser.add_argument("--save", nargs="?", const="", metavar="NAME")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    options = Options(
        arguments.steps, arguments.bn, arguments.network, arguments.batch, arguments.size,
        arguments.groups, arguments.compiled, arguments.bf16, arguments.channels_last,
        arguments.floor, arguments.seconds, arguments.rounds,
    )  # fmt: skip
    device = "cuda" if torch.cuda.device_count() >= arguments.ranks else "cpu"
    rows = launch(measure, options, ranks=arguments.ranks, device=device)
    print_rows(rows)
    if arguments.save is not None:
        name = arguments.save or ("step_compiled" if arguments.compiled else "step")
        path = save(name, rows, on_ranks=arguments.ranks > 1, on_gpu=device == "cuda")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
