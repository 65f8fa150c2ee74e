"""Ranks on the Triton kernels against the same in plain torch, and how much a step launches."""

import warnings
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
from shuffle_batchnorm import ShuffleBatchNorm, record_statistics
from shuffle_batchnorm.kernels import reference, select, tiles
from shuffle_batchnorm.kernels.rows import Exchange
from shuffle_batchnorm.kernels.select import Kernels
from truth import gradient

pytest.importorskip("triton", reason="Triton is for Linux")
from shuffle_batchnorm.kernels import (
    triton_kernels,
    triton_local,
    triton_merge,
    triton_messages,
    triton_ranks,
)
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
        patch.setattr(select, "select", lambda x: kernel if x.numel() else REFERENCE)
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
CHECK = ["ge", "all", "_local_scalar_dense"]


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


def _step_on(
    mode: str, groups: int, sizes: list[int], dtype: torch.dtype, offset: int = 1
) -> list[list[Tensor]]:
    """Two steps of a rank's layer on each of the modules of kernels, and what it records."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    x, dy = torch.randn(2, sizes[rank], 4, 3, 5, generator=generator).to(dtype).movedim(-1, 2)
    results = []
    for kernel in BOTH:
        with _chosen(kernel):
            layer = ShuffleBatchNorm(5, mode=mode, groups=groups, offset=offset, dtype=dtype)
            torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
            for _ in "12":
                leaf = x.clone().requires_grad_()
                layer.zero_grad()
                with record_statistics(layer) as recorded:
                    y = layer(leaf)
                y.backward(dy)
            layer.zero_grad()
            layer(x).backward(dy)  # weight and bias alone
        (record,) = recorded
        tensors = [y.detach(), gradient(leaf), *map(gradient, layer.parameters())]
        results.append([*tensors, *layer.buffers(), record.used_mean, record.used_var])
    return results


@HOSTS
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ([6, 10], torch.float64),
        ([6, 10], torch.float32),
        ([6, 4], torch.bfloat16),
        ([4, 2, 6], torch.float64),  # blocks without samples
        ([4, 0, 2], torch.float64),  # a rank without any, on kernels in plain torch
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["sync", "swap", "regroup"])
def test_layers_of_ranks_on_triton_kernels(mode: str, sizes: list[int], dtype: torch.dtype) -> None:
    """Catches rows of other blocks or ranks, counts that differ, statistics of uneven blocks."""
    if 0 in sizes and mode != "sync":
        pytest.skip("what it normalises has no values")
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    for groups in (1, 2):
        for got, want in run_on_ranks(len(sizes), _step_on, mode, groups, sizes, dtype):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@HOSTS
@pytest.mark.parametrize("mode", ["swap", "regroup"])
def test_ranks_that_shuffle_nothing(mode: str) -> None:
    """Catches rows that are waited for where none travel."""
    for got, want in run_on_ranks(2, _step_on, mode, 2, [6, 10], torch.float64, 0):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def _is_rejected(mode: str) -> str:
    with _chosen(TRITON):
        layer = ShuffleBatchNorm(5, mode=mode, groups=2, process_group=dist.new_group())
        layer(torch.randn(6, 5))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # from the interpreter
                layer(torch.randn(6 - dist.get_rank(), 5))
        except (ValueError, RuntimeError) as error:
            return str(error)
    return ""


@HOSTS
@pytest.mark.parametrize("mode", ["sync", "swap", "regroup"])
def test_a_rank_hears_of_a_rejection(mode: str) -> None:
    """Catches a rank that normalises with a row whose sender has rejected its input."""
    peer, own = run_on_ranks(2, _is_rejected, mode)
    assert "a peer of rank 0 rejected its input in this call" in peer
    assert "batch 5 is not divisible by groups=2" in own


EXCHANGE = Exchange((0,), 2, ((0, 4), (1, 5), (4, 2)))  # the third block is empty
OWN = (0,), (1,), (2,)


def _prepared(x: Tensor, back: Exchange = EXCHANGE) -> Any:
    """A rank of three blocks, as in `swap`."""
    there = EXCHANGE._replace(members=(*((members[0],) for members in EXCHANGE.members), *OWN))
    return triton_module.TritonRanks(x, 1e-3, (2, 4, 0), there, back)


@pytest.mark.parametrize(
    ("count", "valid"), [(2.0, 1), (1.0, 0), (-torch.inf, 0), (0.0, 0)], ids=str
)
def test_counts_are_checked_where_blocks_have_samples(count: float, valid: int) -> None:
    """Catches a normaliser of 1 value or none, and an error for one that normalises nothing."""
    triton_ranks._valid.cache_clear()
    x = torch.randn(6, 3, 4, device=DEVICE, dtype=torch.float64)
    work = _prepared(x)
    rows = work.pack_moments(x).rows
    rows[4, 0] = -torch.inf  # which the third block would use
    rows[1, 0] = count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # from the interpreter
        found = work.mix_moments(rows, None)
    assert work.counts(found).flatten().tolist() == [8, count, 0]
    assert int(work.valid) == valid
    triton_ranks._valid.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("merged", [2, 1024])
def test_rows_are_merged(dtype: torch.dtype, merged: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a member left out, means far apart that cancel, more members than a tile has."""
    monkeypatch.setattr(tiles, "MERGED", merged)
    x = torch.randn(6, 70, 4, device=DEVICE, dtype=dtype)
    members = ((0, 4, 5), (1, 5, 3), (4, 2, 1))
    exchange = Exchange((0,), 2, members)
    work = triton_module.TritonRanks(x, 1e-3, (2, 2, 2), exchange, exchange)
    received = torch.rand(6, 141, device=DEVICE, dtype=dtype)
    received[:, 0] = torch.arange(6)  # the first of none
    received[:, 1:71] += 1e3
    weight = torch.randn(70, device=DEVICE, dtype=dtype)
    rows = work.mix_moments(received, weight)
    chosen = torch.tensor(members, device=DEVICE)
    count, mean, std = REFERENCE.merge_moments(received[chosen])[:, 0].split((1, 70, 70), dim=1)
    rstd, scale = REFERENCE.normaliser_rows(mean, std, weight, 1e-3, count, None)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    want = torch.cat([row.flatten() for row in (mean, std, rstd, scale, count)])
    torch.testing.assert_close(rows, want, rtol=tolerance, atol=0)

    dy, parts = torch.randn_like(x), torch.randn(6, 140, device=DEVICE, dtype=dtype)
    scratch, messages = work.pack_sums(dy, x, weight, rows)
    total, dot = REFERENCE.block_grad_sums(dy, x, (2, 2, 2), mean, rstd)
    _, _, weighted = REFERENCE.param_grads(total, dot, weight)
    torch.testing.assert_close(messages.rows[:3], weighted.flatten(1), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(messages.sent, messages.rows[:1], rtol=0, atol=0)
    dx, _, _ = work.gradients(dy, x, None, None, rows, scratch, parts)
    total, dot = parts[chosen].sum(dim=1).split(70, dim=1)
    b, c = REFERENCE.dx_coefficients(total, dot, rstd, rstd, count)
    want = REFERENCE.block_grad_affine(dy, x, (2, 2, 2), scale, b, mean, c)
    torch.testing.assert_close(dx, want, rtol=1e2 * tolerance, atol=1e4 * tolerance)


@pytest.mark.filterwarnings("ignore:divide by zero")  # from the interpreter
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_deviations_at_the_ends_of_float32(eps: float) -> None:
    """Catches a square that overflows or vanishes, and a NaN that a maximum hides."""
    x = torch.zeros(2, 6, 1, device=DEVICE)
    work = triton_module.TritonRanks(x, eps, (2,), *[Exchange((), 0, ((0,),))] * 2)
    std = torch.tensor([[0.0, 1e-30, 1e-3, 1.0, 1e30, torch.inf]], device=DEVICE)
    received = torch.cat([torch.full_like(std[:, :1], 2), torch.zeros_like(std), std], dim=1)
    got = work.mix_moments(received, None)[12:18]
    want, _ = REFERENCE.normaliser_rows(std, std, None, eps, 2, None)
    torch.testing.assert_close(got, want[0])
