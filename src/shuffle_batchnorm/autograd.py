"""The normalisation of one rank's batch with given statistics, and its exact gradient."""

import math
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .mixing import Plan
from .process_groups import CALL, World
from .statistics import known_count, mix_gradients, unpack


class Normalise(torch.autograd.Function):
    """``y = xhat * w + b``, with ``xhat = (x - mean) / sqrt(std**2 + eps)`` of the normaliser.

    Keeps the input and small rows. With ``s0 = sum w dy`` and ``s1 = sum w dy xhat`` over all users
    of the normaliser S that a block is pooled in, and S's n values per channel:
    ``dx = w dy rho_used - rho_S / n * (s0 + s1 * xhat_S)``, ``rho = 1 / sqrt(std**2 + eps)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        used: Tensor,
        source: Tensor | None,
        eps: float,
        sizes: tuple[int, ...],
        plan: Plan,
        world: World,
    ) -> Tensor:
        """Return y. `used` and `source` are rows as in `Statistics`; None for `source` = `used`."""
        count, mean, rho = _normaliser(used, eps)
        sources = (count, mean, rho) if source is None else _normaliser(source, eps)
        scale = rho if weight is None else rho * weight.to(rho.dtype)
        ctx.save_for_backward(x, weight, mean, rho, scale, *sources)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.call = (sizes, plan, world)
        shift = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype).expand_as(mean)
        return kernels.select(x).block_affine(x, sizes, mean, scale, shift)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, weight, *rows = ctx.saved_tensors
        with torch.no_grad():
            needs_dx = ctx.needs_input_grad[0]
            first = _gradients(needs_dx, dy, x, weight, rows, *ctx.call)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph: the first derivatives are right; a second one must not be wrong.
            first = _FirstDerivative.apply(*first, dy, x, weight)  # type: ignore[no-untyped-call]
        dx, dweight, dbias = first
        return (
            dx,
            None if weight is None else dweight.to(weight.dtype),
            None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
            *[None] * 6,
        )


def _gradients(
    needs_dx: bool,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rows: list[Tensor],
    sizes: tuple[int, ...],
    plan: Plan,
    world: World,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of input, weight and bias.

    `rows` are mean, rho and ``rho * w`` of each block's normaliser, then count, mean and rho of the
    one that the block is pooled in. Always exchanges, even where no gradient of the input is
    needed: a peer may need one.
    """
    kernel = kernels.select(x)
    mean, rho, scale, count, source_mean, source_rho = rows
    total, dot = kernel.block_grad_sums(dy, x, sizes, mean, rho)
    sums = torch.stack([total, dot], dim=1)
    weighted = sums if weight is None else sums * weight.to(sums.dtype)
    weighted = weighted.view(plan.groups, plan.per_group, -1)
    mixed = mix_gradients(weighted, plan, world).reshape(sums.shape)
    dweight, dbias = dot.sum(dim=0), total.sum(dim=0)
    if not needs_dx:
        return None, dweight, dbias
    known = known_count(plan, world, x.shape)  # 0: no values to multiply by infinity
    step = source_rho / (-count.clamp(min=1) if known is None else -known)
    c, b = (step[:, None] * mixed).unbind(dim=1)
    dx = kernel.block_grad_affine(dy, x, sizes, scale, b * source_rho, source_mean, c)
    return dx, dweight, dbias


def _normaliser(rows: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return count, mean and ``1 / sqrt(std**2 + eps)`` of rows ``[groups, B, 2C + 1]``."""
    count, mean, std = unpack(rows)
    # hypot: the square of a deviation that fits the dtype may not.
    return count, mean, torch.hypot(std, std.new_full((), math.sqrt(eps))).reciprocal_()


class _FirstDerivative(torch.autograd.Function):
    """Pass gradients through; refuse to differentiate them again."""

    @staticmethod
    def forward(_ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors[:3]

    @staticmethod
    def backward(_ctx: Any, *_grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            f"{CALL}: double backward is not implemented; differentiate this layer only once "
            "(or put it in eval mode)"
        )
