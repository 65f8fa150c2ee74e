"""Which values a program sums. What the sums are, is tested in test_triton_launch.py."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux")
import triton
import triton.language as tl

from shuffle_batchnorm.kernels import triton_steps

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.gpu_too


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _offsets(  # type: ignore[no-untyped-def]
    out, start, step, piece, outer, inner, LENGTH: tl.constexpr
):
    offsets, _, jump = triton_steps.first_step(
        0, start.to(tl.int64), outer, inner, LENGTH, 1, 4, 1, 1
    )
    tl.store(out + tl.arange(0, 4)[:, None], step * jump + piece + offsets)


@pytest.mark.parametrize("length", [0, 1], ids=["planes", "channels_last"])
def test_offsets_past_2_to_the_31(length: int) -> None:
    """Catches an index in int32, which wraps from 2**31 elements on (pytorch#181555)."""
    start, outer, inner, step, piece = 70_000, 40_000, 50_000, 600_000_009, 49_999
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    _offsets[(1,)](out, start, step, piece, outer, inner, LENGTH=length)
    pitch = 1 if length else outer
    rows = (start * outer + (4 * step + r) * pitch for r in range(4))
    assert out.tolist() == [row * inner + piece for row in rows]
