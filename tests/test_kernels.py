"""The four kernels: the reference against loops of plain torch, the others against the reference.

`torch.use_deterministic_algorithms` fills fresh memory with NaN, so an output that a kernel does
not write can't be right by luck.
"""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from shuffle_batchnorm.kernels import Kernels, cpu, reference, select
from shuffle_batchnorm.mixing import block_sizes

CPU: Kernels = cpu
REFERENCE: Kernels = reference
LAST2D, LAST3D = torch.channels_last, torch.channels_last_3d


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * 2 + 3


# name, with the reason, -> input in float64, and the sizes of its blocks
CASES: dict[str, tuple[Callable[[], Tensor], tuple[int, ...]]] = {
    "plain": (lambda: _randn(8, 5, 4, 6), (4, 4)),
    "one block: nothing to split": (lambda: _randn(6, 5, 4, 6), (6,)),
    "C=1 is channels last and contiguous at once": (lambda: _randn(8, 1, 3, 3), (4, 4)),
    "C=1, one axis less": (lambda: _randn(8, 1, 9), (2, 6)),
    "C not a power of two (apex#1768)": (lambda: _randn(6, 13, 4, 4), (3, 3)),
    "C beyond a vector of 64 (pytorch#57077)": (lambda: _randn(4, 65, 3, 3), (2, 2)),
    "C beyond two vectors of 64": (lambda: _randn(4, 130, 3, 3).contiguous(), (2, 2)),
    "C=65 in lines": (lambda: _randn(4, 65, 3, 3).contiguous(memory_format=LAST2D), (2, 2)),
    "L=1 without space axes": (lambda: _randn(12, 7), (6, 6)),
    "L=1 with space axes": (lambda: _randn(12, 7, 1, 1), (5, 7)),
    "L=1, channels last": (lambda: _randn(12, 7, 1, 1).contiguous(memory_format=LAST2D), (5, 7)),
    "L not a multiple of a vector": (lambda: _randn(4, 3, 17), (2, 2)),
    "5-D": (lambda: _randn(4, 3, 2, 3, 5), (2, 2)),
    "channels last": (lambda: _randn(8, 6, 4, 5).contiguous(memory_format=LAST2D), (4, 4)),
    "channels last 3-D": (lambda: _randn(4, 6, 2, 3, 4).contiguous(memory_format=LAST3D), (1, 3)),
    "3-D in lines, which no memory format names": (
        lambda: _randn(6, 5, 4).movedim(1, 2).contiguous().movedim(2, 1),
        (2, 4),
    ),
    "permuted: neither layout (pytorch#62967)": (
        lambda: _randn(4, 5, 8, 6).permute(2, 3, 1, 0),
        (4, 4),
    ),
    "batch axis innermost": (lambda: _randn(5, 4, 8).movedim(2, 0), (4, 4)),
    "transposed space": (lambda: _randn(8, 5, 4, 6).transpose(2, 3), (4, 4)),
    "expanded over space: strides of 0": (lambda: _randn(8, 5, 1, 1).expand(8, 5, 3, 4), (4, 4)),
    "expanded over samples": (lambda: _randn(1, 5, 3, 4).expand(8, 5, 3, 4), (4, 4)),
    "expanded over channels": (lambda: _randn(8, 1, 3, 4).expand(8, 5, 3, 4), (4, 4)),
    "every second sample": (lambda: _randn(16, 5, 3, 4)[::2], (4, 4)),
    "some channels": (lambda: _randn(8, 9, 3, 4)[:, 2:7], (4, 4)),
    "some channels in lines": (
        lambda: _randn(8, 9, 3, 4).contiguous(memory_format=LAST2D)[:, 2:7],
        (4, 4),
    ),
    "cropped space, with a storage offset": (lambda: _randn(8, 5, 6, 7)[:, :, 1:4, 2:], (4, 4)),
    "uneven blocks, as tensor_split cuts them": (lambda: _randn(14, 5, 4), block_sizes(14, 2, 3)),
    "uneven blocks in lines": (lambda: _randn(14, 5), block_sizes(14, 2, 3)),
    "empty blocks: fewer samples than blocks": (lambda: _randn(6, 5, 4), block_sizes(6, 2, 5)),
    "empty blocks in lines": (lambda: _randn(6, 5), block_sizes(6, 2, 5)),
    "one sample per block": (lambda: _randn(6, 5, 4), (1,) * 6),
    "one sample per block in lines": (lambda: _randn(6, 5), (1,) * 6),
    "one value per channel and block": (lambda: _randn(3, 5, 1), (1,) * 3),
    "constant channels: a variance of 0": (lambda: torch.full((8, 5, 4), 3.7).double(), (4, 4)),
}
NAMED = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Change the dtype, keep the strides, also those of 0 and those with gaps."""
    storage = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=dtype)
    out = storage.as_strided(x.size(), x.stride(), x.storage_offset())
    storage.copy_(x.as_strided((len(storage),), (1,), 0))
    return out


def _rows(x: Tensor, sizes: tuple[int, ...], number: int) -> list[Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [
        torch.randn(len(sizes), x.shape[1], dtype=torch.float64).to(dtype) for _ in range(number)
    ]


def _all_four(
    kernels: Kernels, x: Tensor, dy: Tensor, sizes: tuple[int, ...], rows: list[Tensor]
) -> dict[str, Tensor]:
    a, b, center, c = rows
    mean, std = kernels.block_moments(x, sizes)
    total, dot = kernels.block_grad_sums(dy, x, sizes, center, a)
    return dict(
        mean=mean,
        std=std,
        y=kernels.block_affine(x, sizes, center, a, c),
        total=total,
        dot=dot,
        dx=kernels.block_grad_affine(dy, x, sizes, a, b, center, c),
    )


def _loops(x: Tensor, dy: Tensor, sizes: tuple[int, ...], rows: list[Tensor]) -> dict[str, Tensor]:
    """The formulas, block by block, in float64."""
    shape = (len(sizes), x.shape[1])
    x, dy, rows = x.double(), dy.double(), [row.double() for row in rows]
    out = {name: torch.zeros(shape, dtype=x.dtype) for name in ("mean", "std", "total", "dot")}
    out |= dict(y=torch.empty_like(x), dx=torch.empty_like(x))
    start = 0
    for k, n in enumerate(sizes):
        if n == 0:
            continue
        block = slice(start, start := start + n)
        xs, dys = (t[block].movedim(1, 0).flatten(1) for t in (x, dy))  # [C, n * L]
        a, b, center, c = (row[k, :, None] for row in rows)
        results = dict(
            mean=xs.mean(dim=1),
            std=xs.std(dim=1, correction=0),
            total=dys.sum(dim=1),
            dot=(dys * (xs - center) * a).sum(dim=1),
        )
        for name, result in results.items():
            out[name][k] = result
        for name, values in (("y", (xs - center) * a + c), ("dx", a * dys + b * (xs - center) + c)):
            out[name][block] = values.view(-1, n, *x.shape[2:]).movedim(0, 1)
    return out


def _assert_near(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name, tensor in want.items():
        error = (got[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1)
        assert error <= tolerance, f"{name}: {error:.1e}"


@NAMED
@DTYPES
def test_reference_is_the_formula(
    case: tuple[Callable[[], Tensor], tuple[int, ...]], dtype: torch.dtype
) -> None:
    """Catches a truth for the kernels that is wrong itself."""
    x, sizes = _cast(case[0](), dtype), case[1]
    dy, rows = _randn(*x.shape).to(dtype), _rows(x, sizes, 4)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    _assert_near(_all_four(REFERENCE, x, dy, sizes, rows), _loops(x, dy, sizes, rows), tolerance)


@NAMED
@DTYPES
def test_cpu_is_the_reference(
    case: tuple[Callable[[], Tensor], tuple[int, ...]], dtype: torch.dtype
) -> None:
    """Catches a layout read wrongly, a block's row given to another, an output left unwritten."""
    x = _cast(case[0](), dtype)
    before = x.clone()
    # The gradient comes as the next layer's backward made it: like x, or in any other layout.
    gradients = [_randn(*x.shape).to(dtype), _cast(case[0]().flip(0), dtype)]
    gradients.append(gradients[0].movedim(1, -1).contiguous().movedim(-1, 1))
    gradients.append(gradients[0][:1, :1].expand_as(x))  # of a sum: strides of 0
    # Few blocks and many are for different loops of aten.
    for dy, sizes in itertools.product(gradients, (case[1], block_sizes(len(x), 1, 9))):
        rows = _rows(x, sizes, 4)
        got, want = (_all_four(k, x, dy, sizes, rows) for k in (CPU, REFERENCE))
        _assert_near(got, want, 1e-12 if dtype == torch.float64 else 1e-5)
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
    x, dy = _randn(*shape), _randn(*shape)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if lines else x
    if lines != other_gradient:
        dy = dy.movedim(1, -1).contiguous().movedim(-1, 1)
    for sizes in ((1, 3), block_sizes(4, 1, 9)):
        results = _all_four(kernels, x, dy, sizes, _rows(x, sizes, 4))
        assert results["y"].stride() == results["dx"].stride() == x.stride()
        for name in ("mean", "std", "total", "dot"):
            assert results[name].is_contiguous(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lines", [False, True])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, lines: bool) -> None:
    """Catches sums and counts in half precision (pytorch#96203, #126525): 32768 values a block."""
    x = (_randn(64, 3, 32, 32) * 10).to(dtype)
    x = x.contiguous(memory_format=LAST2D) if lines else x
    dy, sizes = _randn(*x.shape).to(dtype), (32, 32)
    rows = _rows(x, sizes, 4)
    kernels = select(x)
    got, want = _all_four(kernels, x, dy, sizes, rows), _loops(x, dy, sizes, rows)
    for name in ("mean", "std", "total", "dot"):
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-5, atol=1e-3)
    for name in ("y", "dx"):
        # One rounding at the very end, none before.
        assert got[name].dtype == dtype
        assert got[name].stride() == x.stride()
        torch.testing.assert_close(
            got[name].double(), want[name], rtol=torch.finfo(dtype).eps, atol=1e-4
        )


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


def test_kernels_are_chosen_by_device_and_dtype() -> None:
    """Catches half precision or an empty batch sent to aten's loops, and float32 that is not."""
    assert select(torch.zeros(2, 3)) is CPU
    assert select(torch.zeros(2, 3, dtype=torch.float64)) is CPU
    assert select(torch.zeros(2, 3, dtype=torch.bfloat16)) is REFERENCE
    assert select(torch.zeros(0, 3)) is REFERENCE
    assert select(torch.zeros(2, 3, device="meta")) is REFERENCE


def test_no_samples_at_all() -> None:
    """Catches a division by 0 or an error on a rank that got no data (pytorch#36530)."""
    x = torch.empty(0, 3, 4)
    sizes = block_sizes(0, 2, 3)
    results = _all_four(select(x), x, x, sizes, _rows(x, sizes, 4))
    for name in ("mean", "std", "total", "dot"):
        assert torch.equal(results[name], torch.zeros(6, 3)), name
    assert results["y"].shape == results["dx"].shape == x.shape
