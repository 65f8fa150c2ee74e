"""CIFAR-10 and CIFAR-100 as their authors give them out: pickled batches, in an archive or not."""

import gzip
import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shuffle_batchnorm.moco.config import CALL

from .images import ArrayImages, DataError

_SHAPE = (3, 32, 32)


class _Files(NamedTuple):
    """How one of the two data sets is stored."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    labels: bytes
    classes: int


_FILES = {
    "cifar10": _Files(
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test_batch",
        b"labels",
        10,
    ),
    "cifar100": _Files(
        "cifar-100-python.tar.gz", "cifar-100-python", ("train",), "test", b"fine_labels", 100
    ),
}


def read_cifar(dataset: str, path: Path) -> tuple[ArrayImages, ArrayImages, int]:
    """Read CIFAR from its archive or from the folder in it.

    A pickle can hold code; one with anything but arrays, bytes and numbers is refused.

    Args:
        dataset: ``cifar10`` or ``cifar100``.
        path: the archive, the folder in it, or a folder that holds one of them.

    Returns:
        The images to train on, those to test on, and the number of classes.

    Raises:
        DataError: nothing there, an archive that is cut off or another one, a missing batch, a
            batch that isn't one of CIFAR.
    """
    files = _FILES[dataset]
    wanted = [*files.train, files.test]
    call = f"{CALL}: --data-path {path}"
    batches = _read_batches(files, wanted, path, call)
    missing = [name for name in wanted if name not in batches]
    if missing:
        raise DataError(f"{call} lacks {', '.join(missing)}: is it another data set, or cut off?")
    parts = [_decode(batches[name], files, f"{CALL}: {name} in {path}") for name in wanted]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts[:-1], strict=True))
    return ArrayImages(images, labels), ArrayImages(*parts[-1]), files.classes


def _read_batches(files: _Files, wanted: list[str], path: Path, call: str) -> dict[str, bytes]:
    """Return the pickled batches by name, from wherever they are."""
    for folder in (path / files.folder, path):
        if (folder / wanted[0]).is_file():
            paths = [folder / name for name in wanted]
            return {path.name: path.read_bytes() for path in paths if path.is_file()}
    archive = path if path.is_file() else path / files.archive
    if not archive.is_file():
        raise DataError(f"{call} holds neither {files.archive} nor {files.folder}")
    try:
        return _unpack(archive, files.folder, wanted)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{call}: {archive.name} is damaged or no .tar.gz archive: {error}"
        ) from error


def _unpack(archive: Path, folder: str, wanted: list[str]) -> dict[str, bytes]:
    batches = {}
    # All of it at once: its checksum is at the very end.
    content = io.BytesIO(gzip.decompress(archive.read_bytes()))
    with tarfile.open(fileobj=content, mode="r:") as tar:
        for member in tar:
            *_, parent, name = ("", *Path(member.name).parts)
            if member.isfile() and parent == folder and name in wanted:
                stream = tar.extractfile(member)
                batches[name] = b"" if stream is None else stream.read()
    return batches


def _decode(content: bytes, files: _Files, call: str) -> tuple[Tensor, Tensor]:
    """Return the images ``[M, 3, 32, 32]`` and labels ``[M]`` of a pickled batch."""
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{call} is not a batch of CIFAR: {error!r}") from error
    data = batch.get(b"data") if isinstance(batch, dict) else None
    labels = batch.get(files.labels) if isinstance(batch, dict) else None
    if not isinstance(data, np.ndarray) or not isinstance(labels, list):
        raise DataError(f"{call} has no images or no {files.labels.decode()}")
    pixels = int(np.prod(_SHAPE))
    if data.dtype != np.uint8 or data.shape != (len(labels), pixels):
        raise DataError(
            f"{call} holds {data.dtype} {data.shape}, not uint8 {(len(labels), pixels)}"
        )
    numbers = torch.tensor(labels)
    is_whole = not numbers.is_floating_point()
    if not (is_whole and 0 <= numbers.min() <= numbers.max() < files.classes):
        raise DataError(f"{call} has labels that are not whole numbers below {files.classes}")
    return torch.from_numpy(data.reshape(-1, *_SHAPE).copy()), numbers


class _Unpickler(pickle.Unpickler):
    """Makes arrays, and refuses to call anything else that a pickle may name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS:
            return _HARMLESS[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which an array does not need")


_RECONSTRUCT = np.empty(0).__reduce__()[0]
_HARMLESS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # numpy has moved its function since the archives were made, and warns of its old name.
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}
