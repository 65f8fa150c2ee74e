"""The four kernels: the reference against loops of plain torch, the others against the reference.

`torch.use_deterministic_algorithms` fills fresh memory with NaN, so an output that a kernel does
not write can't be right by luck.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kernels.kernel_cases import (
    DTYPES,
    GROUPED,
    LAST2D,
    NAMED,
    all_four,
    assert_near,
    assert_one_rounding,
    cast,
    check_groups,
    loops,
    packed_rows,
    randn,
    rows_for,
)
from shuffle_batchnorm.kernels import cpu, reference
from shuffle_batchnorm.kernels import rows as kernel_rows
from shuffle_batchnorm.kernels.rows import BlockGroups
from shuffle_batchnorm.kernels.select import Kernels, select
from shuffle_batchnorm.norm.mixing import block_sizes

CPU: Kernels = cpu
REFERENCE: Kernels = reference


pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")


@NAMED
@DTYPES
def test_reference_is_the_formula(
    case: tuple[Callable[[], Tensor], tuple[int, ...]], dtype: torch.dtype
) -> None:
    """Catches a truth for the kernels that is wrong itself."""
    x, sizes = cast(case[0](), dtype), case[1]
    dy, rows = randn(*x.shape).to(dtype), rows_for(x, sizes, 4)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_near(all_four(REFERENCE, x, dy, sizes, rows), loops(x, dy, sizes, rows), tolerance)


@pytest.fixture
def _size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU kernels take even small blocks one by one, as large ones are."""
    monkeypatch.setattr(cpu, "_SMALL", request.param)


@NAMED
@pytest.mark.parametrize(
    ("_size", "dtype"),
    [(2**14, torch.float32), (2**14, torch.float64), (0, torch.float64)],
    ids=str,
    indirect=["_size"],
)
@pytest.mark.usefixtures("_size")
def test_cpu_is_the_reference(
    case: tuple[Callable[[], Tensor], tuple[int, ...]], dtype: torch.dtype
) -> None:
    """Catches a layout read wrongly, a block's row given to another, an output left unwritten."""
    x = cast(case[0](), dtype)
    before = x.clone()
    # The gradient comes as the next layer's backward made it: like x, or in any other layout.
    gradients = [randn(*x.shape).to(dtype), cast(case[0]().flip(0), dtype)]
    gradients.append(gradients[0].movedim(1, -1).contiguous().movedim(-1, 1))
    gradients.append(gradients[0][:1, :1].expand_as(x))  # of a sum: strides of 0
    # Few blocks and many are for different loops of aten.
    cuts = (case[1], block_sizes(len(x), 1, 9))
    for dy, sizes in zip([*gradients, gradients[0]], itertools.cycle(cuts), strict=False):
        rows = packed_rows(x, sizes)
        got, want = (all_four(k, x, dy, sizes, rows) for k in (CPU, REFERENCE))
        assert_near(got, want, 1e-12 if dtype == torch.float64 else 1e-5)
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype == dtype, name
            assert got[name].shape == tensor.shape, name
    assert torch.equal(x, before), "a kernel wrote to its input"


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 5, 3), (4, 6, 2, 3, 2), (4, 1, 5, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("other_gradient", [False, True])
def test_layout_of_the_input_is_kept(
    kernels: Kernels, shape: tuple[int, ...], channels_last: bool, other_gradient: bool
) -> None:
    """Catches outputs in the gradient's memory format, or always contiguous (pytorch#64039)."""
    x, dy = randn(*shape), randn(*shape)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
    if channels_last != other_gradient:
        dy = dy.movedim(1, -1).contiguous().movedim(-1, 1)
    for sizes in ((1, 3), block_sizes(4, 1, 9)):
        results = all_four(kernels, x, dy, sizes, rows_for(x, sizes, 4))
        assert results["y"].stride() == results["dx"].stride() == x.stride()
        for name in ("mean", "std", "total", "dot"):
            assert results[name].is_contiguous(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, channels_last: bool) -> None:
    """Catches sums and counts in half precision (pytorch#96203, #126525): 32768 values a block."""
    x = (randn(64, 3, 32, 32) * 10).to(dtype)
    x = x.contiguous(memory_format=LAST2D) if channels_last else x
    dy, sizes = randn(*x.shape).to(dtype), (32, 32)
    assert_one_rounding(select(x), x, dy, sizes, rows_for(x, sizes, 4))


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("empty_blocks", [0, 8])
def test_large_means_cancel_no_more_than_in_batch_norm(
    kernels: Kernels, channels_last: bool, empty_blocks: int
) -> None:
    """Catches E[x²] − E[x]²: at a mean of 1e4 deviations it leaves no digit of the variance."""
    x = torch.randn(16, 8, 16, 16) + 1e4
    x = x.contiguous(memory_format=LAST2D) if channels_last else x
    exact = nn.BatchNorm2d(8, affine=False).double()(x.double())
    theirs = (nn.BatchNorm2d(8, affine=False)(x).double() - exact).norm()
    sizes = (16, *[0] * empty_blocks)
    mean, std = kernels.block_moments(x, sizes)
    rstd = (std.square() + 1e-5).rsqrt()
    y = kernels.block_affine(x, sizes, mean, rstd, torch.zeros_like(mean))
    assert (y.double() - exact).norm() <= 3 * theirs


@pytest.mark.parametrize("shape", [(32, 4, 49), (3, 4, 49), (2, 4, 5000), (640, 4, 1)], ids=str)
@pytest.mark.parametrize("blocks", [1, 2])
def test_moments_of_the_reference_keep_their_digits(shape: tuple[int, ...], blocks: int) -> None:
    """Catches what is rounded off a mean, of a plane or a block, left in it or in the deviation."""
    x, sizes = torch.randn(shape) + 1e6, block_sizes(shape[0], 1, blocks)
    mean, std = reference.block_moments(x, sizes)
    for k, block in enumerate(x.double().split(sizes)):
        exact = torch.std_mean(block, dim=(0, 2), correction=0)
        assert (mean[k] - exact[1]).abs().max() <= 0.51 * 2**-4, "half the last place of 1e6"
        assert (std[k] / exact[0] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
@GROUPED
@pytest.mark.parametrize("_size", [2**14, 0], ids=["small", "large"], indirect=True)
@pytest.mark.usefixtures("_size")
def test_groups_are_made_of_their_blocks(
    kernels: Kernels,
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    groups: BlockGroups,
    channels_last: bool,
) -> None:
    """Catches a block in another's group, one counted twice, and groups that share a mean."""
    check_groups(kernels, shape, sizes, groups, channels_last)


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5)], ids=str)
def test_numbers_kept_from_call_to_call_stay_what_they_are(
    kernels: Kernels, shape: tuple[int, ...]
) -> None:
    """Catches a kernel that writes to the counts that the next call will read."""
    x, sizes = randn(*shape), (2, 1, 0)
    before = kernel_rows.counts(sizes, 1, x).clone()
    all_four(kernels, x, x, sizes, rows_for(x, sizes, 4))
    assert torch.equal(kernel_rows.counts(sizes, 1, x), before)
