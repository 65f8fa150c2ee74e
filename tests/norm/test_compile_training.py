"""Compiled training as people write it: many steps, DDP, checkpoints, autocast, inductor."""

import copy
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor, nn
from torch._inductor.utils import run_fw_bw_and_get_code
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ranks import run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm, batch_shuffle
from shuffle_batchnorm.shuffle.permutations import _permutations_op
from truth import gradient

MODES = ["local", "sync", "swap", "regroup"]


class Net(nn.Module):
    """A residual block of conv, BN and ReLU, recomputed in backward if asked."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.checkpointed:
            y: Tensor = checkpoint(self.block, x, use_reentrant=False)
        else:
            y = self.block(x)
        return x + y


def _net(mode: str, groups: int = 2, checkpointed: bool = False) -> nn.Module:
    torch.manual_seed(1)
    model = Net(checkpointed).double()
    return ShuffleBatchNorm.convert_shuffle_batchnorm(model, mode=mode, groups=groups)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of dynamo's, about its own code
        yield
    torch._dynamo.reset()


def _train(model: nn.Module, run: Callable[[Tensor], Tensor], steps: int = 2) -> list[Tensor]:
    """Outputs, then parameters and buffers, after some steps of SGD."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    outputs = []
    for _ in range(steps):
        x = torch.randn(8, 3, 6, 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        y = run(x)
        y.pow(2).mean().backward()
        optimizer.step()
        outputs.append(y.detach())
    return [*outputs, *(t.detach().clone() for t in model.state_dict().values())]


def _assert_same(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-9) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("mode", "checkpointed"),
    [("sync", False), ("swap", False), ("regroup", False), ("regroup", True)],
)
def test_many_steps_take_one_graph(mode: str, checkpointed: bool) -> None:
    """Catches a recompilation per step, and buffers that a checkpoint updates twice."""
    want_model, model = _net(mode), _net(mode, checkpointed=checkpointed)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    _assert_same(_train(model, compiled, steps=4), _train(want_model, want_model, steps=4))
    assert counter.frame_count == 1
    model.eval()
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), want_model.eval()(x), rtol=1e-9, atol=1e-9)
    model.train()
    assert counter.frame_count == 2
    compiled(torch.randn(8, 3, 6, 6, dtype=torch.float64))
    assert counter.frame_count == 2


@pytest.mark.parametrize("mode", ["local", "regroup"])
def test_autocast(mode: str) -> None:
    """Catches statistics in half precision, or another dtype of the output than in eager mode."""
    eager = _net(mode).float()
    model = copy.deepcopy(eager)
    x = torch.randn(8, 3, 6, 6) * 3 + 5
    results = []
    for m, run in (
        (eager, eager),
        (model, torch.compile(model, fullgraph=True, backend="aot_eager")),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        y.float().pow(2).mean().backward()
        results.append([y, *(p.grad for p in m.parameters()), *m.buffers()])
    for got, want in zip(*reversed(results), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def _under_ddp(mode: str) -> tuple[list[Tensor], ...]:
    """What is learned in eager mode, compiled inside DDP, and compiled with DDP."""
    warnings.simplefilter("ignore", DeprecationWarning)
    torch._dynamo.reset()
    eager, inside, around = (_net(mode) for _ in range(3))
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    runs: list[Any] = [
        DistributedDataParallel(eager),
        DistributedDataParallel(compiled),
        torch.compile(DistributedDataParallel(around), backend="aot_eager"),
    ]
    return tuple(_train(m, run, 2) for m, run in zip((eager, inside, around), runs, strict=True))


@pytest.mark.parametrize("mode", ["sync", "regroup"])
def test_inside_and_around_ddp(mode: str) -> None:
    """Catches gradients that DDP doesn't see, and exchanges in another order (#152131)."""
    for eager, inside, around in run_on_ranks(2, _under_ddp, mode, timeout=200):
        _assert_same(inside, eager)
        _assert_same(around, eager)


NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor needs a C++ compiler"
)


@NEEDS_COMPILER
@pytest.mark.parametrize("mode", ["regroup"])
def test_inductor(mode: str) -> None:
    """Catches what only shows in generated code: a fused kernel with another result."""
    want_model, model = _net(mode, groups=4), _net(mode, groups=4)
    compiled = torch.compile(model, fullgraph=True)
    _assert_same(_train(model, compiled), _train(want_model, want_model))


@NEEDS_COMPILER
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_generated_code_writes_output_and_gradient_once(layout: torch.memory_format) -> None:
    """Catches a result that is made in another layout, and copied into its own."""
    x = torch.randn(8, 24, 5, 7).to(memory_format=layout).requires_grad_()
    run = torch.compile(ShuffleBatchNorm(24, mode="regroup", groups=2), fullgraph=True)
    _, codes = run_fw_bw_and_get_code(lambda: run(x))
    for code in codes:
        shapes = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)
        sizes = [math.prod(map(int, re.findall(r"\d+", shape))) for shape in shapes]
        assert sum(size >= x.numel() for size in sizes) == 1, shapes
    assert len(codes) == 2
    assert gradient(x).is_contiguous(memory_format=layout)


def test_the_custom_op_keeps_its_promises() -> None:
    """Catches an op whose fake result, schema or tracing differs from what it does."""
    for kinds in ([0], [0, 1]):
        arguments = (torch.tensor(3), torch.tensor(1), kinds, 0, 8, torch.device("cpu"))
        torch.library.opcheck(_permutations_op, arguments)
    assert len(batch_shuffle(torch.arange(8))[0]) == 8
