"""One process on the Triton kernels against the same in plain torch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.kernel_cases import GROUPED, MIXED, randn
from shuffle_batchnorm.kernels import reference, select, tiles
from shuffle_batchnorm.kernels.local import Local
from shuffle_batchnorm.kernels.rows import BlockGroups, Groups, Running
from shuffle_batchnorm.norm import functional

pytest.importorskip("triton", reason="Triton is for Linux")
from shuffle_batchnorm.kernels import triton_launch, triton_local
from shuffle_batchnorm.kernels.triton_local import TritonLocal

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu_too, pytest.mark.usefixtures("nan_in_fresh_memory")]
BOTH = pytest.mark.parametrize("merge_last", [False, True], ids=["three", "two"])
EPS = 1e-3


def _next(groups: Groups, blocks: int) -> BlockGroups:
    """Let the blocks of each normaliser be used by the next one, as `swap` does."""
    number = blocks if groups is None else groups.number
    owners = range(blocks) if groups is None else groups.owners
    return BlockGroups(number, tuple((owner + 1) % number for owner in owners))


def _run(
    work: Any, x: Tensor, dy: Tensor, weight: Tensor | None, bias: Tensor | None,
    running: Running | None = None, needs_dx: bool = True,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Forward and backward, as `Normalise` calls them."""
    rows, std = work.statistics(x, weight, running)
    mean, deviation = work.moments(x, rows, std)
    y, rows = work.forward(x, weight, bias, rows, running)
    dtype = None if bias is None else bias.dtype
    dx, dweight, dbias = work.gradients(dy, x, weight, dtype, rows, needs_dx)
    return dict(
        y=y, mean=mean, std=deviation, dx=dx, dweight=None if weight is None else dweight,
        dbias=None if bias is None else dbias,
    )  # fmt: skip


def _compare(got: dict[str, Any], want: dict[str, Any], tolerance: float) -> None:
    for name, tensor in want.items():
        if tensor is None:
            assert got[name] is None, name
        else:
            found = got[name].to(tensor.dtype)
            torch.testing.assert_close(found, tensor, rtol=tolerance, atol=tolerance)


