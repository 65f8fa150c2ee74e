"""Rows ``[R, C]`` in plain torch: from samples to blocks and back, and what else lies between.

The R rows are of blocks, groups of blocks or normalisers. `count`, the values per channel of each,
is a number, or ``[R, 1]`` across ranks. On a GPU, where each of these operations takes as long to
launch, `TritonLocal` and `TritonRanks` do all that lies between in a launch or two.
"""

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Sizes = tuple[int, ...]  # samples of each block
Order = tuple[int, ...]  # numbers of rows


class BlockGroups(NamedTuple):
    """The group of each block; every group has as many blocks, and as many samples.

    Attributes:
        number: of groups.
        owners: the group of each block.
        step: where each group's blocks are in groups this far apart, that distance. A compiler then
            needs no table of owners: block c of i is in group ``i + owners[0] + step * c``.
    """

    number: int
    owners: Order
    step: int | None = None

    @property
    def members(self) -> int:
        """The blocks of each group."""
        return len(self.owners) // self.number

    @property
    def order(self) -> Order:
        """The blocks of group 0, then those of group 1, and so on."""
        return _argsort(self.owners) if torch.compiler.is_compiling() else _sorted(self.owners)


Groups = BlockGroups | None  # None: each block is a group of its own


class Exchange(NamedTuple):
    """Which rows of blocks leave a rank, and which rows it merges.

    Attributes:
        sent: the block of each row that leaves.
        arriving: how many rows arrive.
        members: of each row that is merged. Rows are those of the blocks, then those sent, then
            those that have arrived.
    """

    sent: Order
    arriving: int
    members: tuple[Order, ...]


def _argsort(owners: Order) -> Order:
    return tuple(sorted(range(len(owners)), key=owners.__getitem__))


_sorted = lru_cache(maxsize=1024)(_argsort)


class Running(NamedTuple):
    """Running statistics, and how far a batch moves them.

    Attributes:
        mean: ``[C]``.
        var: ``[C]``.
        step: the share of the batch in what they become.
        number: of batches, which `triton_local` counts; elsewhere the layer has.
    """

    mean: Tensor
    var: Tensor
    step: float | Tensor
    number: Tensor | None = None


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of all sums and statistics of `x`: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in this dtype, itself if it has it: a call of `to` takes time for nothing."""
    # And torch 2.11 compiles an output that was cast to the same dtype to a gradient of zeros.
    return x if x.dtype == dtype else x.to(dtype)


def widen(x: Tensor) -> Tensor:
    """Return a tensor in the dtype of its statistics."""
    return cast(x, accumulation_dtype(x))


def has_numbers(x: Tensor) -> bool:
    """Return whether a program may read a tensor's numbers: it isn't fake, nor being traced."""
    mode_of, kinds = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    traced = mode_of(kinds.FAKE) is not None or mode_of(kinds.PROXY) is not None
    return not (traced or hasattr(x, "fake_mode"))


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


def take(rows: Tensor, order: Order | None) -> Tensor:
    """Return the rows ``[R, C]`` in this order, of which None is their own."""
    return rows if order is None else rows.index_select(0, constant(order, torch.int64, rows))


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
        positions = _positions_in_graph(sizes, samples)
    else:
        positions = constant(_positions(sizes), torch.int64, samples)
    filled = rows.index_select(0, positions)
    return filled.view(len(sizes), len(positions) // len(sizes), rows.shape[1]).sum(dim=1)


def widest(rows: Tensor) -> Tensor:
    """Return rows in float64, where the device has it."""
    return rows if rows.device.type == "mps" else rows.double()


def merge_moments(rows: Tensor) -> Tensor:
    """Merge rows by Chan's formula: ``[R, S, 2 * C + 1]`` to ``[R, 1, 2 * C + 1]``.

    ``n = sum n_s``, ``mean = sum n_s mean_s / n``,
    ``std**2 = sum n_s (std_s**2 + (mean_s - mean)**2) / n``. A rejected row, of count -inf, rejects
    what it is merged to.
    """
    channels = rows.shape[-1] // 2
    wide = widest(rows)
    count, mean, std = wide.split_with_sizes((1, channels, channels), dim=2)
    total = count.sum(dim=1, keepdim=True)
    share = count / total.clamp(min=1)
    merged_mean = (share * mean).sum(dim=1, keepdim=True)
    distance = mean - merged_mean
    variance = share * torch.addcmul(std.square(), distance, distance)
    merged_std = variance.sum(dim=1, keepdim=True).sqrt_()
    return torch.cat([total, merged_mean, merged_std], dim=2).to(rows.dtype)


def normaliser_rows(
    mean: Tensor,
    std: Tensor,
    weight: Tensor | None,
    eps: float,
    count: Tensor | int,
    running: Running | None,
) -> tuple[Tensor, Tensor]:
    """Return ``rstd = 1 / sqrt(std**2 + eps)`` and ``rstd * weight``, each ``[R, C]``.

    Moves running statistics towards the average of the normalisers' means and unbiased variances,
    ``std**2 * count / (count - 1)``.
    """
    if running is not None and (isinstance(count, Tensor) or count > 0):
        move(running.mean, _average(mean), running.step)
        move(running.var, _average(unbiased_variance(std, count)), running.step)
    # hypot: the square of a deviation that fits the dtype may not.
    root = math.sqrt(eps)
    if torch.compiler.is_compiling():
        rstd = torch.hypot(std, std.new_full((), root)).reciprocal_()
    else:
        rstd = torch.hypot(std, constant((root,), std.dtype, std)).reciprocal_()
    return rstd, rstd if weight is None else rstd * cast(weight, rstd.dtype)


def unbiased_variance(std: Tensor, count: Tensor | int) -> Tensor:
    """Return ``std**2 * count / (count - 1)``."""
    less = (count - 1).clamp(min=1) if isinstance(count, Tensor) else count - 1
    return std.square().mul_(count / less)


def _average(rows: Tensor) -> Tensor:
    """Return the mean of rows, ``[R, C]`` to ``[C]``."""
    return rows[0] if rows.shape[0] == 1 else rows.mean(dim=0)


def _total(rows: Tensor) -> Tensor:
    """Return the sum of rows, ``[R, C]`` to ``[C]``."""
    return rows[0] if rows.shape[0] == 1 else rows.sum(dim=0)


def move(running: Tensor, new: Tensor, step: float | Tensor) -> None:
    """Move running statistics ``[C]`` a step towards new ones, in the dtype of these."""
    step = step.to(new.dtype) if isinstance(step, Tensor) else step
    if running.dtype == new.dtype:
        running.lerp_(new, step)
    else:
        running.copy_(running.to(new.dtype).lerp_(new, step))


def param_grads(total: Tensor, dot: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of weight and bias, ``[C]``, and what ranks exchange, ``[R, 2, C]``.

    Of the sums of ``dy`` and of ``dy xhat``, ``[R, C]``: their sums, and both times the weight.
    """
    sums = torch.stack([total, dot], dim=1)
    weighted = sums if weight is None else sums * cast(weight, sums.dtype)
    return _total(dot), _total(total), weighted


