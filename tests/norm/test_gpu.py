"""On a CUDA device: what the CPU gives, without a stop for the host (make gpu-check)."""

import pytest
import torch
from torch import Tensor

from shuffle_batchnorm import ShuffleBatchNorm
from truth import gradient

pytestmark = pytest.mark.gpu


def _step(layer: ShuffleBatchNorm, x: Tensor) -> list[Tensor]:
    y = layer(x)
    y.pow(3).sum().backward()
    return [y.detach(), gradient(x), *(gradient(p) for p in layer.parameters()), *layer.buffers()]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("mode", ["local", "sync", "swap", "regroup"])
def test_cuda_gives_what_the_cpu_gives(mode: str, groups: int, channels_last: bool) -> None:
    """Catches kernels or index arithmetic that depend on the device."""
    results = []
    data = torch.randn(24, 5, 7, 6, dtype=torch.float64)
    if channels_last:
        data = data.contiguous(memory_format=torch.channels_last)
    for device in ("cpu", "cuda"):
        layer = ShuffleBatchNorm(5, mode=mode, groups=groups, device=device, dtype=torch.float64)
        results.append(_step(layer, data.to(device).requires_grad_()))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["swap", "regroup"])
def test_a_step_never_waits_for_the_gpu(mode: str) -> None:
    """Catches an .item(), or a tensor copied to the device at every step."""
    layer = ShuffleBatchNorm(5, mode=mode, groups=4, device="cuda")
    x = torch.randn(20, 5, 7, 6, device="cuda", requires_grad=True)
    _step(layer, x)  # the first one makes its index tensors
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["swap", "regroup"])
def test_forward_is_captured_in_a_cuda_graph(mode: str) -> None:
    """Catches work that a graph can't hold."""
    layer = ShuffleBatchNorm(5, mode=mode, groups=4, device="cuda")
    x = torch.randn(16, 5, 7, 6, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, layer(x))
