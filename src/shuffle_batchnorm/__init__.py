"""Batch normalisation that cannot cheat: statistics shuffled across ranks and virtual groups.

Shape letters, used in every docstring: ``W`` ranks, ``G`` groups over all ranks, ``B`` blocks per
group, ``N`` local batch, ``C`` channels, ``L`` flattened space, ``*`` any number of space axes.
"""

from shuffle_batchnorm.norm.contexts import (
    record_statistics,
    shuffle_offset,
    synchronize_running_stats,
)
from shuffle_batchnorm.norm.functional import shuffle_batch_norm
from shuffle_batchnorm.norm.mixing import mixing_matrix, spectral_radius
from shuffle_batchnorm.norm.modules import ShuffleBatchNorm
from shuffle_batchnorm.probe.leak import LeakReport, measure_leak
from shuffle_batchnorm.probe.stability import StabilityReport, stability
from shuffle_batchnorm.shuffle.batch_shuffle import batch_shuffle, batch_unshuffle
from shuffle_batchnorm.shuffle.encoder import ShuffledEncoder
from shuffle_batchnorm.shuffle.sampler import ShuffledPairSampler
from shuffle_batchnorm.shuffle.state import get_shuffle_state, set_shuffle_state

__all__ = [
    "LeakReport",
    "ShuffleBatchNorm",
    "ShuffledEncoder",
    "ShuffledPairSampler",
    "StabilityReport",
    "batch_shuffle",
    "batch_unshuffle",
    "get_shuffle_state",
    "measure_leak",
    "mixing_matrix",
    "record_statistics",
    "set_shuffle_state",
    "shuffle_batch_norm",
    "shuffle_offset",
    "spectral_radius",
    "stability",
    "synchronize_running_stats",
]
