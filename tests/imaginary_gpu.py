"""A GPU without numbers, for machines that have none: it tells where the host would wait for it.

Tensors on it are torch's meta tensors, which say that they are on "cuda:0". So the library takes
the paths that it takes on a GPU, every shape and dtype is what it is there, and whatever needs a
number of the device on the host can't go on. Kernels are plain torch's; ranks are imagined, too
(`imaginary_ranks`): what they send has no numbers either.

It is stricter than ``torch.cuda.set_sync_debug_mode``, which overlooks copies from pageable memory
with ``non_blocking=True``. `tests/test_imaginary_gpu.py` compares the two on a GPU, and a test that
takes `GPUS` runs on both.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import cuda_sync
from shuffle_batchnorm.kernels import reference, select

NeverWaits = Callable[[], AbstractContextManager[None]]
_REAL = pytest.param(0, marks=pytest.mark.gpu, id="gpu")
# How many imaginary ranks there are; 0 is one on a GPU that exists.
RANKS = pytest.mark.parametrize("ranks", [1, 2, 3])
GPUS = pytest.mark.parametrize("ranks", [1, 2, 3, _REAL])
ONE_GPU = pytest.mark.parametrize("ranks", [1, _REAL])
GPU = torch.device("cuda", 0)
_aten = torch.ops.aten
_NEEDS_NUMBERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
_INDEXED = {Tensor.__getitem__, Tensor.__setitem__}


class Waited(AssertionError):
    """The host would wait for the GPU here."""


class ImaginaryGpu(TorchDispatchMode):
    """Finds what waits, among the operations that reach a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._free_copies = math.inf  # bytes of a copy to the GPU that nobody minds
        self._pinned: list[Tensor] = []

    @contextmanager
    def never_waits(self, small_copies: bool = False) -> Iterator[None]:
        """Refuse the copies, too, that a first call may make.

        But for non-blocking ones of at most 64 KiB, if these are allowed. The CUDA C++ Programming
        Guide (Asynchronous Concurrent Execution) says that they don't wait, pinned or not.
        """
        self._free_copies = 2**16 if small_copies else 0
        try:
            yield
        finally:
            self._free_copies = math.inf

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if not tensor.is_meta]
        if func is _aten._pin_memory.default:
            self._pinned.append(here[0].clone())
            return self._pinned[-1]
        if func is _aten.is_pinned.default:
            return self._is_pinned(here[0])
        if len(here) < len(tensors):
            self._check_numbers(func, args)
        if func in _COPIES:
            self._check_copy(func, args, kwargs)
        # A 0-dim tensor on the host is read there, and goes with the launch.
        elif len(here) < len(tensors) and any(tensor.ndim for tensor in here):
            self._refuse_copy(f"{func}: part of its input is on the host", math.inf)
        return func(*args, **kwargs)

    def _check_numbers(self, func: Any, args: Any) -> None:
        if func in _INDEXING:
            if any(index is not None and index.dtype == torch.bool for index in args[1]):
                raise Waited(f"{func} with a mask needs numbers of the GPU")
        elif _NEEDS_NUMBERS.intersection(func.tags) or func is _aten._linalg_check_errors.default:
            raise Waited(f"{func} needs numbers of the GPU")

    def _check_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        if func is _aten.copy_.default:
            target, source, *rest = args
            to_gpu, is_async = target.is_meta, rest == [True] or kwargs.get("non_blocking", False)
        else:
            source = args[0]
            device = kwargs.get("device") or source.device
            to_gpu, is_async = device.type == "meta", kwargs.get("non_blocking", False)
        if source.is_meta and not to_gpu:
            raise Waited(f"{func} from the GPU to the host")
        if to_gpu and not source.is_meta and not (is_async and self._is_pinned(source)):
            what = f"{func} to the GPU from pageable memory, or without non_blocking"
            self._refuse_copy(what, source.nbytes if is_async else math.inf)

    def _refuse_copy(self, what: str, size: float) -> None:
        if size > self._free_copies:
            raise Waited(what)

    def _is_pinned(self, tensor: Tensor) -> bool:
        start = tensor.untyped_storage().data_ptr()
        return any(pinned.untyped_storage().data_ptr() == start for pinned in self._pinned)


class _SaysCuda(TorchFunctionMode):
    """Has the meta device called "cuda:0" in what Python asks and in what it is told."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return bool(args[0].is_meta)
        if func == Tensor.is_meta.__get__:  # type: ignore[attr-defined]
            return False
        if func in _READS and args[0].is_meta:
            raise Waited(f"{func.__name__} reads numbers of the GPU")
        if func is Tensor.cuda:
            func, args = Tensor.to, (*args, "cuda")
        if func in _INDEXED:  # by lists, which become tensors on the host
            args = args[0], tree_map(_to_tensor, args[1], is_leaf=_is_list), *args[2:]
        if func in _FROM_NUMBERS:  # made on the host, and copied
            device = kwargs.pop("device", None)
            if func is Tensor.new_tensor:
                func, device, args = torch.tensor, device or args[0].device, args[1:]
            made = func(*args, **kwargs)
            return made if device is None else made.to(_to_meta(device))
        result = func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
        if isinstance(result, torch.device) and result.type == "meta":
            return GPU
        return result


def _to_meta(value: Any) -> Any:
    is_gpu = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"
    return torch.device("meta") if is_gpu else value


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _to_tensor(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, list) else value


@contextmanager
def imaginary_gpu() -> Iterator[ImaginaryGpu]:
    """Have a GPU without numbers, "cuda"."""
    plain = mock.patch.object(select, "_triton", return_value=reference)
    capturing = mock.patch("torch.cuda.is_current_stream_capturing", return_value=False)
    with plain, capturing, ImaginaryGpu() as gpu, _SaysCuda():
        yield gpu


@contextmanager
def gpu(ranks: int, small_copies: bool = False) -> Iterator[NeverWaits]:
    """Have a GPU, with so many imaginary ranks, or a real one for 0; yield what refuses waits."""
    if ranks == 0:
        yield cuda_sync.never_waits
        return
    with imaginary_ranks(ranks), imaginary_gpu() as imaginary:
        yield partial(imaginary.never_waits, small_copies)


@contextmanager
def imaginary_ranks(world_size: int) -> Iterator[None]:
    """Be rank 0 of a process group whose other ranks agree, and send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
