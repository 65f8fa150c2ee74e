"""The Triton kernels for rows against plain torch, and how many launches they leave of a step."""

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
from shuffle_batchnorm.kernels.rows import Running
from shuffle_batchnorm.kernels.select import Kernels
from truth import gradient

pytest.importorskip("triton", reason="Triton is for Linux")
from shuffle_batchnorm.kernels import triton_kernels, triton_local, triton_merge, triton_rows
from shuffle_batchnorm.kernels import triton_launch as triton_module

TRITON: Kernels = triton_module
REFERENCE: Kernels = reference
BOTH = TRITON, REFERENCE
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.gpu_too
ROWS = 1, 3, 32, 70  # a tile has 32
CHANNELS = 1, 5, 33
EDGES = pytest.mark.parametrize(
    ("rows", "channels", "dtype"),
    [
        *((rows, channels, torch.float32) for rows in ROWS for channels in CHANNELS),
        (70, 33, torch.float64),
    ],
    ids=str,
)
HOSTS = pytest.mark.skipif(CUDA, reason="gloo's ranks are on the CPU")


def _rows(number: int, rows: int, channels: int, dtype: torch.dtype = torch.float32) -> Any:
    """Rows that are parts of longer ones, at odd addresses, as ranks receive them."""
    return torch.randn(number, rows, 2 * channels + 1, device=DEVICE, dtype=dtype)[:, :, 1:][
        :, :, :channels
    ]


def _counts(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values per channel, ``[R, 1]``: 0 in the first row, 1 in the next, then more."""
    return torch.arange(rows, device=DEVICE).to(dtype).repeat_interleave(3)[::3, None]


@pytest.mark.parametrize(
    ("rows", "channels", "step", "dtype"),
    [
        *((rows, channels, 0.1, torch.float32) for rows in ROWS for channels in CHANNELS),
        *((3, 5, step, torch.float32) for step in (0.0, 0.7, 1, torch.tensor(0.1))),
        *((3, 5, step, torch.bfloat16) for step in (0.1, torch.tensor(0.1))),
    ],
    ids=str,
)
def test_rows_of_normalisers(
    rows: int, channels: int, step: float | Tensor, dtype: torch.dtype
) -> None:
    """Catches a row or channel at the end of a tile, statistics moved the wrong way or too far."""
    mean, std = _rows(2, rows, channels)
    weight, *old = torch.rand(3, channels, device=DEVICE).to(dtype)
    step = step.to(DEVICE) if isinstance(step, Tensor) else step
    for w, tracks, n in ((weight, True, 7), (None, False, 7), (weight, True, _counts(rows))):
        results = []
        for chosen in BOTH:
            new_mean, new_var = (row.clone() for row in old)
            running = Running(new_mean, new_var, step) if tracks else None
            rstd, scale = chosen.normaliser_rows(mean, std.abs(), w, 1e-3, n, running)
            results.append([rstd, scale, new_mean, new_var])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float64, 1), (torch.float32, 2)])
def test_rows_that_triton_leaves_to_torch(dtype: torch.dtype, gap: int) -> None:
    """Catches numbers in float32 beside rows in float64, and memory with gaps."""
    mean, std = torch.rand(2, 3, 5, dtype=dtype, device=DEVICE)
    rows = torch.rand(3, 5 * gap, dtype=dtype, device=DEVICE)
    results = []
    for chosen in BOTH:
        weight, *old = rows.clone()[:, ::gap]
        running = Running(old[0], old[1], 0.1)
        rstd, scale = chosen.normaliser_rows(mean, std, weight, 1e-3, 7, running)
        results.append([rstd, scale, *old])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:divide by zero")  # from the interpreter
@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_deviations_at_the_ends_of_float32(eps: float) -> None:
    """Catches a square that overflows or vanishes, 0 / 0, and a NaN that a maximum hides."""
    std = torch.tensor([[0.0, 1e-30, 1e-3, 1.0, 1e30, torch.inf, torch.nan]], device=DEVICE)
    got, want = (chosen.normaliser_rows(std, std, None, eps, 2, None)[0] for chosen in BOTH)
    torch.testing.assert_close(got, want, equal_nan=True)


@EDGES
def test_rows_of_gradients(rows: int, channels: int, dtype: torch.dtype) -> None:
    """Catches a row or channel at the end of a tile, sums that swap, a count of 0."""
    total, dot, rstd, factor = _rows(4, rows, channels, dtype)
    weight = torch.rand(2 * channels, device=DEVICE).half()[::2]
    got, want = (
        [
            *chosen.backward_rows(total, dot, rstd, factor, 7),
            *chosen.dx_coefficients(total, dot, rstd, factor, _counts(rows, dtype)),
            *chosen.param_grads(total, dot, weight),
            *chosen.param_grads(total, dot, None),
        ]
        for chosen in BOTH
    )
    torch.testing.assert_close(got, want)


@EDGES
def test_merged_rows(rows: int, channels: int, dtype: torch.dtype) -> None:
    """Catches a member left out, one that weighs too much, means far apart that cancel."""
    data = torch.randn(3, rows, 2 * channels + 1, device=DEVICE, dtype=dtype).abs()
    data[..., 0] = torch.arange(rows)  # the first of none
    data[..., 1 : channels + 1] += 1e3
    data[1, ..., 0] = 0  # nothing in all
    got, want = (chosen.merge_moments(data) for chosen in BOTH)
    torch.testing.assert_close(got, want, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)


def test_more_rows_than_one_program_can_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tile that is larger than Triton takes, as 2,000 ranks would ask for."""
    monkeypatch.setattr(triton_module, "MERGED", 8)
    monkeypatch.setattr(triton_rows, "merge_rows", None)  # not to be launched
    rows = torch.rand(2, 9, 7, device=DEVICE)
    torch.testing.assert_close(
        TRITON.merge_moments(rows), REFERENCE.merge_moments(rows), rtol=0, atol=0
    )


@pytest.mark.filterwarnings("ignore:invalid value")  # from the interpreter
def test_a_rejected_row_rejects_its_group() -> None:
    """Catches a group that hides the rejection of one of its members."""
    rows = torch.ones(2, 3, 5, device=DEVICE)
    rows[1, 2, 0] = -torch.inf
    assert TRITON.merge_moments(rows)[:, 0, 0].tolist() == [3, -torch.inf]


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
    triton_rows: (
        "merge_moments", "merge_sums", "normaliser_rows", "merge_rows", "param_grads",
        "dx_coefficients",
    ),
}  # fmt: skip


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


@HOSTS
@pytest.mark.parametrize(
    ("mode", "groups", "most"),
    [
        ("sync", 1, (10, 6)),
        ("swap", 1, (10, 5)),
        ("swap", 2, (13, 8)),
        ("regroup", 1, (12, 8)),
        ("regroup", 2, (13, 9)),
    ],
)
def test_launches_of_a_step_on_ranks(mode: str, groups: int, most: tuple[int, int]) -> None:
    """Catches the same across ranks, where rows are packed, sent, put in order and checked, too."""
    for forward, backward in run_on_ranks(2, _launches_of_a_step, mode, groups):
        assert (len(forward), len(backward)) == most, (forward, backward)


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
