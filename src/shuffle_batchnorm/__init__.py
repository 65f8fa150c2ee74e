"""Batch normalisation that cannot cheat: statistics shuffled across ranks and virtual groups.

Shape letters, used in every docstring: ``W`` ranks, ``G`` groups over all ranks, ``B`` blocks per
group, ``N`` local batch, ``C`` channels, ``L`` flattened space, ``*`` any number of space axes.
"""

from .contexts import record_statistics, shuffle_offset, synchronize_running_stats
from .functional import shuffle_batch_norm
from .mixing import mixing_matrix, spectral_radius
from .modules import ShuffleBatchNorm

__all__ = [
    "ShuffleBatchNorm",
    "mixing_matrix",
    "record_statistics",
    "shuffle_batch_norm",
    "shuffle_offset",
    "spectral_radius",
    "synchronize_running_stats",
]
