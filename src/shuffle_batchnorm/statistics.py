"""The mix: rows of block statistics in, the rows that normalise each block out, and transposed.

A row is ``[count, mean, std]``, ``2 * C + 1`` numbers; a gradient row is
``[sum w dy, sum w dy xhat]``, ``2 * C`` numbers. Rows are in float32, or float64 for float64 input,
and are pooled in float64 where the device has it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from . import exchange, kernels, notices
from .kernels.rows import are_equal, constant, counts, per_sample
from .mixing import Plan, block_sizes
from .process_groups import CALL, World

# The count in the rows of a rank that could not accept its input: that of whatever it is pooled in.
_REJECTED = -math.inf


class Statistics(NamedTuple):
    """Rows ``[groups, B, 2 * C + 1]`` of one rank, for one call of the layer.

    Attributes:
        used: of the normaliser of each block.
        source: of the normaliser in which each block is pooled; differs from `used` in `swap`.
    """

    used: Tensor
    source: Tensor


def pack(sizes: tuple[int, ...], length: int, mean: Tensor, std: Tensor, plan: Plan) -> Tensor:
    """Return rows ``[groups, B, 2 * C + 1]`` from the moments ``[groups * B, C]`` of the blocks."""
    count = counts(sizes, length, mean)
    return torch.cat([count, mean, std], dim=1).view(plan.groups, plan.per_group, -1)


def rejection(plan: Plan, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the rows that a rank sends in place of statistics if it rejects its input."""
    rows = torch.zeros(plan.groups, plan.per_group, 2 * channels + 1, dtype=dtype, device=device)
    rows[..., 0] = _REJECTED
    return rows


