"""The Triton kernels on a CUDA device, at the sizes and under the conditions of training."""

import pytest
import torch
from torch import Tensor

from kernels.kernel_cases import all_four, loops, rows_for
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


# Each dtype, layout, shape and number of groups, not their products: a case compiles four kernels
# or more, at up to a second each.
@pytest.mark.parametrize(
    ("dtype", "shape", "groups", "channels_last"),
    [
        (torch.float32, (16, 64, 112, 112), 1, False),
        (torch.float32, (32, 256, 56, 56), 8, True),
        (torch.float32, (32, 512, 7, 7), 8, False),
        (torch.float32, (64, 2048), 1, False),
        (torch.float64, (32, 1024, 14, 14), 8, False),
        (torch.bfloat16, (16, 64, 112, 112), 8, True),
        (torch.bfloat16, (32, 256, 56, 56), 1, False),
        (torch.bfloat16, (32, 512, 7, 7), 1, False),
        (torch.bfloat16, (32, 1024, 14, 14), 8, True),
        (torch.float16, (32, 1024, 14, 14), 8, False),
    ],
    ids=str,
)
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
