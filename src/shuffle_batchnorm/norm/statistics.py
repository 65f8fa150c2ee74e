"""The mix: statistics of blocks in, those that normalise each block out, and transposed.

In one process a kernel pools the blocks. Ranks exchange rows of them: ``[count, mean, std]``,
``2 * C + 1`` numbers, and gradient rows ``[sum w dy, sum w dy xhat]``, ``2 * C`` numbers. Rows are
in float32, or float64 for float64 input, and are pooled in float64 where the device has it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from shuffle_batchnorm.comm import collectives, failures
from shuffle_batchnorm.comm.world import CALL, World
from shuffle_batchnorm.kernels import select
from shuffle_batchnorm.kernels.rows import (
    BlockGroups,
    Order,
    are_equal,
    constant,
    counts,
    per_sample,
    take,
)

from .mixing import Plan, block_sizes, kept

# The count in the rows of a rank that could not accept its input: that of whatever it is pooled in.
_REJECTED = -math.inf


class Moments(NamedTuple):
    """Count and moments of the values of R groups, as ranks send them.

    Attributes:
        values: per channel, ``[R, 1]``.
        mean: ``[R, C]``.
        std: ``[R, C]``.
    """

    values: Tensor
    mean: Tensor
    std: Tensor


class Statistics(NamedTuple):
    """The R normalisers that a rank has to do with in one call of the layer.

    Attributes:
        values: per channel, ``[R, 1]``; a number, if all have as many and no peer has to be asked.
        mean: ``[R, C]``.
        std: ``[R, C]``.
        used: the normaliser of each block; None if it is the one of the same number, as it is
            across ranks.
        source: across ranks in `swap` the group of each block; else a block is pooled in the
            normaliser that it uses, or, in one process, `find_way` says in which.
    """

    values: Tensor | int
    mean: Tensor
    std: Tensor
    used: Order | None = None
    source: Moments | None = None


class Way(NamedTuple):
    """What becomes of the blocks in one process: see `Statistics`.

    Attributes:
        pools: of blocks, each a normaliser; None: each block is one.
        users: of blocks, by the normaliser that they use; None: each uses its own.
    """

    pools: BlockGroups | None = None
    users: BlockGroups | None = None


@kept
def find_way(plan: Plan) -> Way:
    """Return the way of a plan in one process."""
    used = plan.normalisers()
    users = BlockGroups(plan.groups, used)
    if plan.mode == "swap" and any(plan.shifts):
        return Way(None, users)
    if plan.mode == "regroup" and plan.groups > 1 and plan.per_group > 1:
        return Way(users, users)
    return Way()


def asks_peers(plan: Plan, world: World) -> bool:
    """Return whether the statistics of other ranks are needed, or theirs of this one."""
    return world.size > 1 and plan.mode != "local"


def statistics_of(x: Tensor, sizes: tuple[int, ...], plan: Plan, world: World) -> Statistics:
    """Return the statistics behind a call with this rank's input ``[N, C, *]``.

    Communication: that of `mix`.
    """
    kernel = select.select(x)
    if not asks_peers(plan, world):
        way = find_way(plan)
        mean, std = kernel.block_moments(x, sizes, way.pools)
        # A new group has as many as any.
        values = x.shape[2:].numel() * (x.shape[0] // plan.groups)
        return Statistics(values, mean, std, way.users and way.users.owners)
    mean, std = kernel.block_moments(x, sizes)
    rows = torch.cat([counts(sizes, x.shape[2:].numel(), mean), mean, std], dim=1)
    used_rows, source_rows = mix(rows.view(plan.groups, plan.per_group, -1), plan, world)
    source = None if source_rows is used_rows else _unpack(source_rows)
    return Statistics(*_unpack(used_rows), source=source)


def rejection(plan: Plan, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the rows that a rank sends in place of statistics if it rejects its input."""
    rows = torch.zeros(plan.groups, plan.per_group, 2 * channels + 1, dtype=dtype, device=device)
    rows[..., 0] = _REJECTED
    return rows


def _unpack(rows: Tensor) -> Moments:
    """Return the moments in rows ``[..., 2 * C + 1]``."""
    rows = rows.reshape(-1, rows.shape[-1])
    channels = rows.shape[1] // 2
    count, mean, std = rows.split_with_sizes((1, channels, channels), dim=1)
    return Moments(count, mean, std)


