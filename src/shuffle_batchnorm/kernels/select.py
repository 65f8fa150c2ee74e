"""The four heavy kernels, and the small ones for rows between them.

`reference`, `cpu` and `triton_launch` have the same functions (for the formulas see `reference` and
`rows`). `select` alone chooses between them. Nothing else in this package touches
activations.
"""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from . import cpu, reference
from .rows import BlockGroups, Groups, Running, Sizes, has_numbers


class Kernels(Protocol):
    """What a kernel module offers; ``sizes`` are the samples per block, in order."""

    def block_moments(
        self, x: Tensor, sizes: Sizes, groups: Groups = None
    ) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation ``[blocks, C]``; with groups, ``[groups, C]``."""

    def block_affine(
        self,
        x: Tensor,
        sizes: Sizes,
        center: Tensor,
        scale: Tensor,
        shift: Tensor,
        groups: Groups = None,
    ) -> Tensor:
        """Return ``(x - center) * scale + shift``; with groups, of rows ``[groups, C]``."""

    def block_grad_sums(
        self,
        dy: Tensor,
        x: Tensor,
        sizes: Sizes,
        center: Tensor,
        scale: Tensor,
        groups: Groups = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the sums of ``dy`` and of ``dy * (x - center) * scale``, ``[blocks, C]``.

        With groups, rows and sums are ``[groups, C]``.
        """

    def block_grad_affine(
        self,
        dy: Tensor,
        x: Tensor,
        sizes: Sizes,
        a: Tensor,
        b: Tensor,
        center: Tensor,
        c: Tensor,
        users: Groups = None,
        groups: Groups = None,
    ) -> Tensor:
        """Return ``a * dy + b * (x - center) + c``; `a` may be of users, the rest of groups."""

    def normaliser_rows(
        self,
        mean: Tensor,
        std: Tensor,
        weight: Tensor | None,
        eps: float,
        count: Tensor | int,
        running: Running | None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``1 / sqrt(std**2 + eps)`` and that times the weight; move running statistics."""

    def merge_moments(self, rows: Tensor) -> Tensor:
        """Merge rows by Chan's formula, ``[R, S, 2 * C + 1]`` to ``[R, 1, 2 * C + 1]``."""

    def param_grads(
        self, total: Tensor, dot: Tensor, weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of weight and bias, and the sums that ranks exchange."""

    def dx_coefficients(
        self, total: Tensor, dot: Tensor, rstd: Tensor, factor: Tensor, count: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """Return `b` and `c` of `block_grad_affine`."""

    def backward_rows(
        self, total: Tensor, dot: Tensor, rstd: Tensor, factor: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of weight and bias, and `dx_coefficients`; in one process."""


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
        triton = cast(Kernels, import_module(f"{__package__}.triton_launch"))
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
    running = Running(torch.zeros_like(x[0]), torch.ones_like(x[0]), 0.1)
    rstd, scale = kernels.normaliser_rows(mean, std, x[0], 1e-5, 2, running)
    kernels.block_affine(x, sizes, mean, scale, mean, groups)
    total, dot = kernels.block_grad_sums(x, x, sizes, mean, rstd, groups)
    _, _, b, c = kernels.backward_rows(total, dot, rstd, scale, 2)
    _, _, sums = kernels.param_grads(total, dot, x[0])
    merged = kernels.merge_moments(sums.new_ones(1, 2, 3))
    kernels.normaliser_rows(mean, std, None, 1e-5, merged[0, :, :1], running)
    kernels.dx_coefficients(sums[:, 0], sums[:, 1], rstd, scale, merged[0, :, :1])
    kernels.block_grad_affine(x, x, sizes, scale, b, mean, c, groups, groups)
