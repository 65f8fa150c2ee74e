"""The four kernels: the reference against loops of plain torch, the others against the reference.

`torch.use_deterministic_algorithms` fills fresh memory with NaN, so an output that a kernel does
not write can't be right by luck.
"""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from kernel_cases import (
    DTYPES,
    LAST2D,
    NAMED,
    all_four,
    assert_near,
    assert_one_rounding,
    cast,
    loops,
    randn,
    rows_for,
)
from shuffle_batchnorm.kernels import Kernels, cpu, reference, select
from shuffle_batchnorm.kernels import rows as kernel_rows
from shuffle_batchnorm.kernels.rows import Pools
from shuffle_batchnorm.mixing import block_sizes

CPU: Kernels = cpu
REFERENCE: Kernels = reference


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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


@pytest.fixture(params=["whole", "in parts", "in parts, one pass"])
def _cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take even small tensors the ways of large ones."""
    if request.param != "whole":
        for name in ("_PART", "_LINES", "_LONG"):
            monkeypatch.setattr(cpu, name, 7)
        monkeypatch.setattr(cpu, "_SMALL", 0 if "one pass" in request.param else cpu._SMALL)


@NAMED
@DTYPES
@pytest.mark.usefixtures("_cut")
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
    for dy, sizes in itertools.product(gradients, (case[1], block_sizes(len(x), 1, 9))):
        rows = rows_for(x, sizes, 4)
        got, want = (all_four(k, x, dy, sizes, rows) for k in (CPU, REFERENCE))
        assert_near(got, want, 1e-12 if dtype == torch.float64 else 1e-5)
        for name, tensor in want.items():
            assert got[name].dtype == tensor.dtype == dtype, name
            assert got[name].shape == tensor.shape, name
    assert torch.equal(x, before), "a kernel wrote to its input"


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 5, 3), (4, 6, 2, 3, 2), (4, 1, 5, 3)])
@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("other_gradient", [False, True])
def test_layout_of_the_input_is_kept(
    kernels: Kernels, shape: tuple[int, ...], lines: bool, other_gradient: bool
) -> None:
    """Catches outputs in the gradient's memory format, or always contiguous (pytorch#64039)."""
    x, dy = randn(*shape), randn(*shape)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if lines else x
    if lines != other_gradient:
        dy = dy.movedim(1, -1).contiguous().movedim(-1, 1)
    for sizes in ((1, 3), block_sizes(4, 1, 9)):
        results = all_four(kernels, x, dy, sizes, rows_for(x, sizes, 4))
        assert results["y"].stride() == results["dx"].stride() == x.stride()
        for name in ("mean", "std", "total", "dot"):
            assert results[name].is_contiguous(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lines", [False, True])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, lines: bool) -> None:
    """Catches sums and counts in half precision (pytorch#96203, #126525): 32768 values a block."""
    x = (randn(64, 3, 32, 32) * 10).to(dtype)
    x = x.contiguous(memory_format=LAST2D) if lines else x
    dy, sizes = randn(*x.shape).to(dtype), (32, 32)
    assert_one_rounding(select(x), x, dy, sizes, rows_for(x, sizes, 4))


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("empty_blocks", [0, 8])
def test_large_means_cancel_no_more_than_in_batch_norm(
    kernels: Kernels, lines: bool, empty_blocks: int
) -> None:
    """Catches E[x²] − E[x]²: at a mean of 1e4 deviations it leaves no digit of the variance."""
    x = torch.randn(16, 8, 16, 16) + 1e4
    x = x.contiguous(memory_format=LAST2D) if lines else x
    exact = nn.BatchNorm2d(8, affine=False).double()(x.double())
    theirs = (nn.BatchNorm2d(8, affine=False)(x).double() - exact).norm()
    sizes = (16, *[0] * empty_blocks)
    mean, std = kernels.block_moments(x, sizes)
    rho = (std.square() + 1e-5).rsqrt()
    y = kernels.block_affine(x, sizes, mean, rho, torch.zeros_like(mean))
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


@pytest.mark.parametrize("sizes", [(8,), (5, 3), (1,) * 8], ids=str)
def test_a_bad_guess_of_the_mean_costs_no_digits(sizes: tuple[int, ...]) -> None:
    """Catches cancellation where outliers are spread over each plane."""
    x = torch.randn(8, 3, 3200)
    x[:, 1, ::200] += 1e4
    x[:, 2] = 100.1
    mean, std = cpu.block_moments(x, sizes)
    for k, block in enumerate(x.double().split(sizes)):
        exact = torch.std_mean(block, dim=(0, 2), correction=0)
        torch.testing.assert_close(mean[k], exact[1].float(), rtol=3e-7, atol=3e-7)
        torch.testing.assert_close(std[k], exact[0].float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "few", "seen"),
    [((400,), 3200, 3200), ((8,), 100, 1600), ((5, 3), 12, 200), ((1,) * 8, 12, 200)],
    ids=str,
)
@pytest.mark.parametrize("all_seen", [True, False])
def test_the_worst_guess_of_the_mean_costs_four_bits(
    sizes: tuple[int, ...], few: int, seen: int, all_seen: bool
) -> None:
    """Catches a guess from too few values, where these are far from all others."""
    x = torch.randn(sum(sizes), 3, 3200)
    if all_seen:  # whatever a guess looks at
        x[:: min(16, max(sizes)), 1, :seen] += 1e4
    else:
        x[:: max(sizes), 1, :few] += 1e4
    x[:, 2] = 100.1
    mean, std = cpu.block_moments(x, sizes)
    limit = 8e-6 if all_seen else 1e-6
    for k, block in enumerate(x.double().split(sizes)):
        deviation, center = torch.std_mean(block, dim=(0, 2), correction=0)
        assert ((mean[k] - center).abs() <= 1e-6 * deviation + 1e-7 * center.abs()).all()
        assert ((std[k] - deviation).abs() <= limit * deviation).all()


