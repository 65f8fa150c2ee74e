"""The small kernels in plain torch: rows to rows, between the heavy ones.

R rows, of normalisers with n values per channel each: n is a number, or ``[R, 1]`` across ranks. A
GPU, which takes as long to launch each of these operations, has one launch for all of a function,
but for what `triton` leaves to this module.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import constant


class Running(NamedTuple):
    """Running statistics, and how far a batch moves them.

    Attributes:
        mean: ``[C]``.
        var: ``[C]``.
        step: the share of the batch in what they become.
    """

    mean: Tensor
    var: Tensor
    step: float | Tensor


def normaliser_rows(
    mean: Tensor,
    std: Tensor,
    weight: Tensor | None,
    eps: float,
    n: Tensor | int,
    running: Running | None,
) -> tuple[Tensor, Tensor]:
    """Return ``rho = 1 / sqrt(std**2 + eps)`` and ``rho * weight``, each ``[R, C]``.

    Moves running statistics towards the average of the normalisers' means and unbiased variances,
    ``std**2 * n / (n - 1)``.
    """
    if running is not None and (isinstance(n, Tensor) or n > 0):
        move(running.mean, _average(mean), running.step)
        move(running.var, _average(unbiased_variance(std, n)), running.step)
    # hypot: the square of a deviation that fits the dtype may not.
    rho = torch.hypot(std, constant((math.sqrt(eps),), std.dtype, std)).reciprocal_()
    return rho, rho if weight is None else rho * weight.to(rho.dtype)


def unbiased_variance(std: Tensor, n: Tensor | int) -> Tensor:
    """Return ``std**2 * n / (n - 1)``."""
    rise = n / (n - 1).clamp(min=1) if isinstance(n, Tensor) else n / (n - 1)
    return std.square().mul_(rise)


def _average(rows: Tensor) -> Tensor:
    """Return the mean of rows, ``[R, C]`` to ``[C]``."""
    return rows[0] if len(rows) == 1 else rows.mean(dim=0)


def move(running: Tensor, new: Tensor, step: float | Tensor) -> None:
    """Move running statistics ``[C]`` a step towards new ones, in the dtype of these."""
    step = step.to(new.dtype) if isinstance(step, Tensor) else step
    if running.dtype == new.dtype:
        running.lerp_(new, step)
    else:
        running.copy_(running.to(new.dtype).lerp_(new, step))


def user_rows(total: Tensor, dot: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of weight and bias, ``[C]``, and what ranks exchange, ``[R, 2, C]``.

    Of the sums of ``dy`` and of ``dy xhat``, ``[R, C]``: their sums, and both times the weight.
    """
    sums = torch.stack([total, dot], dim=1)
    weighted = sums if weight is None else sums * weight.to(sums.dtype)
    return dot.sum(dim=0), total.sum(dim=0), weighted


def slopes(
    total: Tensor, dot: Tensor, rho: Tensor, factor: Tensor, n: Tensor | int
) -> tuple[Tensor, Tensor]:
    """Return ``b = -factor dot rho / n`` and ``c = -factor total / n``, each ``[R, C]``.

    So that ``b (x - mean) + c`` is what the statistics pass back to each value of a normaliser.
    """
    # 0, where it is known: no values to multiply by infinity.
    step = factor / (-n.clamp(min=1) if isinstance(n, Tensor) else -n)
    return (step * dot).mul_(rho), step * total


def gradient_rows(
    total: Tensor, dot: Tensor, rho: Tensor, factor: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of weight and bias, ``[C]``, and `slopes`.

    Of the sums of ``dy`` and of ``dy xhat`` over the users of each normaliser, ``[R, C]``.
    """
    return dot.sum(dim=0), total.sum(dim=0), *slopes(total, dot, rho, factor, n)
