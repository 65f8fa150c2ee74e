"""Under Accelerate, a model that was converted before `prepare` learns what one process learns."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from integrations import stack
from integrations.hugging_face import accelerate, started_by_accelerate
from ranks import run_on_ranks


def _trained(mode: str, accumulated: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    with started_by_accelerate():
        accelerator = accelerate.Accelerator(
            gradient_accumulation_steps=accumulated,
            # Each rank keeps the running statistics of what it has seen.
            kwargs_handlers=[accelerate.DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        assert accelerator.num_processes == dist.get_world_size()
        net = stack.model(mode, stack.GROUPS)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        model, optimizer = accelerator.prepare(net, optimizer)
        assert isinstance(model, DistributedDataParallel)
        outputs = []
        for step in range(stack.STEPS):
            with accelerator.accumulate(model):
                y = model(stack.own_data(step))
                accelerator.backward(stack.loss_of(y))
                optimizer.step()
                optimizer.zero_grad()
            outputs.append(y.detach())
        assert accelerator.unwrap_model(model) is net
        return outputs, dict(net.state_dict())


@pytest.mark.parametrize("accumulated", [1, stack.STEPS])
@pytest.mark.parametrize("mode", ["sync", "regroup"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_prepared_models(world_size: int, mode: str, accumulated: int) -> None:
    """Catches statistics that stay on their rank where gradients wait (`no_sync`)."""
    results = run_on_ranks(world_size, _trained, mode, accumulated)
    stack.check(results, mode, accumulated=accumulated)
