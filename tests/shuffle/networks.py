"""A small network with batch norm, its inputs on every rank, and weights for a loss."""

import torch
from torch import Tensor, nn


def network() -> nn.Sequential:
    torch.manual_seed(1)
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)
    return nn.Sequential(*layers).double()


def inputs(sizes: list[int]) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(n, 2, 5, 5, dtype=torch.float64) + rank for rank, n in enumerate(sizes)]


def weights(y: Tensor) -> Tensor:
    return torch.linspace(-1, 2, y[0].numel(), dtype=y.dtype).view(y.shape[1:])