def dx_coefficients(
    total: Tensor, dot: Tensor, rstd: Tensor, factor: Tensor, count: Tensor | int
) -> tuple[Tensor, Tensor]:
    """Return ``b = -factor dot rstd / count`` and ``c = -factor total / count``, each ``[R, C]``.

    So that ``b (x - mean) + c`` is what the statistics pass back to each value of a normaliser.
    """
    # 0, where it is a number: no values to multiply by infinity.
    step = factor / (-count.clamp(min=1) if isinstance(count, Tensor) else -count)
    return (step * dot).mul_(rstd), step * total


def backward_rows(
    total: Tensor, dot: Tensor, rstd: Tensor, factor: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of weight and bias, ``[C]``, and `dx_coefficients`.

    Of the sums of ``dy`` and of ``dy xhat`` over the users of each normaliser, ``[R, C]``.
    """
    b, c = dx_coefficients(total, dot, rstd, factor, count)
    return _total(dot), _total(total), b, c


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
def _owners(sizes: Sizes) -> Order:
    """Return the block of each sample."""
    return tuple(k for k, n in enumerate(sizes) for _ in range(n))


@lru_cache(maxsize=1024)
def _positions(sizes: Sizes) -> Order:
    """Return each block's samples, then N, as often as they are fewer than in the longest block."""
    n, longest = sum(sizes), max(sizes)
    ends = itertools.accumulate(sizes)
    return tuple(
        k if k < end else n
        for size, end in zip(sizes, ends, strict=True)
        for k in range(end - size, end - size + longest)
    )


def _positions_in_graph(sizes: Sizes, like: Tensor) -> Tensor:
    """Return `_positions`, for sizes that may be symbols: the first block is the longest."""
    size = _tensor_in_graph(sizes, like)[:, None]
    k = torch.arange(sizes[0], device=like.device)
    return torch.where(k < size, size.cumsum(0) - size + k, like.shape[0]).view(-1)


def _tensor_in_graph(sizes: Sizes, like: Tensor) -> Tensor:
    """Return sizes, which may be symbols, as a tensor that is computed inside a graph."""
    return torch.tensor(sizes, dtype=torch.int64, device=like.device)
