"""The normalisation of one rank's batch, and its exact gradient, as autograd sees them."""

from typing import Any

import torch
from torch import Tensor

from shuffle_batchnorm.kernels.rows import Running, cast

from .mixing import CALL


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
        work: Any,
        running: Running | None,
        *rows: Tensor | None,
    ) -> Tensor:
        """Return y.

        Args:
            ctx: of autograd.
            x: ``[N, C, *]``.
            weight: ``[C]``.
            bias: ``[C]``.
            work: what does it: `Local`, `TritonLocal` or `AmongRanks`.
            running: statistics to be moved, if they have not been.
            *rows: of normalisers, as its `statistics` has returned them.
        """
        ctx.work, ctx.bias_dtype = work, None if bias is None else bias.dtype
        ctx.nothing = (None,) * (2 + len(rows))
        y: Tensor
        y, rows = work.forward(x, weight, bias, rows, running)
        ctx.save_for_backward(x, weight, *rows)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, weight, *rows = ctx.saved_tensors
        arguments = dy, x, weight, ctx.bias_dtype, rows, ctx.needs_input_grad[0]
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            dx, dweight, dbias = ctx.work.gradients(*arguments)
        else:
            # create_graph: the first derivatives are right; a second one must not be wrong.
            with torch.no_grad():
                first = ctx.work.gradients(*arguments)
            dx, dweight, dbias = _FirstDerivative.apply(*first, dy, x, weight)  # type: ignore[no-untyped-call]
        return (
            dx,
            None if weight is None else cast(dweight, weight.dtype),
            None if ctx.bias_dtype is None else cast(dbias, ctx.bias_dtype),
            *ctx.nothing,
        )


# What ``Normalise.apply`` ends in where no transform of torch.func is active, in less time.
apply_directly: Any = super(torch.autograd.Function, Normalise).apply


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
