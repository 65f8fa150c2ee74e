"""The normalisation of one rank's batch with given statistics, and its exact gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from shuffle_batchnorm.comm.world import CALL, World
from shuffle_batchnorm.kernels import select

from .mixing import Plan
from .statistics import Way, find_way, sums_of_sources


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
        rho: Tensor,
        scale: Tensor | None,
        source_values: Tensor | None,
        source_mean: Tensor | None,
        source_rho: Tensor | None,
        sizes: tuple[int, ...],
        plan: Plan,
        world: World,
    ) -> Tensor:
        """Return y. `values` and `mean` are `Statistics`, those of sources where these differ."""
        scale = rho if scale is None else scale
        sources: tuple[Tensor | None, ...] = ()  # in one process the normalisers
        if isinstance(values, Tensor):  # of peers: rows for each block
            way, sources = Way(), (values, mean, rho)
            if source_values is not None:
                sources = (source_values, source_mean, source_rho)
        else:
            way = find_way(plan)
        ctx.save_for_backward(x, weight, mean, rho, scale, *sources)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.call = (0 if sources else values, way, sizes, plan, world)
        shift = mean.new_zeros(()) if bias is None else bias.to(mean.dtype)
        shift = shift.expand_as(mean)
        return select.select(x).block_affine(x, sizes, mean, scale, shift, way.users)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, weight, mean, rho, scale, *sources = ctx.saved_tensors
        with torch.no_grad():
            needs_dx = ctx.needs_input_grad[0]
            values, *call = ctx.call
            used = _Rows(mean, rho, scale, values)
            # What arrives from users on other ranks is weighted already.
            source = _Rows(sources[1], sources[2], sources[2], sources[0]) if sources else used
            first = _gradients(needs_dx, dy, x, weight, used, source, *call)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph: the first derivatives are right; a second one must not be wrong.
            first = _FirstDerivative.apply(*first, dy, x, weight)  # type: ignore[no-untyped-call]
        dx, dweight, dbias = first
        return (
            dx,
            None if weight is None else dweight.to(weight.dtype),
            None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
            *[None] * 10,
        )


class _Rows(NamedTuple):
    """What a backward pass knows of some normalisers.

    Attributes:
        mean: ``[R, C]``.
        rho: ``[R, C]``.
        factor: of ``dy``, ``rho * w``; ``rho`` where ``dy`` has been weighted.
        values: per channel, ``[R, 1]`` or a number; asked of sources.
    """

    mean: Tensor
    rho: Tensor
    factor: Tensor
    values: Tensor | int


def _gradients(
    needs_dx: bool,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    used: _Rows,
    source: _Rows,
    way: Way,
    sizes: tuple[int, ...],
    plan: Plan,
    world: World,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of input, weight and bias.

    In one process `used` and `source` are all normalisers, which `way` gives to blocks; else they
    have a row for each block. Always exchanges, even where no gradient of the input is needed: a
    peer may need one.
    """
    kernel = select.select(x)
    total, dot = kernel.block_grad_sums(dy, x, sizes, used.mean, used.rho, way.users)
    n = source.values
    if isinstance(n, Tensor):
        dweight, dbias, weighted = kernel.param_grads(total, dot, weight)
        total, dot = sums_of_sources(weighted, plan, world)
        if not needs_dx:
            return None, dweight, dbias
        b, c = kernel.dx_coefficients(total, dot, source.rho, source.factor, n)
    else:
        dweight, dbias, b, c = kernel.backward_rows(total, dot, source.rho, source.factor, n)
        if not needs_dx:
            return None, dweight, dbias
    dx = kernel.block_grad_affine(
        dy, x, sizes, used.factor, b, source.mean, c, way.users, way.pools
    )
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
