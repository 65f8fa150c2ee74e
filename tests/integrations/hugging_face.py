"""Ranks of the pool, as Hugging Face's libraries find theirs."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch.distributed as dist

with mock.patch.dict(os.environ, HF_HUB_OFFLINE="1"):
    accelerate = pytest.importorskip("accelerate")


@contextmanager
def started_by_accelerate() -> Iterator[None]:
    """Let Accelerate find the ranks as after ``accelerate launch --cpu``; forget it afterwards."""
    started = {}
    if dist.is_initialized():
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        started = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    # torch 2.13 renames the option; 2.11 does not know the new name.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    with mock.patch.dict(os.environ, started, ACCELERATE_USE_CPU="true"):
        try:
            yield
        finally:
            accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
            accelerate.state.GradientState._reset_state()
