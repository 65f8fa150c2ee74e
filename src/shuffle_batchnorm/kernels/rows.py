"""From samples ``[N, C]`` to blocks ``[blocks, C]`` and back, for the kernels in plain torch."""

import itertools
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Sizes = tuple[int, ...]  # samples of each block
Order = tuple[int, ...]  # numbers of rows


class Pools(NamedTuple):
    """Which blocks are pooled, or share a row: as many blocks, and as many samples, in every pool.

    The batch is as many equal parts in a row as there are pools, a group each. Where moments are
    pooled, the first block of part p, the longest, belongs to pool p.

    Attributes:
        number: of pools.
        dealt: the blocks of the first pool, then those of the second, and so on.
        owners: the pool of each block.
    """

    number: int
    dealt: Order
    owners: Order

    @property
    def members(self) -> int:
        """The blocks of each pool."""
        return len(self.dealt) // self.number


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of all sums and statistics of `x`: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widen(x: Tensor) -> Tensor:
    """Return a tensor in the dtype of its statistics."""
    return x.to(accumulation_dtype(x))


def has_numbers(x: Tensor) -> bool:
    """Return whether a program may look at a tensor's numbers: it isn't fake, nor being traced."""
    mode_of, kinds = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    traced = mode_of(kinds.FAKE) is not None or mode_of(kinds.PROXY) is not None
    return not (traced or hasattr(x, "fake_mode"))


