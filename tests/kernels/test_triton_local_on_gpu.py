"""One process on a CUDA device: direct launches, and programs that merge others' parts."""

import pytest
import torch
from torch import Tensor

from shuffle_batchnorm.kernels.rows import BlockGroups, Running

pytest.importorskip("triton", reason="Triton is for Linux")
from shuffle_batchnorm.kernels import triton_local
from shuffle_batchnorm.kernels.triton_local import TritonLocal

pytestmark = pytest.mark.gpu
SHAPES = pytest.mark.parametrize(
    ("shape", "channels_last"),
    [((32, 64, 14, 14), False), ((32, 256, 28, 28), True), ((64, 512, 7, 7), True)],
    ids=str,
)
GROUPS = BlockGroups(8, tuple((k // 4 + k % 4) % 8 for k in range(32)))


class _Call:
    """A kind of call with input, gradient, parameters and running statistics of its own."""

    def __init__(self, shape: tuple[int, ...], channels_last: bool) -> None:
        x, dy = torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        self.x, self.dy, self.sizes = x, torch.empty_like(x).copy_(dy), (shape[0] // 32,) * 32
        self.weight, self.bias = torch.randn(2, shape[1], device="cuda")

    def prepare(self) -> TritonLocal:
        return TritonLocal(self.x, 1e-5, self.sizes, GROUPS, GROUPS)

    def step(self, work: TritonLocal) -> list[Tensor]:
        mean, var = torch.zeros_like(self.weight), torch.ones_like(self.weight)
        running = Running(mean, var, 0.1, torch.zeros((), dtype=torch.int64, device="cuda"))
        y, rows = work.forward(self.x, self.weight, self.bias, (), running)
        grads = work.gradients(self.dy, self.x, self.weight, torch.float32, rows, True)
        return [y, mean, var, *rows, *(grad for grad in grads if grad is not None)]


@SHAPES
def test_last_programs_merge_what_all_have_written(
    shape: tuple[int, ...], channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches parts that are read before they are there, on one stream and on several at once."""
    call = _Call(shape, channels_last)
    want = call.step(call.prepare())
    monkeypatch.setattr(triton_local, "MERGE_LAST", True)
    monkeypatch.setattr(triton_local, "_MOST_PARTS", 4096)  # also where it would not pay
    work = call.prepare()
    once = call.step(work)
    for got, expected in zip(once, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(once[3], want[3], rtol=1e-5, atol=1e-5)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(call.step(work))
    torch.cuda.synchronize()
    for result in results:
        for got, expected in zip(result, once, strict=True):
            assert torch.equal(got, expected)
    assert not any(counters.any() for counters in triton_local._arrivals.values())


@pytest.mark.parametrize("merge_last", [False, True])
def test_a_graph_replays_beside_eager_steps(
    merge_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches counters that a graph shares with what runs on the stream of its capture."""
    monkeypatch.setattr(triton_local, "MERGE_LAST", merge_last)
    call = _Call((32, 64, 14, 14), False)
    work = call.prepare()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        want = call.step(work)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = call.step(work)
    torch.cuda.synchronize()
    for _ in range(10):
        graph.replay()
        with torch.cuda.stream(stream):
            eager = call.step(work)
        torch.cuda.synchronize()
        for got, again, expected in zip(captured, eager, want, strict=True):
            assert torch.equal(got, expected)
            assert torch.equal(again, expected)


def test_a_direct_launch_gives_the_same_bits() -> None:
    """Catches a compiled kernel that is given other arguments than ``kernel[grid]`` gives it."""
    call = _Call((32, 64, 14, 14), True)
    work = call.prepare()
    first, direct = call.step(work), call.step(work)
    if torch.version.hip is None:
        assert work._affine._run is not None, "Triton's launcher is one that nobody has read"
    for got, want in zip(direct, first, strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    """Catches a launch on the device that is current, with memory of another."""
    call = _Call((32, 64, 14, 14), False)
    want = call.step(call.prepare())
    with torch.cuda.device(1):
        for got, expected in zip(call.step(call.prepare()), want, strict=True):
            assert torch.equal(got, expected)
