"""Host time: a layer so small that nothing but Python and the start of operations takes time.

    python benchmarks/bench_host.py [--save]

Forward and backward of ``[16, 8]`` in float32 on one CPU thread, over ``nn.BatchNorm1d``: after a
warm-up, the best of several runs of 300 calls back to back, layer after layer in each run, so that
a busy machine slows all of them. `--save` writes benchmarks/results/host.json.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import save
from torch import Tensor, nn

from shuffle_batchnorm import ShuffleBatchNorm

SHAPE = (16, 8)
CALLS, RUNS = 300, 15
PLAIN, EMPTY = "nn.BatchNorm1d", "empty autograd.Function"


class _Empty(torch.autograd.Function):
    """What autograd itself takes for a function in Python."""

    @staticmethod
    def forward(_ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: object, dy: Tensor) -> Tensor:
        return dy


def _contestants() -> dict[str, Callable[[Tensor], Tensor]]:
    channels = SHAPE[1]
    layers: dict[str, Callable[[Tensor], Tensor]] = {PLAIN: nn.BatchNorm1d(channels)}
    for mode, groups in (("local", 1), ("sync", 1), ("swap", 2), ("regroup", 2)):
        layers[f"{mode}, groups={groups}"] = ShuffleBatchNorm(channels, mode=mode, groups=groups)
    return layers | {EMPTY: _Empty.apply}


def _seconds(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        layer(x).backward(dy)
    return (time.perf_counter() - start) / CALLS


def measure(runs: int = RUNS) -> dict[str, float]:
    """The least seconds of one forward and backward, by name."""
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    contestants = _contestants()
    for layer in contestants.values():
        _seconds(layer, x, dy)  # prepares what is kept from call to call
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(runs):
        for name, layer in contestants.items():
            best[name] = min(best[name], _seconds(layer, x, dy))
    return best


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of {CALLS} calls each ({RUNS})")
    parser.add_argument("--save", action="store_true", help="write the results' JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    seconds = measure(arguments.runs)
    rows: list[dict[str, Any]] = [
        {"name": name, "seconds": best, "ratio": best / seconds[PLAIN]}
        for name, best in seconds.items()
    ]
    print(f"{'forward and backward of 16x8':28}       µs  / {PLAIN}")
    for row in rows:
        print(f"{row['name']:28} {1e6 * float(row['seconds']):8.1f}  {row['ratio']:8.2f}")
    if arguments.save:
        print(f"wrote {save('host', rows, on_gpu=False)}")


if __name__ == "__main__":
    main()
