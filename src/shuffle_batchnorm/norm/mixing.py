"""Who normalises whom: index arithmetic on groups, blocks and ranks, with no communication.

Rank ``r`` cuts its batch into ``groups`` equal virtual groups, numbered ``i = r * groups + j``
among all ``G = W * groups``. A group is cut into ``B`` contiguous blocks (``B = 1`` except in
``regroup``), so a local batch is ``groups * B`` blocks in a row.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

MODES = ("local", "sync", "swap", "regroup")


def kept(function: Callable[P, T]) -> Callable[P, T]:
    """Keep what a function makes of its arguments, from step to step.

    Not of symbols, which have no hash, and not under the compiler, which traces the arithmetic once
    and warns of caches.
    """
    cached = lru_cache(maxsize=1024)(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling() or torch.SymInt in map(type, args):
            return function(*args, **kwargs)
        return cached(*args, **kwargs)  # type: ignore[arg-type]  # hashable, which P can't say

    return call


class Options(NamedTuple):
    """What a layer is asked to do, as the user wrote it."""

    mode: str = "swap"
    groups: int = 1
    offset: int = 1
    blocks: int = 8


def check_options(call: str, options: Options) -> None:
    """Raise a ValueError or TypeError that names `call` if an option is out of range."""
    mode, groups, offset, blocks = options
    if mode not in MODES:
        raise ValueError(f"{call}: unknown mode {mode!r}, choose one of {', '.join(MODES)}")
    for name, value in (("groups", groups), ("offset", offset), ("blocks", blocks)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{call}: {name} must be an int, got {value!r}")
    if groups < 1:
        raise ValueError(f"{call}: groups must be at least 1, got groups={groups}")
    if blocks < 1:
        raise ValueError(f"{call}: blocks must be at least 1, got blocks={blocks}")


class Plan(NamedTuple):
    """How one rank cuts its batch and where its statistics travel.

    Row ``(i, c)``, the statistics of block ``c`` of group ``i``, travels to group
    ``(i + shifts[c]) mod G``: to its user in `swap`, to the new group that pools it in `regroup`.
    """

    mode: str
    world_size: int
    rank: int
    groups: int
    per_group: int
    shifts: tuple[int, ...]

    @property
    def total_groups(self) -> int:
        """G, the number of groups over all ranks."""
        return self.world_size * self.groups

    def sizes(self, batch: int) -> tuple[int, ...]:
        """Return the samples in each of the ``groups * B`` local blocks of a batch."""
        return block_sizes(batch, self.groups, self.per_group)

    def normaliser(self, group: int, block: int) -> int:
        """Return the number of the group whose statistics normalise a block (0 in `sync`)."""
        if self.mode == "sync":
            return 0
        sign = -1 if self.mode == "swap" else 1
        return (group + sign * self.shifts[block]) % self.total_groups

    def normalisers(self) -> tuple[int, ...]:
        """Return the normaliser of each local block, in order."""
        first = self.rank * self.groups
        return tuple(
            self.normaliser(group, block)
            for group in range(first, first + self.groups)
            for block in range(self.per_group)
        )

    def source(self, group: int, block: int) -> int:
        """Return the number of the group in whose statistics a block is pooled (0 in `sync`)."""
        return group if self.mode == "swap" else self.normaliser(group, block)

    def without_empty_blocks(self, batch: int) -> "Plan":
        """Return the same plan without the blocks that are empty in every group of this rank."""
        per_group = min(self.per_group, max(1, batch // self.groups))
        return self._replace(per_group=per_group, shifts=self.shifts[:per_group])

    def of_one_process(self) -> "Plan":
        """Return the plan of a single process that has the groups of all ranks."""
        return self._replace(world_size=1, rank=0, groups=self.total_groups)


@kept
def make_plan(options: Options, world_size: int, rank: int) -> Plan:
    """Return the plan of one rank."""
    mode, groups, offset, blocks = options
    if mode == "sync":
        groups = 1  # whatever the groups are, all of them are pooled
    total = world_size * groups
    per_group = min(total, blocks) if mode == "regroup" else 1
    if mode == "swap":
        shifts: tuple[int, ...] = (-offset % total,)
    elif mode == "regroup":
        shifts = tuple(offset * c % total for c in range(per_group))
    else:
        shifts = (0,)
    return Plan(mode, world_size, rank, groups, per_group, shifts)


def block_sizes(batch: int, groups: int, per_group: int) -> tuple[int, ...]:
    """Cut `batch` into equal groups, and each as ``torch.tensor_split`` cuts it into blocks."""
    n = batch // groups
    # tensor_split's sizes without a branch on n, so that a symbolic batch traces.
    return tuple((n + per_group - 1 - c) // per_group for c in range(per_group)) * groups


class Rotation(NamedTuple):
    """One rank's part in moving every row ``(i, c)`` to group ``(i + shifts[c]) mod G``.

    Attributes:
        send_order: the local rows ``j * B + c`` in the order in which they leave.
        send_splits: how many of them go to each rank.
        place_order: for each local place, which received row lands there.
        receive_splits: how many rows arrive from each rank.
    """

    send_order: tuple[int, ...]
    send_splits: tuple[int, ...]
    place_order: tuple[int, ...]
    receive_splits: tuple[int, ...]

    def inverse(self) -> "Rotation":
        """Return the rotation that moves every row back."""
        return Rotation(
            send_order=argsort(self.place_order),
            send_splits=self.receive_splits,
            place_order=argsort(self.send_order),
            receive_splits=self.send_splits,
        )


def rotation(world_size: int, rank: int, groups: int, shifts: tuple[int, ...]) -> Rotation:
    """Return `rank`'s part in a rotation of the rows of all ranks.

    Both ends order the rows of one message by their place at the destination, so that no index
    has to travel with them.
    """
    total, per_group = world_size * groups, len(shifts)
    leaving = sorted(
        (*divmod((rank * groups + j + shift) % total, groups), c, j * per_group + c)
        for j in range(groups)
        for c, shift in enumerate(shifts)
    )
    arriving = sorted(
        ((rank * groups + s - shift) % total // groups, s, c, s * per_group + c)
        for s in range(groups)
        for c, shift in enumerate(shifts)
    )
    return Rotation(
        send_order=tuple(row[-1] for row in leaving),
        send_splits=_count(world_size, [row[0] for row in leaving]),
        place_order=argsort(tuple(row[-1] for row in arriving)),
        receive_splits=_count(world_size, [row[0] for row in arriving]),
    )


def argsort(order: tuple[int, ...]) -> tuple[int, ...]:
    """Return the places of the smallest number, of the next, ...: of a permutation, its inverse."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _count(world_size: int, ranks: list[int]) -> tuple[int, ...]:
    counts = [0] * world_size
    for rank in ranks:
        counts[rank] += 1
    return tuple(counts)


