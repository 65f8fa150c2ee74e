"""Who normalises whom: index arithmetic on groups, blocks and ranks, with no communication.

Rank ``r`` cuts its batch into ``groups`` equal virtual groups, numbered ``i = r * groups + j``
among all ``G = W * groups``. A group is cut into ``B`` contiguous blocks (``B = 1`` except in
``regroup``), so a local batch is ``groups * B`` blocks in a row.

A *normaliser* is the statistics of one or more blocks. There are G of them, numbered like the
groups (one in ``sync``). Block c of group i *joins* normaliser ``(i + joins[c]) mod G`` and *uses*
normaliser ``(i + uses[c]) mod G``. The gradient travels the same way, with the two exchanged.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CALL = "shuffle_batch_norm"
MODES = ("local", "sync", "swap", "regroup")


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
    """How one rank cuts its batch, and which normalisers its blocks join and use.

    Attributes:
        mode: of the layer.
        world_size: W.
        rank: of this process among them.
        groups: virtual groups per rank; 1 in `sync`, whatever the layer's are.
        per_group: B, blocks per group.
        joins: for each block of a group, how many groups further its normaliser is.
        uses: the same of the normaliser that it uses.
    """

    mode: str
    world_size: int
    rank: int
    groups: int
    per_group: int
    joins: tuple[int, ...]
    uses: tuple[int, ...]

    @property
    def total_groups(self) -> int:
        """G, the number of groups over all ranks."""
        return self.world_size * self.groups

    @property
    def shuffles(self) -> bool:
        """Whether a block uses another normaliser than that of its own group."""
        return any(self.uses)

    def sizes(self, batch: int) -> tuple[int, ...]:
        """Return the samples in each of the ``groups * B`` local blocks of a batch."""
        return block_sizes(batch, self.groups, self.per_group)

    def used(self, group: int, block: int) -> int:
        """Return the normaliser that a block uses (0 in `sync`)."""
        return 0 if self.mode == "sync" else (group + self.uses[block]) % self.total_groups

    def joined(self, group: int, block: int) -> int:
        """Return the normaliser that a block joins (0 in `sync`)."""
        return 0 if self.mode == "sync" else (group + self.joins[block]) % self.total_groups

    def transposed(self) -> "Plan":
        """Return the plan of the gradient: a block's sums join the normaliser that it used."""
        return self._replace(joins=self.uses, uses=self.joins)

    def without_empty_blocks(self, batch: int) -> "Plan":
        """Return the same plan without the blocks that are empty in every group of this rank."""
        per_group = min(self.per_group, max(1, batch // self.groups))
        return self._replace(
            per_group=per_group, joins=self.joins[:per_group], uses=self.uses[:per_group]
        )


def make_plan(options: Options, world_size: int, rank: int) -> Plan:
    """Return the plan of one rank."""
    mode, groups, offset, blocks = options
    if mode == "sync":
        groups = 1  # whatever the groups are, all of them are merged
    total = world_size * groups
    per_group = min(total, blocks) if mode == "regroup" else 1
    uses: tuple[int, ...] = (offset % total if mode == "swap" else 0,)
    if mode == "regroup":
        uses = tuple(offset * c % total for c in range(per_group))
        if not any(uses):
            per_group, uses = 1, (0,)  # each group is its own normaliser, whole
    # A new group is normalised by itself.
    joins = uses if mode == "regroup" else (0,)
    return Plan(mode, world_size, rank, groups, per_group, joins, uses)


def block_sizes(batch: int, groups: int, per_group: int) -> tuple[int, ...]:
    """Cut `batch` into equal groups, and each as ``torch.tensor_split`` cuts it into blocks."""
    n = batch // groups
    # tensor_split's sizes without a branch on n, so that a symbolic batch traces.
    return tuple((n + per_group - 1 - c) // per_group for c in range(per_group)) * groups


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

    ``M[p, q] = 1 / |S(p)|`` if sample ``q`` joins ``S(p)``, the normaliser of sample ``p``, else 0.
    The log-scale of the activations against their normaliser evolves from layer to layer as
    ``I - M``: see `spectral_radius`.

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
    cells = [(i, c) for i in range(plan.total_groups) for c in range(plan.per_group)]
    sizes = torch.tensor(plan.sizes(batch_size) * world_size, device="cpu")
    used, joined = (
        torch.tensor([number(i, c) for i, c in cells], device="cpu").repeat_interleave(sizes)
        for number in (plan.used, plan.joined)
    )
    members = (used[:, None] == joined[None, :]).double()
    weights: Tensor = members / members.sum(dim=1, keepdim=True)
    return weights


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
