"""Compiles the Triton kernels for a GPU that need not be here, and prints what became of them.

Run by test_kernels_compiled.py in a process of its own, as Triton either compiles or interprets.
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
from shuffle_batchnorm.kernels import triton_launch
from shuffle_batchnorm.kernels.rows import BlockGroups, Exchange, Running, accumulation_dtype

_FIRST_HOPPER = 90


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


def main() -> None:
    driver.set_active(_Driver())
    for number, line in enumerate(sys.stdin):
        shape, dtype, channels_last, blocks, grouped = json.loads(line)
        for kernel in _compile(tuple(shape), getattr(torch, dtype), channels_last, blocks, grouped):
            # Where activations are in half precision, nothing else is.
            to_halves = re.findall(
                r"tt.addptr .* tensor<[^>]*!tt.ptr<b?f16>.*, tensor<[^>]*x(i\d+)>",
                kernel.asm["ttir"],
            )
            accesses = re.findall(r"(?:ld|st)\.global\.(?:v(\d)\.)?b(\d+)", kernel.asm["ptx"])
            widest = max(int(count or 1) * int(bits) // 8 for count, bits in accesses)
            found = number, kernel.metadata.name, widest, sorted(set(to_halves))
            print(json.dumps(found))


if __name__ == "__main__":
    main()