def mixing_matrix(
    mode: str,
    *,
    world_size: int,
    groups: int,
    batch_size: int,
    offset: int = 1,
    blocks: int = 8,
) -> Tensor:
    """Return which samples' statistics normalise which samples, over all ranks.

    ``M[p, q] = 1 / |S(p)|`` if sample ``q`` is pooled in ``S(p)``, the normaliser of sample ``p``,
    else 0. The log-scale of the activations against their normaliser evolves from layer to layer
    as ``I - M``: see `spectral_radius`.

    Communication: none; every rank computes the same matrix.

    Args:
        mode: ``"local"``, ``"sync"``, ``"swap"`` or ``"regroup"``.
        world_size: W, the number of ranks.
        groups: virtual groups per rank.
        batch_size: N, samples per rank, the same on each.
        offset: as in `ShuffleBatchNorm`.
        blocks: as in `ShuffleBatchNorm`.

    Returns:
        Tensor ``[W * N, W * N]``, float64; each row sums to 1.

    Raises:
        ValueError: unknown mode, a size below 1, or N not divisible by `groups`.

    Source:
        Shuffling BN: He et al. 2019, arXiv 1911.05722, section 3.3.

    Example:
        >>> mixing_matrix("swap", world_size=2, groups=1, batch_size=1).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    call = "mixing_matrix"
    options = Options(mode, groups, offset, blocks)
    check_options(call, options)
    if world_size < 1 or batch_size < 1:
        raise ValueError(
            f"{call}: world_size and batch_size must be at least 1, "
            f"got world_size={world_size}, batch_size={batch_size}"
        )
    if batch_size % groups:
        raise ValueError(f"{call}: batch_size {batch_size} is not divisible by groups={groups}")
    plan = make_plan(options, world_size, rank=0)
    sizes = torch.tensor(plan.sizes(batch_size) * world_size)
    cells = [(i, c) for i in range(plan.total_groups) for c in range(plan.per_group)]
    used = torch.tensor([plan.normaliser(i, c) for i, c in cells]).repeat_interleave(sizes)
    pooled = torch.tensor([plan.source(i, c) for i, c in cells]).repeat_interleave(sizes)
    members = (used[:, None] == pooled[None, :]).double()
    return members / members.sum(dim=1, keepdim=True)


def spectral_radius(matrix: Tensor) -> float:
    """Return the largest absolute eigenvalue of ``I - M`` for a mixing matrix ``M``.

    At most 1 means that the scale of the activations cannot grow with depth: every partition of
    the samples (`local`, `sync`, `regroup`, MoCo's shuffle) makes ``I - M`` a projection. The
    rotation of `swap` reaches ``2 * cos(pi / (2 * n))`` for odd and 2 for even cycle lengths n:
    scales grow like that number to the power of the depth.

    Args:
        matrix: ``[S, S]``, rows sum to 1, as `mixing_matrix` returns it.

    Returns:
        The spectral radius, a float without unit.

    Raises:
        ValueError: `matrix` is not square.

    Example:
        >>> round(spectral_radius(mixing_matrix("swap", world_size=2, groups=1, batch_size=4)), 6)
        2.0
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"spectral_radius: expected a square matrix, got shape {tuple(matrix.shape)}"
        )
    matrix = matrix.double()
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return float(torch.linalg.eigvals(identity - matrix).abs().max())
