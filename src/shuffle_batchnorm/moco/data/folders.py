"""A folder of images: train/<class>/*.jpg, and val or test likewise."""

import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from shuffle_batchnorm.moco.config import CALL

from .decode import read_image
from .images import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
# Beginnings of names that are no data: hidden ones, and those of notebooks, Synology and macOS.
IGNORED = (".", "@", "__MACOSX")
HELD_OUT = ("val", "test")  # the first that exists


def read_folders(path: Path, side: int) -> tuple["FolderImages", "FolderImages", list[str]]:
    """Find the images of a data set in folders.

    Args:
        path: holds ``train``, and ``val`` or ``test``.
        side: H.

    Returns:
        The images to train on, those to test on, and what a user should know of them.

    Raises:
        DataError: no such folders; see `FolderImages`.
    """
    train = FolderImages(path / "train", side)
    held_out = next((path / name for name in HELD_OUT if (path / name).is_dir()), None)
    if held_out is None:
        folders = " or ".join(str(path / name) for name in HELD_OUT)
        raise DataError(f"{CALL}: --dataset imagefolder needs the folder {folders}")
    test = FolderImages(held_out, side, train.classes)
    missing, left_out = test.without_images(), "kNN and the linear probe are left out"
    if len(train.classes) < 2:
        return train, test, [f"{path} has one class, {train.classes[0]}: {left_out}"]
    if not missing:
        return train, test, []
    names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
    lacks = f"{held_out} has no image of {len(missing)} of {len(train.classes)} classes ({names})"
    return train, test, [f"{lacks}: kNN and the linear probe are measured on the others"]


class FolderImages(Dataset[tuple[Tensor, int]]):
    """Images of a folder with one folder per class, read when they are asked for.

    The short side is brought to H, and the centre cut out. Links to folders are followed; names
    that begin with `IGNORED` are skipped.

    Args:
        folder: holds a folder per class.
        side: H.
        classes: names of the classes in the order of their labels; None for those found, sorted,
            each of which needs an image then.

    Raises:
        DataError: no such folder, no image in it or in a class, a class that `classes` doesn't
            name, a link to nothing; when read, a file that is no image.
    """

    def __init__(self, folder: Path, side: int, classes: list[str] | None = None) -> None:
        if not folder.is_dir():
            raise DataError(f"{CALL}: --dataset imagefolder needs the folder {folder}")
        _, found, _ = next(_walk(folder), (folder, [], []))  # one that links to itself is empty
        self.side, self.classes = side, found if classes is None else classes
        unknown = sorted(set(found) - set(self.classes))
        if unknown:
            raise DataError(f"{CALL}: {folder} has the class {unknown[0]}, which train has not")
        self.paths: list[str] = []
        self.labels: list[int] = []
        for name in found:
            files = (where / file for where, _, names in _walk(folder / name) for file in names)
            images = sorted(file for file in files if file.suffix.lower() in SUFFIXES)
            self.paths += map(str, images)
            self.labels += [self.classes.index(name)] * len(images)
        if not self.paths:
            raise DataError(f"{CALL}: {folder} holds no class folder with images in it")
        if classes is None and self.without_images():
            empty = folder / self.without_images()[0]
            raise DataError(f"{CALL}: the class {empty} holds no image ({', '.join(SUFFIXES)})")

    def without_images(self) -> list[str]:
        """Return the names of the classes that have no image here."""
        labels = set(self.labels)
        return [name for label, name in enumerate(self.classes) if label not in labels]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(self.paths[index], self.side), self.labels[index]


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield a folder and those below it with the names of their folders and files, sorted.

    Each folder comes once, however many links lead to it, and none above this one.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{CALL}: can't read {error.filename}: {error.strerror}") from error

    seen = {*folder.resolve().parents, folder.parent.resolve()}
    for name, *kinds in os.walk(folder, followlinks=True, onerror=refuse):
        where = Path(name)
        folders, files = (sorted(n for n in k if not n.startswith(IGNORED)) for k in kinds)
        # One to a folder that isn't there, on a disk that isn't mounted, would lose its images.
        links = (where / n for n in files if not n.lower().endswith(SUFFIXES))
        broken = next((link for link in links if link.is_symlink() and not link.exists()), None)
        if broken:
            raise DataError(f"{CALL}: {broken} is a link to {broken.readlink()}, which isn't there")
        resolved = where.resolve()
        kinds[0][:] = [] if resolved in seen else folders
        if resolved not in seen:
            yield where, folders, files
        seen.add(resolved)
