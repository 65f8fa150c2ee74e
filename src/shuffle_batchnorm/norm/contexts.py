"""What is done to all layers of a model at once: offsets, records, running statistics."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shuffle_batchnorm.comm import collectives
from shuffle_batchnorm.comm.world import ProcessGroupLike, check_process_group, resolve
from shuffle_batchnorm.kernels.rows import accumulation_dtype

from .mixing import Options, check_options
from .modules import ShuffleBatchNorm
from .statistics import StatisticsRecord


@contextmanager
def shuffle_offset(module: nn.Module, offset: int) -> Iterator[None]:
    """Give every ShuffleBatchNorm in a module another offset inside a ``with`` block.

    ``offset=0`` turns shuffling off for one pass; a second view through the same encoder can take
    another offset than the first. All ranks must enter it alike. Under activation checkpointing
    enter it inside the checkpointed function: what is recomputed in the backward pass must find
    the offset of the forward pass.

    Args:
        module: a model or layer.
        offset: the offset inside the block.

    Raises:
        TypeError: `offset` is not an int.

    Example:
        >>> layer = ShuffleBatchNorm(3, groups=2)
        >>> with shuffle_offset(layer, 0):
        ...     y = layer(torch.randn(4, 3))
        >>> layer.offset
        1
    """
    check_options("shuffle_offset", Options(offset=offset))
    layers = [m for m in module.modules() if isinstance(m, ShuffleBatchNorm)]
    before = [layer.offset for layer in layers]
    try:
        for layer in layers:
            layer.offset = offset
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.offset = value


@contextmanager
def record_statistics(module: nn.Module) -> Iterator[list[StatisticsRecord]]:
    """Record the statistics of every ShuffleBatchNorm call inside a ``with`` block.

    Communication: none of its own.

    Args:
        module: a model or layer; records carry the layers' names in it.

    Yields:
        A list that grows by one `StatisticsRecord` per layer call: ``name``, ``own_mean``,
        ``own_var``, ``used_mean``, ``used_var``, each statistic ``[N, C]``, a row per sample.

    Example:
        >>> layer = ShuffleBatchNorm(3, groups=2)
        >>> with record_statistics(layer) as records:
        ...     y = layer(torch.randn(4, 3))
        >>> bool((records[0].used_mean[0] == records[0].own_mean[2]).all())
        True
    """
    records: list[StatisticsRecord] = []
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, ShuffleBatchNorm)]
    sinks = [(layer, (name, records)) for name, layer in layers]
    try:
        for layer, sink in sinks:
            layer._sinks.append(sink)
        yield records
    finally:
        for layer, sink in sinks:
            layer._sinks[:] = [other for other in layer._sinks if other is not sink]


def synchronize_running_stats(module: nn.Module, process_group: ProcessGroupLike = None) -> None:
    """Average the running mean and variance of every normalisation layer over the ranks.

    Ranks see different statistics; average them before an evaluation or a checkpoint that should
    not depend on the rank.

    Communication: one all_reduce of all running statistics together, per dtype and device.

    Args:
        module: a model or layer; every submodule with ``running_mean`` and ``running_var``.
        process_group: None for all ranks, a ProcessGroup or a 1-D DeviceMesh.
    """
    call = "synchronize_running_stats"
    check_process_group(call, process_group)
    world = resolve(process_group, call)
    if world.size == 1:
        return
    named = (getattr(m, n, None) for m in module.modules() for n in ("running_mean", "running_var"))
    # A buffer that two layers share is averaged once.
    buffers = {id(b): b for b in named if isinstance(b, Tensor)}.values()
    with torch.no_grad():
        for kind in sorted({(b.dtype, b.device) for b in buffers}, key=str):
            same = [b for b in buffers if (b.dtype, b.device) == kind]
            flat = torch.cat([b.reshape(-1) for b in same])
            # A sum of half-precision variances overflows where their mean does not.
            flat = flat.to(accumulation_dtype(flat))
            mean = collectives.all_sum(flat, world, call, "averages statistics") / world.size
            for buffer, new in zip(same, mean.split([b.numel() for b in same]), strict=True):
                buffer.copy_(new.view_as(buffer))
