"""Stand-ins for the Triton kernels and for peers, in which nothing runs: what remains is host time.

A layer without them is what a step takes on a GPU beside its kernels and messages.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from shuffle_batchnorm.comm import collectives
from shuffle_batchnorm.kernels import (
    launch,
    select,
    triton_kernels,
    triton_launch,
    triton_merge,
    triton_messages,
)
from shuffle_batchnorm.norm import among_ranks

HEAVY: dict[ModuleType, tuple[str, ...]] = {
    triton_kernels: ("moments", "affine", "grad_sums", "grad_affine"),
    triton_merge: ("finish_moments", "finish_sums"),
    triton_messages: ("pack_moments", "mix_moments", "pack_sums", "mix_sums"),
}


class _StandIn:
    """A kernel that is counted when it is launched, and does nothing."""

    def __init__(self, kernel: Any, name: str, launches: Counter[str]) -> None:
        self.arg_names = kernel.arg_names
        self._name, self._launches = name, launches

    def __getitem__(self, _grid: tuple[int, ...]) -> Callable[..., Any]:
        return self._compile

    def _compile(self, *_tensors: Any, **_named: Any) -> Any:
        self._run()
        metadata = SimpleNamespace(target=SimpleNamespace(backend="cuda"))
        return SimpleNamespace(metadata=metadata, function=0, packed_metadata=(), run=self._run)

    def _run(self, *_arguments: Any) -> None:
        self._launches[self._name] += 1


@contextmanager
def triton_stand_ins() -> Iterator[Counter[str]]:
    """Let layers on the CPU launch stand-ins of the Triton kernels; yields what was launched."""
    launches: Counter[str] = Counter()
    with ExitStack() as stack:
        stack.enter_context(patch.object(select, "select", lambda _: triton_launch))
        stack.enter_context(patch.object(launch, "_is_version_known", lambda: True))
        for module, names in HEAVY.items():
            for name in names:
                stand_in = _StandIn(getattr(module, name), name, launches)
                stack.enter_context(patch.object(module, name, stand_in))
        yield launches


@contextmanager
def stand_in_peers(world_size: int, device: str) -> Iterator[None]:
    """Be rank 0 of a process group whose other ranks send nothing; messages end at once, as NCCL's.

    What arrives is what was in memory, and what checks it looks elsewhere.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    true = torch.ones((), device=device)

    def check(*_: Any) -> None:
        torch._assert_async(true, "true")

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        with ExitStack() as stack:
            stack.enter_context(patch.object(collectives, "_finish", _start))
            stack.enter_context(patch.object(among_ranks, "check_counts", check))
            stack.enter_context(patch.object(among_ranks, "assert_valid", check))
            # Nor are they made on the CPU alone.
            stack.enter_context(patch.object(triton_launch.TritonRanks, "counts", lambda *_: None))
            yield
    finally:
        dist.destroy_process_group()


def _start(start: Callable[[bool], Any], *_: Any) -> None:
    start(False)
