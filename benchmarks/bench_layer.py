"""Forward and backward of one layer against nn.BatchNorm2d, in one process.

    python benchmarks/bench_layer.py [--rounds 15] [--save]

Prints, per shape, the time of nn.BatchNorm2d and the ratio of every mode to it: median and, in
brackets, 20 and 80 percent points. `--save` writes benchmarks/results/layer.json.
"""

import argparse
import math
from collections.abc import Callable

import torch
from harness import interleaved, save
from torch import Tensor, nn

from shuffle_batchnorm import ShuffleBatchNorm

SHAPES = [(64, 64, 56, 56), (64, 256, 28, 28), (128, 512, 4, 4)]
LAYERS = [(mode, groups) for mode in ("local", "swap", "regroup") for groups in (1, 8)]


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    def run() -> None:
        x.grad = None
        layer(x).backward(dy)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15, help="timings per layer (default 15)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/layer.json")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for shape in SHAPES:
        x = torch.randn(shape, device=device, requires_grad=True)
        dy = torch.randn(shape, device=device)
        layers: dict[str, nn.Module] = {"nn.BatchNorm2d": nn.BatchNorm2d(shape[1])}
        for mode, groups in LAYERS:
            layers[f"{mode}, groups={groups}"] = ShuffleBatchNorm(
                shape[1], mode=mode, groups=groups
            )
        contestants = {name: _step(layer.to(device), x, dy) for name, layer in layers.items()}
        timings = interleaved(contestants, arguments.rounds)
        print(
            f"{'x'.join(map(str, shape))}: nn.BatchNorm2d {timings['nn.BatchNorm2d'].median:.4f} s"
        )
        for name, timing in timings.items():
            rows.append({"shape": shape, "layer": name, **timing._asdict()})
            spread = f"({timing.ratio_p20:.2f} to {timing.ratio_p80:.2f})"
            print(f"  {name:20} {timing.ratio:.2f} {spread}", flush=True)
    ours = [row["ratio"] for row in rows if row["layer"] != "nn.BatchNorm2d"]
    mean = math.exp(sum(math.log(ratio) for ratio in ours) / len(ours))
    print(f"geometric mean of the ratios {mean:.2f}, largest {max(ours):.2f}")
    if arguments.save:
        print(f"wrote {save('layer', rows)}")


if __name__ == "__main__":
    main()