def mix(blocks: Tensor, plan: Plan, world: World) -> tuple[Tensor, Tensor]:
    """Return the rows of each block's normaliser, and of the one in which the block is pooled.

    Of two ranks or more. All are ``[groups, B, 2 * C + 1]``.

    Communication: `local` none; `swap` one rotation; `regroup` one rotation to the new groups and
    one back, or one small message with all rows to all ranks; `sync` one all_gather.
    """
    if plan.mode == "swap" and any(plan.shifts):
        return collectives.rotate(blocks, plan, world), blocks
    if plan.mode == "regroup" and plan.per_group > 1:
        used = _regroup(blocks, plan, world, select.select(blocks).merge_moments)
        return used, used
    if plan.mode == "sync":
        used = select.select(blocks).merge_moments(collectives.gather(blocks.view(-1), world)[None])
        return used, used
    return blocks, blocks


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
        return collectives.rotate(sums, plan, world, inverse=True)
    if plan.mode == "regroup" and plan.per_group > 1:
        return _regroup(sums, plan, world, lambda rows: rows.sum(dim=1, keepdim=True))
    if plan.mode == "sync":
        return collectives.all_sum(sums.view(-1), world).view_as(sums)
    return sums


def sums_of_sources(sums: Tensor, plan: Plan, world: World) -> tuple[Tensor, Tensor]:
    """Return for each of this rank's blocks the sums over all users of its source.

    Args:
        sums: ``sum w dy`` and ``sum w dy xhat`` over each of them, ``[blocks, 2, C]``.
        plan: how the ranks mix.
        world: the ranks.

    Returns:
        The same two, ``[blocks, C]`` each.

    Communication: that of `mix_gradients`.
    """
    mixed = mix_gradients(sums.view(plan.groups, plan.per_group, -1), plan, world)
    mixed = mixed.reshape(sums.shape)
    return mixed[:, 0], mixed[:, 1]


def _regroup(rows: Tensor, plan: Plan, world: World, combine: Callable[[Tensor], Tensor]) -> Tensor:
    """Return for each block the rows of its new group, combined: ``[groups, B, K]`` to the same.

    Communication: one rotation to the new groups and one back; or all rows to all ranks, where they
    fit one message, and then each rank combines the rows of all groups.
    """
    if not collectives.fits_one_message(rows, plan):
        combined = combine(collectives.rotate(rows, plan, world))
        return collectives.rotate(combined, plan, world, inverse=True)
    dealt = collectives.rotate(collectives.send_to_all(rows, world), plan.of_one_process(), World())
    mine = constant(plan.normalisers(), torch.int64, rows)
    return combine(dealt).flatten(0, 1).index_select(0, mine).view(rows.shape)


def per_sample_statistics(statistics: Statistics, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the mean and std ``[N, C]`` that normalised each sample."""
    mean, std = (take(rows, statistics.used) for rows in (statistics.mean, statistics.std))
    return per_sample(mean, sizes), per_sample(std, sizes)


def own_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the mean and std ``[N, C]`` of each sample's own group, as plain BN has them."""
    sizes = block_sizes(x.shape[0], groups, 1)
    mean, std = select.select(x).block_moments(x, sizes)
    return per_sample(mean, sizes), per_sample(std, sizes)


def check_counts(
    statistics: Statistics, sizes: tuple[int, ...], plan: Plan, world: World, shape: torch.Size
) -> None:
    """Raise if a normaliser has fewer than 2 values per channel, or its rank rejected its input.

    On the CPU the error is raised here and names the group. A GPU raises a device-side assertion,
    so that no step has to wait for the counts.
    """
    values = statistics.values
    if not isinstance(values, Tensor):
        if values == 1:
            raise _count_error(1, 0, plan, shape)
        return
    count = values[:, 0]
    valid = count >= 2
    if not are_equal(sizes) or sizes[0] == 0:
        valid |= counts(sizes, 1, count)[:, 0] == 0  # nobody is normalised
    if torch.compiler.is_compiling() or count.device.type != "cpu":
        torch._assert_async(
            valid.all(),
            f"{CALL}: a peer rejected its input, or a normaliser has 1 value per channel",
        )
    elif not bool(valid.all()):
        row = int(valid.int().argmin())
        error = _count_error(float(count[row]), row, plan, shape)
        failures.report_failure(world, str(error))
        raise error


def _count_error(n: float, row: int, plan: Plan, shape: torch.Size) -> Exception:
    if plan.mode == "sync":  # which has one group per rank
        source, user = "the whole of all ranks", f"rank {plan.rank}"
    else:
        group = plan.rank * plan.groups + row // plan.per_group
        source = f"group {plan.normaliser(group, row % plan.per_group)}"
        user = f"group {group} on rank {plan.rank}"
    if n == _REJECTED:
        return RuntimeError(
            f"{CALL}: a peer of rank {plan.rank} rejected its input in this call, so {source} has "
            f"no statistics to normalise {user} with; see the peer's error"
        )
    return ValueError(
        f"{CALL}: expected more than 1 value per channel when training, got {n:g} in {source}, "
        f"which normalises {user} (mode {plan.mode!r}, input shape {tuple(shape)})"
    )
