"""Groups of blocks: their rows given to blocks, their blocks' rows collected, summed and merged."""

import torch
from torch import Tensor

from .rows import BlockGroups, Groups, Sizes, are_equal, counts, merge_moments, take, widest


def of_blocks(rows: Tensor, groups: BlockGroups) -> Tensor:
    """Give each block the row of its group, ``[groups, C]`` to ``[blocks, C]``."""
    if not _is_arithmetic(groups, rows):
        return take(rows, groups.owners)
    if groups.members == 1:
        return rows.roll(-groups.owners[0], 0)
    return rows.index_select(0, _rotation(groups, 1, rows).flatten())


def by_group(rows: Tensor, groups: BlockGroups) -> Tensor:
    """Return the rows of each group's blocks, ``[blocks, C]`` to ``[groups, members, C]``.

    In the order of the blocks; as arithmetic, in that of their numbers in their own groups.
    """
    number, members = groups.number, groups.members
    if not _is_arithmetic(groups, rows):
        rows = take(rows, groups.order)
    elif members == 1:
        rows = rows.roll(groups.owners[0], 0)
    else:
        positions = _rotation(groups, -1, rows) * members
        positions = positions + torch.arange(members, device=rows.device)
        rows = rows.index_select(0, positions.flatten())
    return rows.view(number, members, rows.shape[1])


def group_sum(rows: Tensor, groups: Groups) -> Tensor:
    """Sum the blocks of each group: ``[blocks, C]`` to ``[groups, C]``; None: no groups."""
    if groups is None:
        return rows
    rows = by_group(rows, groups)
    return rows.sum(dim=1) if groups.members > 1 else rows[:, 0]


def merge_blocks(mean: Tensor, std: Tensor, sizes: Sizes, groups: Groups) -> tuple[Tensor, Tensor]:
    """Merge moments of blocks, ``[blocks, C]`` each to ``[groups, C]``; None: no groups."""
    if groups is None:
        return mean, std
    if torch.compiler.is_compiling() and are_equal(sizes):
        rows = widest(by_group(torch.cat([mean, std], dim=1), groups))
        means, stds = rows.chunk(2, dim=2)
        merged = means.mean(dim=1)
        variance = (stds.square() + (means - merged[:, None]).square()).mean(dim=1)
        return merged.to(mean.dtype), variance.sqrt().to(std.dtype)
    rows = torch.cat([counts(sizes, 1, mean), mean, std], dim=1)
    merged = merge_moments(by_group(rows, groups)).flatten(0, 1)
    _, mean, std = merged.split_with_sizes((1, mean.shape[1], mean.shape[1]), dim=1)
    return mean, std


def _is_arithmetic(groups: BlockGroups, rows: Tensor) -> bool:
    """Return whether a graph should compute the owners: on a GPU it would wait for a table.

    For a CPU a table takes less time to compile.
    """
    if groups.step is None or not torch.compiler.is_compiling():
        return False
    return groups.members == 1 or rows.device.type != "cpu"


def _rotation(groups: BlockGroups, sign: int, like: Tensor) -> Tensor:
    """Return ``(i + sign * step * c) % groups``, ``[groups, members]``."""
    i = torch.arange(groups.number, device=like.device)[:, None]
    c = torch.arange(groups.members, device=like.device)
    return (i + sign * (groups.step or 0) * c) % groups.number
