"""PyTorch's own tests of SyncBatchNorm under DDP, with mode ``sync`` in its place, on CPU ranks.

They are part of the installed torch and written for GPUs, so they are told that the CPU is one.
"""

import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import TestCase, mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from ranks import run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm

# All that name SyncBatchNorm but test_sync_bn_logged, which asks whether a layer is an instance.
TESTS = [
    "test_DistributedDataParallel_SyncBatchNorm",
    "test_DistributedDataParallel_SyncBatchNorm_2D_Input",
    "test_DistributedDataParallel_SyncBatchNorm_Channels_Last",
    "test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_Running_Value",
    "test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_gradient",
    "test_DistributedDataParallel_SyncBatchNorm_No_Affine",
    "test_DistributedDataParallel_SyncBatchNorm_Single_Input_Per_Process",
    "test_DistributedDataParallel_SyncBatchNorm_half",
    "test_SyncBatchNorm_process_group",
    "test_ddp_inference",
    "test_ddp_sync_bn_training_vs_eval",
    "test_ddp_uneven_inputs_stop_iteration_sync_bn",
]


@pytest.mark.parametrize("name", TESTS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_pytorchs_tests_of_sync_batchnorm(world_size: int, name: str) -> None:
    # A call of its own: the import takes long on a busy machine, and no rank should wait for it in
    # a collective.
    if not all(run_on_ranks(world_size, _has, name, timeout=240)):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    run_on_ranks(world_size, _run, name)


def _has(name: str) -> bool:
    return hasattr(_import_suite().DistributedTest._DistTestBase, name)


def _run(name: str) -> None:
    suite = _import_suite()
    base = suite.DistributedTest._DistTestBase

    class Case(suite.MultiProcessTestCase.__base__, base):  # type: ignore[misc, name-defined, valid-type]
        rank = dist.get_rank()

        def _barrier(self, **_options: object) -> None:
            dist.barrier()

    # Without the decorators that want a GPU for each rank.
    body: Callable[[TestCase], None] = inspect.unwrap(getattr(base, name))
    with _stand_ins(suite), warnings.catch_warnings():
        # One test also has a model of its own that sums over ranks in its forward.
        warnings.filterwarnings("ignore", "c10d::allreduce_: an autograd kernel")
        body(Case())


def _import_suite() -> Any:
    # It reads these when it is imported.
    settings = {
        "BACKEND": "gloo",
        "INIT_METHOD": "file://",  # has it save and load models in mid-training as well
        "WORLD_SIZE": str(dist.get_world_size()),
    }
    with (
        mock.patch.dict(os.environ, settings),
        mock.patch("torch.backends.disable_global_flags"),  # which other tests may want to set
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        from torch.testing._internal.distributed import distributed_test
    return distributed_test


@contextmanager
def _stand_ins(suite: Any) -> Iterator[None]:
    """Put the layer, the CPU and a small network in the places of what the tests ask for."""

    def on_cpu(module: nn.Module, device_ids: object = None) -> DistributedDataParallel:
        del device_ids
        return DistributedDataParallel(module)

    torchvision = SimpleNamespace(models=SimpleNamespace(resnet50=_Network))
    with (
        mock.patch.object(nn, "SyncBatchNorm", _SyncBatchNorm),
        mock.patch.object(nn.parallel, "DistributedDataParallel", on_cpu),
        mock.patch.object(suite, "torchvision", torchvision, create=True),
        mock.patch("torch.cuda.set_device"),
        mock.patch("torch.cuda.current_device", return_value="cpu"),
        _OnCpu(),
    ):
        yield


class _SyncBatchNorm(ShuffleBatchNorm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, mode="sync", **kwargs)

    convert_sync_batchnorm = partial(ShuffleBatchNorm.convert_shuffle_batchnorm, mode="sync")


class _OnCpu(TorchFunctionMode):
    """Leaves tensors on the CPU and makes new ones there, whatever device is asked for."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        _types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.device:
            return torch.device("cpu")
        on_cpu = {"device": "cpu"} if kwargs and "device" in kwargs else {}
        return function(*args, **{**(kwargs or {}), **on_cpu})


class _Network(nn.Module):
    """With batch norm where torchvision's ResNet-50 has it: ``layer1[0].bn1``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Module())
        self.layer1[0].bn1 = nn.BatchNorm2d(3)
