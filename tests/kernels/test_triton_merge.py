"""What ends a reduction: parts of blocks are merged to rows of normalisers."""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is for Linux")
from shuffle_batchnorm.kernels import triton_merge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu_too
SPLITS, BLOCKS, CHANNELS, NORMALISERS = 3, 6, 5, 2
ORDER = (4, 0, 2, 5, 1, 3)
AT_A_TIME = pytest.mark.parametrize("rows", [2, 4, 16])  # 9 parts each


def _parts(planes: int) -> Tensor:
    return torch.randn(planes, SPLITS, BLOCKS, CHANNELS, dtype=torch.float64, device=DEVICE)


def _of(parts: Tensor, normaliser: int) -> Tensor:
    """Return its parts, ``[planes, 9, C]``."""
    members = ORDER[3 * normaliser : 3 * normaliser + 3]
    return parts[:, :, list(members)].flatten(1, 2)


@AT_A_TIME
@pytest.mark.filterwarnings("ignore:invalid value")  # from the interpreter
def test_moments_of_parts(rows: int) -> None:
    """Catches a part left out or taken twice, an empty one that counts, an infinity lost."""
    parts = _parts(3)
    parts[1].abs_()
    parts[2] = torch.randint(1, 9, (SPLITS, BLOCKS, 1), device=DEVICE).double()
    parts[:, 1, 4] = 0  # an empty part
    parts[0, 0, 2, 3] = math.inf
    weight = torch.randn(CHANNELS, dtype=torch.float64, device=DEVICE)
    out = torch.empty(4, NORMALISERS, CHANNELS, dtype=torch.float64, device=DEVICE)
    order = torch.tensor(ORDER, device=DEVICE)
    triton_merge.finish_moments[(NORMALISERS * 2,)](
        parts, order, weight, out, 0.1, BLOCKS * CHANNELS, CHANNELS, SPLITS, 3,
        ROWS=rows, COLUMNS=4,
    )  # fmt: skip
    for k in range(NORMALISERS):
        mean, squares, count = _of(parts, k)
        total = count.sum(dim=0)
        merged = (count * mean).sum(dim=0) / total
        std = ((squares + count * (mean - merged).square()).sum(dim=0) / total).sqrt()
        rstd = 1 / (std.square() + 0.01).sqrt()
        want = torch.stack([merged, std, rstd, rstd * weight])
        torch.testing.assert_close(out[:, k], want, equal_nan=True)
    assert out[0].isinf().sum() == 1


@AT_A_TIME
def test_sums_of_parts(rows: int) -> None:
    """Catches sums of other users, and coefficients made with another normaliser's rows."""
    parts, forward = _parts(2), torch.rand(4, NORMALISERS, CHANNELS, device=DEVICE).double()
    at = parts.numel()
    scratch = torch.cat([parts.flatten(), torch.empty_like(forward).flatten()])
    triton_merge.finish_sums[(NORMALISERS * 2,)](
        scratch, torch.tensor(ORDER, device=DEVICE), forward, 7.0, BLOCKS * CHANNELS, CHANNELS,
        SPLITS, 3, at, ROWS=rows, COLUMNS=4,
    )  # fmt: skip
    out = scratch[at:].view_as(forward)
    for k in range(NORMALISERS):
        total, dot = _of(parts, k).sum(dim=1)
        step = forward[3, k] / -7
        want = torch.stack([total, dot, step * dot * forward[2, k], step * total])
        torch.testing.assert_close(out[:, k], want)
