"""Batch normalisation that cannot cheat: statistics shuffled across ranks and virtual groups.

Shape letters, used in every docstring: ``W`` ranks, ``G`` groups over all ranks, ``B`` blocks per
group, ``N`` local batch, ``C`` channels, ``L`` flattened space, ``*`` any number of space axes.
"""

from .comm.node import node_group
from .norm.contexts import record_statistics, shuffle_offset, synchronize_running_stats
from .norm.functional import shuffle_batch_norm
from .norm.mixing import mixing_matrix, spectral_radius
from .norm.modules import ShuffleBatchNorm
from .probe.audit import audit
from .probe.audit_report import AuditReport
from .probe.leak import measure_leak
from .probe.leak_report import LeakReport
from .probe.stability import StabilityReport, stability
from .shuffle.batch_shuffle import batch_shuffle, batch_unshuffle
from .shuffle.encoder import ShuffledEncoder
from .shuffle.sampler import ShuffledPairSampler
from .shuffle.state import get_shuffle_state, set_shuffle_state

__all__ = [
    "AuditReport", "LeakReport", "ShuffleBatchNorm", "ShuffledEncoder", "ShuffledPairSampler",
    "StabilityReport", "audit", "batch_shuffle", "batch_unshuffle", "get_shuffle_state",
    "measure_leak", "mixing_matrix", "node_group", "record_statistics", "set_shuffle_state",
    "shuffle_batch_norm", "shuffle_offset", "spectral_radius", "stability",
    "synchronize_running_stats",
]  # fmt: skip

__version__ = "0.1.0"
