"""What the frameworks' tests share: a small model, its data, and what one process makes of them."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shuffle_batchnorm import ShuffleBatchNorm

STEPS, BATCH, GROUPS = 2, 4, 2


def model(mode: str, groups: int, process_group: object = None) -> nn.Sequential:
    """Two blocks of conv, batch norm (named 1) and ReLU, and a head, converted, in float64."""
    torch.manual_seed(1)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    block = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(stem, block, nn.Linear(54, 2)).double()
    ShuffleBatchNorm.convert_shuffle_batchnorm(net, process_group, mode=mode, groups=groups)
    return net


def data(step: int, world_size: int) -> Tensor:
    """The batch of all ranks, whose groups differ in scale."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(world_size * BATCH, 3, 7, 7, generator=generator, dtype=torch.float64)
    return x * torch.linspace(0.5, 2, len(x)).view(-1, 1, 1, 1)


def own_data(step: int) -> Tensor:
    """This rank's part of it."""
    return data(step, dist.get_world_size()).chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(y: Tensor) -> Tensor:
    """A mean over samples, so that the average over ranks is that of one process."""
    return (y.pow(3) + y).mean()


def train(
    encode: Callable[[Tensor], Tensor],
    net: nn.Module,
    xs: Sequence[Tensor],
    accumulated: int = 1,
) -> list[Tensor]:
    """Take a step per batch, or after some, and return the outputs."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    outputs = []
    for step, x in enumerate(xs, start=1):
        y = encode(x)
        (loss_of(y) / accumulated).backward()
        if step % accumulated == 0:
            optimizer.step()
            optimizer.zero_grad()
        outputs.append(y.detach())
    return outputs


def check(
    results: Sequence[tuple[list[Tensor], dict[str, Tensor]]],
    mode: str,
    replicas: int = 1,
    accumulated: int = 1,
) -> None:
    """Compare the ranks' outputs and states with those of one process.

    Of ranks in replicas, each replica shares statistics among its own ranks.
    """
    size = len(results)
    net = model(mode, GROUPS * size // replicas)

    def encode(x: Tensor) -> Tensor:
        return torch.cat([net(part) for part in x.chunk(replicas)])

    wanted = train(encode, net, [data(step, size) for step in range(STEPS)], accumulated)
    for step, want in enumerate(wanted):
        close(torch.cat([outputs[step] for outputs, _ in results]), want)
    for name, value in net.state_dict().items():
        got = [state[name] for _, state in results]
        if "running" in name:  # of the groups that each rank has seen
            got = [torch.stack(got).mean(dim=0)]
        if replicas > 1 and ("running" in name or "num_batches" in name):
            continue  # one process has taken the replicas in turn
        for each in got:
            close(each, value, name)


def close(got: Tensor, wanted: Tensor, name: str | None = None) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9, msg=name)
