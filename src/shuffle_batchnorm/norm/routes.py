"""Which rows of statistics travel between ranks, and which of them make up a normaliser.

Rows are ``[groups * B, K]`` on each rank, one per local block. Each row goes once to each other
rank that uses the normaliser that its block joins, and nothing is merged on the way: every rank
merges the same rows in the same order, so to the same bits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from shuffle_batchnorm.comm import collectives
from shuffle_batchnorm.comm.world import World
from shuffle_batchnorm.kernels.rows import Exchange, Order, take

from .mixing import Plan


class Route(NamedTuple):
    """One rank's part in bringing every block the rows of the normaliser that it uses.

    Attributes:
        send_order: the local rows in the order in which they leave, for rank after rank; None if it
            is their own.
        send_splits: how many of them go to each rank.
        receive_splits: how many rows arrive from each rank.
        with_local: whether local rows are among the members. If so they come first, then those that
            have arrived.
        members: which rows make up the first normaliser used here, the second, ..., B for each;
            None if all of them do in their own order.
        per_group: B, the rows of each normaliser.
        used: which of these normalisers each local block uses; None if it is the one of the same
            number.
    """

    send_order: Order | None
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]
    with_local: bool
    members: Order | None
    per_group: int
    used: Order | None


def find_route(plan: Plan) -> Route:
    """Return a rank's part. Both ends order the rows of one message by group and block."""
    return Route(*_find_route(*plan))


def _find_route(*terms: Any) -> tuple[Any, ...]:
    plan = Plan(*terms)
    rank, groups, total = plan.rank, plan.groups, plan.total_groups
    mine = [
        (group, block)
        for group in range(rank * groups, (rank + 1) * groups)
        for block in range(plan.per_group)
    ]
    leaving: dict[int, list[int]] = {}
    for row, (group, block) in enumerate(mine):
        normaliser = plan.joined(group, block)
        users = {(normaliser - shift) % total // groups for shift in plan.uses}
        for user in users - {rank}:
            leaving.setdefault(user, []).append(row)
    used = [plan.used(*cell) for cell in mine]
    normalisers = list(dict.fromkeys(used))
    members = [
        ((normaliser - shift) % total, block)
        for normaliser in normalisers
        for block, shift in enumerate(plan.joins)
    ]
    arriving = sorted({cell for cell in members if cell[0] // groups != rank})
    with_local = not {*mine}.isdisjoint(members)
    there = {cell: k for k, cell in enumerate([*(mine if with_local else ()), *arriving])}
    route = Route(
        send_order=_order([row for user in sorted(leaving) for row in leaving[user]], len(mine)),
        send_splits=tuple(len(leaving.get(user, ())) for user in range(plan.world_size)),
        receive_splits=_count(plan.world_size, [group // groups for group, _ in arriving]),
        with_local=with_local,
        members=_order([there[cell] for cell in members], len(there)),
        per_group=plan.per_group,
        used=_order([normalisers.index(normaliser) for normaliser in used], len(normalisers)),
    )
    return tuple(route)


# As torch.compiler.assume_constant_result does, which would import the compiler: run when traced.
# Traced itself, it takes as long as the rest of a layer; nothing in it depends on the batch.
_find_route._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _order(rows: list[int], length: int) -> Order | None:
    return None if rows == list(range(length)) else tuple(rows)


def _count(world_size: int, ranks: list[int]) -> tuple[int, ...]:
    counts = [0] * world_size
    for rank in ranks:
        counts[rank] += 1
    return tuple(counts)


def gather_members(rows: Tensor, route: Route, world: World, call: str, doing: str) -> Tensor:
    """Return the rows of each normaliser that is used here, ``[groups * B, K]`` to ``[R, B, K]``.

    Communication: one ``all_to_all_single`` with constant splits. `swap` (B = 1) sends ``groups``
    rows at most to at most two ranks. `regroup` sends each row to the ranks that use its
    normaliser: for ``groups=1`` at most ``B**2 - B`` rows to at most ``min(2 * B - 2, W - 1)``
    ranks, else at most ``groups * B * (min(B, W) - 1)`` rows.
    """
    # Alike on all ranks: their routes are those of the first rank, moved on.
    if any(route.send_splits):
        sent = take(rows, route.send_order)
        splits = route.send_splits, route.receive_splits
        arrived = collectives.all_to_all(sent, *splits, world, call, doing)
        rows = torch.cat([rows, arrived]) if route.with_local else arrived
    members = take(rows, route.members)
    return members.view(-1, route.per_group, members.shape[1])


def exchange_of(route: Route, blocks: int) -> Exchange:
    """Return the same part for kernels that pack rows and merge them, block for block."""
    sent = tuple(range(blocks)) if route.send_order is None else route.send_order
    arriving = sum(route.receive_splits)
    own, arrived = blocks * route.with_local, blocks + len(sent)
    there = (*range(own), *range(arrived, arrived + arriving))
    order = range(len(there)) if route.members is None else route.members
    rows, each = tuple(there[k] for k in order), route.per_group
    used = range(blocks) if route.used is None else route.used
    return Exchange(sent, arriving, tuple(rows[k * each : (k + 1) * each] for k in used))
