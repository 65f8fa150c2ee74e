"""One part of what `make gpu-bench` measures on a CUDA machine, against the targets set for it.

    python benchmarks/bench_gpu.py PART [--out FOLDER] [--tiny]

host: bench_host.py. profile: the kernels that a layer launches, the host's slowest functions.
step: eager training steps of ResNet-50 (bench_step.py), with 32 and 256 images.
layer: forward and backward on ResNet-50's shapes, batch 256 (bench_layer.py).
kernels: a share of copy bandwidth (bench_kernels.py).
compiled: compiling ResNet-50 with an empty cache, and compiled training steps.
graphs: layers in CUDA graphs give what eager ones give, and their time.
memory: a step's peak. ranks: with two GPUs or more, the layer on NCCL against nn.SyncBatchNorm.
FOLDER/PART.json is written whenever something has been measured, so that what is there stays when
time runs out. A target that is missed is printed as such; the exit status is 1 only if a result was
wrong or the part did not run. `--tiny` tries the program with small tensors on any device.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import bench_kernels
import bench_layer
import bench_step
import gpu_layers
import harness
import torch
from harness import geometric_mean
from peers import MODES, PLAIN
from targets import Target, print_targets, slowest

from shuffle_batchnorm.moco.ranks.launch import Rank, launch

Row = dict[str, Any]
DTYPES = (torch.float32, torch.bfloat16)
_CORES = len(os.sched_getaffinity(0))


class Scale(NamedTuple):
    """How large everything is."""

    device: str
    kernels: bench_kernels.Options
    shapes: list[tuple[int, int, int]]
    batch: int
    groups: int
    network: str
    image_size: int
    step_batches: list[int]
    compiled: bool
    seconds: float
    rounds: int
    ranks: int

    @property
    def rank(self) -> Rank:
        return Rank(0, 1, torch.device(self.device))


def full_scale() -> Scale:
    large: list[tuple[int, ...]] = list(bench_kernels.LARGE)
    return Scale(
        "cuda", bench_kernels.Options(large, list(DTYPES), [1, 8, 64], 0.3, 7),
        list(bench_layer.resnet50_shapes()), 256, 8, "resnet50", 224, [32, 256], True, 0.3, 9,
        torch.cuda.device_count(),
    )  # fmt: skip


def tiny_scale() -> Scale:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels = bench_kernels.Options([(8, 4, 5, 6)], [torch.float32], [1, 4], 0.0, 3)
    return Scale(device, kernels, [(4, 5, 6)], 8, 4, "small", 16, [8], False, 0.0, 3, 1)


def host(_: Scale) -> Iterator[list[Row]]:
    printed = run_bench_host().stdout
    print(printed, flush=True)
    yield [json.loads(printed.splitlines()[-1])]


def run_bench_host() -> "subprocess.CompletedProcess[str]":
    """Run bench_host.py, which prints one line of JSON last."""
    command = [sys.executable, str(Path(__file__).with_name("bench_host.py"))]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)


def judge_host(rows: list[Row]) -> list[Target]:
    limits = {"local": 1.5, "swap": 1.5, "regroup": 1.8}
    [row] = rows
    return [
        *(
            Target(f"host time, forward + backward / {PLAIN}", row["host_ratio"][mode], limit, mode)
            for mode, limit in limits.items()
        ),
        *(
            Target("launches, forward + backward", row["launches"][mode], 4, mode)
            for mode in limits
        ),
    ]


def profile(scale: Scale) -> Iterator[list[Row]]:
    yield gpu_layers.profile(scale.device, scale.groups)
    yield gpu_layers.launches(scale.device, scale.groups)


def judge_profile(rows: list[Row]) -> list[Target]:
    return [
        Target("kernels on the device, forward + backward", row["number"], 4, row["name"])
        for row in rows
        if row["what"] == "launches" and row["name"] != PLAIN
    ]


def step(scale: Scale) -> Iterator[list[Row]]:
    for batch in scale.step_batches:
        yield bench_step.measure(scale.rank, _step_options(scale, batch, ["local", "regroup"]))


def judge_step(rows: list[Row]) -> list[Target]:
    return _judge_steps(rows, "eager", (1.20, 0.95))


def _step_options(
    scale: Scale, batch: int, bn: list[str], compiled: bool = False
) -> bench_step.Options:
    return bench_step.Options(
        ["supervised"], bn, scale.network, batch, scale.image_size, scale.groups, compiled,
        True, True, False, 10 * scale.seconds, scale.rounds,
    )  # fmt: skip


def _judge_steps(rows: list[Row], how: str, limits: tuple[float, float]) -> list[Target]:
    """The targets for few images and for many."""
    return [
        Target(
            f"{how} step of {row['network']}, regroup / {PLAIN}", row["ratio"].median,
            limits[row["images"][0] > 32], f"{row['images'][0]} images, groups={row['groups']}",
        )
        for row in rows
        if row["bn"] == "regroup" and "ratio" in row
    ]  # fmt: skip


def layer(scale: Scale) -> Iterator[list[Row]]:
    only = ("local, groups=1", *(f"{mode}, groups={scale.groups}" for mode in MODES))
    for channels_last in (True, False):
        for dtype in DTYPES:
            for shape in scale.shapes:
                options = bench_layer.Options(
                    [shape], scale.batch, [1, scale.groups], dtype, channels_last, False,
                    scale.seconds, scale.rounds, only,
                )  # fmt: skip
                yield bench_layer.measure(scale.rank, options)


def judge_layer(rows: list[Row]) -> list[Target]:
    """One target for each dtype and layout, the worst of all shapes, and the price of groups."""
    targets = []
    ours = [row for row in rows if row["name"].startswith(MODES)]
    for dtype, channels_last in dict.fromkeys((row["dtype"], row["channels_last"]) for row in ours):
        kind = dtype, channels_last
        some = [row for row in rows if (row["dtype"], row["channels_last"]) == kind]
        worst = slowest(bench_layer.summarise(some), PLAIN)
        how = f"{dtype}, {'channels_last' if channels_last else 'contiguous'}"
        limit = 0.95 if how == "float32, channels_last" else 1.0
        shapes = len({tuple(row["shape"]) for row in some})
        mean = worst["both"]["geometric_mean"]
        where = f"{worst['name']}, {shapes} shapes"
        targets.append(Target(f"forward + backward / {PLAIN}, {how}", mean, limit, where))
    worst = max(ours, key=lambda row: float(row["ratios"][PLAIN]["both"].median))
    where = ", ".join(f"{key} {worst[key]}" for key in ("name", "shape", "dtype", "channels_last"))
    largest = worst["ratios"][PLAIN]["both"].median
    targets.append(Target(f"forward + backward / {PLAIN}, any shape", largest, 1.10, where))
    local = [row for row in ours if row["name"].startswith("local")]
    few = [row["both"].median for row in local if row["name"] == "local, groups=1"]
    many = [row["both"].median for row in local if row["name"] != "local, groups=1"]
    price = geometric_mean(b / a for a, b in zip(few, many, strict=True))
    targets.append(Target("many groups / one", price, 1.05, "local"))
    return targets


def kernels(scale: Scale) -> Iterator[list[Row]]:
    for rows in bench_kernels.measure(scale.device, scale.kernels):
        bench_kernels.print_rows(rows)
        yield rows


def judge_kernels(rows: list[Row]) -> list[Target]:
    targets = []
    for kernel in bench_kernels.PASSES:
        limit = 0.90 if kernel.endswith("affine") else 0.85
        mine = [row for row in rows if row["kernel"] == kernel]
        worst = min(mine, key=lambda row: float(row["share"].median))
        where = ", ".join(str(worst[key]) for key in ("shape", "dtype", "layout", "blocks"))
        name = f"{kernel}, share of copy bandwidth"
        targets.append(Target(name, worst["share"].median, limit, where, is_least=True))
    return targets


def compiled(scale: Scale) -> Iterator[list[Row]]:
    """Compile each model in a process of its own, side by side; then time what the cache has."""
    models = [(bn, batch) for batch in scale.step_batches for bn in (PLAIN, "regroup")]
    workers = max(1, min(len(models), _CORES // 2))
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, _CORES // workers))
        # A fresh process for each model: the first one in a process also starts the compiler.
        with ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=1) as pool:
            cold = {}
            for bn, batch in models:
                options = _step_options(scale, batch, ["regroup"], scale.compiled)
                cold[pool.submit(bench_step.first_step, scale.rank, options, bn)] = (bn, batch)
            for future in as_completed(cold):
                bn, batch = cold[future]
                row = {"bn": bn, "batch": batch, "cold": future.result(), "side_by_side": workers}
                print(row, flush=True)
                yield [row]
        for batch in scale.step_batches:
            options = _step_options(scale, batch, ["regroup"], scale.compiled)
            yield bench_step.measure(scale.rank, options)


def judge_compiled(rows: list[Row]) -> list[Target]:
    cold = {(row["batch"], row["bn"]): row["cold"] for row in rows if "cold" in row}
    return _judge_steps(rows, "compiled", (1.05, 1.02)) + [
        Target(f"cold compiling, regroup / {PLAIN}", seconds / plain, 1.5, f"{batch} images")
        for (batch, bn), seconds in cold.items()
        if bn != PLAIN and (plain := cold.get((batch, PLAIN)))
    ]


def graphs(scale: Scale) -> Iterator[list[Row]]:
    shape = (scale.batch, *scale.shapes[-1])
    yield gpu_layers.graphs(scale.device, shape, scale.groups, scale.seconds, scale.rounds)


def memory(scale: Scale) -> Iterator[list[Row]]:
    batch = min(128, scale.step_batches[-1])
    yield bench_layer.peaks(scale.device, batch, [scale.groups], scale.network)


def judge_memory(rows: list[Row]) -> list[Target]:
    worst = max(rows, key=lambda row: float(row["ratio"]))
    return [Target(f"peak memory of a step / {PLAIN}", worst["ratio"], 1.02, worst["name"])]


def ranks(scale: Scale) -> Iterator[list[Row]]:
    """The layer on all GPUs, with nn.SyncBatchNorm and the seed's pattern among its peers."""
    if scale.ranks < 2:
        print("one GPU: NCCL was NOT TRIED")
        return
    options = bench_layer.Options(
        scale.shapes, scale.batch // 4, [1], torch.float32, False, False,
        scale.seconds, scale.rounds,
    )  # fmt: skip
    yield launch(bench_layer.measure, options, ranks=scale.ranks, device="cuda")


