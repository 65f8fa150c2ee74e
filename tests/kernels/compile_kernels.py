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
from shuffle_batchnorm.kernels import triton_launch, triton_local
from shuffle_batchnorm.kernels.rows import BlockGroups, Running
from shuffle_batchnorm.kernels.triton_local import TritonLocal

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
        total, dot, rstd, factor = rows_for(x, sizes, 4)
        triton_launch.backward_rows(total, dot, rstd, factor, 7)
        weight, mean, var = x.new_ones(3, shape[1])
        triton_launch.normaliser_rows(total, dot, weight, 1e-5, 7, Running(mean, var, 0.1))
        triton_launch.normaliser_rows(total, dot, None, 1e-5, total[:, :1], None)
        for step in (0.1, x.new_ones(())):
            triton_launch.normaliser_rows(
                total, dot, weight, 1e-5, total[:, :1], Running(mean, var, step)
            )
        triton_launch.dx_coefficients(total, dot, rstd, factor, total[:, :1])
        triton_launch.param_grads(total, dot, weight)
        triton_launch.param_grads(total, dot, None)
        triton_launch.merge_moments(total.new_ones(blocks, 3, 2 * shape[1] + 1))
        _step(x, sizes, merge_last=grouped)
    finally:
        JITFunction.run = run
    return launched


def _step(x: Tensor, sizes: tuple[int, ...], merge_last: bool) -> None:
    """Run forward and backward of one process."""
    triton_local.MERGE_LAST = merge_last
    groups = BlockGroups(1, (0,) * len(sizes))
    work = TritonLocal(x, 1e-5, sizes, groups, groups)
    weight, mean, var = rows_for(x, (3,), 1)[0].new_ones(3, x.shape[1])
    number = torch.tensor(0)
    _, rows = work.forward(x, weight, weight, (), Running(mean, var, 0.1, number))
    work.gradients(x, x, weight, weight.dtype, rows, True)


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
        _step(x, (shape[0],), False)
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
