"""The Triton kernels against the reference: on a GPU where there is one, else in the interpreter.

The interpreter forgives what a compiler doesn't: see test_kernels_compiled.py and test_gpu.py.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kernels.kernel_cases import (
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
)
from shuffle_batchnorm import ShuffleBatchNorm
from shuffle_batchnorm.kernels import reference, select, tiles
from shuffle_batchnorm.kernels.rows import BlockGroups
from shuffle_batchnorm.kernels.select import Kernels
from truth import gradient

pytest.importorskip("triton", reason="Triton is for Linux")
from shuffle_batchnorm.kernels import triton_launch as triton_module

TRITON: Kernels = triton_module
REFERENCE: Kernels = reference
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu_too, pytest.mark.usefixtures("nan_in_fresh_memory")]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
LAYOUTS = pytest.mark.parametrize(
    "channels_last", [False, True], ids=["contiguous", "channels_last"]
)


def _in_lines(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _input(*shape: int, channels_last: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    x = randn(*shape).to(DEVICE, dtype)
    return _in_lines(x) if channels_last else x


def _check(x: Tensor, dy: Tensor, sizes: tuple[int, ...]) -> dict[str, Tensor]:
    rows = packed_rows(x, sizes)
    got, want = (all_four(k, x, dy, sizes, rows) for k in (TRITON, REFERENCE))
    assert_near(got, want, 1e-12 if x.dtype == torch.float64 else 1e-5)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
    for name in ("mean", "std", "total", "dot"):
        assert got[name].is_contiguous(), name
    return got


@NAMED
def test_triton_is_the_reference(case: tuple[Callable[[], Tensor], tuple[int, ...]]) -> None:
    """Catches a layout read wrongly, a block's row given to another, an output left unwritten."""
    x = cast(case[0](), torch.float64, DEVICE)
    before = x.clone()
    _check(x, torch.randn_like(x), case[1])
    assert torch.equal(x, before), "a kernel wrote to its input"


# Planes of 49 and 196 are a run of memory, where a channel ends anywhere, also beyond a tile.
_SPACE = [
    (5, 1, 1030),
    (5, 3, 1030),
    (5, 13, 49),
    (5, 64, 17),
    (5, 257, 9),
    (9, 20, 49),
    (5, 6, 196),
]


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        *((shape, channels_last) for shape in _SPACE for channels_last in (False, True)),
        *((shape, False) for shape in ((6, 65), (70, 1), (70, 130))),
    ],
    ids=str,
)
def test_any_channels_and_any_length(shape: tuple[int, ...], channels_last: bool) -> None:
    """Catches a tile's end that is not the data's, in channels or in space, of either layout."""
    x = _input(*shape, channels_last=channels_last, dtype=torch.float32)
    dy = _input(*shape, channels_last=channels_last, dtype=torch.float32)
    _check(x, dy, (1, 0, shape[0] - 1))


@pytest.mark.parametrize("sizes", [(2, 6), (8,), (1,) * 8, (0, 0, 8, 0), (3, 0, 0, 5)])
@LAYOUTS
def test_any_sizes_of_blocks(sizes: tuple[int, ...], channels_last: bool) -> None:
    """Catches blocks thought equal, a sample counted in its neighbour, NaN from an empty block."""
    x, dy = _input(8, 5, 7, channels_last=channels_last), _input(8, 5, 7)
    rows = packed_rows(x, sizes)
    got, want = all_four(TRITON, x, dy, sizes, rows), loops(x, dy, sizes, rows)
    assert_near(got, want, 1e-12)
    empty = [k for k, n in enumerate(sizes) if n == 0]
    for name in ("mean", "std", "total", "dot"):
        assert torch.equal(got[name][empty], torch.zeros_like(got[name][empty])), name


@LAYOUTS
def test_gradients_in_any_layout(channels_last: bool) -> None:
    """Catches a gradient read in the layout of the input, as in pytorch#64039."""
    x = _input(4, 6, 5, 3, channels_last=channels_last)
    dy = _input(4, 6, 5, 3)
    gradients = [dy, _in_lines(dy), dy.transpose(2, 3).contiguous().transpose(2, 3)]
    gradients.append(dy[:1, :1].expand_as(x))  # of a sum: strides of 0
    for other in gradients:
        results = _check(x, other, (1, 3))
        assert results["y"].stride() == results["dx"].stride() == x.stride()


