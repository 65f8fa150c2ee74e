"""The two layouts that kernels work on: planes ``[N, C, L]`` and lines ``[N, L, C]``."""

import torch
from torch import Tensor


def layout(x: Tensor) -> tuple[Tensor, bool]:
    """Return ``[N, C, *]``, copied if it has neither layout, and whether it is in lines.

    ``L = 1`` is in lines too: planes of one value have nothing to sum. ``C = 1`` is in planes.
    """
    if x.is_contiguous() and x.shape[2:].numel() > 1:
        return x, False
    if _in_lines(x):
        return x, True
    if not x.is_contiguous():
        dense = torch.empty_like(x)  # in the same order of axes: lines with gaps become lines
        if _in_lines(dense):
            return dense.copy_(x), True
    return x.contiguous(), False


def as_layout(dy: Tensor, lines: bool) -> Tensor:
    """Return a gradient in the layout of the input, copied if it has another."""
    return dy.movedim(1, -1).contiguous().movedim(-1, 1) if lines else dy.contiguous()


def _in_lines(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()
