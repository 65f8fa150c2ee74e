"""The two layouts that kernels work on: contiguous ``[N, C, L]``, channels-last ``[N, L, C]``."""

import torch
from torch import Tensor


def layout(x: Tensor) -> tuple[Tensor, bool]:
    """Return ``[N, C, *]``, copied if it has neither layout, and whether it is channels-last.

    ``L = 1`` counts as channels-last: a plane of one value has nothing to sum. ``C = 1`` counts as
    contiguous.
    """
    if x.is_contiguous():
        return x, x.ndim == 2 or x.shape[2:].numel() == 1
    if _is_channels_last(x):
        return x, True
    dense = torch.empty_like(x)  # the same order of axes: channels-last with gaps, without them
    if _is_channels_last(dense):
        return dense.copy_(x), True
    return layout(x.contiguous())


def as_layout(dy: Tensor, channels_last: bool) -> Tensor:
    """Return a gradient in the layout of the input, copied if it has another."""
    if channels_last and dy.ndim > 2:
        return dy.movedim(1, -1).contiguous().movedim(-1, 1)
    return dy.contiguous()


def _is_channels_last(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()
