"""Fashion-MNIST as its authors give it out: four IDX files, gzipped or not."""

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from shuffle_batchnorm.moco.config import CALL

from .images import ArrayImages, DataError

DATASET = "fashion-mnist"
# Where Debian's package dataset-fashion-mnist puts the files.
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
GET_IT = (
    "the folder that holds train-images-idx3-ubyte.gz and three more files of "
    "github.com/zalandoresearch/fashion-mnist; Debian's package dataset-fashion-mnist puts them "
    f"in {DEBIAN}, where they are found without --data-path"
)
CLASSES = 10
# The folders below a path in which others unpack the files.
_BELOW = ("", "raw", "fashion-mnist", "FashionMNIST/raw", "data/fashion")


def read_fashion_mnist(path: Path | None) -> tuple[ArrayImages, ArrayImages]:
    """Read the images to train on, 60,000, and those to test on, 10,000.

    Args:
        path: the folder of the files, or one that holds it; None for Debian's.

    Returns:
        Both parts, images ``[M, 1, 28, 28]`` and labels ``[M]`` from 0 to 9.

    Raises:
        DataError: no such files, or one that is cut off, damaged or of another kind.

    Source:
        Xiao et al. 2017, arXiv 1708.07747; the format is described at yann.lecun.com/exdb/mnist.
    """
    if path is None and not DEBIAN.is_dir():
        raise DataError(f"{CALL}: --dataset {DATASET} needs --data-path, {GET_IT}")
    given = DEBIAN if path is None else path
    call = f"{CALL}: --data-path {given}"
    folder = next((given / name for name in _BELOW if _find(given / name, "train-images")), None)
    if folder is None:
        raise DataError(f"{call} has no train-images-idx3-ubyte or .gz; it is {GET_IT}")
    train, test = (_read_part(folder, name, call) for name in ("train", "t10k"))
    return train, test


def _find(folder: Path, name: str) -> Path | None:
    """Return the file of images or labels, whichever way it is stored."""
    axes = 3 if name.endswith("images") else 1
    names = (f"{name}-idx{axes}-ubyte", f"{name}-idx{axes}-ubyte.gz")
    return next((folder / one for one in names if (folder / one).is_file()), None)


def _read_part(folder: Path, part: str, call: str) -> ArrayImages:
    images, labels = (_read_idx(folder, f"{part}-{what}", call) for what in ("images", "labels"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(labels):
        raise DataError(
            f"{call}: {part} has images {list(images.shape)} and labels {list(labels.shape)}, "
            "not [M, H, H] and [M]"
        )
    if images.shape[1] != images.shape[2] or labels.max() >= CLASSES:
        raise DataError(
            f"{call}: {part} has images of {images.shape[1]} x {images.shape[2]} and labels up to "
            f"{labels.max()}; they must be square, and below {CLASSES}"
        )
    return ArrayImages(images.unsqueeze(1), labels.long())


def _read_idx(folder: Path, name: str, call: str) -> Tensor:
    """Return an array of bytes: 0, 0, 8 for uint8, the number of axes, 4 bytes each, the data."""
    path = _find(folder, name)
    if path is None:
        raise DataError(f"{call} lacks {name}: is it another data set, or cut off?")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{call}: {path.name} is damaged or can't be read: {error}") from error
    axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    begin = 4 + 4 * axes
    shape = [int.from_bytes(content[at : at + 4]) for at in range(4, begin, 4)]
    if not axes or not math.prod(shape) or len(content) != begin + math.prod(shape):
        raise DataError(
            f"{call}: {path.name} is damaged or no IDX file of bytes: {len(content)} bytes, which "
            f"begin with {content[:4].hex(' ') or 'nothing'}"
        )
    return torch.frombuffer(bytearray(content[begin:]), dtype=torch.uint8).reshape(shape)
