"""What the recipes share: flags, ranks, two views of each image, a network. Put yours in its place.

Without flags a recipe takes scikit-learn's digits and a small network, and ends within seconds on a
CPU. ``--data FOLDER`` takes the images FOLDER/CLASS/*.jpg, ``--arch resnet50`` a ResNet; both need
torchvision. Under torchrun each rank is a process with a device of its own.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

Augment = Callable[[Tensor], Tensor]


def flags(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the flags that all recipes have."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument("--data", type=Path, help="folder of images; None for digits")
    parser.add_argument("--arch", default="small", help="or a ResNet of torchvision's")
    parser.add_argument("--batch-size", type=int, default=64, help="of each rank")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.06)
    parser.add_argument("--workers", type=int, default=0, help="that load images, of each rank")
    return parser


def join_ranks() -> torch.device:
    """Join the ranks that torchrun has started, if it has, and return this rank's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group()  # gloo for CPU tensors, nccl for CUDA tensors
    return device


def leave_ranks() -> None:
    """Undo `join_ranks`."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_of_world() -> tuple[int, int]:
    """Return this rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def groups_of_rank(groups: int) -> int:
    """Return how many of all ranks' groups each rank has."""
    world = rank_of_world()[1]
    if groups % world:
        raise SystemExit(f"--groups {groups} can't be dealt evenly to {world} ranks")
    return groups // world


def gather(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, in rank order, without gradient."""
    if not dist.is_initialized():
        return rows
    everyones = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, rows.contiguous())
    return torch.cat(everyones)


def fewest_groups(batch_size: int, world: int) -> int:
    """Return the fewest virtual groups per rank that divide its batch and make G at least 8."""
    fit = (g for g in range(1, batch_size + 1) if batch_size % g == 0 and world * g >= 8)
    return next(fit, batch_size)


def network(arch: str, dim: int = 128) -> nn.Module:
    """Return an encoder whose head `fc` has two layers, as in MoCo v2 and SimCLR."""
    if arch == "small":
        layers: list[nn.Module] = []
        for inputs, outputs, stride in (3, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1):
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        width = 64
    else:
        from torchvision import models

        encoder = models.get_model(arch)
        width = encoder.fc.in_features
    encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))
    return encoder


class Digits(Dataset[Any]):
    """scikit-learn's digits, ``[3, 16, 16]``, with no label that a recipe would need."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = torch.from_numpy(load_digits().images).float()[:, None] / 16
        self.images = F.interpolate(digits, scale_factor=2.0).expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], 0


def open_images(folder: Path | None, side: int | None = None) -> Dataset[Any]:
    """Return images with labels, of a folder or the digits; cut to squares of one side if given."""
    if folder is None:
        return Digits()
    from torchvision import datasets
    from torchvision import transforms as t

    square = [] if side is None else [t.Resize(side), t.CenterCrop(side)]
    images: Dataset[Any] = datasets.ImageFolder(folder, t.Compose([t.ToTensor(), *square]))
    return images


def augmentation(folder: Path | None) -> Augment:
    """Return what makes views ``[N, 3, *]`` of images: MoCo v2's way, or that for digits."""
    if folder is None:
        return shift_and_blend
    from torchvision import transforms as t

    jitter, blur = t.ColorJitter(0.4, 0.4, 0.4, 0.1), t.GaussianBlur(23, (0.1, 2.0))
    often = [t.RandomApply([jitter], 0.8), t.RandomGrayscale(0.2), t.RandomApply([blur], 0.5)]
    scale = t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    crop = t.RandomResizedCrop(224, (0.2, 1.0))
    return Each(t.Compose([crop, *often, t.RandomHorizontalFlip(), scale]))


class Each:
    """Applies a transform to each image of a batch by itself."""

    def __init__(self, transform: Augment) -> None:
        self.transform = transform

    def __call__(self, images: Tensor) -> Tensor:
        return torch.stack([self.transform(image) for image in images])


def shift_and_blend(images: Tensor) -> Tensor:
    """Return views of digits: shifted by up to two pixels, of other contrasts, with noise."""
    theta = torch.eye(2, 3).repeat(len(images), 1, 1)  # [N, 2, 3]: the last column is a shift
    theta[:, :, 2] = (torch.rand(len(images), 2) - 0.5) / 2
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    shifted = F.grid_sample(images, grid, align_corners=False)
    contrast = 0.6 + 0.8 * torch.rand(len(images), 1, 1, 1)
    return shifted * contrast + 0.1 * torch.randn(images.shape)


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """Two random views of each image."""

    def __init__(self, images: Any, augment: Augment) -> None:
        self.images, self.augment = images, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index][0].unsqueeze(0)
        return self.augment(image)[0], self.augment(image)[0]


def batches(samples: int, batch_size: int, first: int, last: int) -> Iterator[list[int]]:
    """Yield this rank's part of each step's batch, which follows from the step alone."""
    rank, world = rank_of_world()
    together = batch_size * world
    if together > samples:
        raise SystemExit(f"{samples} images are fewer than a batch of all ranks, {together}")
    for step in range(first, last):
        epoch, position = divmod(step, samples // together)
        if position == 0 or step == first:
            order = torch.randperm(samples, generator=torch.Generator().manual_seed(epoch))
        batch = order[position * together : (position + 1) * together]
        yield batch.tensor_split(world)[rank].tolist()


def load(args: argparse.Namespace, first: int = 0) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return what loads two views for each step from `first` on, the same images as in any run.

    It seeds torch, so that the augmentations of ranks differ, and those after a resumption.
    """
    rank, world = rank_of_world()
    torch.manual_seed(1 + rank + world * first)
    views = TwoViews(open_images(args.data), augmentation(args.data))
    sampler = batches(len(views), args.batch_size, first, args.steps)
    pinned = torch.cuda.is_available()
    return DataLoader(views, batch_sampler=sampler, num_workers=args.workers, pin_memory=pinned)
