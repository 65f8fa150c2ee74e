"""What a data set is to the trainer, and the error that says why there is none."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from shuffle_batchnorm.moco.config import UserError


class DataError(UserError):
    """A data set that isn't there or isn't what it should be."""


@dataclass(frozen=True)
class Images:
    """A data set in two parts, and what there is to know about its images.

    Attributes:
        train: to train on; an item is an image ``[c, H, H]`` in uint8, and its label.
        test: held out.
        classes: how many labels there are, from 0.
        channels: c.
        image_size: H.
        mean: of each channel, of values from 0 to 1.
        std: of each channel.
        remarks: what a user should know before a run with them.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    classes: int
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    remarks: tuple[str, ...] = ()


class ArrayImages(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory.

    Args:
        images: ``[M, c, H, H]`` in uint8.
        labels: ``[M]``.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a batch at once: what torch's loader asks for where it is offered."""
        chosen = torch.tensor(indices)
        return self.images[chosen], self.labels[chosen]


def resized(images: Tensor, side: int) -> Tensor:
    """Return uint8 images ``[M, c, H, H]`` with another H, by bilinear interpolation."""
    if images.shape[-1] == side:
        return images
    larger = F.interpolate(
        images.float(), (side, side), mode="bilinear", align_corners=False, antialias=True
    )
    return larger.round().clamp(0, 255).to(torch.uint8)
