"""Ranks on the Triton kernels against the same in plain torch, and how much a step launches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ranks import run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm
from shuffle_batchnorm.kernels import reference, select
from shuffle_batchnorm.kernels.select import Kernels
from truth import gradient

pytest.importorskip("triton", reason="Triton is for Linux")
from shuffle_batchnorm.kernels import triton_kernels, triton_local, triton_merge, triton_messages
from shuffle_batchnorm.kernels import triton_launch as triton_module

TRITON: Kernels = triton_module
REFERENCE: Kernels = reference
BOTH = TRITON, REFERENCE
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.gpu_too
HOSTS = pytest.mark.skipif(CUDA, reason="gloo's ranks are on the CPU")


def test_a_graph_knows_that_running_statistics_have_moved() -> None:
    """Catches a kernel that writes to what an eval-mode call has saved, unseen by autograd."""
    with _chosen(TRITON):
        layer = ShuffleBatchNorm(5, mode="local", device=DEVICE).eval()
        x = torch.randn(8, 5, device=DEVICE, requires_grad=True)
        y = layer(x)
        layer.train()(x.detach())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


class _Launches(TorchDispatchMode):
    """Counts what a GPU would be asked to do: operations on memory, and calls of our kernels."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if not function.is_view and not name.startswith(("empty", "new_empty", "detach")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))

    def count(self, kernel: Any, name: str) -> Any:
        """Return a kernel that is counted as one, whatever the interpreter does to run it."""

        class Counted:
            arg_names = kernel.arg_names

            def __getitem__(_, grid: tuple[int, ...]) -> Callable[..., None]:
                def launch(*args: Any, **options: Any) -> None:
                    self.names.append(name)
                    with _disable_current_modes():
                        kernel[grid](*args, **options)

                return launch

        return Counted()


@contextmanager
def _chosen(kernel: Kernels) -> Iterator[pytest.MonkeyPatch]:
    """Let layers take a module of kernels, whatever the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "select", lambda _: kernel)
        yield patch


KERNELS: dict[ModuleType, tuple[str, ...]] = {
    triton_kernels: ("moments", "affine", "grad_sums", "grad_affine"),
    triton_merge: ("finish_moments", "finish_sums"),
    triton_messages: ("pack_moments", "mix_moments", "pack_sums", "mix_sums"),
}


def _launches_of_a_step(
    mode: str, groups: int = 2, merge_last: bool = False
) -> tuple[list[str], list[str]]:
    """What forward and backward launch, once index tensors are made and ranks have agreed."""
    launches = _Launches()
    with _chosen(TRITON) as patch:
        patch.setattr(triton_local, "MERGE_LAST", merge_last)
        for module, names in KERNELS.items():
            for name in names:
                patch.setattr(module, name, launches.count(getattr(module, name), name))
        layer = ShuffleBatchNorm(5, mode=mode, groups=groups, device=DEVICE)
        x, dy = torch.randn(2, 8, 5, 4, 3, device=DEVICE)
        x.requires_grad_()
        layer(x).backward(dy)
        launches.names.clear()
        with launches:
            y = layer(x)
            forward = len(launches.names)
            torch.autograd.grad(y, [x, *layer.parameters()], dy)
    return launches.names[:forward], launches.names[forward:]


@pytest.mark.parametrize("mode", ["local", "swap", "regroup"])
def test_launches_of_a_step(mode: str) -> None:
    """Catches an operation that has crept in: each costs small layers on a GPU its launch."""
    forward, backward = _launches_of_a_step(mode)
    assert forward == ["moments", "finish_moments", "affine"]
    assert backward == ["grad_sums", "finish_sums", "grad_affine"]
    forward, backward = _launches_of_a_step(mode, merge_last=True)
    assert forward == ["moments", "affine"]
    assert backward == ["grad_sums", "grad_affine"]


# On the CPU the counts are read, to name the group; on a GPU one assertion takes that place.
CHECK = ["ge", "all", "is_nonzero"]


@HOSTS
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", ["sync", "swap", "regroup"])
def test_launches_of_a_step_on_ranks(mode: str, groups: int) -> None:
    """Catches the same across ranks, where rows are packed, sent, merged and checked, too."""
    there, back = {"sync": ("allgather_", "allreduce_")}.get(mode, ("alltoall_base_",) * 2)
    for forward, backward in run_on_ranks(2, _launches_of_a_step, mode, groups):
        assert forward == ["moments", "pack_moments", there, "mix_moments", *CHECK, "affine"]
        clone = ["clone"] if mode == "sync" else []
        assert backward == ["grad_sums", "pack_sums", *clone, back, "mix_sums", "grad_affine"]


def _step_on(mode: str, groups: int, sizes: list[int], dtype: torch.dtype) -> list[list[Tensor]]:
    """Two steps of a rank's layer on each of the modules of kernels."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    x, dy = torch.randn(2, sizes[rank], 5, 4, 3, generator=generator, dtype=dtype)
    results = []
    for kernel in BOTH:
        with _chosen(kernel):
            layer = ShuffleBatchNorm(5, mode=mode, groups=groups, dtype=dtype)
            torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
            for _ in "12":
                leaf = x.clone().requires_grad_()
                layer.zero_grad()
                y = layer(leaf)
                y.backward(dy)
        tensors = [y.detach(), gradient(leaf), *map(gradient, layer.parameters())]
        results.append([*tensors, *layer.buffers()])
    return results


@HOSTS
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ([6, 10], torch.float64),
        ([6, 10], torch.float32),
        ([4, 2], torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["sync", "swap", "regroup"])
def test_layers_of_ranks_on_triton_kernels(mode: str, sizes: list[int], dtype: torch.dtype) -> None:
    """Catches rows that arrive with gaps, counts that differ, and statistics of uneven blocks."""
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for groups in (1, 2):
        for got, want in run_on_ranks(2, _step_on, mode, groups, sizes, dtype):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
