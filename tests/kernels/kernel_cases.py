"""Awkward inputs for the heavy kernels, and what the kernels should make of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shuffle_batchnorm.kernels.rows import BlockGroups
from shuffle_batchnorm.kernels.select import Kernels
from shuffle_batchnorm.norm.mixing import block_sizes

LAST2D, LAST3D = torch.channels_last, torch.channels_last_3d


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * 2 + 3


# name, with the reason, -> input in float64, and the sizes of its blocks
CASES: dict[str, tuple[Callable[[], Tensor], tuple[int, ...]]] = {
    "plain": (lambda: randn(8, 5, 4, 6), (4, 4)),
    "one block: nothing to split": (lambda: randn(6, 5, 4, 6), (6,)),
    "C=1 is channels last and contiguous at once": (lambda: randn(8, 1, 3, 3), (4, 4)),
    "C=1, one axis less": (lambda: randn(8, 1, 9), (2, 6)),
    "C not a power of two (apex#1768)": (lambda: randn(6, 13, 4, 4), (3, 3)),
    "C beyond a vector of 64 (pytorch#57077)": (lambda: randn(4, 65, 3, 3), (2, 2)),
    "C beyond two vectors of 64": (lambda: randn(4, 130, 3, 3).contiguous(), (2, 2)),
    "C=65 channels-last": (lambda: randn(4, 65, 3, 3).contiguous(memory_format=LAST2D), (2, 2)),
    "L=1 without space axes": (lambda: randn(12, 7), (6, 6)),
    "C=1 and L=1: rows of one number, which may lie apart": (lambda: randn(8, 1), (4, 4)),
    "L=1 with space axes": (lambda: randn(12, 7, 1, 1), (5, 7)),
    "L=1, channels last": (lambda: randn(12, 7, 1, 1).contiguous(memory_format=LAST2D), (5, 7)),
    "L not a multiple of a vector": (lambda: randn(4, 3, 17), (2, 2)),
    "5-D": (lambda: randn(4, 3, 2, 3, 5), (2, 2)),
    "channels last": (lambda: randn(8, 6, 4, 5).contiguous(memory_format=LAST2D), (4, 4)),
    "channels last, an odd number of channels_last": (
        lambda: randn(7, 6, 3, 5).contiguous(memory_format=LAST2D),
        (7,),
    ),
    "channels last 3-D": (lambda: randn(4, 6, 2, 3, 4).contiguous(memory_format=LAST3D), (1, 3)),
    "3-D channels-last, which no memory format names": (
        lambda: randn(6, 5, 4).movedim(1, 2).contiguous().movedim(2, 1),
        (2, 4),
    ),
    "permuted: neither layout (pytorch#62967)": (
        lambda: randn(4, 5, 8, 6).permute(2, 3, 1, 0),
        (4, 4),
    ),
    "batch axis innermost": (lambda: randn(5, 4, 8).movedim(2, 0), (4, 4)),
    "transposed space": (lambda: randn(8, 5, 4, 6).transpose(2, 3), (4, 4)),
    "expanded over space: strides of 0": (lambda: randn(8, 5, 1, 1).expand(8, 5, 3, 4), (4, 4)),
    "expanded over samples": (lambda: randn(1, 5, 3, 4).expand(8, 5, 3, 4), (4, 4)),
    "expanded over channels": (lambda: randn(8, 1, 3, 4).expand(8, 5, 3, 4), (4, 4)),
    "every second sample": (lambda: randn(16, 5, 3, 4)[::2], (4, 4)),
    "some channels": (lambda: randn(8, 9, 3, 4)[:, 2:7], (4, 4)),
    "some channels channels-last": (
        lambda: randn(8, 9, 3, 4).contiguous(memory_format=LAST2D)[:, 2:7],
        (4, 4),
    ),
    "cropped space, with a storage offset": (lambda: randn(8, 5, 6, 7)[:, :, 1:4, 2:], (4, 4)),
    "uneven blocks, as tensor_split cuts them": (lambda: randn(14, 5, 4), block_sizes(14, 2, 3)),
    "uneven blocks channels-last": (lambda: randn(14, 5), block_sizes(14, 2, 3)),
    "empty blocks: fewer samples than blocks": (lambda: randn(6, 5, 4), block_sizes(6, 2, 5)),
    "empty blocks channels-last": (lambda: randn(6, 5), block_sizes(6, 2, 5)),
    "one sample per block": (lambda: randn(6, 5, 4), (1,) * 6),
    "one sample per block channels-last": (lambda: randn(6, 5), (1,) * 6),
    "one value per channel and block": (lambda: randn(3, 5, 1), (1,) * 3),
    "constant channels: a variance of 0": (lambda: torch.full((8, 5, 4), 3.7).double(), (4, 4)),
}
NAMED = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def cast(x: Tensor, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Change dtype and device, keep the strides, also those of 0 and those with gaps."""
    size = x.untyped_storage().nbytes() // x.element_size()
    storage = torch.empty(size, dtype=dtype, device=device)
    out = storage.as_strided(x.size(), x.stride(), x.storage_offset())
    storage.copy_(x.as_strided((len(storage),), (1,), 0))
    return out


