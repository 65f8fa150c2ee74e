"""The mix: statistics of blocks in, those that normalise each block out, and transposed.

In one process a kernel merges the blocks. Ranks exchange rows of them: ``[count, mean, std]``,
``2 * C + 1`` numbers, and gradient rows ``[sum w dy, sum w dy xhat]``, ``2 * C`` numbers. Rows are
in float32, or float64 for float64 input, and are merged in float64 where the device has it.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shuffle_batchnorm.comm import collectives, failures
from shuffle_batchnorm.comm.world import World
from shuffle_batchnorm.kernels import select
from shuffle_batchnorm.kernels.local import Local, own_class, prepare
from shuffle_batchnorm.kernels.rows import (
    BlockGroups,
    Exchange,
    Order,
    are_equal,
    counts,
    is_known,
    per_sample,
    take,
)
from shuffle_batchnorm.kernels.select import Kernels

from .mixing import CALL, Plan, block_sizes
from .routes import Route, exchange_of, find_route, gather_members

# The count in the rows of a rank that could not accept its input: that of all they are merged with.
_REJECTED = -math.inf


class Moments(NamedTuple):
    """Count and moments of R groups of values, as ranks send them.

    Attributes:
        counts: values per channel, ``[R, 1]``.
        mean: ``[R, C]``.
        std: ``[R, C]``.
    """

    counts: Tensor
    mean: Tensor
    std: Tensor


class Statistics(NamedTuple):
    """The statistics that normalise a rank's blocks, among several ranks.

    Attributes:
        used: of the normaliser that each block uses.
        source: of this rank's own blocks, where other ranks use them and the blocks do not: in
            `swap`.
    """

    used: Moments
    source: Moments | None


class StatisticsRecord(NamedTuple):
    """The statistics of one call of one layer, each ``[N, C]``, one row per sample.

    Attributes:
        name: the layer's name in the module given to `record_statistics`.
        own_mean: mean of the sample's own group.
        own_var: biased variance of the sample's own group.
        used_mean: mean that normalised the sample.
        used_var: biased variance that normalised it; in eval mode the running variance.
    """

    name: str
    own_mean: Tensor
    own_var: Tensor
    used_mean: Tensor
    used_var: Tensor


class RowFormat(NamedTuple):
    """The form of the rows that ranks exchange."""

    channels: int
    dtype: torch.dtype


class Call(NamedTuple):
    """What follows from the shapes, dtypes and options of a training call alone.

    Attributes:
        plan: how the ranks mix.
        sizes: samples per block.
        row_format: of what ranks exchange.
        kernels: those for the input.
        doing: what ranks do when they exchange rows of statistics, and of gradients.
        local: what one process does that asks no peer; None if there are peers to ask.
        ranks: what a rank that has peers to ask prepares for them, if its kernels can.
        moves_later: whether running statistics move there in the elementwise pass, not before.
        used: the normaliser of each block there; None if it is the one of the same number.
        route: of statistics to the ranks that use them, if there is one.
        back: of gradients, likewise.
    """

    plan: Plan
    sizes: tuple[int, ...]
    row_format: RowFormat
    kernels: Kernels
    doing: tuple[str, str]
    local: Any = None
    ranks: Any = None
    moves_later: bool = False
    used: Order | None = None
    route: Route | None = None
    back: Route | None = None


def prepare_call(
    plan: Plan, sizes: tuple[int, ...], row_format: RowFormat, kernels: Kernels
) -> Call:
    """Find which rows travel; without peers, see `prepare_local`."""
    call = Call(plan, sizes, row_format, kernels, _doing(plan, row_format))
    if not plan.shuffles:
        return call
    return call._replace(route=find_route(plan), back=find_route(plan.transposed()))


def prepare_ranks(call: Call, x: Tensor, eps: float, parameters: Iterable[Tensor | None]) -> Call:
    """Let the kernels prepare what they do before and after ranks exchange rows, if they can."""
    own = own_class(call.kernels, "TritonRanks", x, parameters)
    if own is None:
        return call
    blocks, plan = len(call.sizes), call.plan
    local = tuple((k,) for k in range(blocks))
    there = back = Exchange((), 0, local)
    if call.route is not None and call.back is not None:
        there, back = exchange_of(call.route, blocks), exchange_of(call.back, blocks)
    if plan.mode == "sync":  # whose collectives return the rows of all, and their sum
        there = Exchange((), 0, (tuple(range(plan.world_size)),))
    elif plan.mode == "swap" and plan.shuffles:
        there = there._replace(members=there.members + local)
    return call._replace(ranks=own(x, eps, call.sizes, there, back), moves_later=True)


def prepare_local(
    plan: Plan, x: Tensor, eps: float, row_format: RowFormat, parameters: Iterable[Tensor | None]
) -> Call:
    """Find who normalises whom in one process, and prepare its kernels."""
    sizes, kernels = plan.sizes(x.shape[0]), select.select(x)
    groups = users = None
    if plan.shuffles:
        cells = ((i, c) for i in range(plan.groups) for c in range(plan.per_group))
        step = plan.uses[1] if plan.per_group > 1 else 0
        users = BlockGroups(plan.groups, tuple(plan.used(*cell) for cell in cells), step)
        groups = users if plan.mode == "regroup" else None
    count = x.shape[2:].numel() * (x.shape[0] // plan.groups)
    if is_known(count == 1):
        raise _count_error(1, 0, plan, x.shape)
    local = prepare(kernels, x, eps, sizes, groups, users, count, parameters)
    used = None if users is None else users.owners
    doing, moves_later = _doing(plan, row_format), not isinstance(local, Local)
    return Call(
        plan, sizes, row_format, kernels, doing, local, moves_later=moves_later, used=used
    )  # fmt: skip


def asks_peers(plan: Plan) -> bool:
    """Return whether the statistics of other ranks are needed, or theirs of this one."""
    return plan.world_size > 1 and plan.mode != "local"


def statistics_of(x: Tensor, call: Call, world: World) -> Statistics:
    """Return the statistics behind a call with this rank's input ``[N, C, *]``.

    Communication: that of `mix`.
    """
    sizes, plan = call.sizes, call.plan
    mean, std = call.kernels.block_moments(x, sizes)
    rows = torch.cat([counts(sizes, x.shape[2:].numel(), mean), mean, std], dim=1)
    used = _unpack(mix(rows, call, world))
    return Statistics(used, _unpack(rows) if plan.mode == "swap" and plan.shuffles else None)


def rejection(plan: Plan, row_format: RowFormat, device: torch.device) -> Tensor:
    """Return the rows that a rank sends in place of statistics if it rejects its input."""
    (channels, dtype), blocks = row_format, plan.groups * plan.per_group
    rows = torch.zeros(blocks, 2 * channels + 1, dtype=dtype, device=device)
    rows[:, 0] = _REJECTED
    return rows


def _unpack(rows: Tensor) -> Moments:
    """Return the moments in rows ``[R, 2 * C + 1]``."""
    channels = rows.shape[1] // 2
    count, mean, std = rows.split_with_sizes((1, channels, channels), dim=1)
    return Moments(count, mean, std)


def mix(rows: Tensor, call: Call, world: World) -> Tensor:
    """Return for each local block the row of the normaliser that it uses, ``[blocks, 2 * C + 1]``.

    Of two ranks or more.

    Communication: `local` none; `swap` and `regroup` one all_to_all, see `gather_members`; `sync`
    one all_gather.
    """
    doing, _ = call.doing
    if call.plan.mode == "sync":
        members = collectives.all_gather(rows.view(-1), world, CALL, doing)[None]
        merged: Tensor = call.kernels.merge_moments(members)[0]
        return merged
    if call.route is None:
        return rows
    members = gather_members(rows, call.route, world, CALL, doing)
    if members.shape[1] > 1:
        members = call.kernels.merge_moments(members)
    return take(members.flatten(0, 1), call.route.used)


def mix_gradients(sums: Tensor, call: Call, world: World) -> Tensor:
    """Return for each local block the sums over all users of the normaliser that it joins.

    The transpose of `mix`, with the same messages in the other direction; `sync` takes one
    all_reduce.

    Args:
        sums: ``sum w dy`` and ``sum w dy xhat`` over each block, ``[blocks, 2, C]``.
        call: what has been prepared.
        world: the ranks.

    Returns:
        Tensor ``[blocks, 2, C]``.
    """
    rows = sums.flatten(1)
    _, doing = call.doing
    if call.plan.mode == "sync":
        return collectives.all_sum(sums, world, CALL, doing)
    if call.back is None:
        return sums
    members = gather_members(rows, call.back, world, CALL, doing)
    members = members.sum(dim=1) if members.shape[1] > 1 else members[:, 0]
    return take(members, call.back.used).view(sums.shape)


def _doing(plan: Plan, row_format: RowFormat) -> tuple[str, str]:
    forward, backward = (
        f"exchanges rows of {numbers} numbers in mode {plan.mode!r}"
        for numbers in (2 * row_format.channels + 1, 2 * row_format.channels)
    )
    return forward, backward


def own_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the mean and std ``[N, C]`` of each sample's own group, as plain BN has them."""
    sizes = block_sizes(x.shape[0], groups, 1)
    mean, std = select.select(x).block_moments(x, sizes)
    return per_sample(mean, sizes), per_sample(std, sizes)


