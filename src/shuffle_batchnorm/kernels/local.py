"""Forward and backward of one process, whose normalisers ask no other for statistics."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .rows import Groups, Running, Sizes, cast
from .select import Kernels

Rows = tuple[Any, ...]  # of tensors; None where one is missing
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Local(NamedTuple):
    """Calls of one kind, by kernels in plain torch; `triton_local.TritonLocal` has the same.

    Attributes:
        kernels: the module.
        sizes: samples of each block.
        groups: of blocks, each group a normaliser; None if each block is one.
        users: of blocks, by the normaliser that they use; None if each uses its own.
        values: per channel, of each normaliser.
        eps: added to the variance.
    """

    kernels: Kernels
    sizes: Sizes
    groups: Groups
    users: Groups
    values: int
    eps: float

    def statistics(
        self, x: Tensor, weight: Tensor | None, running: Running | None
    ) -> tuple[Rows, Tensor]:
        """Return rows ``[R, C]`` of R normalisers: mean, rstd, ``rstd * weight``; and deviations.

        The third is None without a weight. Moves the running statistics.
        """
        with torch.no_grad():
            mean, std = self.kernels.block_moments(x, self.sizes, self.groups)
            rstd, scale = self.kernels.normaliser_rows(
                mean, std, weight, self.eps, self.values, running
            )
        # A compiler refuses the same tensor twice.
        return (mean, rstd, None if weight is None else scale), std

    def forward(
        self, x: Tensor, _weight: Tensor | None, bias: Tensor | None, rows: Rows,
        _running: Running | None,
    ) -> tuple[Tensor, Rows]:  # fmt: skip
        """Return ``y = (x - mean) * rstd * weight + bias``, and what `gradients` needs."""
        return affine(self.kernels, x, bias, self.sizes, rows, self.users), rows

    def gradients(
        self, dy: Tensor, x: Tensor, _weight: Tensor | None, _bias_dtype: torch.dtype | None,
        rows: Rows, needs_dx: bool,
    ) -> Gradients:  # fmt: skip
        """Return the gradients of x, unless it needs none, of weight and of bias."""
        kernels, sizes, groups, users = self.kernels, self.sizes, self.groups, self.users
        mean, rstd, scale = rows
        scale = rstd if scale is None else scale
        total, dot = kernels.block_grad_sums(dy, x, sizes, mean, rstd, users)
        dweight, dbias, b, c = kernels.backward_rows(total, dot, rstd, scale, self.values)
        if not needs_dx:
            return None, dweight, dbias
        dx = kernels.block_grad_affine(dy, x, sizes, scale, b, mean, c, users, groups)
        return dx, dweight, dbias

    def moments(self, _x: Tensor, rows: Rows, std: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of each normaliser, from what `statistics` has returned."""
        return rows[0], std


def affine(
    kernels: Kernels, x: Tensor, bias: Tensor | None, sizes: Sizes, rows: Rows, users: Groups
) -> Tensor:
    """Return ``y = (x - mean) * scale + bias``, with rows mean, rstd and scale, if not the same."""
    mean, rstd, scale = rows[:3]
    shift = mean.new_zeros(()) if bias is None else cast(bias, mean.dtype)
    scale = rstd if scale is None else scale
    y: Tensor = kernels.block_affine(x, sizes, mean, scale, shift.expand_as(mean), users)
    return y


def prepare(
    kernels: Kernels, x: Tensor, eps: float, sizes: Sizes, groups: Groups, users: Groups,
    values: int, parameters: Iterable[Tensor | None],
) -> Any:  # fmt: skip
    """Return what runs calls of a kind: `Local`, or the kernels' own."""
    own = own_class(kernels, "TritonLocal", x, parameters)
    if own is not None:
        return own(x, eps, sizes, groups, users)
    return Local(kernels, sizes, groups, users, values, eps)


def own_class(kernels: Kernels, name: str, x: Tensor, parameters: Iterable[Tensor | None]) -> Any:
    """Return the class of kernels that prepare calls; None if there is none, or it can't.

    A kernel reads memory of the input's device without gaps, which a subclass may not have.
    """
    own = getattr(kernels, name, None)
    if own is None:
        return None
    for p in (p for p in parameters if p is not None):
        is_usual = type(p) in (Tensor, Parameter) and p.is_contiguous() and p.device == x.device
        if not is_usual:
            return None
    return own
