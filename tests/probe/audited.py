"""Networks that mix samples in places that are known."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Centre(nn.Module):
    """Takes the batch's mean away, by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0)


class Functional(nn.Module):
    """Batch norm of its own code, around a layer that mixes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.linear(x), None, None, training=True)


class Attention(nn.Module):
    """Every sample attends to all others: the batch is the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class Words(nn.Module):
    """Batch norm over all words of all samples: its rows are not those of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        words = x.reshape(-1, 4)  # two a sample
        y: Tensor = self.norm(words)
        return y.view_as(x)


class Twice(nn.Module):
    """One layer that is called twice, by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(input=torch.relu(self.norm(input=x)))
        return y


class Both(nn.Module):
    """Mixes by its own code, and in a layer inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(torch.relu(x - x.mean(dim=0)))
        return y


class After(nn.Module):
    """Mixes in a layer, and by its own code behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x).sigmoid()
        return y / y.mean(dim=0)


# What mixes, and the name of the player inside it.
MIXING: dict[str, tuple[Any, str]] = {
    "batch norm": (lambda: nn.BatchNorm1d(8), ""),
    "by hand": (Centre, ""),
    "functional": (Functional, ""),
    "attention": (Attention, ".attention"),
    "words": (Words, ""),
    "twice": (Twice, ".norm"),
}


def planted(kind: str, place: int) -> tuple[nn.Sequential, str]:
    """A network of six places, one of which mixes, and the name of the player."""
    make, suffix = MIXING[kind]
    layers: list[nn.Module] = []
    for k in range(6):
        rest = make() if k == place else nn.GroupNorm(2, 8)
        layers.append(nn.Sequential(nn.Linear(8, 8), rest, nn.ReLU(inplace=True)))
    return nn.Sequential(*layers, nn.Linear(8, 4)), f"{place}.1{suffix}"
