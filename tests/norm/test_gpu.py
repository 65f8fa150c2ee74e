"""A layer on a CUDA device: what the CPU gives, without a stop for the host (make gpu-test)."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from cuda_sync import never_waits
from shuffle_batchnorm import ShuffleBatchNorm
from truth import gradient

pytestmark = pytest.mark.gpu


def _input(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    x = torch.randn(shape, device="cuda", dtype=dtype).mul_(2).add_(3)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


def _step(layer: ShuffleBatchNorm, x: Tensor) -> list[Tensor]:
    y = layer(x)
    y.pow(3).sum().backward()
    return [y.detach(), gradient(x), *(gradient(p) for p in layer.parameters()), *layer.buffers()]


@pytest.mark.parametrize(
    ("mode", "groups", "channels_last"),
    [
        ("local", 1, False),
        ("local", 4, True),
        ("sync", 4, False),
        ("swap", 4, True),
        ("regroup", 1, True),
        ("regroup", 4, False),
        ("regroup", 4, True),
    ],
)
def test_cuda_gives_what_the_cpu_gives(mode: str, groups: int, channels_last: bool) -> None:
    """Catches kernels or index arithmetic that depend on the device."""
    results = []
    data = torch.randn(24, 5, 7, 6, dtype=torch.float64)
    if channels_last:
        data = data.contiguous(memory_format=torch.channels_last)
    for device in ("cpu", "cuda"):
        layer = ShuffleBatchNorm(5, mode=mode, groups=groups, device=device, dtype=torch.float64)
        results.append(_step(layer, data.to(device, copy=True).requires_grad_()))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("mode", "groups", "channels_last"),
    [("local", 1, True), ("swap", 4, False), ("regroup", 8, True)],
)
def test_a_step_with_new_batch_sizes_never_waits(
    mode: str, groups: int, channels_last: bool
) -> None:
    """Catches tuning, an .item() or a copy to the device, also at the last batch of an epoch."""
    layer = ShuffleBatchNorm(64, mode=mode, groups=groups, device="cuda")
    for n in (64, 24):
        x = _input(n, 64, 14, 14, channels_last=channels_last).requires_grad_()
        _step(layer, x)  # its index tensors
        with never_waits():
            _step(layer, x)


@pytest.mark.parametrize(
    ("mode", "dtype"), [("swap", torch.float32), ("regroup", torch.bfloat16)], ids=str
)
def test_a_step_is_captured_in_a_cuda_graph(mode: str, dtype: torch.dtype) -> None:
    """Catches work of forward or backward that a graph can't hold, or that reads stale memory."""
    layer = ShuffleBatchNorm(64, mode=mode, groups=4, device="cuda")
    x, dy = (_input(16, 64, 28, 28, dtype=dtype) for _ in range(2))
    x.requires_grad_()

    def step() -> list[Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and makes index tensors
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        x.normal_()
        dy.normal_()
    graph.replay()
    for got, want in zip(results, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("mode", ["swap", "regroup"])
def test_compiled_is_eager(mode: str) -> None:
    """Catches a graph break on CUDA, and kernels that differ from what the compiler makes."""
    layer = ShuffleBatchNorm(8, mode=mode, groups=4, device="cuda")
    model = nn.Sequential(layer, nn.ReLU())
    x = _input(16, 8, 9, 9).requires_grad_()
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        torch._dynamo.reset()
        for run in (torch.compile(model, fullgraph=True), model):
            y = run(x)
            results.append([y, *torch.autograd.grad(y.pow(3).sum(), [x, *model.parameters()])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
