"""The two functions of MoCo in lightly, by name and signature; lightly itself is not needed."""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from shuffle_batchnorm.shuffle import batch_shuffle as library
from shuffle_batchnorm.shuffle.plan import ShufflePlan

Shuffle: TypeAlias = Any  # a Tensor, or a ShufflePlan


@torch.no_grad()
def batch_shuffle(batch: Tensor, distributed: bool = False) -> tuple[Tensor, Shuffle]:
    """Shuffle a batch, as ``lightly.models.utils.batch_shuffle``: without gradients.

    Communication: none, or with ``distributed=True`` that of `shuffle_batchnorm.batch_shuffle`:
    every sample travels once, where lightly gathers all ranks' batches on every rank.

    Args:
        batch: ``[N, *]``. With ``distributed=True``, N may differ between ranks.
        distributed: shuffle among the ranks of the default process group.

    Returns:
        The shuffled batch, and what `batch_unshuffle` needs, an index ``[N]``, as lightly's; with
        ``distributed=True`` a plan, where lightly has an index of all ranks' samples.

    Raises:
        Exception: with ``distributed=True``, what `shuffle_batchnorm.batch_shuffle` raises.

    Example:
        >>> keys, shuffle = batch_shuffle(torch.arange(6.0))
        >>> batch_unshuffle(keys, shuffle)
        tensor([0., 1., 2., 3., 4., 5.])
    """
    if distributed:
        shuffled, plan = library.batch_shuffle(batch)
        return shuffled, plan
    index = torch.randperm(len(batch), device=batch.device)
    return batch[index], index


@torch.no_grad()
def batch_unshuffle(batch: Tensor, shuffle: Shuffle, distributed: bool = False) -> Tensor:
    """Undo `batch_shuffle`, as ``lightly.models.utils.batch_unshuffle``: without gradients.

    Communication: as `batch_shuffle`.

    Args:
        batch: ``[N, *]``, in the order in which `batch_shuffle` returned its samples.
        shuffle: what `batch_shuffle` returned.
        distributed: as in that call.

    Returns:
        The batch in the order before the shuffle.

    Raises:
        TypeError: `distributed` is not what it was in `batch_shuffle`.
        Exception: with ``distributed=True``, what `shuffle_batchnorm.batch_unshuffle` raises.
    """
    if distributed:
        restored: Tensor = library.batch_unshuffle(batch, shuffle)
        return restored
    if isinstance(shuffle, ShufflePlan):
        raise TypeError(
            "batch_unshuffle: shuffle comes from batch_shuffle(..., distributed=True); call "
            "batch_unshuffle(..., distributed=True)"
        )
    return batch[torch.argsort(shuffle)]