# Blocks per pool in an order of their own; and all in one.
DEALT = Pools(2, (0, 4, 2, 3, 1, 5), (0, 1, 0, 1, 0, 1))
ONE_POOL = Pools(1, tuple(range(6)), (0,) * 6)


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
@pytest.mark.parametrize(
    ("shape", "sizes", "pools"),
    [
        ((12, 5, 4, 6), (2,) * 6, DEALT),
        ((6, 5, 49), (1,) * 6, DEALT),
        ((10, 5, 7), (2, 2, 1) * 2, DEALT),
        ((4, 5, 7), (1, 1, 0) * 2, DEALT),
        ((204, 3, 20), (34,) * 6, DEALT),  # more than the sixteen of which a guess sees one
        ((6, 5), (1,) * 6, DEALT),
        ((10, 5), (2, 2, 1) * 2, DEALT),
        ((12, 5, 4), (2,) * 6, ONE_POOL),
        ((12, 5), (2,) * 6, ONE_POOL),
    ],
    ids=str,
)
@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.usefixtures("_cut")
def test_pools_are_groups_of_their_blocks(
    kernels: Kernels, shape: tuple[int, ...], sizes: tuple[int, ...], pools: Pools, lines: bool
) -> None:
    """Catches a block in another's pool, one counted twice, and pools that share a mean."""
    x = randn(*shape) + 100 * torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if lines else x
    blocks, per_pool = x.split(sizes), len(sizes) // pools.number
    mean, std = kernels.block_moments(x, sizes, pools)
    for k in range(pools.number):
        members = pools.dealt[k * per_pool : (k + 1) * per_pool]
        assert all(pools.owners[block] == k for block in members)
        samples = torch.cat([blocks[block] for block in members]).movedim(1, 0).flatten(1)
        deviation, center = torch.std_mean(samples, dim=1, correction=0)
        torch.testing.assert_close(mean[k], center, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(std[k], deviation, rtol=1e-12, atol=1e-13)


def test_the_guess_of_a_pool_sees_a_sixteenth() -> None:
    """Catches a guess from a pool's first sample, where that is far from all others."""
    x = torch.randn(3200, 3, 8)
    x[::800] += 1e4
    mean, std = cpu.block_moments(x, (800,) * 4, Pools(2, (0, 3, 1, 2), (0, 1, 1, 0)))
    blocks = x.double().split(800)
    for k, pool in enumerate((blocks[::3], blocks[1:3])):
        deviation, center = torch.std_mean(torch.cat(pool), dim=(0, 2), correction=0)
        assert ((mean[k] - center).abs() <= 1e-6 * deviation).all()
        assert ((std[k] - deviation).abs() <= 1e-6 * deviation).all()


@pytest.mark.parametrize("lines", [False, True])
def test_the_guess_of_a_pool_sees_no_other_pool(lines: bool) -> None:
    """Catches a center between pools that are far apart."""
    x = torch.randn(64, 3, 8)
    x[16:48] += 1e5  # pool 1
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if lines else x
    mean, std = cpu.block_moments(x, (16,) * 4, Pools(2, (0, 3, 1, 2), (0, 1, 1, 0)))
    blocks = x.double().split(16)
    for k, pool in enumerate((blocks[::3], blocks[1:3])):
        deviation, center = torch.std_mean(torch.cat(pool), dim=(0, 2), correction=0)
        torch.testing.assert_close(mean[k], center.float(), rtol=2e-7, atol=1e-6)
        torch.testing.assert_close(std[k], deviation.float(), rtol=1e-6, atol=0)


def test_the_guess_of_a_pool_of_many_blocks_costs_no_digits() -> None:
    """Catches a guess from the first block alone, where there are hundreds."""
    owners = (*(0, 1) * 160, *(1, 0) * 160)
    dealt = tuple(sorted(range(640), key=owners.__getitem__))
    x = torch.randn(640, 3, 8)
    x[::320] += 1e4
    mean, std = cpu.block_moments(x, (1,) * 640, Pools(2, dealt, owners))
    for k in range(2):
        members = x.double()[torch.tensor(owners) == k]
        deviation, center = torch.std_mean(members, dim=(0, 2), correction=0)
        assert ((mean[k] - center).abs() <= 1e-6 * deviation).all()
        assert ((std[k] - deviation).abs() <= 1e-6 * deviation).all()


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4)], ids=str)
def test_pools_whose_blocks_are_far_apart_stay_finite(shape: tuple[int, ...]) -> None:
    """Catches squares of ±1e30 in float32, and infinities that spread to another pool."""
    x = torch.ones(shape) * torch.tensor([1, 2, 2, -1, 3, 4.0]).view(-1, *[1] * (len(shape) - 1))
    mean, std = cpu.block_moments(
        1e30 * x, (1,) * 6, Pools(3, (0, 3, 2, 5, 4, 1), (0, 2, 1, 0, 2, 1))
    )
    torch.testing.assert_close(mean, torch.tensor([[0.0], [3.0], [2.5]]).expand(3, 3) * 1e30)
    torch.testing.assert_close(std, torch.tensor([[1.0], [1.0], [0.5]]).expand(3, 3) * 1e30)


