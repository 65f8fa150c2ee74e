"""From samples ``[N, C]`` to blocks ``[blocks, C]`` and back, for the kernels in plain torch."""

from functools import lru_cache

import torch
from torch import Tensor

Sizes = tuple[int, ...]


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of all sums and statistics of `x`: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def block_sum(samples: Tensor, sizes: Sizes) -> Tensor:
    """Sum the samples of each block: ``[N, C]`` to ``[blocks, C]``, 0 for an empty block."""
    if are_equal(sizes):
        return samples.reshape(len(sizes), sizes[0], samples.shape[1]).sum(dim=1)
    if samples.device.type != "cpu" or torch.compiler.is_compiling():
        # index_add_ adds in an order of its own on a GPU.
        return torch.stack([block.sum(dim=0) for block in samples.split(sizes)])
    sums = samples.new_zeros(len(sizes), samples.shape[1])
    return sums.index_add_(0, _owners(sizes, samples), samples)


def per_sample(rows: Tensor, sizes: Sizes) -> Tensor:
    """Give each sample its block's row: ``[blocks, C]`` to ``[N, C]``."""
    if are_equal(sizes):
        return rows.repeat_interleave(sizes[0], dim=0)
    if torch.compiler.is_compiling():
        # Without a loop over samples, so that a symbolic batch stays symbolic.
        return torch.cat([row.expand(n, -1) for row, n in zip(rows.split(1), sizes, strict=True)])
    return rows.index_select(0, _owners(sizes, rows))


def counts(sizes: Sizes, length: int, like: Tensor) -> Tensor:
    """Return the values per channel of each block, ``[blocks, 1]`` in the dtype of `like`."""
    if are_equal(sizes):
        return like.new_full((len(sizes), 1), sizes[0] * length)
    if torch.compiler.is_compiling():
        return torch.cat([like.new_full((1, 1), n * length) for n in sizes])
    return constant(tuple(n * length for n in sizes), like.dtype, like)[:, None]


def constant(values: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return numbers as a tensor on the device of `like`, without a copy to it at every step."""
    # A tensor made while tracing belongs to that trace.
    if type(like) is not Tensor or torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=like.device)
    return _cached(values, dtype, like.device)


@lru_cache(maxsize=1024)
def _cached(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def _owners(sizes: Sizes, like: Tensor) -> Tensor:
    """Return the block of each sample, ``[N]``."""
    return constant(tuple(k for k, n in enumerate(sizes) for _ in range(n)), torch.int64, like)


def are_equal(sizes: Sizes) -> bool:
    """Return whether all blocks have the same number of samples."""
    # As tensor_split cuts a group, sizes fall by at most one from its first block to its last.
    return sizes[0] == sizes[-1]
