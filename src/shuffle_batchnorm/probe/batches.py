"""Which images are encoded together, which of them are keys, and what counts as a hit."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .isolation import derive_seed

PASSES = 16  # in fresh batches that one batch takes by default


class Sizes(NamedTuple):
    """How many images, batches and keys; `batch` counts the samples of all ranks."""

    pool: int
    batch: int
    batches: int
    keys: int
    keys_per_pass: int

    @property
    def passes(self) -> int:
        """Return the number of passes in fresh batches that one batch takes."""
        return self.keys // self.keys_per_pass


class Batch(NamedTuple):
    """One batch of all ranks.

    Attributes:
        images: ``[S]``, numbers of images in the pool.
        positions: ``[keys]``, where in the batch the keys are, pass by pass.
        fresh: for each pass a fresh batch ``[S]``: the keys where they were, all other images
            replaced by some that are not in the batch.
    """

    images: Tensor
    positions: Tensor
    fresh: list[Tensor]


def default_keys(batch: int, per_pass: int) -> int:
    """Return how many keys of a batch are measured by default: those of 16 passes, if it has them.

    Example:
        >>> default_keys(256, 1), default_keys(256, 8), default_keys(256, 32)
        (16, 128, 256)
    """
    are_ints = isinstance(batch, int) and isinstance(per_pass, int)
    if not are_ints or per_pass < 1:  # check_sizes will say so
        return PASSES
    return per_pass * max(1, min(PASSES, batch // per_pass))


def check_sizes(call: str, sizes: Sizes, world_size: int) -> None:
    """Raise a ValueError that names `call` if a size does not fit the others."""
    pool, batch, batches, keys, per_pass = sizes
    least = {"batch_size": (batch, 2), "batches": (batches, 2), "keys_per_batch": (keys, 1)}
    for name, (value, minimum) in {**least, "keys_per_pass": (per_pass, 1)}.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{call}: {name} must be an int, got {value!r}")
        if value < minimum:
            raise ValueError(f"{call}: {name} must be at least {minimum}, got {value}")
    if batch % world_size:
        raise ValueError(
            f"{call}: batch_size {batch}, which counts the samples of all ranks, is not divisible "
            f"by {world_size} ranks"
        )
    if per_pass >= batch:
        raise ValueError(
            f"{call}: keys_per_pass {per_pass} leaves no other sample to replace in a batch of "
            f"batch_size {batch}"
        )
    if keys > batch:
        raise ValueError(f"{call}: keys_per_batch {keys} is larger than batch_size {batch}")
    if keys % per_pass:
        raise ValueError(
            f"{call}: keys_per_batch {keys} is not divisible by keys_per_pass {per_pass}"
        )
    if pool < 2 * batch - per_pass:
        raise ValueError(
            f"{call}: {pool} images are too few for fresh batches: a batch of {batch} and "
            f"{batch - per_pass} others take {2 * batch - per_pass}"
        )


def draw_batch(sizes: Sizes, seed: int, number: int) -> Batch:
    """Draw a batch, its keys and their fresh batches; the same on every rank."""
    generator = torch.Generator().manual_seed(derive_seed(seed, number, "images"))

    def shuffled(count: int) -> Tensor:
        return torch.randperm(count, generator=generator, device="cpu")

    order = shuffled(sizes.pool)
    images, rest = order[: sizes.batch], order[sizes.batch :]
    per_pass = sizes.keys_per_pass
    # One distance for all keys of a pass: those of equal groups are then in different ones.
    starts = shuffled(sizes.batch // per_pass)[: sizes.passes].tolist()
    passes = [[start + k * sizes.batch // per_pass for k in range(per_pass)] for start in starts]
    fresh = []
    for positions in passes:
        replaced = torch.ones(sizes.batch, dtype=torch.bool, device="cpu")
        replaced[positions] = False
        others = rest[shuffled(len(rest))[: sizes.batch - per_pass]]
        fresh.append(images.masked_scatter(replaced, others))
    return Batch(images, torch.tensor(passes, device="cpu").flatten(), fresh)


def take(pool: Any, numbers: Tensor) -> Tensor:
    """Return images of a pool, ``[N, *]``: a tensor, or a data set of images or (image, label)."""
    if isinstance(pool, Tensor):
        images: Tensor = pool[numbers.to(pool.device)]
        return images
    items = (pool[number] for number in numbers.tolist())
    return torch.stack([item[0] if isinstance(item, (tuple, list)) else item for item in items])


def find_hits(queries: Tensor, keys: Tensor, negatives: Tensor, own: Tensor | None) -> Tensor:
    """Return which queries have a larger dot product with their key than with all negatives.

    A tie is no hit, or an encoder that is constant would score 1. What differs by rounding alone
    is a tie.

    Args:
        queries: ``[P, D]``, float64.
        keys: ``[P, D]``, float64.
        negatives: ``[K, D]``, float64.
        own: ``[P]``, the position of each query's key among the negatives; None if it is not there.

    Returns:
        Tensor ``[P]``, float64: 1 for a hit, else 0.
    """
    scores = queries @ negatives.T
    if own is not None:
        scores.scatter_(1, own[:, None], -torch.inf)
    longest = torch.cat([keys, negatives]).norm(dim=1).max()
    rounding = 1e-12 * queries.norm(dim=1) * longest
    hits: Tensor = (queries * keys).sum(dim=1) > scores.amax(dim=1) + rounding
    return hits.double()
