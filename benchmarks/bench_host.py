"""Host time: what a layer so small costs that nothing but Python and launches takes time.

    python benchmarks/bench_host.py [--save]

Forward and backward over ``nn.BatchNorm2d``: after a warm-up, the best of several runs of 300 calls
back to back, layer after layer in each run, so that a busy machine slows all of them.

On a GPU, ``[32, 64, 14, 14]`` in float32. Without one, ``[16, 8, 2, 2]`` on one CPU thread with the
Triton kernels replaced by stand-ins, in which nothing runs: what is left is the Python, the
look-ups and the allocations of a step on a GPU, and its launches are counted. The CPU's own
kernels are measured beside them.

"of 2 ranks" is a layer in a process group whose other rank is a stand-in, too: its messages take
the host's time, and none to arrive. The last line is JSON; `--save` writes
benchmarks/results/host.json.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from harness import save
from stand_ins import stand_in_peers, triton_stand_ins
from torch import Tensor, nn

from shuffle_batchnorm import ShuffleBatchNorm
from shuffle_batchnorm.moco.journal import processor

CALLS, RUNS = 300, 15
PLAIN, EMPTY = "nn.BatchNorm2d", "empty autograd.Function"
MODES = {"local": 1, "swap": 8, "regroup": 8}  # and groups
RANK_MODES = "sync", "swap", "regroup"

Layer = Callable[[Tensor], Tensor]


class _Empty(torch.autograd.Function):
    """What autograd itself takes for a function in Python, with a weight and a bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, weight, bias = ctx.saved_tensors
        return dy, weight, bias


def _empty(channels: int, device: str) -> Layer:
    weight, bias = (nn.Parameter(torch.zeros(channels, device=device)) for _ in range(2))
    return lambda x: _Empty.apply(x, weight, bias)  # type: ignore[no-untyped-call]


def _layers(channels: int, device: str) -> dict[str, Layer]:
    return {
        mode: ShuffleBatchNorm(channels, mode=mode, groups=groups, device=device)
        for mode, groups in MODES.items()
    }


def _seconds(layer: Layer, x: Tensor, dy: Tensor, calls: int = CALLS) -> float:
    _synchronize(x)
    start = time.perf_counter()
    for _ in range(calls):
        layer(x).backward(dy)
    seconds = time.perf_counter() - start
    _synchronize(x)
    return seconds / calls


def _synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def _input(device: str) -> tuple[Tensor, Tensor]:
    shape = (32, 64, 14, 14) if device == "cuda" else (16, 8, 2, 2)
    x, dy = torch.randn(2, *shape, device=device)
    return x.requires_grad_(), dy


def _best(contestants: dict[str, Layer], x: Tensor, dy: Tensor, runs: int) -> dict[str, float]:
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(runs):
        for name, layer in contestants.items():
            best[name] = min(best[name], _seconds(layer, x, dy))
    return best


def _stand_ins(device: str) -> Any:
    return triton_stand_ins() if device == "cpu" else nullcontext()


def measure(device: str, runs: int = RUNS) -> tuple[dict[str, float], dict[str, int]]:
    """The least seconds of one forward and backward, by name, and launches of each mode."""
    x, dy = _input(device)
    channels = x.shape[1]
    plain: dict[str, Layer] = {PLAIN: nn.BatchNorm2d(channels).to(device)}
    contestants = plain | _layers(channels, device) | {EMPTY: _empty(channels, device)}
    launches: dict[str, int] = {}
    own = {f"{mode}, CPU kernels": layer for mode, layer in _layers(channels, device).items()}
    if device == "cpu":
        for layer in own.values():
            _seconds(layer, x, dy, 10)  # prepares what is kept from call to call
    with _stand_ins(device) as counter:
        for name, layer in contestants.items():
            _seconds(layer, x, dy, 10)
            if name in MODES:
                launches[name] = _count(layer, x, dy, counter)
    contestants |= own if device == "cpu" else {}
    return _best(contestants, x, dy, runs), launches


def measure_ranks(device: str, runs: int = RUNS) -> tuple[dict[str, float], dict[str, int]]:
    """The same of modes in a process group of 2, the other of which is a stand-in."""
    x, dy = _input(device)
    channels = x.shape[1]
    layers = {mode: ShuffleBatchNorm(channels, mode=mode, device=device) for mode in RANK_MODES}
    plain: dict[str, Layer] = {PLAIN: nn.BatchNorm2d(channels).to(device)}
    launches: dict[str, int] = {}
    with _stand_ins(device) as counter, stand_in_peers(2, device):
        for mode, layer in layers.items():
            _seconds(layer, x, dy, 10)
            launches[mode] = _count(layer, x, dy, counter)
        return _best(plain | layers, x, dy, runs), launches


def _count(layer: Layer, x: Tensor, dy: Tensor, counter: Any) -> int:
    """Launches of a step: of our kernels, and on a GPU of all."""
    if counter is not None:
        before = counter.total()
        layer(x).backward(dy)
        return int(counter.total() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad(layer(x), x, dy)
        torch.cuda.synchronize()
    # Without what reads memory and gives none: a launch is one event on the device.
    return sum(event.count for event in profile.key_averages() if event.self_device_time_total)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of {CALLS} calls each ({RUNS})")
    parser.add_argument("--save", action="store_true", help="write the results' JSON")
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds, launches = measure(device, arguments.runs)
    of_ranks, launches_ranks = measure_ranks(device, arguments.runs)
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = [
        {"name": name, "seconds": best, "ratio": best / seconds[PLAIN]}
        for name, best in seconds.items()
    ] + [
        {"name": f"{mode} of 2 ranks", "seconds": of_ranks[mode],
         "ratio": of_ranks[mode] / of_ranks[PLAIN]}
        for mode in RANK_MODES
    ]  # fmt: skip
    print(f"{'forward + backward':28}       µs  / {PLAIN}")
    for row in rows:
        print(f"{row['name']:28} {1e6 * float(row['seconds']):8.1f}  {row['ratio']:8.2f}")
    summary: dict[str, Any] = {
        "host_ratio": {mode: round(seconds[mode] / seconds[PLAIN], 2) for mode in MODES},
        "launches": launches,
        "host_ratio_ranks": {
            mode: round(of_ranks[mode] / of_ranks[PLAIN], 2) for mode in RANK_MODES
        },
        "launches_ranks": launches_ranks,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, stand-ins",
    }
    if arguments.save:
        print(f"wrote {save('host', rows, on_gpu=device == 'cuda', **summary)}")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
