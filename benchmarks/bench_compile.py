"""Cold time of torch.compile for a converted network, against one with nn.BatchNorm2d.

    python benchmarks/bench_compile.py [--network resnet50] [--ranks 2] [--save]

In `--rounds` interleaved rounds each contestant compiles forward and backward of a network, without
any code that was compiled before. Prints seconds until the first step
has ended, their ratio to plain batch norm (median, and the smallest and largest), and the stages of
the last round: dynamo, then AOTAutograd, inductor, and of that the C++ or Triton compiler.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch._inductor.config as inductor_config
from harness import bind, save
from torch._dynamo.utils import compilation_time_metrics
from torch._inductor.utils import fresh_cache

from shuffle_batchnorm import ShuffleBatchNorm
from shuffle_batchnorm.moco.networks import make_backbone
from shuffle_batchnorm.moco.ranks.launch import Rank, launch

PLAIN = "plain"
STAGES = {
    "dynamo and all": "_compile.compile_inner",
    "AOTAutograd and below": "create_aot_dispatcher_function",
    "inductor": "compile_fx_inner",
    "compiler": "compile_file",
}


class Options(NamedTuple):
    """What is compiled."""

    kind: str
    groups: int
    network: str
    batch: int
    size: int


def measure(rank: Rank, options: Options) -> dict[str, float]:
    """Seconds of one rank's first step, and of its stages."""
    bind(rank)
    warnings.simplefilter("ignore")  # the compiler's, about its own code
    torch.manual_seed(0)
    model, _ = make_backbone(options.network, image_size=options.size)
    if options.kind != PLAIN:
        ShuffleBatchNorm.convert_shuffle_batchnorm(model, mode=options.kind, groups=options.groups)
    x = torch.randn(options.batch, 3, options.size, options.size, device=rank.device)
    model.to(rank.device)
    # What is loaded once in a process is no part of it.
    torch.compile(torch.nn.Linear(3, 3), dynamic=False)(torch.randn(3, 3)).sum().backward()
    torch._dynamo.reset()
    compilation_time_metrics.clear()
    with fresh_cache(), inductor_config.patch(force_disable_caches=True):
        begun = time.perf_counter()
        torch.compile(model, dynamic=False, fullgraph=True)(x).square().mean().backward()
        seconds = {"first step": time.perf_counter() - begun}
    for name, key in STAGES.items():
        seconds[name] = sum(compilation_time_metrics.get(key, ()))
    return seconds


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--bn", nargs="+", default=["local", "swap", "regroup"])
    parser.add_argument("--groups", type=int, default=2, help="on each rank (default 2)")
    parser.add_argument("--ranks", type=int, default=1, help="gloo, or NCCL with as many GPUs")
    parser.add_argument("--batch", type=int, default=16, help="images per rank (default 16)")
    parser.add_argument("--size", type=int, default=32, help="of the images (default 32)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", nargs="?", const="compile", metavar="NAME")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    device = "cuda" if torch.cuda.device_count() >= arguments.ranks else "cpu"
    kinds = [PLAIN, *arguments.bn]
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.rounds):
        for kind in kinds:
            options = Options(
                kind, arguments.groups, arguments.network, arguments.batch, arguments.size
            )
            runs[kind].append(launch(measure, options, ranks=arguments.ranks, device=device))
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        pairs = zip(runs[kind], runs[PLAIN], strict=True)
        ratios = sorted(ours["first step"] / theirs["first step"] for ours, theirs in pairs)
        row = {
            "bn": kind, "network": arguments.network, "ranks": arguments.ranks,
            "groups": arguments.groups, "images": [arguments.batch, 3, *[arguments.size] * 2],
            "seconds": [run["first step"] for run in runs[kind]],
            "ratio": [statistics.median(ratios), ratios[0], ratios[-1]], "stages": runs[kind][-1],
        }  # fmt: skip
        rows.append(row)
        print(f"{kind:10}", "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio"]), end="  ")
        print(", ".join(f"{name} {s:.1f} s" for name, s in row["stages"].items()))
    if arguments.save is not None:
        path = save(arguments.save, rows, on_ranks=arguments.ranks > 1, on_gpu=device == "cuda")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
