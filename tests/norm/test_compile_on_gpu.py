"""torch.compile(mode="reduce-overhead"): a converted model runs as CUDA graphs, like plain BN."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from shuffle_batchnorm import ShuffleBatchNorm
from truth import gradient

pytestmark = pytest.mark.gpu


def _net(mode: str, groups: int) -> nn.Module:
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    net = nn.Sequential(*layers, nn.BatchNorm2d(8), nn.ReLU()).cuda()
    return ShuffleBatchNorm.convert_shuffle_batchnorm(net, mode=mode, groups=groups)


@pytest.mark.parametrize(("mode", "groups"), [("local", 1), ("swap", 4), ("regroup", 4)])
def test_reduce_overhead(mode: str, groups: int) -> None:
    """Catches "skipping cudagraphs", and running statistics that a replay doesn't move."""
    torch._dynamo.reset()
    counters.clear()
    eager = _net(mode, groups)
    net = copy.deepcopy(eager)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, about its own code
        compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True)
        for _ in range(4):  # warm up, record, replay twice
            x = torch.randn(16, 3, 12, 12, device="cuda")
            results: list[list[Tensor]] = []
            for model, run in ((eager, eager), (net, compiled)):
                model.zero_grad()
                torch.compiler.cudagraph_mark_step_begin()
                y = run(x)
                y.square().mean().backward()
                grads = [gradient(p) for p in model.parameters()]
                results.append([t.detach().clone() for t in (y, *grads, *model.buffers())])
            for got, want in zip(*reversed(results), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert counters["inductor"]["cudagraph_skips"] == 0
