"""Nothing that launches a Triton kernel waits for the GPU; the kernels do nothing here."""

from typing import Any
from unittest import mock

import pytest
import torch

from imaginary_gpu import gpu
from shuffle_batchnorm import ShuffleBatchNorm
from shuffle_batchnorm.kernels import select

pytest.importorskip("triton")
if torch.cuda.is_available():  # where `tests/norm/test_host_waits.py` launches them
    pytest.skip("the kernels are not those of Triton's interpreter", allow_module_level=True)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mode", ["local", "sync", "swap", "regroup"])
@pytest.mark.parametrize("shape", [(16, 4, 5, 5), (17, 4, 3), (16, 4)], ids=str)
def test_launches(shape: tuple[int, ...], mode: str, ranks: int) -> None:
    """Catches a grid, a scratch tensor or an order of rows that follows from numbers on the GPU."""
    from triton.runtime.interpreter import InterpretedFunction

    from shuffle_batchnorm.kernels import launch as launches
    from shuffle_batchnorm.kernels import triton_launch

    launched: list[Any] = []

    def launch(kernel: Any, _grid: Any) -> Any:
        return lambda *_, **__: launched.append(kernel)

    kernels = mock.patch.object(select, "_triton", return_value=triton_launch)
    kernel = mock.patch.object(InterpretedFunction, "__getitem__", launch)
    stream = mock.patch.object(launches, "current_stream", return_value=0)
    device = mock.patch.object(launches, "current_device", return_value=0)
    with gpu(ranks) as never_waits, kernels, kernel, stream, device:
        groups = 2 if shape[0] == 16 else 1
        layer = ShuffleBatchNorm(4, mode=mode, groups=groups, device="cuda")
        x = torch.randn(shape, device="cuda", requires_grad=True)
        layer(x).sum().backward()
        launched.clear()
        with never_waits():
            layer(x).sum().backward()
    assert launched
