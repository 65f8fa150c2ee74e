"""A folder of images: train/<class>/*.jpg, and val or test likewise."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shuffle_batchnorm.moco.config import CALL

from .images import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


class FolderImages(Dataset[tuple[Tensor, int]]):
    """Images of a folder with one folder per class, read when they are asked for.

    The short side is brought to H, and the centre cut out.

    Args:
        folder: holds a folder per class.
        side: H.
        classes: names of the classes in the order of their labels; None for those found, sorted.

    Raises:
        DataError: no such folder, no image in it, a class that `classes` doesn't name; when read,
            a file that is no image.
    """

    def __init__(self, folder: Path, side: int, classes: list[str] | None = None) -> None:
        if not folder.is_dir():
            raise DataError(f"{CALL}: --dataset imagefolder needs the folder {folder}")
        found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        self.side, self.classes = side, found if classes is None else classes
        unknown = sorted(set(found) - set(self.classes))
        if unknown:
            raise DataError(f"{CALL}: {folder} has the class {unknown[0]}, which train has not")
        self.paths: list[str] = []
        self.labels: list[int] = []
        for name in found:
            files = sorted(f for f in (folder / name).rglob("*") if f.suffix.lower() in SUFFIXES)
            self.paths += map(str, files)
            self.labels += [self.classes.index(name)] * len(files)
        if not self.paths:
            raise DataError(f"{CALL}: {folder} holds no class folder with images in it")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(self.paths[index], self.side), self.labels[index]


def read_image(path: str, side: int) -> Tensor:
    """Return an image file as uint8 ``[3, H, H]``: short side to H, centre cut out."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file.draft("RGB", (side, side))  # lets a JPEG be decoded at a fraction of its size
            fitted: Any = ImageOps.fit(file.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{CALL}: {path} can't be read as an image: {error}") from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()