def block_sum(samples: Tensor, sizes: Sizes) -> Tensor:
    """Sum the samples of each block: ``[N, C]`` to ``[blocks, C]``, 0 for an empty block.

    Where a block is a sample, that is `samples` itself.
    """
    if are_equal(sizes):
        if is_known(sizes[0] == 1):
            return samples
        return samples.reshape(len(sizes), sizes[0], samples.shape[1]).sum(dim=1)
    # Shorter blocks are filled up with a row of zeros. (index_add_ adds in any order on a GPU, and
    # takes 90 ms on a CPU in torch 2.13.)
    rows = torch.cat([samples, samples.new_zeros(1, samples.shape[1])])
    if torch.compiler.is_compiling():
        places = _places_in_graph(sizes, samples)
    else:
        places = constant(_places(sizes), torch.int64, samples)
    filled = rows.index_select(0, places).view(len(sizes), len(places) // len(sizes), rows.shape[1])
    return filled.sum(dim=1)


def pool_sum(sums: Tensor, pools: Pools | None) -> Tensor:
    """Sum the blocks of each pool: ``[blocks, C]`` to ``[pools, C]``; None: no pools."""
    if pools is None:
        return sums
    dealt = take(sums, pools.dealt)
    if pools.members == 1:
        return dealt
    return dealt.view(pools.number, pools.members, -1).sum(dim=1)


def take(rows: Tensor, order: Order | None) -> Tensor:
    """Return the rows ``[R, C]`` in this order, of which None is their own."""
    return rows if order is None else rows.index_select(0, constant(order, torch.int64, rows))


def take_pools(pools: Pools | None, *rows: Tensor) -> tuple[Tensor, ...]:
    """Give each block the row of its pool: ``[pools, C]`` to ``[blocks, C]``; None: no pools."""
    return rows if pools is None else tuple(take(row, pools.owners) for row in rows)


def pool(rows: Tensor) -> Tensor:
    """Pool rows by Chan's formula: ``[R, S, 2 * C + 1]`` to ``[R, 1, 2 * C + 1]``.

    ``n = sum n_s``, ``mean = sum n_s mean_s / n``,
    ``std**2 = sum n_s (std_s**2 + (mean_s - mean)**2) / n``. A rejected row rejects the pool.
    """
    channels = rows.shape[-1] // 2
    # In float64, where the device has it.
    wide = rows if rows.device.type == "mps" else rows.double()
    count, mean, std = wide.split_with_sizes((1, channels, channels), dim=2)
    total = count.sum(dim=1, keepdim=True)
    share = count / total.clamp(min=1)
    pooled_mean = (share * mean).sum(dim=1, keepdim=True)
    distance = mean - pooled_mean
    variance = share * torch.addcmul(std.square(), distance, distance)
    pooled_std = variance.sum(dim=1, keepdim=True).sqrt_()
    return torch.cat([total, pooled_mean, pooled_std], dim=2).to(rows.dtype)


def pool_moments(
    mean: Tensor, std: Tensor, sizes: Sizes, pools: Pools | None
) -> tuple[Tensor, Tensor]:
    """Pool moments of blocks, ``[blocks, C]`` each to ``[pools, C]``; None: no pools."""
    if pools is None:
        return mean, std
    rows = take(torch.cat([counts(sizes, 1, mean), mean, std], dim=1), pools.dealt)
    shape = pools.number, pools.members, rows.shape[1]
    pooled = pool(rows.view(shape)).flatten(0, 1)
    _, mean, std = pooled.split_with_sizes((1, mean.shape[1], mean.shape[1]), dim=1)
    return mean, std


def samples_of_pools(sizes: Sizes, pools: Pools | None, like: Tensor) -> Tensor | int:
    """Return the samples of each pool, at least 1: ``[pools, 1]``, or a number if all have as many.

    None: a block is a pool.
    """
    if pools is not None:
        return max(1, sum(sizes) // pools.number)
    if are_equal(sizes):
        return max(1, sizes[0])
    return counts(sizes, 1, like).clamp(min=1)


def per_sample(rows: Tensor, sizes: Sizes) -> Tensor:
    """Give each sample its block's row: ``[blocks, C]`` to ``[N, C]``."""
    if are_equal(sizes):
        return rows[:, None].expand(-1, sizes[0], -1).flatten(0, 1)
    if torch.compiler.is_compiling():
        ends = _tensor_in_graph(sizes, rows).cumsum(0)
        samples = torch.arange(sum(sizes), device=rows.device)
        owners = torch.searchsorted(ends, samples, right=True)
    else:
        owners = constant(_owners(sizes), torch.int64, rows)
    return rows.index_select(0, owners)


def counts(sizes: Sizes, length: int, like: Tensor) -> Tensor:
    """Return the values per channel of each block, ``[blocks, 1]`` in the dtype of `like`."""
    if torch.compiler.is_compiling():
        if are_equal(sizes):
            return like.new_full((len(sizes), 1), sizes[0] * length)
        return (_tensor_in_graph(sizes, like) * length).to(like.dtype)[:, None]
    return constant(tuple(n * length for n in sizes), like.dtype, like)[:, None]


def _places_in_graph(sizes: Sizes, like: Tensor) -> Tensor:
    """Return `_places`, for sizes that may be symbols: the first block is the longest."""
    size = _tensor_in_graph(sizes, like)[:, None]
    k = torch.arange(sizes[0], device=like.device)
    return torch.where(k < size, size.cumsum(0) - size + k, like.shape[0]).view(-1)


def _tensor_in_graph(sizes: Sizes, like: Tensor) -> Tensor:
    """Return sizes, which may be symbols, as a tensor that is computed inside a graph."""
    return torch.stack([like.new_full((), n, dtype=torch.int64) for n in sizes])


def constant(values: tuple[float, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return numbers as a tensor on the device of `like`, without a copy to it at every step."""
    # A tensor made while tracing belongs to that trace.
    if type(like) is not Tensor or torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=like.device)
    tensor = _cached(values, dtype, like.device)
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        _in_cuda_graphs.add(tensor)
    return tensor


# What a graph reads at every replay must outlive its entry in the cache.
_in_cuda_graphs: set[Tensor] = set()


@lru_cache(maxsize=1024)
def _cached(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@lru_cache(maxsize=1024)
def _owners(sizes: Sizes) -> tuple[int, ...]:
    """Return the block of each sample."""
    return tuple(k for k, n in enumerate(sizes) for _ in range(n))


@lru_cache(maxsize=1024)
def _places(sizes: Sizes) -> tuple[int, ...]:
    """Return each block's samples, then N, as often as they are fewer than in the longest block."""
    n, longest = sum(sizes), max(sizes)
    ends = itertools.accumulate(sizes)
    return tuple(
        k if k < end else n
        for size, end in zip(sizes, ends, strict=True)
        for k in range(end - size, end - size + longest)
    )


def are_equal(sizes: Sizes) -> bool:
    """Return whether all blocks have the same number of samples.

    Under a compiler, whether they have in every batch that the graph is for.
    """
    # As tensor_split cuts a group, sizes fall by at most one from its first block to its last.
    first, last = sizes[0], sizes[-1]
    return first is last or is_known(first == last)


def is_known(condition: bool) -> bool:
    """Return whether a condition holds; under a compiler, in all batches that the graph is for."""
    if not torch.compiler.is_compiling():
        return condition
    # An import that takes long, of what a compiler has imported.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)