def test_sums_of_large_values_stay_finite() -> None:
    """Catches sums over a whole block, which is infinite where a plane's is not."""
    mean, std = cpu.block_moments(torch.full((256, 2, 64, 64), 1e34), (256,))
    assert torch.equal(mean, torch.full((1, 2), 1e34))
    assert not std.any()
    x = randn(256, 2, 8, 8)
    std = cpu.block_moments((x * 1e17).float(), (256,))[1]  # the sum of all squares is 1e39
    torch.testing.assert_close(std[0].double(), 1e17 * x.std(dim=(0, 2, 3), correction=0))


@pytest.mark.parametrize("scale", [1e18, 1e25, 1e37])
@pytest.mark.parametrize("sizes", [(8,), (5, 3), (1,) * 8], ids=str)
@pytest.mark.parametrize("lines", [False, True])
def test_a_deviation_is_finite_where_its_square_is_not(
    scale: float, sizes: tuple[int, ...], lines: bool
) -> None:
    """Catches squares, and sums of them, that float32 doesn't hold; and a true infinity lost."""
    x = (randn(8, 4, 16, 16) * scale).float()
    x = x.contiguous(memory_format=torch.channels_last) if lines else x
    mean, std = cpu.block_moments(x, sizes)
    for k, block in enumerate(x.double().split(sizes)):
        deviation, center = torch.std_mean(block, dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(std[k].double(), deviation, rtol=1e-6, atol=0)
        torch.testing.assert_close(mean[k].double(), center, rtol=1e-6, atol=1e-7 * scale)
    x[:, 0] = torch.inf
    mean, std = cpu.block_moments(x, sizes)
    assert mean[:, 0].isinf().all()
    assert std[:, 0].isnan().all()
    assert std[:, 1:].isfinite().all()


def test_kernels_are_chosen_by_device_and_dtype() -> None:
    """Catches an empty batch sent to aten's loops, and full batches that are not."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        assert select(torch.zeros(2, 3, dtype=dtype)) is CPU
    assert select(torch.zeros(0, 3)) is REFERENCE
    assert select(torch.zeros(2, 3, device="meta")) is REFERENCE


def test_no_samples_at_all() -> None:
    """Catches a division by 0 or an error on a rank that got no data (pytorch#36530)."""
    x = torch.empty(0, 3, 4)
    sizes = block_sizes(0, 2, 3)
    results = all_four(select(x), x, x, sizes, rows_for(x, sizes, 4))
    for name in ("mean", "std", "total", "dot"):
        assert torch.equal(results[name], torch.zeros(6, 3)), name
    assert results["y"].shape == results["dx"].shape == x.shape


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


def test_what_a_cuda_graph_reads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches index tensors freed by a full cache, whose memory a replay goes on reading."""

    class OnAGPU(Tensor):
        is_cuda = True

    held = torch.arange(3).as_subclass(OnAGPU)
    monkeypatch.setattr(kernel_rows, "_cached", lambda *_: held)
    monkeypatch.setattr(kernel_rows, "_in_cuda_graphs", kept := set[Tensor]())
    for is_capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)  # noqa: B023
        kernel_rows.constant((0, 1, 2), torch.int64, torch.zeros(1))
        assert kept == ({held} if is_capturing else set())