def judge_nothing(_: list[Row]) -> list[Target]:
    return []


class Part(NamedTuple):
    """What yields rows as they are measured, and what they mean."""

    measure: Callable[[Scale], Iterator[list[Row]]]
    judge: Callable[[list[Row]], list[Target]]


PARTS = {
    "host": Part(host, judge_host),
    "profile": Part(profile, judge_profile),
    "step": Part(step, judge_step),
    "layer": Part(layer, judge_layer),
    "kernels": Part(kernels, judge_kernels),
    "compiled": Part(compiled, judge_compiled),
    "graphs": Part(graphs, judge_nothing),
    "memory": Part(memory, judge_memory),
    "ranks": Part(ranks, judge_nothing),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="small tensors, on any device")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "gpu", metavar="FOLDER")
    arguments = parser.parse_args(argv)
    if not arguments.tiny and not torch.cuda.is_available():
        print("bench_gpu: there is no CUDA device: NOTHING WAS MEASURED")
        return 1
    part = PARTS[arguments.part]
    scale = tiny_scale() if arguments.tiny else full_scale()
    rows: list[Row] = []
    targets: list[Target] = []
    for more in part.measure(scale):
        rows += more
        try:
            targets = part.judge(rows)
        finally:  # what was measured stays, whatever became of it
            judged = [target._asdict() | {"is_met": target.is_met} for target in targets]
            harness.save(arguments.part, rows, folder=arguments.out, targets=judged)
    if targets:
        print_targets(targets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