def unpack(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return count ``[R, 1]``, mean and std ``[R, C]`` of rows ``[..., 2 * C + 1]``."""
    rows = rows.reshape(-1, rows.shape[-1])
    channels = rows.shape[1] // 2
    count, mean, std = rows.split_with_sizes((1, channels, channels), dim=1)
    return count, mean, std


def mix(blocks: Tensor, plan: Plan, world: World) -> Statistics:
    """Return who normalises whom: the rows of each block's normalisers.

    Communication: `local` none; `swap` one rotation; `regroup` one rotation to the new groups and
    one back, or one small message with all rows to all ranks; `sync` one all_gather.
    """
    if plan.mode == "swap" and any(plan.shifts):
        return Statistics(exchange.rotate(blocks, plan, world), blocks)
    if plan.mode == "regroup" and plan.per_group > 1:
        used = _regroup(blocks, plan, world, pool)
        return Statistics(used, used)
    if plan.mode == "sync":
        row = blocks.view(1, -1, blocks.shape[-1])
        if row.shape[1] > 1:  # a single group is pooled as it is
            row = pool(row)
        if world.size > 1:
            row = pool(exchange.gather(row.view(-1), world)[None])
        used = row.expand_as(blocks)
        return Statistics(used, used)
    return Statistics(blocks, blocks)


def mix_gradients(sums: Tensor, plan: Plan, world: World) -> Tensor:
    """Return for each block the sums over all users of the normaliser that it is pooled in.

    The transpose of `mix`, with the same messages in the other direction; `sync` takes one
    all_reduce.

    Args:
        sums: ``[groups, B, 2 * C]``, sums over each local block.
        plan: how the ranks mix.
        world: the ranks.

    Returns:
        Tensor ``[groups, B, 2 * C]``.
    """
    if plan.mode == "swap":
        return exchange.rotate(sums, plan, world, inverse=True)
    if plan.mode == "regroup" and plan.per_group > 1:
        return _regroup(sums, plan, world, lambda rows: rows.sum(dim=1, keepdim=True))
    if plan.mode == "sync":
        total = sums.sum(dim=(0, 1))
        if world.size > 1:
            total = exchange.all_sum(total, world)
        return total.expand_as(sums)
    return sums


def _regroup(rows: Tensor, plan: Plan, world: World, combine: Callable[[Tensor], Tensor]) -> Tensor:
    """Return for each block the rows of its new group, combined: ``[groups, B, K]`` to the same.

    Communication: one rotation to the new groups and one back; or all rows to all ranks, where they
    fit one message, and then each rank combines the rows of all groups, as a single process does.
    """
    if not exchange.fits_one_message(rows, plan):
        combined = combine(exchange.rotate(rows, plan, world))
        return exchange.rotate(combined, plan, world, inverse=True)
    dealt = exchange.rotate(exchange.send_to_all(rows, world), plan.of_one_process(), World())
    mine = constant(plan.normalisers(), torch.int64, rows)
    return combine(dealt).flatten(0, 1).index_select(0, mine).view(rows.shape)


def pool(rows: Tensor) -> Tensor:
    """Pool rows by Chan's formula: ``[R, S, 2 * C + 1]`` to ``[R, 1, 2 * C + 1]``.

    ``n = sum n_s``, ``mean = sum n_s mean_s / n``,
    ``std**2 = sum n_s (std_s**2 + (mean_s - mean)**2) / n``. A rejected row rejects the pool.
    """
    channels = rows.shape[-1] // 2
    count, mean, std = wide(rows).split_with_sizes((1, channels, channels), dim=2)
    total = count.sum(dim=1, keepdim=True)
    share = count / total.clamp(min=1)
    pooled_mean = (share * mean).sum(dim=1, keepdim=True)
    distance = mean - pooled_mean
    variance = share * torch.addcmul(std.square(), distance, distance)
    pooled_std = variance.sum(dim=1, keepdim=True).sqrt_()
    return torch.cat([total, pooled_mean, pooled_std], dim=2).to(rows.dtype)


def wide(rows: Tensor) -> Tensor:
    """Return rows in the dtype in which they are pooled: float64 where the device has it."""
    return rows if rows.device.type == "mps" else rows.double()


def per_sample_statistics(rows: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the mean and std ``[N, C]`` of each sample's row."""
    _, mean, std = unpack(rows)
    return per_sample(mean, sizes), per_sample(std, sizes)


def own_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the mean and std ``[N, C]`` of each sample's own group, as plain BN has them."""
    sizes = block_sizes(x.shape[0], groups, 1)
    mean, std = kernels.select(x).block_moments(x, sizes)
    return per_sample(mean, sizes), per_sample(std, sizes)


def known_count(plan: Plan, world: World, shape: torch.Size) -> int | None:
    """Return the values per channel of any normaliser, where a rank knows it without its peers."""
    if world.size > 1 and plan.mode != "local":
        return None
    # In one process a new group has as many samples as any.
    return shape[2:].numel() * shape[0] // (1 if plan.mode == "sync" else plan.groups)


def check_counts(
    statistics: Statistics, sizes: tuple[int, ...], plan: Plan, world: World, shape: torch.Size
) -> None:
    """Raise if a normaliser has fewer than 2 values per channel, or its rank rejected its input.

    On the CPU the error is raised here and names the group. A GPU raises a device-side assertion,
    so that no step has to wait for the counts.
    """
    known = known_count(plan, world, shape)
    if known is not None:
        if known == 1:
            _fail(unpack(statistics.used)[0][:, 0], 0, plan, world, shape)
        return
    count = unpack(statistics.used)[0][:, 0]
    valid = count >= 2
    if not are_equal(sizes) or sizes[0] == 0:
        valid |= counts(sizes, 1, count)[:, 0] == 0  # nobody is normalised
    if torch.compiler.is_compiling() or count.device.type != "cpu":
        torch._assert_async(
            valid.all(),
            f"{CALL}: a peer rejected its input, or a normaliser has 1 value per channel",
        )
    elif not bool(valid.all()):
        _fail(count, int(valid.int().argmin()), plan, world, shape)


def _fail(count: Tensor, row: int, plan: Plan, world: World, shape: torch.Size) -> NoReturn:
    error = _count_error(count, row, plan, shape)
    if plan.mode != "local":
        notices.report_failure(world, str(error))
    raise error


def _count_error(count: Tensor, row: int, plan: Plan, shape: torch.Size) -> Exception:
    group = plan.rank * plan.groups + row // plan.per_group
    normaliser = plan.normaliser(group, row % plan.per_group)
    n = float(count[row])
    if n == _REJECTED:
        return RuntimeError(
            f"{CALL}: a peer of rank {plan.rank} rejected its input in this call, so group "
            f"{normaliser} has no statistics to normalise group {group} with; see the peer's error"
        )
    whole = "all groups" if plan.mode == "sync" else f"group {normaliser}"
    return ValueError(
        f"{CALL}: expected more than 1 value per channel when training, got {n:g} in {whole}, "
        f"which normalises group {group} on rank {plan.rank} (mode {plan.mode!r}, input shape "
        f"{tuple(shape)})"
    )
