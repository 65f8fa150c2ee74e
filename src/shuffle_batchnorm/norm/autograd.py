"""The normalisation of one rank's batch with given statistics, and its exact gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from shuffle_batchnorm.comm.world import World
from shuffle_batchnorm.kernels.rows import cast

from .mixing import CALL
from .statistics import Call, asks_peers, mix_gradients


class Rows(NamedTuple):
    """Rows of R normalisers.

    Attributes:
        counts: values per channel, ``[R, 1]`` or a number.
        mean: ``[R, C]``.
        rstd: ``1 / sqrt(std**2 + eps)``, ``[R, C]``.
    """

    counts: Tensor | int
    mean: Tensor
    rstd: Tensor


class Normalise(torch.autograd.Function):
    """``y = xhat * w + b``, with ``xhat = (x - mean) * rstd`` of the normaliser that a sample uses.

    Keeps the input and small rows. With ``s0 = sum w dy`` and ``s1 = sum w dy xhat`` over all users
    of the normaliser S that a block joins, and S's n values per channel:
    ``dx = w dy rstd_used - rstd_S / n * (s0 + s1 * xhat_S)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        count: Tensor | int,
        mean: Tensor,
        rstd: Tensor,
        scale: Tensor | None,
        source_count: Tensor | None,
        source_mean: Tensor | None,
        source_rstd: Tensor | None,
        call: Call,
        world: World,
    ) -> Tensor:
        """Return y.

        Args:
            ctx: of autograd.
            x: ``[N, C, *]``.
            weight: ``[C]``.
            bias: ``[C]``.
            count: `Rows` of the normalisers used: see `Statistics`.
            mean: likewise.
            rstd: likewise.
            scale: ``rstd * weight``; None without a weight.
            source_count: `Rows` of those that the blocks join, if they are others.
            source_mean: likewise.
            source_rstd: likewise.
            call: what has been prepared.
            world: the ranks.
        """
        scale = rstd if scale is None else scale
        # A number stays out of the tensors to be saved.
        number, counts = (None, count) if isinstance(count, Tensor) else (count, None)
        ctx.save_for_backward(
            x, weight, mean, rstd, scale, counts, source_count, source_mean, source_rstd
        )
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.call = number, call, world
        shift = mean.new_zeros(()) if bias is None else cast(bias, mean.dtype)
        shift = shift.expand_as(mean)
        kernels, users = call.kernels, call.mixing.users
        y: Tensor = kernels.block_affine(x, call.sizes, mean, scale, shift, users)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, weight, mean, rstd, scale, counts, *of_source = ctx.saved_tensors
        number, call, world = ctx.call
        source = Rows(number if counts is None else counts, mean, rstd)
        if of_source[0] is not None:
            source = Rows(*of_source)
        arguments = dy, x, weight, mean, rstd, scale, source, call, world
        needs_dx = ctx.needs_input_grad[0]
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            dx, dweight, dbias = _gradients(needs_dx, *arguments)
        else:
            # create_graph: the first derivatives are right; a second one must not be wrong.
            with torch.no_grad():
                first = _gradients(needs_dx, *arguments)
            dx, dweight, dbias = _FirstDerivative.apply(*first, dy, x, weight)  # type: ignore[no-untyped-call]
        return (
            dx,
            None if weight is None else cast(dweight, weight.dtype),
            None if ctx.bias_dtype is None else cast(dbias, ctx.bias_dtype),
            *[None] * 9,
        )


def _gradients(
    needs_dx: bool,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    source: Rows,
    call: Call,
    world: World,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of input, weight and bias.

    Always exchanges, even where no gradient of the input is needed: a peer may need one.
    """
    kernels, sizes, (groups, users) = call.kernels, call.sizes, call.mixing
    total, dot = kernels.block_grad_sums(dy, x, sizes, mean, rstd, users)
    if asks_peers(call.plan):
        dweight, dbias, weighted = kernels.param_grads(total, dot, weight)
        total, dot = mix_gradients(weighted, call, world).unbind(dim=1)
        b = c = total
        if needs_dx:  # what has arrived is weighted already
            b, c = kernels.dx_coefficients(total, dot, source.rstd, source.rstd, source.counts)
    else:
        dweight, dbias, b, c = kernels.backward_rows(total, dot, rstd, scale, source.counts)
    if not needs_dx:
        return None, dweight, dbias
    dx = kernels.block_grad_affine(dy, x, sizes, scale, b, source.mean, c, users, groups)
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