@BOTH
@GROUPED
@pytest.mark.usefixtures("many_splits")
def test_groups_and_their_users(
    shape: tuple[int, ...], sizes: tuple[int, ...], groups: BlockGroups, channels_last: bool,
    merge_last: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Catches a part merged into another normaliser, lost, or merged twice."""
    monkeypatch.setattr(triton_local, "MERGE_LAST", merge_last)
    x = (randn(*shape) + 10 * torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))).to(DEVICE)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
    dy, (weight, bias) = torch.randn_like(x), torch.randn(2, shape[1]).double().to(DEVICE)
    users = _next(groups, len(sizes))
    values = x.shape[2:].numel() * (shape[0] // groups.number)
    local = Local(reference, sizes, groups, users, values, EPS)
    got = _run(TritonLocal(x, EPS, sizes, groups, users), x, dy, weight, bias)
    _compare(got, _run(local, x, dy, weight, bias), 1e-11)


@BOTH
@pytest.mark.parametrize("users", [False, True], ids=["local", "swap"])
def test_blocks_that_are_normalisers(
    users: bool, merge_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows of blocks that are merged, though each is a normaliser of its own."""
    monkeypatch.setattr(triton_local, "MERGE_LAST", merge_last)
    x, dy = randn(12, 5, 7).to(DEVICE), randn(12, 5, 7).to(DEVICE)
    chosen = _next(None, 3) if users else None
    local = Local(reference, (4,) * 3, None, chosen, 28, EPS)
    got = _run(TritonLocal(x, EPS, (4,) * 3, None, chosen), x, dy, None, None)
    _compare(got, _run(local, x, dy, None, None), 1e-11)


@BOTH
@pytest.mark.parametrize(
    ("dtype", "channels_last", "affine", "step"),
    [
        (torch.float64, False, "weight, bias", 0.1),
        (torch.float64, True, "weight", torch.tensor(0.3)),
        (torch.float32, False, "", 0.7),
        (torch.float32, True, "weight, bias", 0.0),
        (torch.bfloat16, False, "weight, bias", torch.tensor(0.3)),
        (torch.bfloat16, True, "weight", 0.1),
    ],
    ids=str,
)
@pytest.mark.usefixtures("many_splits")
def test_what_a_step_moves(
    dtype: torch.dtype, channels_last: bool, affine: str, step: float | Tensor, merge_last: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Catches running statistics moved twice, or not in all channels; a batch not counted."""
    monkeypatch.setattr(triton_local, "MERGE_LAST", merge_last)
    x = randn(12, 70, 1, 5).to(DEVICE, dtype)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
    dy, sizes = torch.randn_like(x), (2,) * 6
    # In mixed precision parameters are in float32.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(70, dtype=wide, device=DEVICE) if affine else None
    bias = torch.randn(70, dtype=dtype, device=DEVICE) if "bias" in affine else None
    number = torch.tensor(41, device=DEVICE)
    results = []
    works: list[Any] = [Local(reference, sizes, MIXED, MIXED, 30, EPS)]
    works.append(TritonLocal(x, EPS, sizes, MIXED, MIXED))
    for work in works:
        mean, var = (torch.full((70,), float(k), dtype=wide, device=DEVICE) for k in (1, 2))
        result = _run(work, x, dy, weight, bias, Running(mean, var, step, number))
        results.append(result | dict(running_mean=mean, running_var=var))
    assert number == 42  # by one of them
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    _compare(results[1], results[0], tolerance)


@BOTH
def test_gradients_without_that_of_the_input(
    merge_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches gradients of parameters that only the elementwise kernel would write."""
    monkeypatch.setattr(triton_local, "MERGE_LAST", merge_last)
    x, dy = (randn(12, 5, 7).to(DEVICE) for _ in range(2))
    weight, bias = torch.randn(2, 5).double().to(DEVICE)
    work = TritonLocal(x, EPS, (2,) * 6, MIXED, MIXED)
    whole, part = (_run(work, x, dy, weight, bias, needs_dx=needs) for needs in (True, False))
    assert part["dx"] is None
    for name in ("dweight", "dbias"):
        torch.testing.assert_close(part[name], whole[name])


@BOTH
def test_memory_at_odd_addresses_and_in_other_layouts(
    merge_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a kernel for aligned memory launched on other, and strides taken for others."""
    monkeypatch.setattr(triton_local, "MERGE_LAST", merge_last)
    x, dy = (randn(12, 6, 4, 4).to(DEVICE) for _ in range(2))
    weight, bias = torch.randn(2, 6).double().to(DEVICE)
    shifted = x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    assert shifted.data_ptr() % 16
    gaps = x.new_empty(12, 9, 4, 4)[:, 2:8].copy_(x)
    want = _run(Local(reference, (2,) * 6, MIXED, MIXED, 96, EPS), x, dy, weight, bias)
    for other in (x, shifted, gaps, x.contiguous(memory_format=torch.channels_last)):
        work = TritonLocal(other, EPS, (2,) * 6, MIXED, MIXED)
        for gradient in (
            dy,
            dy.contiguous(memory_format=torch.channels_last),
            dy[:, :1].expand_as(x),
        ):
            expected = want
            if gradient.stride(1) == 0:
                local = Local(reference, (2,) * 6, MIXED, MIXED, 96, EPS)
                expected = _run(local, x, gradient, weight, bias)
            _compare(_run(work, other, gradient, weight, bias), expected, 1e-11)


@pytest.mark.usefixtures("many_splits")
def test_counters_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a counter that is not set back, with which the next call would merge too early."""
    monkeypatch.setattr(triton_local, "MERGE_LAST", True)
    monkeypatch.setattr(triton_local, "_arrivals", {})
    x, dy = (randn(12, 20, 9).to(DEVICE) for _ in range(2))
    work = TritonLocal(x, EPS, (2,) * 6, MIXED, _next(MIXED, 6))
    results = [_run(work, x, dy, None, None) for _ in range(3)]
    (counters,) = triton_local._arrivals.values()
    assert not counters.any()
    for again in results[1:]:
        for name in ("y", "dx", "mean", "std"):
            torch.testing.assert_close(again[name], results[0][name], rtol=0, atol=0)


def test_many_parts_are_merged_by_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a last program that works on while all others have ended."""
    monkeypatch.setattr(triton_local, "MERGE_LAST", True)
    monkeypatch.setattr(triton_local, "_MOST_PARTS", 2)
    work = TritonLocal(randn(12, 5, 7).to(DEVICE), EPS, (2,) * 6, MIXED, None)
    assert work._merge_moments is not None  # 3 parts for each
    assert work._merge_sums is not None
    monkeypatch.setattr(triton_local, "_MOST_PARTS", 3)
    again = TritonLocal(randn(12, 5, 7).to(DEVICE), EPS, (2,) * 6, MIXED, None)
    assert again._merge_moments is again._merge_sums is None


def test_a_momentum_in_memory_is_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a kernel that was compiled for a number, and never looks where a tensor has it."""
    calls: dict[Any, Any] = {}
    monkeypatch.setattr(functional, "_calls", calls)
    mean, var = torch.zeros(2, 5, device=DEVICE)
    for momentum in (0.1, 0.2, torch.tensor(0.3)):
        functional.shuffle_batch_norm(
            torch.randn(4, 5, device=DEVICE), mean, var, training=True, momentum=momentum
        )
    assert len(calls) == 2


def test_another_layout_is_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches output in the layout of an earlier input of that shape, and weights with gaps."""
    monkeypatch.setattr(select, "select", lambda _: triton_launch)
    x, weights = randn(8, 6, 3, 5).to(DEVICE), randn(12).to(DEVICE)
    last = x.contiguous(memory_format=torch.channels_last)
    want = functional.shuffle_batch_norm(x, None, None, weights[::2].clone(), training=True)
    for input in (x, last):
        for weight in (weights[::2].clone(), weights[::2]):
            y = functional.shuffle_batch_norm(input, None, None, weight, training=True)
            assert y.stride() == input.stride()
            torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-11)


def test_a_channel_in_two_programs_is_moved_once() -> None:
    """Catches running statistics that each program moves in which a part of a channel lies."""
    x, sizes = randn(6, 450, 5).to(DEVICE), (1,) * 6
    tile = tiles.elementwise(x.shape, sizes, False, x.itemsize)
    # A run of memory, whose programs end within a channel.
    values = tile.arguments["OUTER"] * tile.arguments["INNER"]
    assert tile.arguments["LENGTH"] == 5
    assert values < 450 * 5
    assert values % 5
    results = []
    for work in (
        Local(reference, sizes, MIXED, MIXED, 15, EPS),
        TritonLocal(x, EPS, sizes, MIXED, MIXED),
    ):
        mean, var = torch.zeros(2, 450, dtype=x.dtype, device=DEVICE)
        result = _run(work, x, x, mean + 1, mean.clone(), Running(mean, var, 0.3))
        results.append(result | dict(running_mean=mean, running_var=var))
    _compare(results[1], results[0], 1e-11)
