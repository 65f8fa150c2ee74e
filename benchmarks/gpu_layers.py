"""Single layers on a GPU: what they launch, what takes the host's time, and CUDA graphs."""

import cProfile
import pstats
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import laps_of, ratios, spread
from peers import MODES, PLAIN, staged
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from shuffle_batchnorm import ShuffleBatchNorm

SMALL = (32, 64, 14, 14)  # the host takes longer than the device
CALLS, FUNCTIONS = 300, 30
Row = dict[str, Any]


def _layers(channels: int, groups: int) -> dict[str, nn.Module]:
    """nn.BatchNorm2d, `local` with one group, and all modes with several."""
    layers: dict[str, nn.Module] = {PLAIN: nn.BatchNorm2d(channels)}
    for mode, count in [("local", 1), *((mode, groups) for mode in MODES)]:
        layers[f"{mode}, groups={count}"] = ShuffleBatchNorm(channels, mode=mode, groups=count)
    return layers


def _small(device: str, groups: int) -> dict[str, Callable[[], None]]:
    """A forward and backward of each layer, so small that the host's time counts."""
    x, dy = torch.randn(2, *SMALL, device=device)
    layers = _layers(SMALL[1], groups)
    return {
        name: partial(staged(layer.to(device), x, dy), lambda: None)
        for name, layer in layers.items()
    }


def launches(device: str, groups: int) -> list[Row]:
    """Count what a forward and backward starts on the device, by kernel; on a CPU, operations."""
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    kind = activities[-1].name
    rows = []
    for name, run in _small(device, groups).items():
        for _ in range(3):
            run()
        with torch.profiler.profile(activities=activities) as profiler:
            run()
            if on_gpu:
                torch.cuda.synchronize()
        found = Counter(event.name for event in profiler.events() if event.device_type.name == kind)
        rows.append({"what": "launches", "name": name, "number": found.total(), "kernels": found})
        print(f"{name}: {found.total()} {dict(found) if on_gpu else 'operations'}", flush=True)
    return rows


def profile(device: str, groups: int) -> list[Row]:
    """Microseconds of a forward and backward in the host's functions, those that take most."""
    rows = []
    with torch.autograd.set_multithreading_enabled(False):  # else a profile lacks the backward
        for name, run in _small(device, groups).items():
            for _ in range(20):
                run()
            profiler = cProfile.Profile()
            profiler.enable()
            for _ in range(CALLS):
                run()
            profiler.disable()
            if device == "cuda":
                torch.cuda.synchronize()
            rows += _longest(name, pstats.Stats(profiler))
            print(f"profiled {name}", flush=True)
    return rows


def _longest(name: str, stats: pstats.Stats) -> list[Row]:
    functions = stats.get_stats_profile().func_profiles
    longest = sorted(functions.items(), key=lambda item: item[1].tottime, reverse=True)
    return [
        {
            "what": "profile",
            "name": name,
            "function": function,
            "where": f"{Path(timed.file_name).name}:{timed.line_number}",
            "calls": int(timed.ncalls.split("/")[0]) / CALLS,
            "own_us": 1e6 * timed.tottime / CALLS,
            "all_us": 1e6 * timed.cumtime / CALLS,
        }
        for function, timed in longest[:FUNCTIONS]
    ]


def graphs(
    device: str, shape: tuple[int, ...], groups: int, seconds: float, rounds: int
) -> list[Row]:
    """Layers in CUDA graphs: what they give to new input, and their time with the host's."""
    rows: list[Row] = []
    for name, eager in _layers(shape[1], groups).items():
        eager.to(device)
        captured = deepcopy(eager)
        if device == "cuda":
            # It gives the module itself another forward.
            example = torch.randn(shape, device="cuda", requires_grad=True)
            torch.cuda.make_graphed_callables(captured, (example,))
        x, dy = (torch.randn(shape, device=device) for _ in range(2))
        pairs = zip(_step(captured, x, dy), _step(eager, x, dy), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        runs = {"graph": captured, "eager": eager}
        laps = laps_of(
            {how: partial(_many_steps, run, x, dy) for how, run in runs.items()},
            "cpu", seconds, 3, rounds,
        )  # fmt: skip
        times = {how: [stages[0] for stages in laps[how].stages] for how in runs}
        rows.append(
            {
                "name": name,
                "shape": list(shape),
                "graph": spread(times["graph"]),
                "eager": spread(times["eager"]),
                "ratio": ratios(times["graph"], times["eager"]),
            }
        )
    print("\n10 steps of a layer in a CUDA graph, host included")
    for row in rows:
        milliseconds = 1e3 * row["graph"].median
        print(f"  {row['name']:20}{milliseconds:8.2f} ms, {row['ratio'].median:.2f} of eager")
    return rows


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
