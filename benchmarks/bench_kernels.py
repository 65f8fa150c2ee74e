"""The four kernels as a share of copy bandwidth, on tensors that no cache holds.

    python benchmarks/bench_kernels.py [--shapes 256x64x112x112] [--blocks 1 8 64] [--save]

The peer is `torch.Tensor.copy_` of the same tensor in the same rounds. Counted are the passes over
activations that a kernel can't do without: `block_moments` one read, `block_affine` a read and a
write, `block_grad_sums` two reads, `block_grad_affine` two reads and a write; a share of 1 moves as
many bytes per second as the copy. Each kernel's result is compared with the reference's first.
Prints the smallest share over the shapes, median of its rounds. `--save` writes
benchmarks/results/kernels.json.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from harness import laps_of, one_stage, save, spread
from torch import Tensor

from shuffle_batchnorm.kernels import reference, select
from shuffle_batchnorm.kernels.select import Kernels

COPY = "copy"
# Reads and writes of activations; a copy has two.
PASSES = {"block_moments": 1, "block_affine": 2, "block_grad_sums": 2, "block_grad_affine": 3}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Long and short planes, few and many channels; 411 MB or more in half precision.
LARGE = [(256, 64, 112, 112), (256, 256, 56, 56), (2048, 512, 14, 14), (2048, 2048, 7, 7)]
Row = dict[str, Any]


class Options(NamedTuple):
    """What is measured, and how long."""

    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    blocks: list[int]
    seconds: float
    rounds: int


def measure(device: str, options: Options) -> Iterator[list[Row]]:
    """The rows of each tensor, as they are measured."""
    for shape in options.shapes:
        for dtype in options.dtypes:
            for layout in LAYOUTS:
                yield _measure_tensor(device, options, shape, dtype, layout)


def _measure_tensor(
    device: str, options: Options, shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> list[Row]:
    x, dy, out = (
        torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
        for _ in range(3)
    )
    rows = []
    for blocks in options.blocks:
        sizes = (shape[0] // blocks,) * blocks
        calls = _calls(x, dy, sizes)
        for name, call in calls.items():
            _check(name, call, x)
        runs = {COPY: partial(one_stage, lambda: out.copy_(x))}
        runs |= {
            name: partial(one_stage, partial(call, select.select(x)))
            for name, call in calls.items()
        }
        laps = laps_of(runs, device, options.seconds, 3, options.rounds)
        seconds = {name: [stages[0] for stages in laps[name].stages] for name in runs}
        for name, passes in PASSES.items():
            rows.append(
                {
                    "kernel": name,
                    "shape": list(shape),
                    "megabytes": x.nbytes / 1e6,
                    "dtype": str(dtype).removeprefix("torch."),
                    "layout": layout,
                    "blocks": blocks,
                    "rounds": len(seconds[name]),
                    "seconds": spread(seconds[name]),
                    "copy_seconds": spread(seconds[COPY]),
                    "share": spread(_shares(seconds[COPY], seconds[name], passes)),
                }
            )
    return rows


def _shares(copies: list[float], times: list[float], passes: int) -> list[float]:
    """A kernel's bytes per second over the copy's, round by round."""
    return [passes / 2 * copy / time for copy, time in zip(copies, times, strict=True)]


def _calls(x: Tensor, dy: Tensor, sizes: tuple[int, ...]) -> dict[str, Callable[[Kernels], Any]]:
    """Each kernel on `x` and `dy`, for a module that has it."""
    float_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = [torch.rand(len(sizes), x.shape[1], device=x.device, dtype=float_dtype) for _ in "abcd"]
    a, b, center, c = rows
    return {
        "block_moments": lambda kernel: kernel.block_moments(x, sizes),
        "block_affine": lambda kernel: kernel.block_affine(x, sizes, center, a, c),
        "block_grad_sums": lambda kernel: kernel.block_grad_sums(dy, x, sizes, center, a),
        "block_grad_affine": lambda kernel: kernel.block_grad_affine(dy, x, sizes, a, b, center, c),
    }


def _check(name: str, call: Callable[[Kernels], Any], x: Tensor) -> None:
    """Raise unless a kernel gives what the reference gives."""
    got, want = call(select.select(x)), call(reference)
    for mine, true in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, want)), strict=True):
        tolerance = 3e-2 if mine.dtype in (torch.bfloat16, torch.float16) else 2e-4
        error = float((mine.float() - true.float()).abs().max() / true.float().abs().max())
        if not error <= tolerance:
            where = f"{tuple(x.shape)}, {x.dtype}"
            raise RuntimeError(f"{name} of {where} is off by {error:.1e} of the largest value")


def print_rows(rows: list[Row]) -> None:
    columns = sorted({(row["dtype"], row["layout"], row["blocks"]) for row in rows})
    print("\nsmallest share of copy bandwidth")
    for dtype, layout, blocks in columns:
        cells = []
        for kernel in PASSES:
            mine = [
                row["share"].median
                for row in rows
                if (row["kernel"], row["dtype"], row["layout"], row["blocks"])
                == (kernel, dtype, layout, blocks)
            ]
            cells.append(f"{kernel.removeprefix('block_')} {min(mine):.2f}")
        print(f"  {dtype:9} {layout:14} blocks={blocks:<4} {'   '.join(cells)}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    cuda = torch.cuda.is_available()
    # On a CPU 103 MB are beyond the caches.
    usual = ["x".join(map(str, shape)) for shape in LARGE] if cuda else ["32x64x112x112"]
    dtypes = ["float32", "bfloat16"] if cuda else ["float32"]
    parser.add_argument("--shapes", nargs="+", default=usual, metavar="NxCxHxW")
    parser.add_argument("--dtypes", nargs="+", default=dtypes)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 8, 64] if cuda else [1, 8])
    parser.add_argument("--seconds", type=float, default=3.0, help="per tensor and blocks")
    parser.add_argument("--rounds", type=int, default=21, help="at most")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/kernels.json")
    arguments = parser.parse_args(argv)
    options = Options(
        [tuple(map(int, text.split("x"))) for text in arguments.shapes],
        [getattr(torch, name) for name in arguments.dtypes],
        arguments.blocks, arguments.seconds, arguments.rounds,
    )  # fmt: skip
    rows = [row for some in measure("cuda" if cuda else "cpu", options) for row in some]
    print_rows(rows)
    if arguments.save:
        print(f"wrote {save('kernels', rows)}")


if __name__ == "__main__":
    main()
