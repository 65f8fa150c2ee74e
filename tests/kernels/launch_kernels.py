"""Launches the kernels of a step, compiled for a GPU, on a driver that only takes notes.

Run by test_launch.py in a process of its own, as Triton either compiles or interprets. Prints, by
name, what was found.
"""

import json
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.compile_kernels import _Driver
from shuffle_batchnorm.kernels import launch, triton_local
from shuffle_batchnorm.kernels.rows import BlockGroups, Exchange, Running
from shuffle_batchnorm.kernels.triton_local import TritonLocal
from shuffle_batchnorm.kernels.triton_ranks import TritonRanks

notes: list[tuple[Any, ...]] = []


class _Launcher:
    """What a launch ends in: it is given a grid, a stream, a function, and so on."""

    def __init__(self, *_source: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        # In between is what profilers of Triton have asked for, whom a direct launch tells nothing.
        notes.append(tuple(map(_describe, arguments[:6] + arguments[9:])))


def _describe(argument: Any) -> Any:
    """Two launches have the same arguments but for memory, which is new."""
    if isinstance(argument, Tensor):
        return list(argument.shape), str(argument.dtype)
    return argument


class _Utils:
    def load_binary(self, *_: Any) -> tuple[str, int, int, int, int]:
        return "module", 7, 0, 0, 1024

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": 200_000}


class _NotingDriver(_Driver):
    launcher_cls = _Launcher
    utils = _Utils()


class _Runs:
    """Counts what goes through ``kernel[grid]``."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "_Runs":
        run = JITFunction.run

        def counted(kernel: Any, *arguments: Any, **named: Any) -> Any:
            self.count += 1
            return run(kernel, *arguments, **named)

        self._patch = patch.object(JITFunction, "run", counted)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


def _step(work: Any, x: Tensor, weight: Tensor | None) -> tuple[list[Any], int]:
    """Return what was launched, and how much of it by way of ``kernel[grid]``."""
    notes.clear()
    rows = weight.new_ones(2, x.shape[1]) if weight is not None else x.new_ones(2, x.shape[1])
    running = None if weight is None else Running(rows[0], rows[1], 0.1, torch.tensor(3))
    dtype = None if weight is None else weight.dtype
    with _Runs() as runs:
        if isinstance(work, TritonLocal):
            _, kept = work.forward(x, weight, weight, (), running)
            work.gradients(x, x, weight, dtype, kept, True)
        else:
            packed = work.mix_moments(work.pack_moments(x).rows, weight)
            work.forward(x, weight, packed, running)
            scratch, messages = work.pack_sums(x, x, weight, packed)
            work.gradients(x, x, weight, dtype, packed, scratch, messages.rows)
    return list(notes), runs.count


def _prepare(kind: str, x: Tensor) -> Any:
    sizes = (2,) * 6
    if kind == "ranks":
        exchange = Exchange((0,), 1, ((0, 7),) * 6)
        return TritonRanks(x, 1e-5, sizes, exchange, exchange)
    groups = BlockGroups(2, (0, 1, 0, 1, 0, 1))
    return TritonLocal(x, 1e-5, sizes, groups, groups)


def _look(dtype: torch.dtype, channels_last: bool, affine: bool, kind: str) -> Any:
    x = torch.zeros(12, 6, 5, 8, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weight = torch.zeros(6) if affine else None
    with patch.object(triton_local, "MERGE_LAST", kind == "two"):
        work = _prepare(kind, x)
        first, compiled = _step(work, x, weight)
        again, found = _step(work, x, weight)
        _, directly = _step(work, torch.zeros(x.numel() + 1, dtype=dtype)[1:].as_strided(
            x.size(), x.stride(), 1), weight)  # fmt: skip
        recorded = None
        if kind != "ranks":
            with _Runs() as runs:
                work.moments(x, (), None)  # without a weight, whatever the layer has
            recorded = runs.count
        with patch.object(launch, "_is_version_known", lambda: False):
            other = _prepare(kind, x)
            _step(other, x, weight)
            third, slowly = _step(other, x, weight)
    return {
        "launches": len(first), "compiled": compiled, "found": found, "unaligned": directly,
        "unknown": slowly, "same": first == again == third, "recorded": recorded,
    }  # fmt: skip


def main() -> None:
    driver.set_active(_NotingDriver())
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("three", "two", "ranks"):
            channels_last = affine = dtype == torch.float32
            print(json.dumps(_look(dtype, channels_last, affine, kind)))


if __name__ == "__main__":
    main()
