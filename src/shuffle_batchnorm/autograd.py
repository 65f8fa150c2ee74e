"""The normalisation of one rank's batch with given statistics, and its exact gradient."""

import math
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .kernels.rows import constant, take
from .mixing import Plan
from .process_groups import CALL, World
from .statistics import Way, asks_peers, find_way, sums_of_sources


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
        values: Tensor | int,
        mean: Tensor,
        std: Tensor,
        used: tuple[int, ...] | None,
        source: tuple[int, ...] | None,
        eps: float,
        sizes: tuple[int, ...],
        plan: Plan,
        world: World,
    ) -> Tensor:
        """Return y. `values` to `source` are `Statistics`."""
        # hypot: the square of a deviation that fits the dtype may not.
        rho = torch.hypot(std, constant((math.sqrt(eps),), std.dtype, std)).reciprocal_()
        scale = rho if weight is None else rho * weight.to(rho.dtype)
        sources, count = (mean, scale, rho), None
        way = Way() if asks_peers(plan, world) else find_way(plan)
        if isinstance(values, Tensor):  # of peers: a row for each block
            count = take(values, source)
            source_mean, source_rho = take(mean, source), take(rho, source)
            mean, rho, scale = (take(rows, used) for rows in (mean, rho, scale))
            sources = source_mean, source_rho, source_rho  # users weight what they send
        ctx.save_for_backward(x, weight, mean, rho, scale, *sources, count)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.call = (None if count is not None else values, way, sizes, plan, world)
        shift = mean.new_zeros(()) if bias is None else bias.to(mean.dtype)
        shift = shift.expand_as(mean)
        return kernels.select(x).block_affine(x, sizes, mean, scale, shift, way.users)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, weight, *rows, count = ctx.saved_tensors
        with torch.no_grad():
            needs_dx = ctx.needs_input_grad[0]
            known, way, sizes, plan, world = ctx.call
            count = known if count is None else count
            first = _gradients(needs_dx, dy, x, weight, rows, count, way, sizes, plan, world)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph: the first derivatives are right; a second one must not be wrong.
            first = _FirstDerivative.apply(*first, dy, x, weight)  # type: ignore[no-untyped-call]
        dx, dweight, dbias = first
        return (
            dx,
            None if weight is None else dweight.to(weight.dtype),
            None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
            *[None] * 9,
        )


def _gradients(
    needs_dx: bool,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rows: list[Tensor],
    count: Tensor | int,
    way: Way,
    sizes: tuple[int, ...],
    plan: Plan,
    world: World,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of input, weight and bias.

    `rows` are mean, rho and ``rho * w`` of normalisers, then mean, the factor of the sums and rho
    of sources, as is `count`: in one process both are the R of `Statistics`, which `way` gives to
    blocks; else there is one for each block. Always exchanges, even where no gradient of the input
    is needed: a peer may need one.
    """
    kernel = kernels.select(x)
    mean, rho, scale, source_mean, factor, source_rho = rows
    first, second = kernel.block_grad_sums(dy, x, sizes, mean, rho, way.users)
    dweight, dbias = second.sum(dim=0), first.sum(dim=0)
    if asks_peers(plan, world):
        first, second = sums_of_sources(first, second, weight, plan, world)
    if not needs_dx:
        return None, dweight, dbias
    # 0, where it is known: no values to multiply by infinity.
    step = factor / (-count.clamp(min=1) if isinstance(count, Tensor) else -count)
    b, c = (step * second).mul_(source_rho), step * first
    dx = kernel.block_grad_affine(dy, x, sizes, scale, b, source_mean, c, way.users, way.pools)
    return dx, dweight, dbias


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
