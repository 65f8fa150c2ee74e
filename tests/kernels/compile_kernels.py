"""Compiles the Triton kernels for a GPU that need not be here, and prints what became of them.

    PYTHONPATH=src:tests python tests/kernels/compile_kernels.py --table

The table is of the heavy kernels on some layers of ResNet-50. Without it, cases come as lines of
JSON from test_triton_kernels.py, in a process of its own, as Triton either compiles or interprets.
The host functions run as they are, on small tensors on the CPU; the driver that they find is a
stand-in, and nothing is launched.
"""

import json
import re
import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.kernel_cases import all_four, all_of_groups, rows_for
from kernels.kernel_code import Code, read_code
from shuffle_batchnorm.kernels import triton_launch
from shuffle_batchnorm.kernels.rows import BlockGroups, Exchange, Running, accumulation_dtype

_FIRST_HOPPER = 90
_THREADS = 128  # of a program
# Of the heavy kernels in the order of `all_four`; the last is the same as the third.
_HEAVY = {"moments": "moments", "affine": "affine", "grad_sums": "grad_sums", "grad_affine": "dx"}


class _Driver:
    """As much of a driver as compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", _FIRST_HOPPER, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def _compile(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, blocks: int, grouped: bool
) -> list[Any]:
    """Return the kernels that a call of all functions, with groups or not, would launch."""
    launched: list[Any] = []
    run = JITFunction.run

    def note(self: Any, *args: Any, **options: Any) -> None:
        launched.append(run(self, *args, **options | {"warmup": True}))

    x: Tensor = torch.zeros(shape, dtype=dtype)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
    sizes = (shape[0] // blocks,) * blocks
    JITFunction.run = note
    try:
        if grouped:
            groups = BlockGroups(1, (0,) * blocks)
            all_of_groups(triton_launch, x, x, sizes, rows_for(x, (shape[0],), 4), groups, groups)
        else:
            all_four(triton_launch, x, x, sizes, rows_for(x, sizes, 4))
        if grouped or dtype == torch.float64:
            _steps(x, sizes)
    finally:
        JITFunction.run = run
    return launched


def _steps(x: Tensor, sizes: tuple[int, ...]) -> None:
    """Steps of one process and of ranks, with everything that a layer may have, and without."""
    blocks = len(sizes)
    weight, mean, var = x.new_ones(3, x.shape[1], dtype=accumulation_dtype(x))
    exchange, groups = Exchange((0,), 1, ((0, blocks + 1),) * blocks), BlockGroups(1, (0,) * blocks)
    ranks = triton_launch.TritonRanks(x, 1e-5, sizes, exchange, exchange)
    local = triton_launch.TritonLocal(x, 1e-5, sizes, groups, groups)
    for chosen, running in ((weight, Running(mean, var, 0.1, mean.long()[0])), (None, None)):
        rows = ranks.mix_moments(ranks.pack_moments(x).rows, chosen)
        ranks.forward(x, chosen, rows, running)
        scratch, messages = ranks.pack_sums(x, x, chosen, rows)
        ranks.gradients(x, x, chosen, None, rows, scratch, messages.rows)
        _, kept = local.forward(x, chosen, chosen, (), running)
        local.gradients(x, x, chosen, None, kept, True)


def _compile_step(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> list[Any]:
    """Return the kernels of forward and backward of one process, in this order."""
    launched: list[Any] = []
    run = JITFunction.run

    def note(self: Any, *args: Any, **options: Any) -> None:
        launched.append(run(self, *args, **options | {"warmup": True}))

    x: Tensor = torch.zeros(shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    JITFunction.run = note
    try:
        work = triton_launch.TritonLocal(x, 1e-5, (shape[0],), None, None)
        weight, mean, var = x.new_ones(3, shape[1], dtype=accumulation_dtype(x))
        _, rows = work.forward(x, weight, weight, (), Running(mean, var, 0.1, mean.long()[0]))
        work.gradients(x, x, weight, weight.dtype, rows, True)
    finally:
        JITFunction.run = run
    return launched


def _describe(kernel: Any) -> list[Any]:
    # Where activations are in half precision, nothing else is.
    to_halves = re.findall(
        r"tt.addptr .* tensor<[^>]*!tt.ptr<b?f16>.*, tensor<[^>]*x(i\d+)>", kernel.asm["ttir"]
    )
    code = read_code(kernel)
    loops = [loop._asdict() for loop in code.loops]
    return [kernel.metadata.name, sorted(set(to_halves)), code._asdict() | {"loops": loops}]


def _print_table() -> None:
    """Print what becomes of the heavy kernels, and what follows.

    KiB are bytes that a multiprocessor has under way at once: those that a program loads before it
    uses the first, times the programs that fit its registers and threads. The instructions are a
    thread's per value that it sums, once around the loop, or in all per value that it writes.
    """
    print(
        f"{'kernel':10}{'shape':13}{'dtype':10}{'layout':12}registers  stack  shared  KiB  "
        f"{'loads':12}instructions"
    )
    for channels, side in ((64, 112), (256, 56), (512, 28), (1024, 14), (512, 7)):
        for dtype in (torch.float32, torch.bfloat16):
            for channels_last in (False, True):
                shape = (32 if side < 100 else 16, channels, side, side)
                where = f"{channels}x{side}x{side}".ljust(13) + str(dtype)[6:].ljust(10)
                where += ("channels_last" if channels_last else "contiguous")[:10].ljust(12)
                for kernel in _compile_step(shape, dtype, channels_last):
                    name = _HEAVY.get(kernel.metadata.name)
                    if name:
                        _print_row(name, where, dtype.itemsize, read_code(kernel))


def _print_row(name: str, where: str, itemsize: int, code: Code) -> None:
    if name in ("moments", "grad_sums"):
        loop = code.loops[0]
        read = sum(width * count for width, count in loop.loads.items())
        values = read / itemsize / (2 if name == "grad_sums" else 1)
        instructions, loads = loop.instructions, loop.loads
        read = read * loop.at_once // sum(loads.values())
    else:
        values = sum(width * count for width, count in code.stores.items()) / itemsize
        instructions, loads = code.instructions, code.loads
        read = int(values * itemsize * (2 if name == "dx" else 1))
    registers = -(-code.registers // 8) * 8
    threads = min(2**16 // (registers * _THREADS), 2048 // _THREADS) * _THREADS
    widths = " ".join(f"{count}x{width}" for width, count in sorted(loads.items()))
    print(
        f"{name:10}{where}{code.registers:9}{code.stack:7}{code.shared:8}"
        f"{threads * read // 1024:5}  {widths:12}{instructions / values:12.1f}"
    )


def main() -> None:
    driver.set_active(_Driver())
    if sys.argv[1:] == ["--table"]:
        _print_table()
        return
    for line in sys.stdin:
        shape, dtype, channels_last, blocks, grouped = json.loads(line)
        kernels = _compile(tuple(shape), getattr(torch, dtype), channels_last, blocks, grouped)
        print(json.dumps([_describe(kernel) for kernel in kernels]))


if __name__ == "__main__":
    main()
