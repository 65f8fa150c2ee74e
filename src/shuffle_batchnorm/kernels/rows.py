"""From samples ``[N, C]`` to blocks ``[blocks, C]`` and back, for the kernels in plain torch."""

import torch
from torch import Tensor

Sizes = tuple[int, ...]


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of all sums and statistics of `x`: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def block_sum(samples: Tensor, sizes: Sizes) -> Tensor:
    """Sum the samples of each block: ``[N, C]`` to ``[blocks, C]``, 0 for an empty block."""
    if _equal(sizes):
        return samples.reshape(len(sizes), sizes[0], samples.shape[1]).sum(dim=1)
    return torch.stack([block.sum(dim=0) for block in samples.split(sizes)])


def per_sample(rows: Tensor, sizes: Sizes) -> Tensor:
    """Give each sample its block's row: ``[blocks, C]`` to ``[N, C]``."""
    if _equal(sizes):
        return rows.repeat_interleave(sizes[0], dim=0)
    return torch.cat([row.expand(n, -1) for row, n in zip(rows.split(1), sizes, strict=True)])


def reciprocal_counts(sizes: Sizes, length: int, like: Tensor) -> Tensor | float:
    """Return ``1 / (samples * length)`` per block, to be multiplied with ``[blocks, C]``.

    An empty block has 1, so that its zero sums stay 0.
    """
    inverses = [1.0 / max(n * length, 1) for n in sizes]
    if _equal(sizes):
        return inverses[0]
    # Filled on the device: a tensor made from a list would stop a GPU and break graph capture.
    return torch.cat([like.new_full((1, 1), inverse) for inverse in inverses])


def _equal(sizes: Sizes) -> bool:
    return all(n == sizes[0] for n in sizes)
