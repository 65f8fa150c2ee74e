"""What `make gpu-check` measures on a CUDA machine, against the targets set for it.

    python benchmarks/bench_gpu.py [--save] [--parts kernels layer memory graphs ranks step]

kernels: a share of copy bandwidth (bench_kernels.py). layer: forward and backward on ResNet-50's
shapes, batch 256, both layouts, float32 and bfloat16 (bench_layer.py). memory: a step's peak.
step: a compiled training step of ResNet-50 (bench_step.py). graphs: a layer in a CUDA graph is
correct, and its time. ranks: with two GPUs or more, the layer on NCCL against nn.SyncBatchNorm.
A target that is missed is printed as such; the exit status is 1 only if a result was wrong or a
part did not run. `--save` writes benchmarks/results/gpu.json. `--tiny` tries the program with small
tensors on any device.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import bench_kernels
import bench_layer
import bench_step
import torch
from harness import geometric_mean, laps_of, ratios, save, spread
from peers import MODES, PLAIN, staged
from targets import Target, print_targets, slowest
from torch import Tensor, nn

from shuffle_batchnorm import ShuffleBatchNorm
from shuffle_batchnorm.moco.ranks.launch import Rank, launch

Row = dict[str, Any]


class Scale(NamedTuple):
    """How large everything is."""

    device: str
    kernels: bench_kernels.Options
    shapes: list[tuple[int, int, int]]
    batch: int
    groups: list[int]
    network: str
    image_size: int
    step_batch: int
    compiled: bool
    seconds: float
    rounds: int
    ranks: int


def full_scale() -> Scale:
    dtypes = [torch.float32, torch.bfloat16]
    large: list[tuple[int, ...]] = list(bench_kernels.LARGE)
    return Scale(
        "cuda", bench_kernels.Options(large, dtypes, [1, 8, 64], 1.0, 11),
        list(bench_layer.resnet50_shapes()), 256, [1, 8], "resnet50", 224, 128, True, 2.0, 21,
        torch.cuda.device_count(),
    )  # fmt: skip


def tiny_scale() -> Scale:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels = bench_kernels.Options([(8, 4, 5, 6)], [torch.float32], [1, 4], 0.0, 3)
    return Scale(device, kernels, [(4, 5, 6)], 8, [1, 4], "small", 16, 8, False, 0.0, 3, 1)


def kernels(scale: Scale) -> tuple[list[Row], list[Target]]:
    rows = bench_kernels.measure(scale.device, scale.kernels)
    bench_kernels.print_rows(rows)
    targets = []
    for kernel in bench_kernels.PASSES:
        worst = min(
            (row for row in rows if row["kernel"] == kernel), key=lambda row: row["share"].median
        )
        options = (f"{key} {worst[key]}" for key in ("shape", "dtype", "layout", "blocks"))
        where = ", ".join(options)
        name = f"{kernel}, share of copy bandwidth"
        targets.append(Target(name, worst["share"].median, 0.85, where, is_least=True))
    return rows, targets


def layer(scale: Scale) -> tuple[list[Row], list[Target]]:
    rank = Rank(0, 1, torch.device(scale.device))
    everything, targets = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for channels_last in (False, True):
            options = bench_layer.Options(
                scale.shapes, scale.batch, scale.groups, dtype, channels_last, False,
                scale.seconds, scale.rounds,
            )  # fmt: skip
            how = f"{str(dtype)[6:]}, {'channels_last' if channels_last else 'contiguous'}"
            print(f"\n{how}")
            rows = bench_layer.measure(rank, options)
            summary = bench_layer.summarise(rows)
            bench_layer.print_summary(summary)
            worst = slowest(summary, PLAIN)
            targets += [
                Target(
                    f"forward + backward / {PLAIN}, {how}",
                    worst["both"]["geometric_mean"], 1.0, worst["name"],
                ),
                _price_of_groups(rows, scale.groups, how),
            ]  # fmt: skip
            everything += rows
    return everything, targets


def _price_of_groups(rows: list[Row], groups: list[int], how: str) -> Target:
    few, many = groups[0], groups[-1]
    prices = {}
    for mode in MODES:
        one, other = (
            [row["both"].median for row in rows if row["name"] == f"{mode}, groups={count}"]
            for count in (few, many)
        )
        prices[mode] = geometric_mean(b / a for a, b in zip(one, other, strict=True))
    worst = max(prices, key=lambda mode: prices[mode])
    return Target(f"groups={many} / groups={few}, {how}", prices[worst], 1.05, worst)


def memory(scale: Scale) -> tuple[list[Row], list[Target]]:
    rows = bench_layer.peaks(scale.device, scale.step_batch, scale.groups, scale.network)
    worst = max(rows, key=lambda row: float(row["ratio"]))
    return rows, [Target(f"peak memory of a step / {PLAIN}", worst["ratio"], 1.02, worst["name"])]


def step(scale: Scale) -> tuple[list[Row], list[Target]]:
    rank = Rank(0, 1, torch.device(scale.device))
    options = bench_step.Options(
        ["supervised"], ["regroup"], scale.network, scale.step_batch, scale.image_size,
        scale.groups[-1], scale.compiled, True, True, False, 10 * scale.seconds, scale.rounds,
    )  # fmt: skip
    rows = bench_step.measure(rank, options)
    bench_step.print_rows(rows)
    what = f"step of {scale.network}, regroup / {PLAIN}"
    where = f"batch {scale.step_batch}, bfloat16, channels_last, groups={scale.groups[-1]}"
    how = "compiled " if scale.compiled else ""
    return rows, [Target(f"{how}{what}", rows[-1]["ratio"].median, 1.03, where)]


def graphs(scale: Scale) -> tuple[list[Row], list[Target]]:
    """Layers in CUDA graphs: what they give to new input, and their time with the host's."""
    rows: list[Row] = []
    shape = (scale.batch, *scale.shapes[-1])
    for mode in (None, *MODES):
        made: nn.Module = nn.BatchNorm2d(shape[1])
        if mode is not None:
            made = ShuffleBatchNorm(shape[1], mode=mode, groups=scale.groups[-1])
        eager = made.to(scale.device)
        captured = deepcopy(eager)
        if scale.device == "cuda":
            # It gives the module itself another forward.
            example = torch.randn(shape, device="cuda", requires_grad=True)
            torch.cuda.make_graphed_callables(captured, (example,))
        x, dy = (torch.randn(shape, device=scale.device) for _ in range(2))
        pairs = zip(_step(captured, x, dy), _step(eager, x, dy), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        runs = {"graph": captured, "eager": eager}
        laps = laps_of(
            {how: partial(_many_steps, run, x, dy) for how, run in runs.items()},
            "cpu", scale.seconds, 3, scale.rounds,
        )  # fmt: skip
        seconds = {how: [stages[0] for stages in laps[how].stages] for how in runs}
        rows.append(
            {
                "name": mode or PLAIN,
                "shape": list(shape),
                "groups": 1 if mode is None else scale.groups[-1],
                "graph": spread(seconds["graph"]),
                "eager": spread(seconds["eager"]),
                "ratio": ratios(seconds["graph"], seconds["eager"]),
            }
        )
    print("\n10 steps of a layer in a CUDA graph, host included")
    for row in rows:
        milliseconds = 1e3 * row["graph"].median
        print(f"  {row['name']:16}{milliseconds:8.2f} ms, {row['ratio'].median:.2f} of eager")
    return rows, []


def _step(run: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    run.zero_grad()
    y = run(leaf)
    y.backward(dy)
    grads = [leaf.grad, *(parameter.grad for parameter in run.parameters())]
    # Copies: a graph gives its next results in the same memory.
    return [y.detach().clone(), *(grad.clone() for grad in grads if grad is not None)]


def _many_steps(run: nn.Module, x: Tensor, dy: Tensor, lap: Callable[[], None]) -> None:
    once = staged(run, x, dy)
    for _ in range(10):
        once(lambda: None)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    lap()


def ranks(scale: Scale) -> tuple[list[Row], list[Target]]:
    """The layer on all GPUs, with nn.SyncBatchNorm and the seed's pattern among its peers."""
    if scale.ranks < 2:
        print("\nranks: one GPU, so NCCL was not tried")
        return [], []
    options = bench_layer.Options(
        scale.shapes, scale.batch // 4, [1], torch.float32, False, False,
        scale.seconds, scale.rounds,
    )  # fmt: skip
    rows = launch(bench_layer.measure, options, ranks=scale.ranks, device="cuda")
    bench_layer.print_summary(bench_layer.summarise(rows))
    return rows, []


PARTS = {
    "kernels": kernels,
    "layer": layer,
    "memory": memory,
    "graphs": graphs,
    "ranks": ranks,
    "step": step,  # last, since the compiler takes longest
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="small tensors, on any device")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/gpu.json")
    arguments = parser.parse_args(argv)
    if not arguments.tiny and not torch.cuda.is_available():
        print("bench_gpu: there is no CUDA device: NOTHING WAS MEASURED")
        return 1
    scale = tiny_scale() if arguments.tiny else full_scale()
    targets: list[Target] = []
    tables: dict[str, list[Row]] = {}
    took: dict[str, float] = {}
    failed: dict[str, str] = {}
    for part in arguments.parts:
        begun = time.perf_counter()
        try:
            tables[part], found = PARTS[part](scale)
            targets += found
        except Exception as error:  # one part must not cost the results of the others
            traceback.print_exc()
            failed[part] = f"{type(error).__name__}: {error}"
        took[part] = time.perf_counter() - begun
        if arguments.save:  # after every part: what is measured is not lost when time runs out
            summary = [target._asdict() | {"is_met": target.is_met} for target in targets]
            more: dict[str, Any] = {"failed": failed, "seconds": took, **tables}
            save("gpu", summary, **more)
    print_targets(targets)
    print("\n" + ", ".join(f"{part} {seconds:.0f} s" for part, seconds in took.items()))
    for part, why in failed.items():
        print(f"{part} FAILED: {why}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
