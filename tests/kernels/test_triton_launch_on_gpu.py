"""The Triton kernels on a CUDA device, at the sizes and under the conditions of training."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from kernels.kernel_cases import all_four, loops, rows_for
from shuffle_batchnorm import ShuffleBatchNorm
from shuffle_batchnorm.kernels import reference
from shuffle_batchnorm.kernels.select import Kernels, select
from shuffle_batchnorm.norm.mixing import block_sizes

pytestmark = pytest.mark.gpu
REFERENCE: Kernels = reference
LAYOUTS = pytest.mark.parametrize(
    "channels_last", [False, True], ids=["contiguous", "channels_last"]
)


def _input(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    x = torch.randn(shape, device="cuda", dtype=dtype).mul_(2).add_(3)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(
    "shape",
    [(16, 64, 112, 112), (32, 256, 56, 56), (32, 512, 7, 7), (32, 1024, 14, 14), (64, 2048)],
)
@pytest.mark.parametrize("groups", [1, 8])
@LAYOUTS
def test_every_dtype_and_layout(
    dtype: torch.dtype, shape: tuple[int, ...], groups: int, channels_last: bool
) -> None:
    """Catches what only a compiled kernel does wrong: tiles, splits and dtypes of real layers."""
    x, dy = (_input(*shape, dtype=dtype, channels_last=channels_last) for _ in range(2))
    sizes = block_sizes(shape[0], groups, 3)
    rows = rows_for(x, sizes, 4)
    got, want = all_four(select(x), x, dy, sizes, rows), loops(x, dy, sizes, rows)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for name in ("mean", "std", "total", "dot"):
        assert got[name].dtype == accumulation
        size = want[name].abs().max().item()
        torch.testing.assert_close(
            got[name].double(), want[name], rtol=tolerance, atol=tolerance * size
        )
    eps = max(tolerance, torch.finfo(dtype).eps)
    for name in ("y", "dx"):
        assert got[name].dtype == dtype
        assert got[name].stride() == x.stride()
        torch.testing.assert_close(got[name].double(), want[name], rtol=eps, atol=1e2 * tolerance)


@LAYOUTS
def test_results_repeat_their_bits(channels_last: bool) -> None:
    """Catches atomics, and tiles chosen by timing."""
    x, dy = (_input(64, 64, 56, 56, channels_last=channels_last) for _ in range(2))
    for sizes in ((64,), (8,) * 8):
        rows = rows_for(x, sizes, 4)
        once, again = (all_four(select(x), x, dy, sizes, rows) for _ in range(2))
        for name, tensor in once.items():
            assert torch.equal(tensor, again[name]), name


@LAYOUTS
def test_more_elements_than_int32_counts(channels_last: bool) -> None:
    """Catches offsets that wrap at 2**31 (pytorch#181555)."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    x = torch.empty(33, 64, 1024, 1024, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    assert x.numel() > 2**31
    dy = torch.empty_like(x).normal_()
    x.normal_()
    sizes = (1, 31, 1)
    rows = rows_for(x, sizes, 4)
    got = all_four(select(x), x, dy, sizes, rows)
    # The ends tell: block 0 lies before 2**31, block 2 behind it.
    for k, end in ((0, slice(0, 1)), (2, slice(32, 33))):
        ends = [row[k : k + 1] for row in rows]
        want = all_four(REFERENCE, x[end], dy[end], (1,), ends)
        for name in ("mean", "std", "total", "dot"):
            torch.testing.assert_close(got[name][k], want[name][0], rtol=1e-4, atol=1e-1)
        for name in ("y", "dx"):
            torch.testing.assert_close(got[name][end], want[name], rtol=1e-2, atol=1e-2)


def test_more_blocks_than_a_grid_has_rows() -> None:
    """Catches blocks on an axis of the grid that ends at 65535 (pytorch#16998)."""
    x = _input(131_072, 3, 4)
    sizes = (1,) * len(x)
    rows = rows_for(x, sizes, 4)
    got, want = (all_four(kernels, x, x, sizes, rows) for kernels in (select(x), REFERENCE))
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["swap", "regroup"])
def test_a_step_is_captured_in_a_cuda_graph(mode: str, dtype: torch.dtype) -> None:
    """Catches work of forward or backward that a graph can't hold, or that reads stale memory."""
    layer = ShuffleBatchNorm(64, mode=mode, groups=4, device="cuda")
    x, dy = (_input(16, 64, 28, 28, dtype=dtype) for _ in range(2))
    x.requires_grad_()

    def step() -> list[Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and makes index tensors
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        x.normal_()
        dy.normal_()
    graph.replay()
    for got, want in zip(results, step(), strict=True):
        assert torch.equal(got, want)


@LAYOUTS
@pytest.mark.parametrize("groups", [1, 8])
def test_a_step_with_new_batch_sizes_never_waits(groups: int, channels_last: bool) -> None:
    """Catches tuning or a synchronisation at the last batch of an epoch."""
    layer = ShuffleBatchNorm(64, mode="regroup", groups=groups, device="cuda")
    for n in (64, 24):
        x = _input(n, 64, 14, 14, channels_last=channels_last).requires_grad_()
        layer(x).sum().backward()  # its index tensors
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["local", "sync", "swap", "regroup"])
def test_compiled_is_eager(mode: str) -> None:
    """Catches a graph break on CUDA, and kernels that differ from what the compiler makes."""
    torch._dynamo.reset()
    layer = ShuffleBatchNorm(8, mode=mode, groups=4, device="cuda")
    model = nn.Sequential(layer, nn.ReLU())
    x = _input(16, 8, 9, 9).requires_grad_()
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        for run in (torch.compile(model, fullgraph=True), model):
            y = run(x)
            results.append([y, *torch.autograd.grad(y.pow(3).sum(), [x, *model.parameters()])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
