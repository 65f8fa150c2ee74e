"""Layers of ranks with a GPU each: no step waits, and a CUDA graph holds their NCCL messages."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cuda_sync import never_waits
from ranks import run_on_ranks
from shuffle_batchnorm import ShuffleBatchNorm

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["sync", "swap", "regroup"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_replay_is_a_step(world_size: int, mode: str) -> None:
    """Catches what a graph can't hold, or reads from memory that is another's at the replay."""
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} CUDA devices")
    run_on_ranks(world_size, _replay, mode, fresh=True, timeout=200)


def _replay(mode: str) -> None:
    torch.cuda.set_device(dist.get_rank())
    torch.manual_seed(dist.get_rank())
    group = dist.new_group(backend="nccl")
    layers = [
        ShuffleBatchNorm(16, mode=mode, groups=2, offset=offset, process_group=group, device="cuda")
        for offset in (1, 3)
    ]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    x = torch.randn(8, 16, 9, 9, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)

    def step() -> list[Tensor]:
        y = model(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # the ranks agree, NCCL connects them, kernels are loaded
        with never_waits():
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
            dy.normal_()
        before = [buffer.clone() for buffer in model.buffers()]
        graph.replay()
        got = [t.clone() for t in (*captured, *model.buffers())]
        for buffer, old in zip(model.buffers(), before, strict=True):
            buffer.copy_(old)
        want = [*step(), *model.buffers()]
        torch.testing.assert_close(got, want)
    # NCCL 2.26 and later end a communicator after the graphs that use it.
    graph.reset()
    torch.cuda.synchronize()
    dist.destroy_process_group(group)
