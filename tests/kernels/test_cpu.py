"""The CPU kernels: digits that cancel, squares beyond float32, and what memory they take."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.kernel_cases import LAST2D, randn
from shuffle_batchnorm.kernels import cpu
from shuffle_batchnorm.kernels.rows import BlockGroups

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")


@pytest.mark.parametrize("sizes", [(8,), (5, 3), (1,) * 8], ids=str)
@pytest.mark.parametrize("step", [200, 16])
def test_outliers_cost_no_digits(sizes: tuple[int, ...], step: int) -> None:
    """Catches cancellation about a center that some values are far from."""
    x = torch.randn(8, 3, 3200)
    x[:, 1, ::step] += 1e4
    x[:, 2] = 100.1
    mean, std = cpu.block_moments(x, sizes)
    for k, block in enumerate(x.double().split(sizes)):
        exact = torch.std_mean(block, dim=(0, 2), correction=0)
        torch.testing.assert_close(mean[k], exact[1].float(), rtol=3e-7, atol=3e-7)
        torch.testing.assert_close(std[k], exact[0].float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("samples", "blocks"), [(3200, 4), (640, 640)])
def test_samples_far_apart_cost_no_digits(samples: int, blocks: int) -> None:
    """Catches a merge of many planes or blocks in which the mean of few of them cancels."""
    owners = (*(0, 1) * (blocks // 4), *(1, 0) * (blocks // 4))
    x = torch.randn(samples, 3, 8)
    x[:: samples // 4] += 1e4
    size = samples // blocks
    mean, std = cpu.block_moments(x, (size,) * blocks, BlockGroups(2, owners))
    of_samples = torch.tensor(owners).repeat_interleave(size)
    for k in range(2):
        deviation, center = torch.std_mean(x.double()[of_samples == k], dim=(0, 2), correction=0)
        assert ((mean[k] - center).abs() <= 1e-6 * deviation).all()
        assert ((std[k] - deviation).abs() <= 1e-6 * deviation).all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_groups_far_apart_do_not_see_each_other(channels_last: bool) -> None:
    """Catches a center between groups; what is left is aten's rounding of means of 1e5."""
    x = torch.randn(64, 3, 8, 1)
    x[16:48] += 1e5  # group 1
    x = x.contiguous(memory_format=LAST2D) if channels_last else x
    mean, std = cpu.block_moments(x, (16,) * 4, BlockGroups(2, (0, 1, 1, 0)))
    blocks = x.double().split(16)
    for k, group in enumerate((blocks[::3], blocks[1:3])):
        deviation, center = torch.std_mean(torch.cat(group), dim=(0, 2, 3), correction=0)
        # aten adds channels-last values one after the other in float32, in a thread's order.
        mean_error, std_error = (1e-6, 2e-3) if channels_last else (1e-7, 1e-4)
        torch.testing.assert_close(mean[k], center.float(), rtol=mean_error, atol=1e-6)
        torch.testing.assert_close(std[k], deviation.float(), rtol=std_error if k else 1e-6, atol=0)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4)], ids=str)
def test_groups_whose_blocks_are_far_apart_stay_finite(shape: tuple[int, ...]) -> None:
    """Catches squares of ±1e30 in float32, and infinities that spread to another group."""
    x = torch.ones(shape) * torch.tensor([1, 2, 2, -1, 3, 4.0]).view(-1, *[1] * (len(shape) - 1))
    mean, std = cpu.block_moments(1e30 * x, (1,) * 6, BlockGroups(3, (0, 2, 1, 0, 2, 1)))
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


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_float64_has_infinite_variances_without_fused_arithmetic(capability: str) -> None:
    """Catches inf - inf, which is NaN, where a processor does not multiply and add in one step."""
    program = (
        "import torch; from shuffle_batchnorm.kernels import cpu;"
        "x = 1e160 * torch.randn(8, 4, 16, 16, dtype=torch.float64);"
        "print(cpu.block_moments(x, (8,))[1].isinf().all().item())"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


class _Largest(TorchDispatchMode):
    """Notes the largest memory that an operation returns, but for that of a tensor."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = known.untyped_storage().data_ptr()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self._known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("sizes", [(4096,), (512,) * 8])
@pytest.mark.parametrize("shape", [(), (1, 2)], ids=["L=1", "channels_last"])
def test_sums_take_no_memory_like_their_input(
    sizes: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """Catches a sum per sample where that is a value, and large blocks that are copied."""
    x = torch.randn(4096, 64, *shape)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    rows = torch.randn(len(sizes), 64)
    with _Largest(x) as largest:
        cpu.block_moments(x, sizes)
        cpu.block_grad_sums(x, x, sizes, rows, rows)
    assert largest.bytes < 0.1 * x.untyped_storage().nbytes()


@pytest.mark.parametrize("scale", [1e18, 1e25, 1e35])
@pytest.mark.parametrize("sizes", [(8,), (5, 3), (1,) * 8], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_deviation_is_finite_where_its_square_is_not(
    scale: float, sizes: tuple[int, ...], channels_last: bool
) -> None:
    """Catches squares, and sums of them, that float32 doesn't hold; and a true infinity lost."""
    x = (randn(8, 4, 8, 8) * scale).float()  # few enough for a sum of them in float32
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
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


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("sizes", [(8,), (2,) * 4], ids=str)
def test_an_infinity_is_the_mean_of_its_channel(value: float, sizes: tuple[int, ...]) -> None:
    """Catches inf - inf where blocks are merged, and an infinity that is lost in float64."""
    x = torch.randn(8, 4, 5, 7)
    x[0, 1, 0, 0] = value
    for data in (x, x.contiguous(memory_format=torch.channels_last)):
        mean, std = cpu.block_moments(data, sizes, BlockGroups(1, (0,) * len(sizes)))
        torch.testing.assert_close(mean[0], x.mean(dim=(0, 2, 3)), equal_nan=True)
        assert std.isfinite().tolist() == [[True, False, True, True]]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_float64_has_infinite_variances(layout: torch.memory_format) -> None:
    """Catches inf - inf in the merge, where no wider dtype helps."""
    x = 1e200 * torch.randn(6, 4, 5, 7, dtype=torch.float64).contiguous(memory_format=layout)
    for sizes, groups in (((6,), None), ((2,) * 3, None), ((2,) * 3, BlockGroups(1, (0,) * 3))):
        assert cpu.block_moments(x, sizes, groups)[1].isinf().all()


@pytest.mark.parametrize("shape", [(64, 8), (4, 8, 64)], ids=str)
def test_small_blocks_keep_the_distance_to_their_mean(shape: tuple[int, ...]) -> None:
    """Catches a product with a large mean, and its rounding, where the distance itself is exact.

    Channels-last the mean is off by more: aten sums these values in float32, one after the other.
    """
    x = torch.randn(shape) + 1e4
    center = x.transpose(0, 1).flatten(1).mean(dim=1)[None]
    zero, third = torch.zeros_like(center), torch.full_like(center, 1 / 3)
    dx = cpu.block_grad_affine(x, x, shape[:1], zero, third, center, zero)
    want = (x - center.view(-1, *[1] * (x.ndim - 2))) / 3
    torch.testing.assert_close(dx, want, rtol=2e-7, atol=0)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 5)])
def test_results_are_no_views_to_autograd(shape: tuple[int, ...]) -> None:
    """Catches a layer's output that FSDP2 loses its hook on when it is changed in place."""
    x, row = torch.randn(shape), torch.rand(2, 3)
    assert cpu.block_affine(x, (2, 2), row, row, row)._base is None
    assert cpu.block_grad_affine(x, x, (2, 2), row, row, row, row)._base is None
