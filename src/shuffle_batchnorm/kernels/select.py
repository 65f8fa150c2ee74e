"""The four heavy kernels, and the small ones for rows between them.

`reference`, `cpu` and `triton_launch` have the same functions (for the formulas see `reference` and
`rows`). `select` alone chooses between them. Nothing else in this package touches
activations.
"""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import cpu, reference
from .rows import BlockGroups, Exchange, Running, has_numbers

Kernels = Any  # a module with the functions of `reference`, in which mypy has checked them


def select(x: Tensor) -> Kernels:
    """Return the kernels for a tensor: its device's own, or the reference."""
    # The compiler fuses the reference better than opaque calls, whose number depends on a batch's
    # size and numbers; and aten's loops divide by the number of values.
    if torch.compiler.is_compiling() or not has_numbers(x) or x.numel() == 0:
        return reference
    if x.is_cuda:
        # A kernel of ours reads memory, which a subclass, like a fake tensor, may not have.
        has_memory = type(x) in (Tensor, Parameter)
        return _triton(x.device) if has_memory and x.dtype in _DTYPES else reference
    return cpu if x.device.type == "cpu" and x.dtype in _DTYPES else reference


_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@cache
def _triton(device: torch.device) -> Kernels:
    """Return the Triton kernels, imported at their first use, where Triton is and works."""
    if find_spec("triton") is None:
        return reference
    try:
        triton = import_module(f"{__package__}.triton_launch")
        _launch_all(triton, torch.ones(2, 1, device=device))
    except torch.OutOfMemoryError:
        raise  # it says nothing about Triton, and the next call asks again
    except Exception as error:  # an image without a C compiler, a driver that is too old, ...
        warnings.warn(
            "shuffle_batch_norm: Triton does not work here, so its kernels are replaced by plain "
            f"torch, which is slower: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return reference
    return triton


def _launch_all(kernels: Kernels, x: Tensor) -> None:
    """Call all of them, with everything that they may launch: what fails should fail here."""
    sizes, groups = (1, 1), BlockGroups(1, (0, 0))
    mean, std = kernels.block_moments(x, sizes, groups)
    kernels.block_affine(x, sizes, mean, std, mean, groups)
    kernels.block_grad_sums(x, x, sizes, mean, std, groups)
    kernels.block_grad_affine(x, x, sizes, std, std, mean, std, groups, groups)
    running = Running(torch.zeros_like(x[0]), torch.ones_like(x[0]), 0.1)
    local = kernels.TritonLocal(x, 1e-5, sizes, groups, groups)
    _, rows = local.forward(x, x[0], x[0], (), running)
    local.gradients(x, x, x[0], x.dtype, rows, True)
    exchange = Exchange((), 0, ((0, 1), (0, 1)))
    ranks = kernels.TritonRanks(x, 1e-5, sizes, exchange, exchange)
    rows = ranks.mix_moments(ranks.pack_moments(x).rows, x[0])
    ranks.forward(x, x[0], rows, running)
    scratch, messages = ranks.pack_sums(x, x, x[0], rows)
    ranks.gradients(x, x, x[0], x.dtype, rows, scratch, messages.rows)