def rows_for(x: Tensor, sizes: tuple[int, ...], number: int) -> list[Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (len(sizes), x.shape[1])
    return [torch.randn(shape, dtype=torch.float64).to(x.device, dtype) for _ in range(number)]


def packed_rows(x: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Rows as the layer passes them: parts of longer ones, at odd addresses, or one for all."""
    a, b, center, c = rows_for(x, sizes, 4)
    packed = torch.cat([c[:, :1], a, b, center], dim=1)
    a, b, center = packed[:, 1:].chunk(3, dim=1)
    return [a, b, center, c[:1].expand_as(center)]


def all_four(
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


def loops(x: Tensor, dy: Tensor, sizes: tuple[int, ...], rows: list[Tensor]) -> dict[str, Tensor]:
    """The formulas, block by block, in float64."""
    shape = (len(sizes), x.shape[1])
    x, dy, rows = x.double(), dy.double(), [row.double() for row in rows]
    zero = torch.zeros(shape, dtype=x.dtype, device=x.device)
    out = {name: zero.clone() for name in ("mean", "std", "total", "dot")}
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


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name, tensor in want.items():
        error = (got[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1)
        assert error <= tolerance, f"{name}: {error:.1e}"


def assert_one_rounding(
    kernels: Kernels, x: Tensor, dy: Tensor, sizes: tuple[int, ...], rows: list[Tensor]
) -> None:
    """All four, in half precision: sums in float32, and one rounding at the very end."""
    got, want = all_four(kernels, x, dy, sizes, rows), loops(x, dy, sizes, rows)
    for name in ("mean", "std", "total", "dot"):
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-5, atol=1e-3)
    for name in ("y", "dx"):
        assert got[name].dtype == x.dtype
        assert got[name].stride() == x.stride()
        torch.testing.assert_close(
            got[name].double(), want[name], rtol=torch.finfo(x.dtype).eps, atol=1e-4
        )


# The blocks of two groups, in no order; and one group of all.
MIXED = BlockGroups(2, (0, 1, 0, 1, 0, 1))
ONE_GROUP = BlockGroups(1, (0,) * 6)
GROUPED = pytest.mark.parametrize(
    ("shape", "sizes", "groups", "channels_last"),
    [
        ((12, 5, 4, 6), (2,) * 6, MIXED, False),
        ((12, 5, 4, 6), (2,) * 6, MIXED, True),
        ((6, 5, 49), (1,) * 6, MIXED, False),
        ((6, 5, 7, 7), (1,) * 6, MIXED, True),
        ((10, 5, 7), (2, 2, 1) * 2, MIXED, False),
        ((10, 5, 7, 1), (2, 2, 1) * 2, MIXED, True),
        ((4, 5, 7), (1, 1, 0) * 2, MIXED, False),
        ((6, 5), (1,) * 6, MIXED, False),
        ((10, 5), (2, 2, 1) * 2, MIXED, False),
        ((12, 5, 4), (2,) * 6, ONE_GROUP, False),
        ((12, 5, 4, 1), (2,) * 6, ONE_GROUP, True),
        ((12, 5), (2,) * 6, ONE_GROUP, False),
    ],
    ids=str,
)


def check_groups(
    kernels: Kernels,
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    groups: BlockGroups,
    channels_last: bool,
    device: str = "cpu",
) -> None:
    """Compare moments of groups, far apart, and kernels that take rows of groups, with loops."""
    x = randn(*shape) + 100 * torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x
    dy = torch.randn_like(x)
    a, b, center, c = torch.randn(4, groups.number, shape[1], dtype=x.dtype)
    users = _next_owners(groups)
    xs, dys, rows = x.to(device), dy.to(device), [row.to(device) for row in (a, b, center, c)]
    got = all_of_groups(kernels, xs, dys, sizes, rows, users, groups)

    of_a, of_groups = list(users.owners), list(groups.owners)
    b, center, c = b[of_groups], center[of_groups], c[of_groups]
    want = loops(x, dy, sizes, [b, b, center, c])
    want["dx"] = loops(x, dy, sizes, [a[of_a], b, center, c])["dx"]
    per_group, blocks = len(sizes) // groups.number, x.split(sizes)
    members = [groups.order[k * per_group : (k + 1) * per_group] for k in range(groups.number)]
    for name in ("total", "dot"):
        want[name] = torch.stack([want[name][list(blocks)].sum(dim=0) for blocks in members])
    samples = [torch.cat([blocks[k] for k in some]).movedim(1, 0).flatten(1) for some in members]
    want["mean"] = torch.stack([values.mean(dim=1) for values in samples])
    want["std"] = torch.stack([values.std(dim=1, correction=0) for values in samples])
    for k, some in enumerate(members):
        assert all(groups.owners[block] == k for block in some)
    bounds = {"mean": (1e-13, 1e-13), "std": (1e-12, 1e-13)}
    for name, tensor in got.items():
        rtol, atol = bounds.get(name, (1e-12, 1e-10))
        torch.testing.assert_close(tensor.cpu(), want[name], rtol=rtol, atol=atol)


def _next_owners(groups: BlockGroups) -> BlockGroups:
    """Give the blocks of each group to the next one."""
    owners = tuple((k + 1) % groups.number for k in groups.owners)
    return BlockGroups(groups.number, owners)


def all_of_groups(
    kernels: Kernels,
    x: Tensor,
    dy: Tensor,
    sizes: tuple[int, ...],
    rows: list[Tensor],
    users: BlockGroups,
    groups: BlockGroups,
) -> dict[str, Tensor]:
    a, b, center, c = rows
    mean, std = kernels.block_moments(x, sizes, groups)
    total, dot = kernels.block_grad_sums(dy, x, sizes, center, b, groups)
    return dict(
        mean=mean,
        std=std,
        y=kernels.block_affine(x, sizes, center, b, c, groups),
        total=total,
        dot=dot,
        dx=kernels.block_grad_affine(dy, x, sizes, a, b, center, c, users, groups),
    )
