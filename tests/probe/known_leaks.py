"""Encoders whose leak is known, by construction or in closed form."""

import random
from collections.abc import Iterator
from math import comb

import pytest
import torch
from torch import Tensor, nn

from shuffle_batchnorm import ShuffleBatchNorm
from shuffle_batchnorm.comm.collectives import all_sum
from shuffle_batchnorm.comm.world import resolve


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread for thousands of small calls: more would wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Below 1, the score of a true match, and above that of any other.
ALMOST = 1 - 1e-9


def pool_of_ids(count: int, known: float = 0.0, seed: int = 0) -> Tensor:
    """Images ``[M, 2]``: a random number, and 1 for the share `known` of them, else 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2**40, (count,), generator=generator)
    flags = torch.rand(count, generator=generator).argsort() < round(known * count)
    return torch.stack([ids, flags], dim=1).double()


class Signature:
    """Recognises known images by themselves, and others by their batch, if it is exposed.

    A batch is exposed with the probability `exposed`, which the sum of its images' numbers
    decides. An image is known with the probability a. As trained, a query of an exposed batch
    finds its key, and one of a known image does: 1 - (1 - a)(1 - exposed). In a fresh batch
    only the latter does: a. So the leak is (1 - a) * exposed, and within a batch all keys that
    are not known stand or fall together.
    """

    def __init__(self, exposed: float) -> None:
        self.exposed = exposed
        self.queue = torch.tensor([[0.0, 0.0, 0.0, ALMOST]], dtype=torch.float64)

    def _numbers(self, x: Tensor) -> tuple[Tensor, bool]:
        world = resolve(None, "test")
        total = x[:, 0].sum(dim=0, keepdim=True)
        if world.size > 1:
            total = all_sum(total, world, "test", "adds up")
        # Whole numbers below 2^53: the sum does not depend on the order of ranks.
        number = random.Random(int(total))
        angle = torch.tensor(2 * torch.pi * number.random(), dtype=torch.float64)
        return torch.stack([angle.cos(), angle.sin()]), number.random() < self.exposed

    def query(self, x: Tensor) -> Tensor:
        sign, exposed = self._numbers(x)
        rest = torch.cat([sign * exposed, torch.ones(1).double()])
        # 3, so that a known image is found even if the signatures are opposite ones.
        return torch.cat([3 * x[:, 1:], rest.expand(len(x), 3)], dim=1)

    def key(self, x: Tensor) -> Tensor:
        sign, _ = self._numbers(x)
        rest = torch.cat([sign, torch.zeros(1).double()])
        return torch.cat([x[:, 1:], rest.expand(len(x), 3)], dim=1)


def deep_pairs(channels: int, depth: int, groups: int) -> nn.Module:
    """A deep network with real batch norm in groups of two samples.

    Two values normalised together become 1 and -1, whatever they are, so after `depth` layers a
    sample's code still says, for each channel, whether its number was the larger of the two.
    """
    layers: list[nn.Module] = []
    for k in range(depth):
        linear = nn.Linear(channels, channels, bias=False)
        # A permutation of the channels keeps the code legible.
        linear.weight.data = torch.eye(channels)[torch.randperm(channels)]
        layers += [linear, ShuffleBatchNorm(channels, mode="local", groups=groups)]
        if k < depth - 1:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers).double()


def accuracy_of_pairs(channels: int, negatives: int) -> float:
    """How often a key of `deep_pairs` with a fresh partner beats random codes.

    Of three independent numbers, the first is on the same side of the second and of the third
    with probability 2/3; a random code agrees with probability 1/2.
    """
    below, hit = 0.0, 0.0
    for m in range(channels + 1):
        same = comb(channels, m) * (2 / 3) ** m * (1 / 3) ** (channels - m)
        hit += same * below**negatives
        below += comb(channels, m) / 2**channels
    return hit


def convolutional(mode: str, groups: int, width: int = 16) -> nn.Module:
    """A small network as initialised, from seed 1, ``[N, 3, 6, 6]`` to ``[N, 32]``."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for inputs in (3, width, width, width):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 32))
    return ShuffleBatchNorm.convert_shuffle_batchnorm(network, mode=mode, groups=groups)