def check_counts(count: Tensor, call: Call, world: World, shape: torch.Size) -> None:
    """Raise if a normaliser has fewer than 2 values per channel, or its rank rejected its input.

    On the CPU the error is raised here and names the group. A GPU raises a device-side assertion,
    so that no step has to wait for the counts, ``[R, 1]``.
    """
    count = count[:, 0]
    if torch.compiler.is_compiling() or count.device.type != "cpu":
        assert_valid(_are_valid(count, call.sizes).all())
    elif not bool((valid := _are_valid(count, call.sizes)).all()):
        row = int(valid.int().argmin())
        error = _count_error(float(count[row]), row, call.plan, shape)
        failures.announce(world, str(error))
        raise error


def assert_valid(valid: Tensor) -> None:
    """Have a device raise if `valid` is 0."""
    torch._assert_async(
        valid, f"{CALL}: a peer rejected its input, or a normaliser has 1 value per channel"
    )


def _are_valid(count: Tensor, sizes: tuple[int, ...]) -> Tensor:
    valid = count >= 2
    if not are_equal(sizes) or sizes[0] == 0:
        valid |= counts(sizes, 1, count)[:, 0] == 0  # nobody is normalised
    return valid


def _count_error(count: float, row: int, plan: Plan, shape: torch.Size) -> Exception:
    if plan.mode == "sync":  # which has one group per rank
        source, user = "the whole of all ranks", f"rank {plan.rank}"
    else:
        group = plan.rank * plan.groups + row // plan.per_group
        source = f"group {plan.used(group, row % plan.per_group)}"
        user = f"group {group} on rank {plan.rank}"
    if count == _REJECTED:
        return RuntimeError(
            f"{CALL}: a peer of rank {plan.rank} rejected its input in this call, so {source} has "
            f"no statistics to normalise {user} with; see the peer's error"
        )
    return ValueError(
        f"{CALL}: expected more than 1 value per channel when training, got {count:g} in {source}, "
        f"which normalises {user} (mode {plan.mode!r}, input shape {tuple(shape)})"
    )