@HALVES
@pytest.mark.parametrize("shape", [(8, 3, 20, 33), (8, 24, 7, 7)], ids=str)
@LAYOUTS
def test_half_precision_is_summed_in_float32(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    """Catches sums, counts and affine steps in half precision (pytorch#96203)."""
    x = (_input(*shape, channels_last=channels_last) * 10).to(dtype)
    dy, sizes = _input(*shape, dtype=dtype), (3, 5)
    assert_one_rounding(TRITON, x, dy, sizes, packed_rows(x, sizes))


@pytest.mark.usefixtures("many_splits")
@pytest.mark.parametrize("programs", [12, 4096])
@LAYOUTS
def test_splits_add_up_and_repeat_their_bits(
    programs: int, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a split lost or counted twice, an empty split's row, an order that is chance."""
    monkeypatch.setattr(tiles, "_PROGRAMS", programs)
    x, dy = (
        _input(17, 3, 150, channels_last=channels_last),
        _input(17, 3, 150, channels_last=channels_last),
    )
    sizes = (1, 16)  # the first block has fewer steps than the second has splits
    splits = tiles.reduction(x.shape, sizes, channels_last, x.itemsize).splits
    assert splits > 1
    torch.manual_seed(1)
    once = _check(x, dy, sizes)
    torch.manual_seed(1)
    again = all_four(TRITON, x, dy, sizes, packed_rows(x, sizes))
    for name, tensor in once.items():
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("merged", [2, 1024])
@GROUPED
@pytest.mark.usefixtures("many_splits")
def test_groups_are_made_of_their_blocks(
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    groups: BlockGroups,
    channels_last: bool,
    merged: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a split in another's group, and more blocks than one program can merge."""
    monkeypatch.setattr(tiles, "MERGED", merged)
    check_groups(TRITON, shape, sizes, groups, channels_last, DEVICE)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(("drift", "outlier"), [(0.0, 0.0), (300.0, 0.0), (0.0, 3e4)])
@pytest.mark.parametrize(
    ("side", "channels_last"), [(16, False), (16, True), (7, False)], ids=["planes", "last", "run"]
)
def test_large_means_cancel_no_more_than_in_batch_norm(
    split: bool,
    drift: float,
    outlier: float,
    side: int,
    channels_last: bool,
    request: pytest.FixtureRequest,
) -> None:
    """Catches E[x²] − E[x]², also about a centre that only the first samples have."""
    if split:
        request.getfixturevalue("many_splits")
    x = torch.randn(32, 4, side, side) + 1e4
    x += torch.linspace(-drift, drift, 32)[:, None, None, None]
    x[0, :, 0, 0] += outlier
    exact = nn.BatchNorm2d(4, affine=False).double()(x.double())
    theirs = (nn.BatchNorm2d(4, affine=False)(x).double() - exact).norm()
    x = (x.contiguous(memory_format=LAST2D) if channels_last else x).to(DEVICE)
    mean, std = TRITON.block_moments(x, (32, 0))
    y = TRITON.block_affine(x, (32, 0), mean, (std.square() + 1e-5).rsqrt(), mean * 0)
    assert (y.cpu().double() - exact).norm() <= 3 * theirs


@pytest.mark.filterwarnings("ignore:invalid:RuntimeWarning")
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("position", [0, 149])
@LAYOUTS
def test_an_infinity_is_the_mean_of_its_channel(
    position: int, split: bool, channels_last: bool, request: pytest.FixtureRequest
) -> None:
    """Catches inf - inf, which is NaN, in running means that nn.BatchNorm2d has infinite."""
    if split:
        request.getfixturevalue("many_splits")
    x = torch.randn(16, 4, 150)
    x[8, 1, position], x[8, 2, position], x[8, 3, position] = torch.inf, -torch.inf, torch.nan
    x = (_in_lines(x) if channels_last else x).to(DEVICE)
    for got, want in zip(*(k.block_moments(x, (8, 8)) for k in (TRITON, REFERENCE)), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid:RuntimeWarning")
@pytest.mark.parametrize("split", [False, True])
def test_what_overflows_is_infinite_and_stays_in_its_channel(
    split: bool, request: pytest.FixtureRequest
) -> None:
    """Catches inf - inf, and a NaN or an infinity that reaches a neighbour or is lost."""
    if split:
        request.getfixturevalue("many_splits")
    x = torch.randn(16, 4, 150, device=DEVICE)
    x[:, 0] *= 1e30  # its squares don't fit
    x[3, 2, 7] = float("nan")
    mean, std = TRITON.block_moments(x, (9, 0, 7))
    want_mean, want_std = REFERENCE.block_moments(x, (9, 0, 7))
    torch.testing.assert_close(std, want_std, equal_nan=True)
    torch.testing.assert_close(mean, want_mean, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert std[0, 0] == torch.inf
    assert std[0, 2].isnan()
    assert std[2, 2].isfinite()


@pytest.mark.parametrize("mode", ["local", "swap", "regroup"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_layer_on_triton_kernels(
    mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows, dtypes or gradients that autograd passes and the tests above don't."""
    data, dy = _input(14, 5, 4, 3, dtype=dtype), _input(14, 5, 4, 3, dtype=dtype)
    results: list[list[Tensor]] = []
    for chosen in (TRITON, REFERENCE):
        monkeypatch.setattr(select, "select", lambda _, chosen=chosen: chosen)
        layer = ShuffleBatchNorm(5, mode=mode, groups=2).to(DEVICE, dtype)
        x = data.clone().requires_grad_()
        y = layer(x)
        y.backward(dy)
        results.append([y.detach(), gradient(x), *map(gradient, layer.parameters())])
        results[-1] += [*layer.buffers()]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
