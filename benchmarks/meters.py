"""Counts what a call costs besides time: bytes received from other ranks, and peak memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# How many bytes each collective brings to this rank from others, from its arguments.
_RECEIVED: dict[str, Callable[..., int]] = {
    "all_to_all_single": lambda out, _, splits=None, *__, **___: sum(
        n * out[0].nbytes for rank, n in enumerate(splits) if n and rank != dist.get_rank()
    ),
    "all_gather": lambda outs, *_, **__: sum(out.nbytes for out in outs) - outs[0].nbytes,
    "irecv": lambda tensor, *_, **__: tensor.nbytes,
    "broadcast": lambda tensor, src, **_: tensor.nbytes if dist.get_rank() != src else 0,
    # As a ring does it: every rank's share of the sum comes round once, then the sums do.
    "all_reduce": lambda tensor, *_, **__: (
        2 * tensor.nbytes * (dist.get_world_size() - 1) // dist.get_world_size()
    ),
}
Message = tuple[str, int]  # collective, bytes received from others


@contextmanager
def received_messages() -> Iterator[list[Message]]:
    """Note every collective of this rank, and let it happen."""
    messages: list[Message] = []

    def spy(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            messages.append((name, _RECEIVED[name](*args, **kwargs)))
            return original(*args, **kwargs)

        return call

    with mock.patch.multiple(dist, **{name: spy(name) for name in _RECEIVED}):
        yield messages


class PeakMemory(TorchDispatchMode):
    """Track the bytes of all tensors made inside the ``with`` block that are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[int, StorageWeakRef] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A key may be that of a dead storage: look again before each operation.
        self._alive = {key: ref for key, ref in self._alive.items() if not ref.expired()}
        self._known.update(key for key in _keys((args, kwargs)) if key not in self._alive)
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._alive[storage._cdata] = StorageWeakRef(storage)
        self.peak = max(self.peak, sum(map(_size, self._alive.values())))
        return result


def _keys(tree: Any) -> list[int]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
    return [tensor.untyped_storage()._cdata for tensor in tensors]


def _size(ref: StorageWeakRef) -> int:
    """The bytes of a storage now: it may be gone, or have been emptied."""
    storage: Any = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
    return 0 if storage is None else int(storage.nbytes())


def peak_memory(run: Callable[[], object], device: str) -> int:
    """The most bytes that a run's own tensors took at once; on a GPU, that it had allocated."""
    if device != "cuda":
        memory = PeakMemory()
        with memory:
            run()
        return memory.peak
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before
